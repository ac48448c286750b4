"""Kronecker approximations against matrices of autodiff, singular value decompositions and another implementation."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from flax import linen as nn
from kronecker_references import CASES, WIDTHS, data, weights

import attnlab as al
from attnlab.curvature.kronecker import (
    APPROXIMATIONS,
    approximate,
    kronecker_approximation,
    operator_errors,
    pseudo_gradients,
    selection_of,
)
from attnlab.losses import LOSSES
from attnlab.models.adapters import mean_over_tokens
from attnlab.models.attention import AttentionConfig
from attnlab.models.networks import MLP, MLPConfig
from attnlab.models.transformer import LanguageModel, LanguageModelConfig, TransformerConfig
from nightly import nightly

REFERENCES = json.loads(Path(__file__).with_name("kronecker_references.json").read_text())


def language(tied=False, factored=False, remat=None):
    attention = AttentionConfig(4, 4, heads=2, causal=True, output_dim=6, bias=True)
    blocks = TransformerConfig(attention, 1, mlp_width=5, bias=True, remat=remat)
    model = LanguageModel(LanguageModelConfig(blocks, 5, 4, 6, tied=tied, factored=factored))
    tokens = jax.random.randint(jax.random.key(0), (3, 4), 0, 5)
    params = model.init(jax.random.key(1), tokens)["params"]
    return al.objective(al.from_linen(model), al.cross_entropy, tokens, tokens[:, ::-1]), params


def perceptron(loss=al.cross_entropy, targets=None, **options):
    inputs = jax.random.normal(jax.random.key(0), (7, 4))
    model = MLP(MLPConfig((5, 3), "tanh", bias=True))
    params = model.init(jax.random.key(1), inputs)["params"]
    if targets is None:
        targets = inputs[:, :3] if loss is al.square_loss else jnp.arange(7) % 3
    return al.objective(al.from_linen(model), loss, inputs, targets, **options), params


KERNELS = re.compile("query|key|value|output|up|down|unembedding")
NETWORKS = {
    "labels": (lambda: perceptron(), None),
    "masked": (lambda: perceptron(weights=jnp.arange(7) % 2), None),
    "ignored": (lambda: perceptron(al.cross_entropy.ignoring(2)), None),
    "distributions": (lambda: perceptron(targets=jnp.arange(21.0).reshape(7, 3)), None),
    "square": (lambda: perceptron(al.square_loss), None),
    "weighted entries": (lambda: perceptron(al.square_loss, weights=jnp.arange(7.0)), None),
    "language": (lambda: language(), KERNELS),
    "rematerialised": (lambda: language(remat="block"), re.compile("query|up")),
}


@pytest.mark.parametrize("name", nightly(NETWORKS, ("labels", "masked", "distributions")))
def test_the_second_moment_of_pseudo_gradients_is_the_gauss_newton_block(name):
    build, block = NETWORKS[name]
    risk, params = build()
    blocks = al.ggn(risk, params, block=block, check=False).blocks()
    for leaf, pseudo in pseudo_gradients(risk, params, selection_of(params, block)).items():
        exact = blocks[leaf, leaf]
        np.testing.assert_allclose(pseudo.second_moment(), exact, atol=1e-13 * float(jnp.abs(exact).max()) + 1e-16)


def test_a_kernel_that_is_used_twice_or_turned_is_one_kernel():
    inputs = jax.random.normal(jax.random.key(0), (6, 3))
    params = {"w": jax.random.normal(jax.random.key(1), (3, 3)), "v": jax.random.normal(jax.random.key(2), (2, 3))}
    twice = lambda p, x: jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"]) @ p["v"].T  # noqa: E731
    risk = al.objective(twice, al.square_loss, inputs, inputs[:, :2])
    for leaf, pseudo in pseudo_gradients(risk, params, selection_of(params, None)).items():
        np.testing.assert_allclose(pseudo.second_moment(), al.ggn(risk, params, block=leaf).dense(), atol=1e-13)
    both = al.objective(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, al.square_loss, inputs, inputs)
    with pytest.raises(ValueError, match="'w' is met as W and as its transpose"):
        kronecker_approximation("kfac", both, {"w": params["w"]})


@pytest.mark.parametrize("name", nightly(CASES, ("pooled", "tokens")))
def test_kfac_and_ekfac_are_those_of_another_implementation(name):
    loss, _, form = CASES[name]
    predict = al.from_linen(MLP(MLPConfig(WIDTHS[1:], "tanh", bias=True)))
    inputs, targets = map(jnp.asarray, data(name))
    risk = al.objective(mean_over_tokens(predict) if name == "pooled" else predict, LOSSES[loss], inputs, targets)
    params, vector = (jax.tree.map(jnp.asarray, weights(phase)) for phase in (0.1, 2.0))
    for kind, wanted in REFERENCES["images"][name].items():
        own = "kfac_reduce" if (kind, form) == ("kfac", "reduce") else kind
        found = kronecker_approximation(own, risk, params).operator.mv(vector)
        for leaf, image in found.items():
            np.testing.assert_allclose(image, wanted[leaf], rtol=1e-11, atol=1e-13)


RISK, PARAMS = language()
FOUND = {
    leaf: pseudo_gradients(RISK, PARAMS, selection_of(PARAMS, leaf))[leaf]
    for leaf in ("transformer/layer_0/attention/key", "transformer/layer_0/attention/value_bias")
}
KEY, BIAS = FOUND


def matrix(kind, leaf):
    point = selection_of(PARAMS, leaf).take(PARAMS)
    return approximate(kind, (FOUND[leaf],), point).operator.dense()


def test_kfoc_is_the_leading_singular_pair_of_the_rearranged_block():
    exact = np.asarray(FOUND[KEY].second_moment())
    m, n = PARAMS["transformer"]["layer_0"]["attention"]["key"].shape
    rearranged = exact.reshape(m, n, m, n).transpose(0, 2, 1, 3).reshape(m * m, n * n)
    left = np.linalg.svd(rearranged, compute_uv=False)
    assert np.linalg.norm(matrix("kfoc", KEY) - exact) == pytest.approx(np.sqrt(np.sum(left[1:] ** 2)), rel=1e-9)


@pytest.mark.slow
def test_kfoc_of_an_attention_layer_is_the_nearest_product_of_its_closed_form():
    layer = al.SelfAttention(AttentionConfig(2, 3))
    tokens = jax.random.normal(jax.random.key(0), (2, 5, 4))
    params = layer.init(jax.random.key(1), tokens)["params"]
    risk = al.objective(al.from_linen(layer), al.square_loss, tokens, tokens[..., :3])
    closed = al.attention_hessian(risk, params)
    for name in ("query", "value"):
        block = closed.block(name, name, "ggn")
        found = kronecker_approximation("kfoc", risk, params, block=name).operator.dense()
        error = jnp.linalg.norm(found - block.dense()) / block.norm()
        assert float(error) == pytest.approx(float(al.nearest_kronecker(block).relative_error), rel=1e-6)


def test_shampoo_is_made_of_the_roots_of_its_sides():
    exact = np.asarray(FOUND[KEY].second_moment())
    m, n = PARAMS["transformer"]["layer_0"]["attention"]["key"].shape
    left, right = np.einsum("iaja->ij", exact.reshape(m, n, m, n)), np.einsum("aiaj->ij", exact.reshape(m, n, m, n))
    half = np.kron(scipy.linalg.sqrtm(left).real, scipy.linalg.sqrtm(right).real)
    np.testing.assert_allclose(matrix("shampoo", KEY), half, atol=1e-9 * np.abs(half).max())
    whole = np.kron(left, right) / np.trace(left)
    np.testing.assert_allclose(matrix("shampoo_squared", KEY), whole, atol=1e-13 * np.abs(whole).max())


def test_corrected_eigenvalues_are_the_diagonal_of_the_block_in_their_basis():
    exact = np.asarray(FOUND[KEY].second_moment())
    for kind in ("ekfac", "soap"):
        block = approximate(kind, (FOUND[KEY],), selection_of(PARAMS, KEY).take(PARAMS)).blocks[0]
        basis = np.kron(block.left, block.right)
        np.testing.assert_allclose(block.values.ravel(), np.diag(basis.T @ exact @ basis), atol=1e-12 * exact.max())
        others = basis @ np.diag(block.values.ravel() * 1.01) @ basis.T
        assert np.linalg.norm(matrix(kind, KEY) - exact) < np.linalg.norm(others - exact)


@pytest.mark.parametrize("kind", APPROXIMATIONS)
def test_a_bias_is_exact_but_for_the_form_that_sums_positions(kind):
    exact = FOUND[BIAS].second_moment()
    close = np.allclose(matrix(kind, BIAS), exact, atol=1e-12 * float(exact.max()))
    # Over several positions K-FAC leaves out what positions do together; SOAP and EKFAC keep its diagonal.
    assert close == (kind in ("shampoo", "shampoo_squared", "kfoc", "kfac_reduce", "soap"))


@pytest.mark.parametrize("kind", nightly(APPROXIMATIONS, ("kfac", "soap")))
def test_solve_trace_and_log_determinant_are_those_of_the_matrix(kind):
    risk, params = perceptron()
    found, gradient = kronecker_approximation(kind, risk, params), jax.grad(risk)(params)
    dense = np.asarray(found.operator.dense())
    damped = dense + 0.1 * np.eye(len(dense))
    solved = found.operator.ravel(found.solve(gradient, 0.1))
    np.testing.assert_allclose(solved, np.linalg.solve(damped, found.operator.ravel(gradient)), rtol=1e-10)
    assert float(found.trace()) == pytest.approx(np.trace(dense), rel=1e-12)
    assert float(found.log_determinant(0.1)) == pytest.approx(np.linalg.slogdet(damped)[1], rel=1e-12)
    root = found.inverse(0.1, -0.5).dense()
    np.testing.assert_allclose(root @ damped @ root, np.eye(len(dense)), atol=1e-12)


def test_an_approximation_crosses_jit_and_vmap():
    risk, params = perceptron()
    step = jax.jit(lambda risk, params: kronecker_approximation("ekfac", risk, params).solve(params, 0.1))
    plain = kronecker_approximation("ekfac", risk, params).solve(params, 0.1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), step(risk, params), plain)


@pytest.mark.slow
@pytest.mark.parametrize("kind", nightly(("kfac", "shampoo"), ("shampoo",)))
def test_sampled_errors_are_within_their_bars(kind, monkeypatch):
    risk, params = perceptron()
    found, gradient = kronecker_approximation(kind, risk, params), jax.grad(risk)(params)
    arguments = (found.operator, al.ggn(risk, params), found.solve(gradient, 0.01), gradient)
    exact = operator_errors(*arguments, jax.random.key(0), damping=0.01)
    a, k = (np.asarray(operator.dense()) for operator in (al.ggn(risk, params), found.operator))
    assert float(exact.frobenius.value) == pytest.approx(np.linalg.norm(k - a) / np.linalg.norm(a))
    best = np.vdot(k, a) / np.vdot(k, k)
    assert float(exact.shape.value) == pytest.approx(np.linalg.norm(best * k - a) / np.linalg.norm(a))
    monkeypatch.setattr("attnlab.curvature.kronecker.errors.DENSE_DIMENSION", 1)
    for seed in range(3):
        sampled = operator_errors(*arguments, jax.random.key(seed), damping=0.01, samples=200)
        for name in ("frobenius", "shape", "trace", "inverse"):
            one, other = getattr(sampled, name), getattr(exact, name)
            assert abs(one.value - other.value) < 4 * one.error + 1e-6, name


def test_factors_of_a_model_in_bfloat16_are_in_float32():
    risk, params = perceptron()
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    coarse = al.objective(risk.predict, risk.loss, risk.inputs.astype(jnp.bfloat16), risk.targets)
    found, exact = (kronecker_approximation("ekfac", *each).operator for each in ((coarse, half), (risk, params)))
    assert found.dense().dtype == jnp.float32
    error = jnp.linalg.norm(found.dense().astype(float) - exact.dense()) / jnp.linalg.norm(exact.dense())
    assert 1e-4 < error < 0.05


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="'token_embedding' is met in gather, where it is no kernel"):
        kronecker_approximation("kfac", RISK, PARAMS)
    with pytest.raises(ValueError, match="'transformer/layer_0/mlp_norm/scale' is met in mul"):
        kronecker_approximation("kfac", RISK, PARAMS, block="mlp_norm/scale")
    with pytest.raises(ValueError, match=r"no Kronecker approximation 'kfak'.*Did you mean 'kfac'"):
        kronecker_approximation("kfak", RISK, PARAMS)
    risk, params = language(factored=True)
    with pytest.raises(TypeError, match=r"returns Logits.*factored=False"):
        kronecker_approximation("kfac", risk, params, block="query")
    risk, params = perceptron()
    with pytest.raises(TypeError, match="Kronecker factors need its curvature position by position"):
        kronecker_approximation("kfac", al.objective(risk.predict, power, risk.inputs, risk.targets), params)
    with pytest.raises(ValueError, match="'unused' is met in no operation"):
        kronecker_approximation("kfac", al.objective(ignoring, al.square_loss, risk.inputs, risk.inputs), UNUSED)


def power(outputs, targets):
    return jnp.mean(outputs**4)


UNUSED = {"unused": jnp.ones((4, 4)), "used": jnp.ones((4, 4))}


def ignoring(params, x):
    return x @ params["used"]


def test_examples_that_are_not_independent_are_an_error():
    layer = al.SelfAttention(AttentionConfig(2, 2))
    tokens = jax.random.normal(jax.random.key(0), (5, 3))
    params = layer.init(jax.random.key(1), tokens)["params"]
    single = al.objective(al.from_linen(layer), al.square_loss, tokens, tokens[:, :2])
    with pytest.raises(ValueError, match=r"expected examples.*first axis of length 1"):
        kronecker_approximation("kfac", single, params, block="value")
    one = al.objective(al.from_linen(layer), al.square_loss, tokens[None], tokens[None, :, :2])
    (pseudo,) = pseudo_gradients(one, params, selection_of(params, "value")).values()
    np.testing.assert_allclose(pseudo.second_moment(), al.ggn(one, params, block="value").dense(), atol=1e-12)


def test_a_scanned_stack_is_an_error():
    def predict(params, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, params["layers"])[0]

    inputs, params = jnp.ones((2, 4)), {"layers": jnp.ones((2, 4, 4))}
    risk = al.objective(predict, al.square_loss, inputs, inputs)
    with pytest.raises(ValueError, match=r"'layers' is met in 3 axes.*outside of a scan"):
        kronecker_approximation("kfac", risk, params)


def test_a_dense_layer_of_flax_is_found():
    model = nn.Sequential([nn.Dense(3, param_dtype=float), nn.tanh, nn.Dense(2, param_dtype=float)])
    inputs = jax.random.normal(jax.random.key(0), (5, 2, 4))
    params = model.init(jax.random.key(1), inputs)["params"]
    risk = al.objective(al.from_linen(model), al.square_loss, inputs, inputs[..., :2])
    for leaf, pseudo in pseudo_gradients(risk, params, selection_of(params, None)).items():
        np.testing.assert_allclose(pseudo.second_moment(), al.ggn(risk, params, block=leaf).dense(), atol=1e-13)


def test_singular_systems_and_wrong_vectors_are_errors():
    risk, params = perceptron()
    found = kronecker_approximation("kfac", risk, params)
    with pytest.raises(ValueError, match=r"kfac of 'layer_\d.*' has the eigenvalue .* at damping 0.*Raise the damping"):
        found.solve(params, 0.0)
    with pytest.raises(ValueError, match=r"damping is -1\.0; expected 0 <= damping"):
        found.solve(params, -1)
    with pytest.raises(ValueError, match="vector has the structure"):
        found.solve(params["layer_0"], 1.0)
    part = kronecker_approximation("kfac", risk, params, block="layer_0")
    with pytest.raises(ValueError, match="the exact operator's point has the structure"):
        operator_errors(part.operator, al.ggn(risk, params), params, params, jax.random.key(0), damping=1.0)
