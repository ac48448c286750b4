"""A layer inside a network: its blocks of the network's Hessian and Gauss-Newton matrix against autodiff."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import layer_config

from attnlab.attention import SecondOrder, attention_hessian, downstream_derivatives, second_order
from attnlab.losses import LOSSES, cross_entropy
from attnlab.models.adapters import from_linen
from attnlab.models.attention import SelfAttention
from attnlab.objectives import objective
from compare import assert_close
from oracles import ggn, hessian

BATCH, LENGTH, WIDTH, CLASSES = 2, 4, 3, 5
CONFIG = layer_config(heads=2, output_dim=WIDTH, causal=True)
LATER = layer_config(causal=True, output_dim=WIDTH)


def normalized(x):
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred / jnp.sqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + 1e-5)


def network(key):
    shapes = {"up": (WIDTH, 6), "down": (6, WIDTH), "unembed": (WIDTH, CLASSES)}
    keys = iter(jax.random.split(key, 8))
    weights = {name: jax.random.normal(next(keys), shape) for name, shape in shapes.items()}
    x = jax.random.normal(next(keys), (BATCH, LENGTH, WIDTH))
    labels = jax.random.randint(next(keys), (BATCH, LENGTH), 0, CLASSES)
    weights["first"], weights["later"] = (SelfAttention(c).init(next(keys), x)["params"] for c in (CONFIG, LATER))
    return weights, x, labels


def rest_of_the_last_block(weights, x, out):
    """Residual, pre-norm MLP, final norm, unembedding: every token by itself."""
    x = x + out
    x = x + jax.nn.gelu(normalized(x) @ weights["up"]) @ weights["down"]
    return normalized(x) @ weights["unembed"]


def rest_with_another_layer(weights, x, out):
    x = x + out
    x = x + SelfAttention(LATER).apply({"params": weights["later"]}, normalized(x))
    return rest_of_the_last_block(weights, x, jnp.zeros_like(x))


def rest_that_pools(weights, x, out):
    return jnp.broadcast_to(jnp.mean(jnp.tanh(x + out), axis=1, keepdims=True), x.shape) @ weights["unembed"]


def layer_objective(tokens, behind):
    return objective(from_linen(SelfAttention(CONFIG)), second_order, tokens, behind)


RESTS = {
    "last_block": (rest_of_the_last_block, False),
    "another_layer": (rest_with_another_layer, True),
    "pooling": (rest_that_pools, True),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["last_block", *(pytest.param(n, marks=pytest.mark.slow) for n in list(RESTS)[1:])])
def test_layer_inside_a_network(name, key):
    rest, coupled = RESTS[name]
    weights, x, labels = network(key)
    layer, params, seen = SelfAttention(CONFIG), weights["first"], normalized(x)
    predict = lambda params, x: rest(weights, x, layer.apply({"params": params}, normalized(x)))  # noqa: E731
    risk = objective(predict, cross_entropy, x, labels)
    expected = {"hessian": hessian(risk, params), "ggn": ggn(risk, params)}
    out, loss = layer.apply({"params": params}, seen), partial(cross_entropy, targets=labels)
    for part, matrix in expected.items():
        behind = downstream_derivatives(partial(rest, weights, x), loss, out, part=part, coupled=coupled)
        around = layer_objective(seen, SecondOrder(out, *behind))
        closed_form = attention_hessian(around, params)
        oracle = {"hessian": hessian, "ggn": ggn}[part]
        assert_close(oracle(around, params), matrix)  # the second-order loss stands for the network
        assert_close(closed_form.dense(part), matrix)
        sizes = {n: np.size(w) for n, w in params.items()}
        key_key = np.asarray(matrix)[: sizes["key"], : sizes["key"]]
        assert_close(closed_form.norms()[part]["key", "key"], np.linalg.norm(key_key))
        product = closed_form.operator(part).mv(params)
        flat = np.concatenate([np.ravel(params[n]) for n in sorted(params)])
        assert_close(np.concatenate([np.ravel(product[n]) for n in sorted(params)]), matrix @ flat)


@pytest.mark.slow
def test_coupled_and_token_diagonal_agree_where_both_hold(key):
    weights, x, labels = network(key)
    params, seen = weights["first"], normalized(x)
    out = SelfAttention(CONFIG).apply({"params": params}, seen)
    rest, loss = partial(rest_of_the_last_block, weights, x), partial(cross_entropy, targets=labels)
    norms, traces = [], []
    for coupled in (True, False):
        behind = downstream_derivatives(rest, loss, out, coupled=coupled)
        closed_form = attention_hessian(layer_objective(seen, SecondOrder(out, *behind)), params)
        norms.append(closed_form.norms())
        traces.append(closed_form.traces())
    assert_close(norms[0], norms[1], 1e-12)
    assert_close(traces[0], traces[1], 1e-12)


@pytest.mark.parametrize("loss", ["square", "cross_entropy", "soft_labels"])
def test_loss_derivatives(loss, key):
    outputs = jax.random.normal(key, (BATCH, LENGTH, WIDTH))
    targets = jax.nn.sigmoid(jax.random.normal(jax.random.fold_in(key, 1), outputs.shape))  # not normalised
    if loss == "cross_entropy":
        targets = jnp.argmax(targets, axis=-1)
    name = "cross_entropy" if loss == "soft_labels" else loss
    gradient, curvature = LOSSES[name].derivatives(outputs, targets)
    function = lambda out: LOSSES[name](out, targets)  # noqa: E731
    assert_close(gradient, jax.grad(function)(outputs), 1e-12)
    dense = jax.jit(jax.hessian(function))(outputs)
    if curvature.ndim == 0:
        curvature = curvature * jnp.broadcast_to(jnp.eye(WIDTH), (BATCH, LENGTH, WIDTH, WIDTH))
    tokens = np.eye(BATCH * LENGTH).reshape(BATCH, LENGTH, BATCH, LENGTH)
    assert_close(np.einsum("blop,blcm->blocmp", curvature, tokens), dense, 1e-12)


def test_away_from_where_the_derivatives_were_taken(key):
    """The loss is a quadratic of its own: its gradient at other outputs is that of the quadratic."""
    weights, x, _ = network(key)
    params = weights["first"]
    gradient = jax.random.normal(key, (BATCH, LENGTH, WIDTH))
    square = jax.random.normal(key, (BATCH, LENGTH, WIDTH, LENGTH, WIDTH))
    coupled = square + jnp.einsum("blomp->bmplo", square)
    for curvature in (0.7, jnp.einsum("bloLp,lL->blop", coupled, jnp.eye(LENGTH)), coupled):
        curvature = curvature if jnp.ndim(curvature) != 4 else curvature + jnp.swapaxes(curvature, 2, 3)
        risk = layer_objective(x, SecondOrder(jnp.ones_like(gradient), gradient, curvature))
        assert_close(attention_hessian(risk, params).dense(), hessian(risk, params))


def test_shapes_of_what_stands_behind(key):
    weights, x, _ = network(key)
    params, zero = weights["first"], jnp.zeros((BATCH, LENGTH, WIDTH))
    build = lambda *behind: attention_hessian(layer_objective(x, SecondOrder(*behind)), params)  # noqa: E731
    with pytest.raises(ValueError, match=r"gradient has shape .* expected that of the layer's output"):
        build(zero, zero[0], 1.0)
    with pytest.raises(ValueError, match=r"curvature has shape \(3, 3\); expected one of"):
        build(zero, zero, jnp.eye(3))
    with pytest.raises(ValueError, match=r"targets: .*1 non-finite"):
        build(zero, zero, jnp.nan)
    with pytest.raises(TypeError, match=r"targets is a .*; expected a SecondOrder\(outputs, gradient, curvature\)"):
        attention_hessian(layer_objective(x, zero), params)
