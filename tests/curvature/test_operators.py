"""Every operator against its dense twin, over the table of models and losses."""

import re
import warnings
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import oracles
from attnlab.curvature.operators import PARTS, functional, ggn, hessian, restrict
from attnlab.curvature.self_checks import CurvatureWarning
from attnlab.losses import cross_entropy, square_loss
from attnlab.objectives import objective
from attnlab.trees import block_slices
from cases import CASES, build
from compare import assert_close
from nightly import nightly

SEED = 1


@cache
def case(name, seed=SEED):
    """The objective, the parameters, and the dense Hessian, GGN and functional part by autodiff."""
    risk, params = CASES[name](jax.random.key(seed))
    hessian_matrix, ggn_matrix = oracles.hessian(risk, params), oracles.ggn(risk, params)
    dense = {"hessian": hessian_matrix, "ggn": ggn_matrix, "functional": hessian_matrix - ggn_matrix}
    return risk, params, dense


# One model of each kind that differs in what an operator reads; the others run nightly.
QUICK = [f"{name}/cross_entropy" for name in ("mlp", "convnet", "softmax", "linear", "causal")] + ["softmax/square"]


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_dense_matrices_equal_autodiff(name):
    risk, params, dense = case(name)
    scale = np.linalg.norm(dense["hessian"])
    for part, build_operator in PARTS.items():
        assert_close(build_operator(risk, params, check=False).dense(), dense[part], scale=scale)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
@pytest.mark.parametrize("name", ["softmax/square", "two_layers/cross_entropy"])
def test_dense_matrices_equal_autodiff_at_other_seeds(name, seed):
    risk, params, dense = case(name, seed)
    for part, build_operator in PARTS.items():
        assert_close(
            build_operator(risk, params, check=False).dense(), dense[part], scale=np.linalg.norm(dense["hessian"])
        )


@pytest.mark.parametrize(
    "name", nightly(("softmax/square", "two_layers/cross_entropy", "convnet/square"), ("two_layers/cross_entropy",))
)
@pytest.mark.parametrize("part", PARTS)
def test_products_are_symmetric_and_linear(name, part, key):
    risk, params, dense = case(name)
    operator = PARTS[part](risk, params, check=False)
    flat, unravel = ravel_pytree(params)
    u, v = jax.random.normal(key, (2, flat.size))
    left, right = jnp.vdot(u, operator.flat_mv(v)), jnp.vdot(v, operator.flat_mv(u))
    scale = np.linalg.norm(dense["hessian"]) * np.linalg.norm(u) * np.linalg.norm(v)
    assert abs(left - right) <= 1e-13 * scale
    combined = operator.mv(unravel(2.0 * u - 3.0 * v))
    separate = 2.0 * operator.flat_mv(u) - 3.0 * operator.flat_mv(v)
    assert_close(ravel_pytree(combined)[0], separate, 1e-12)


@pytest.mark.parametrize(
    "name", nightly(("softmax/square", "multi_head/cross_entropy", "mlp/square"), ("softmax/square",))
)
def test_every_diagonal_block_is_that_of_the_whole(name):
    risk, params, dense = case(name)
    for block, rows in block_slices(params).items():
        for part, build_operator in PARTS.items():
            expected = dense[part][rows, rows]
            scale = np.linalg.norm(dense["hessian"])
            assert_close(build_operator(risk, params, block=block, check=False).dense(), expected, scale=scale)


@pytest.mark.slow
def test_a_block_may_be_a_module_or_a_regular_expression():
    risk, params, dense = case("two_layers/square")
    slices = block_slices(params)
    for block, belongs in (
        ("layer_1/attention", lambda name: name.startswith("layer_1/attention/")),
        ("query", lambda name: name.endswith("/query")),
        (re.compile(r"(query|key)$"), lambda name: name.endswith(("/query", "/key"))),
    ):
        index = np.concatenate([np.r_[rows] for name, rows in slices.items() if belongs(name)])
        expected = dense["hessian"][np.ix_(index, index)]
        operator = hessian(risk, params, block=block, check=False)
        assert_close(operator.dense(), expected)
        assert_close(restrict(hessian(risk, params, check=False), block).dense(), expected)


def test_the_order_of_a_long_stack_is_kept():
    weights = [jnp.full((1, 1), 1.0 + i) for i in range(12)]

    def predict(params, inputs):
        for weight in params["layers"]:
            inputs = jnp.tanh(inputs @ weight)
        return inputs

    risk = objective(predict, square_loss, jnp.ones((2, 1)), jnp.zeros((2, 1)))
    params = {"layers": weights}
    assert_close(hessian(risk, params, block="layers").dense(), oracles.hessian(risk, params))


def test_blocks_tile_the_matrix():
    risk, params, dense = case("softmax/square")
    blocks, slices = hessian(risk, params).blocks(), block_slices(params)
    assert set(blocks) == {(row, column) for row in slices for column in slices}
    for (row, column), block in blocks.items():
        assert_close(block, dense["hessian"][slices[row], slices[column]])


def test_the_parts_add_up_and_operators_form_sums():
    risk, params, dense = case("multi_head/cross_entropy")
    total = ggn(risk, params) + functional(risk, params)
    assert_close(total.dense(), dense["hessian"])
    assert_close((2.0 * total).dense(), 2 * dense["hessian"])


def test_the_functional_part_of_linear_attention_has_zero_diagonal_blocks():
    # Its own product: zero to rounding of itself, where a difference of two products would leave rounding of those.
    risk, params, _ = case("linear/square")
    for block in ("query", "key", "value"):
        assert np.all(np.abs(functional(risk, params, block=block, check=False).dense()) <= 1e-16)


def test_one_compilation_serves_all_points_and_data():
    risk, params = build("softmax", "square", jax.random.key(5))
    products = jax.jit(lambda operator, vector: operator.linear(vector))
    products(hessian(risk, params), params)
    moved = jax.tree.map(lambda leaf: 1.5 * leaf, params)
    other = objective(risk.predict, square_loss, risk.inputs + 1.0, risk.targets)
    products(hessian(other, moved), params)
    assert products._cache_size() == 1


def test_operators_cross_vmap():
    risk, params, _ = case("softmax/square")
    scales = jnp.array([0.5, 1.0])
    points = jax.tree.map(lambda leaf: jnp.stack([0.5 * leaf, leaf]), params)
    vector = jax.tree.map(jnp.ones_like, params)
    batched = jax.vmap(lambda point: hessian(risk, point).mv(vector))(points)
    for i, scale in enumerate(scales):
        alone = hessian(risk, jax.tree.map(lambda leaf, scale=scale: scale * leaf, params)).mv(vector)
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], batched), alone, 1e-12)


class TestBadInput:
    def setup_method(self):
        self.risk, self.params, _ = case("softmax/square")

    def test_unknown_block(self):
        with pytest.raises(ValueError, match=r"no parameter block 'qurey'.*key, query, value.*Did you mean 'query'"):
            hessian(self.risk, self.params, block="qurey")

    def test_vector_of_another_structure(self):
        with pytest.raises(ValueError, match="structure"):
            hessian(self.risk, self.params).mv({"query": self.params["query"]})

    def test_vector_of_another_shape(self):
        vector = {**self.params, "key": jnp.ones((7, 1))}
        with pytest.raises(ValueError, match=r"key has shape \(7, 1\); expected \(3, 2\)"):
            hessian(self.risk, self.params).mv(vector)

    @pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
    def test_non_finite_parameters(self, value):
        params = {**self.params, "query": self.params["query"].at[0, 0].set(value)}
        with pytest.raises(ValueError, match="params: query has 1 non-finite of 6 values"):
            hessian(self.risk, params)

    def test_integer_parameters(self):
        with pytest.raises(TypeError, match="query has dtype int64"):
            ggn(self.risk, {**self.params, "query": jnp.ones((3, 2), int)})

    def test_no_parameters(self):
        with pytest.raises(ValueError, match="params holds no array"):
            hessian(self.risk, {})

    def test_non_finite_data(self):
        with pytest.raises(ValueError, match="inputs has 18 non-finite of 18"):
            objective(self.risk.predict, square_loss, self.risk.inputs * jnp.nan, self.risk.targets)

    def test_empty_batch(self):
        with pytest.raises(ValueError, match=r"inputs has shape \(0, 3, 3\), which holds no element"):
            objective(self.risk.predict, square_loss, self.risk.inputs[:0], self.risk.targets[:0])

    def test_loss_that_returns_a_vector(self):
        risk = objective(self.risk.predict, lambda outputs, targets: outputs[..., 0], self.risk.inputs, 0.0)
        with pytest.raises(TypeError, match="expected one real number"):
            hessian(risk, self.params)

    def test_targets_of_another_shape(self):
        risk = objective(self.risk.predict, square_loss, self.risk.inputs, jnp.ones((2, 5)))
        with pytest.raises(ValueError, match=r"targets have shape \(2, 5\)"):
            hessian(risk, self.params)

    def test_labels_of_another_shape(self):
        risk = objective(self.risk.predict, cross_entropy, self.risk.inputs, jnp.ones((2, 5), int))
        with pytest.raises(ValueError, match=r"class labels for outputs of shape \(2, 3, 2\) have shape \(2, 3\)"):
            hessian(risk, self.params)

    def test_dense_matrix_that_does_not_fit(self):
        risk = objective(lambda params, inputs: params * inputs, square_loss, jnp.ones(()), jnp.zeros(30_000))
        with pytest.raises(ValueError, match=r"dimension 30000 takes 6\.7 GiB"):
            hessian(risk, jnp.ones(30_000)).dense()


@pytest.mark.parametrize("part", PARTS)
def test_products_that_save_nothing_are_the_same(part):
    risk, params, dense = case("softmax/cross_entropy")
    with pytest.warns(CurvatureWarning, match=r"a linearisation would save .* GiB, and the budget is 0 GiB"):
        found = PARTS[part](risk, params, budget=0)
    assert_close(found.dense(), dense[part], scale=np.linalg.norm(dense["hessian"]))


def test_what_a_linearisation_saves_is_counted_without_what_it_is_given():
    """exp(p) x: it saves its slopes, one number a parameter for each order, and neither the data nor the parameters."""
    params = jnp.zeros(1000)
    risk = objective(lambda params, x: jnp.exp(params) * x, square_loss, jnp.ones(1000), jnp.zeros(1000))
    allowed = 6 * params.nbytes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hessian(risk, params, check=False, budget=allowed)
    with pytest.raises(ValueError, match="budget is -1"):
        hessian(risk, params, check=False, budget=-1)
    with pytest.warns(CurvatureWarning, match="each product linearises anew"):
        hessian(risk, params, check=False, budget=params.nbytes // 2)
