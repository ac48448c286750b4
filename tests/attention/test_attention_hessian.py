"""Every block of the closed-form Hessian against automatic differentiation of the Flax layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import CASES, closed_form_of, problem, risk_of

from attnlab.attention import PARTS
from attnlab.curvature import eigenpairs, spectral_density, trace
from attnlab.trees import block_slices, ravel
from compare import assert_close
from oracles import ggn, hessian


@jax.jit
def answers(closed_form, vector):
    return {
        "dense": {part: closed_form.dense(part) for part in PARTS},
        "products": {part: closed_form.operator(part).mv(vector) for part in PARTS},
        "norms": closed_form.norms(),
        "traces": closed_form.traces(),
    }


def autodiff_parts(risk, params):
    whole, outer = hessian(risk, params), ggn(risk, params)
    return {"hessian": whole, "ggn": outer, "functional": whole - outer}


# They differ in one choice each from one that runs every time.
NIGHTLY = (
    "batch",
    "causal",
    "linear_causal",
    "mask",
    "sigmoid_mask",
    "sink_merged",
    "temperature",
    "wide_key",
    "heads",
    "heads_projection",
    "heads_projection_labels",
    "merged",
    "linear_heads_projection",
    "mask_per_sequence",
    "no_scale_projection",
    "one_head",
    "two_batch_axes",
    "shared_heads",
    "one_key_for_all",
    "turned",
    "turned_linear",
    "turned_sigmoid",
    "turned_shared",
    "turned_sink",
    "sigmoid",
    "merged_heads",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in NIGHTLY else name for name in CASES]
)
def test_equals_autodiff(name, key):
    config, loss, params, inputs, targets, mask = problem(name, key)
    closed_form = closed_form_of(config, loss, params, inputs, targets, mask)
    expected = autodiff_parts(risk_of(config, loss, inputs, targets, mask), params)
    vector = jax.tree.map(lambda leaf: jnp.cos(3 + jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape), params)
    found, places = answers(closed_form, vector), block_slices(params)
    for part, matrix in expected.items():
        scale = np.linalg.norm(expected["hessian"])
        assert_close(found["dense"][part], matrix)
        assert_close(ravel(found["products"][part]), matrix @ ravel(vector))
        for row in params:
            assert_close(found["traces"][part][row], np.trace(matrix[places[row], places[row]]), 1e-12, scale)
            for column in params:
                block = matrix[places[row], places[column]]
                assert_close(found["dense"][part][places[row], places[column]], block, 1e-12, scale)
                norm = np.linalg.norm(block)
                assert_close(found["norms"][part][row, column], norm, 1e-12, scale if norm < 1e-8 * scale else norm)


SCORES = {("key", "key"), ("key", "query"), ("query", "query"), ("query_key", "query_key")}


@pytest.mark.parametrize("name", ["heads_projection", "merged_heads", "linear", "sink_merged", "sigmoid"])
def test_score_parameters_share_their_vectors(name, key):
    """There, and only there, a full block has one term less than its parts have together."""
    config, loss, params, inputs, targets, mask = problem(name, key)

    def blocks(params):
        closed_form = closed_form_of(config, loss, params, inputs, targets, mask)
        return {part: {pair: closed_form.block(*pair, part) for pair in closed_form.ggn} for part in PARTS}

    found = jax.eval_shape(blocks, params)
    terms = {part: {pair: len(block.terms) for pair, block in found[part].items()} for part in PARTS}
    fewer = {pair for pair, n in terms["hessian"].items() if n < terms["ggn"][pair] + terms["functional"][pair]}
    assert fewer == (SCORES & set(terms["hessian"]) if config.weights != "linear" else set())


@pytest.mark.slow
def test_zero_blocks_are_exactly_zero(key):
    """The layer is linear in the values, and linear attention in each of query and key."""
    for name, zero in (("one_head", ["value"]), ("linear", ["value", "query", "key"])):
        config, loss, params, inputs, targets, mask = problem(name, key)
        norms = closed_form_of(config, loss, params, inputs, targets, mask).norms()
        assert [norms["functional"][block, block] for block in zero] == [0.0] * len(zero)


def test_heads_meet_in_the_outer_part_only(key):
    config, loss, params, inputs, targets, mask = problem("heads_projection", key)
    closed_form = closed_form_of(config, loss, params, inputs, targets, mask)
    across = {}
    for part in ("ggn", "functional"):
        dense = closed_form.block("query", "value", part).dense()
        split = dense.reshape(inputs.shape[-1], config.heads, config.key_dim, inputs.shape[-1], config.heads, -1)
        across[part] = jnp.linalg.norm(split[:, 0, :, :, 1])
    assert across["functional"] == 0
    assert across["ggn"] > 1e-3


def test_differentiable_and_vmappable(key):
    """The whole construction is one pure function of the parameters."""
    config, loss, params, inputs, targets, _ = problem("cross_entropy", key)

    def sharpness_proxy(params):
        return closed_form_of(config, loss, params, inputs, targets).norms()["hessian"]["query", "query"]

    step = 1e-5
    direction = jax.tree.map(jnp.ones_like, params)
    moved = jax.tree.map(lambda leaf, d: jnp.stack([leaf + step * d, leaf - step * d]), params, direction)
    plus, minus = jax.jit(jax.vmap(sharpness_proxy))(moved)
    _, slope = jax.jit(lambda p: jax.jvp(sharpness_proxy, (p,), (direction,)))(params)
    assert_close(slope, (plus - minus) / (2 * step), 1e-5)


@pytest.mark.slow
def test_a_permutation_of_the_heads_permutes_the_blocks(key):
    config, loss, params, inputs, targets, mask = problem("heads_projection", key)
    order = jnp.array([2, 0, 1])

    def permuted(name, leaf):
        if name == "output":
            return leaf.reshape(3, -1, leaf.shape[1])[order].reshape(leaf.shape)
        return leaf.reshape(leaf.shape[0], 3, -1)[:, order].reshape(leaf.shape)

    moved = {name: permuted(name, leaf) for name, leaf in params.items()}
    build = jax.jit(lambda params: closed_form_of(config, loss, params, inputs, targets, mask))
    before, after = build(params), build(moved)
    assert_close(after.norms(), before.norms(), 1e-12)
    product = after.operator().mv({name: permuted(name, leaf) for name, leaf in params.items()})
    assert_close(product, {name: permuted(name, leaf) for name, leaf in before.operator().mv(params).items()}, 1e-12)


def test_a_part_is_an_operator_like_any_other(key):
    """Spectra, traces and solutions of the closed form are those of its dense matrix."""
    config, loss, params, inputs, targets, mask = problem("linear", key)
    operator = closed_form_of(config, loss, params, inputs, targets, mask).operator("ggn")
    matrix = np.asarray(ggn(risk_of(config, loss, inputs, targets, mask), params))
    values = np.linalg.eigvalsh(matrix)
    assert_close(operator.dense(), matrix)
    assert_close(eigenpairs(operator, key, count=2).values, values[-2:], 1e-10)
    density = spectral_density(operator, key, samples=2, steps=operator.dimension)
    second = density.moment(2)
    assert abs(second.value - np.mean(values**2)) <= 4 * second.standard_error + 1e-10
    found = trace(operator, key, samples=40)
    assert abs(found.value - np.trace(matrix)) <= 4 * found.standard_error
    assert set(operator.blocks()) == {(row, column) for row in params for column in params}
