"""Curvature along the next update, on quadratics where it is known in closed form."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import oracles
from attnlab.dynamics.directional import critical_sharpness, directional_sharpness
from attnlab.objectives import objective
from attnlab.training import TrainingState, train
from attnlab.trees import block_slices, ravel
from cases import CASES
from compare import assert_close


def half_square(outputs, targets):
    return jnp.sum((outputs - targets) ** 2) / 2


def quadratic(key, n=5):
    root = jax.random.normal(key, (n, n))
    return objective(lambda w, x: x @ w, half_square, root, jnp.zeros(n)), root.T @ root


def measured(probe, risk, params, optimizer):
    state = TrainingState(jnp.array(0), params, optimizer.init(params), jax.random.key(0), {})
    memory = probe.start(risk, state, jax.random.key(0))
    return jax.jit(probe.measure)(risk, state, memory, jax.random.key(0))[0]


@pytest.mark.parametrize("rate", [1e-3, 5.0])
def test_critical_sharpness_of_a_quadratic_is_exact(rate, key):
    """<u, H u> / -<g, u>, from steps far too short and far too long; and the same of products."""
    risk, matrix = quadratic(key)
    w, optimizer = jax.random.normal(key, (5,)), optax.adam(rate)
    gradient = matrix @ w
    step = -rate * jnp.sign(gradient)  # the first step of Adam, up to its eps
    exact = step @ matrix @ step / -(gradient @ step)
    found = measured(critical_sharpness(optimizer, accuracy=1e-9), risk, w, optimizer)
    assert_close(found["sharpness"], exact, 1e-6)
    assert_close(measured(directional_sharpness(optimizer), risk, w, optimizer)["critical"], exact, 1e-6)
    assert_close(found["step"] * found["sharpness"], 2.0, 1e-12)


def test_the_relative_one_looks_at_another_loss(key):
    """A loss five times larger rises at the same place, a part of the data elsewhere."""
    risk, _ = quadratic(key)
    w, optimizer = jax.random.normal(key, (5,)), optax.sgd(0.01)
    part = critical_sharpness(optimizer, accuracy=1e-9, measured=lambda risk: risk.on(lambda leaf: leaf[:2]))
    found = measured(part, risk, w, optimizer)["sharpness"]
    rows = risk.inputs[:2]
    step, gradient = -0.01 * risk.inputs.T @ (risk.inputs @ w), rows.T @ (rows @ w)
    curvature = (rows @ step) @ (rows @ step)
    expected = curvature / -(gradient @ step)
    assert (expected > 0 and abs(found / expected - 1) < 1e-6) or (expected <= 0 and np.isinf(found))


def test_uphill_nothing_is_stable_and_along_a_plane_everything(key):
    risk = objective(lambda w, x: x * w, lambda outputs, _: jnp.sum(outputs), jnp.ones(3), jnp.zeros(3))
    for rate, step in ((-0.1, 0.0), (0.1, np.inf)):
        found = measured(critical_sharpness(optax.sgd(rate)), risk, jnp.ones(3), optax.sgd(rate))
        assert found["step"] == step
        assert found["sharpness"] == 2 / np.float64(step) if step else np.isinf(found["sharpness"])


def test_it_costs_some_eight_passes_along_training(key):
    """Accurate to 2 %, from where the last search ended: counted where the loss is called."""
    risk, matrix = quadratic(key)
    optimizer = optax.sgd(1.0 / np.linalg.eigvalsh(matrix)[-1])
    probes = {"critical": critical_sharpness(optimizer), "exact": directional_sharpness(optimizer)}
    values = train(risk, jnp.ones(5), optimizer, key, steps=10, probes=probes).records.values
    error = np.abs(values["critical"]["sharpness"] / values["exact"]["critical"] - 1)
    assert np.max(error) <= 0.02
    assert np.max(values["critical"]["passes"][1:]) <= 11


@pytest.mark.parametrize("blocks", [None, ("query", re.compile("key|value"))], ids=["leaves", "named"])
def test_the_split_is_that_of_the_dense_hessian(blocks, key):
    risk, params = CASES["softmax/square"](key)
    optimizer = optax.sgd(0.1)
    found = measured(directional_sharpness(optimizer, blocks), risk, params, optimizer)
    matrix, gradient = oracles.hessian(risk, params), ravel(jax.grad(risk)(params))
    assert_close(found["update"], gradient @ matrix @ gradient / (gradient @ gradient), 1e-10)
    assert_close(found["gradient"], found["update"], 1e-10)
    places = block_slices(params)
    groups = [[name] for name in places] if blocks is None else [["query"], ["key", "value"]]
    rows = [np.r_[tuple(places[name] for name in group)] for group in groups]
    pairs = [[gradient[a] @ matrix[np.ix_(a, b)] @ gradient[b] for b in rows] for a in rows]
    assert_close(found["pairs"], np.array(pairs) / (gradient @ gradient), 1e-10)
    assert_close(found["within"] + found["across"], found["update"], 1e-10)


class TestBadInput:
    def test_accuracy_of_nothing(self):
        with pytest.raises(ValueError, match=r"accuracy is 0\.0; expected 1e-12 <= accuracy"):
            critical_sharpness(optax.sgd(0.1), accuracy=0.0)

    def test_no_optimizer(self):
        with pytest.raises(TypeError, match="optimizer is a float; expected an optax"):
            directional_sharpness(0.1)

    def test_blocks_that_share_or_leave_out(self, key):
        risk, params = CASES["softmax/square"](key)
        with pytest.raises(ValueError, match="which has key in 0, value in 0 of them; expected every parameter in one"):
            measured(directional_sharpness(optax.sgd(0.1), ("query",)), risk, params, optax.sgd(0.1))
