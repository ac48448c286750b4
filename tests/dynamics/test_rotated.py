"""Adafactor, Shampoo and SOAP: their steps against NumPy's own loops, their limits, their edges in chains."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg

import oracles
from attnlab.curvature.operators import hessian
from attnlab.dynamics.norms import polar
from attnlab.dynamics.preconditioners import whitened
from attnlab.dynamics.rods import rod_between, rod_flow
from attnlab.dynamics.rules import Adafactor, Adam, Shampoo, Soap, edge_of_step
from attnlab.dynamics.sharpness import Tracking, stability
from attnlab.training import train
from attnlab.trees import ravel
from cases import CASES
from compare import assert_close
from update_rules import dense_of

RATE = 0.05
PARAMS = {"bias": jnp.linspace(-1.0, 1.0, 4), "kernel": jnp.linspace(-1.0, 2.0, 12).reshape(3, 4)}


def gradients(key, count):
    draws = jax.random.normal(key, (count, 16))
    return [{"bias": draw[:4], "kernel": draw[4:].reshape(3, 4)} for draw in draws]


def last_update(optimizer, steps):
    """The update of the last of these gradients, and the state after it."""
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(PARAMS)
        for gradient in steps:
            update, state = optimizer.update(gradient, state, PARAMS)
    return update, state


def power(matrix, exponent):
    return scipy.linalg.fractional_matrix_power(matrix, exponent)


def averages(b, terms):
    """The average of decay b, corrected for its start at zero."""
    total = 0
    for term in terms:
        total = b * total + (1 - b) * term
    return total / (1 - b ** len(terms))


def test_shampoo_divides_by_roots_of_its_averages(key):
    steps = gradients(key, 6)
    update, _ = last_update(Shampoo(RATE, b1=0.6, b2=0.8).transformation, steps)
    kernels, biases = ([np.asarray(step[name]) for step in steps] for name in ("kernel", "bias"))
    left = power(averages(0.8, [g @ g.T for g in kernels]), -0.25)
    right = power(averages(0.8, [g.T @ g for g in kernels]), -0.25)
    assert_close(update["kernel"], -RATE * left @ averages(0.6, kernels) @ right, 1e-8)
    root = power(averages(0.8, [np.outer(g, g) for g in biases]), -0.5)
    assert_close(update["bias"], -RATE * root @ averages(0.6, biases), 1e-8)


def test_shampoo_without_memory_steps_along_the_polar_factor(key):
    """(G G^T)^-1/4 G (G^T G)^-1/4 = U V^T: the step of spectral descent in direction, of Muon without momentum."""
    gradient = {"kernel": jax.random.normal(key, (3, 3))}
    rule = Shampoo(RATE, b1=0.0, b2=0.0, eps=0.0)
    with jax.numpy_dtype_promotion("standard"):
        update, _ = rule.transformation.update(gradient, rule.transformation.init(gradient), gradient)
    assert_close(update["kernel"], -RATE * polar(gradient["kernel"]), 1e-10)


@pytest.mark.parametrize("frequency", [1, 3])
def test_soap_is_adam_in_the_basis_of_its_averages(frequency, key):
    steps, rule = gradients(key, 8), Soap(RATE, b1=0.6, b2=0.8, frequency=frequency)
    update, _ = last_update(rule.transformation, steps)
    mean, left, right, square = 0, 0, 0, 0
    for count, step in enumerate(steps):
        g = np.asarray(step["kernel"])
        left, right = 0.8 * left + 0.2 * g @ g.T, 0.8 * right + 0.2 * g.T @ g
        if count % frequency == 0:
            u, v = np.linalg.eigh(left)[1], np.linalg.eigh(right)[1]
        mean, square = 0.6 * mean + 0.4 * g, 0.8 * square + 0.2 * (u.T @ g @ v) ** 2
    turned = u.T @ mean @ v / (1 - 0.6**8) / (np.sqrt(square / (1 - 0.8**8)) + 1e-8)
    assert_close(update["kernel"], -RATE * u @ turned @ v.T, 1e-7)
    adam, _ = last_update(Adam(RATE, 0.6, 0.8).transformation, steps)
    assert_close(update["bias"], adam["bias"], 1e-12)


def test_adafactor_is_the_step_of_optax(key):
    """Optax's own Adafactor with its clipping of blocks: the rule's step with a rate for each of them."""
    steps = [jax.tree.map(lambda g, scale=scale: scale * g, step) for scale, step in enumerate(gradients(key, 5), 1)]
    own = optax.adafactor(RATE, min_dim_size_to_factor=2, multiply_by_parameter_scale=False)
    update, after = last_update(own, steps)
    _, state = last_update(own, steps[:-1])
    rule = Adafactor(1.0, min_dim_size_to_factor=2)
    found = edge_of_step(rule, own, steps[-1], state, PARAMS)
    moved = dense_of(found.metric, PARAMS) @ ravel(update)
    assert_close(moved, -found.rate * ravel(steps[-1]), 1e-8)
    assert_close(found.threshold, 2 / found.rate, 1e-12)
    nu = averages_of_adafactor([np.asarray(step["kernel"]) for step in steps])
    assert_close(rule.preconditioner(after, PARAMS)["kernel"] ** 2, nu, 1e-6)  # optax counts in float32
    scaled = optax.adafactor(RATE, min_dim_size_to_factor=2)
    with pytest.raises(ValueError, match="as by a trust ratio"):
        edge_of_step(rule, scaled, steps[-1], last_update(scaled, steps[:-1])[1], PARAMS)


def averages_of_adafactor(kernels):
    rows, columns = 0, 0
    for t, g in enumerate(kernels, 1):
        b = 1 - t**-0.8
        rows, columns = (b * a + (1 - b) * (g**2).mean(axis) for a, axis in ((rows, 1), (columns, 0)))
    return np.outer(rows, columns) / rows.mean()


@pytest.mark.parametrize("rule", [Shampoo(RATE, b1=0.5, b2=0.9), Soap(RATE, frequency=2)], ids=["shampoo", "soap"])
def test_a_rotated_rule_beside_another_in_groups(rule, key):
    """Matrices by one rule, vectors by Adam, clipped: P of each and the factor of clipping."""
    steps = gradients(key, 5)
    labels = {"kernel": "matrix", "bias": "vector"}
    groups = {"matrix": rule.transformation, "vector": optax.set_to_zero()}
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.partition(groups, labels))
    _, state = last_update(optimizer, steps[:-1])
    found = edge_of_step(rule, optimizer, steps[-1], state, PARAMS)
    clipped = [jax.tree.map(lambda g, step=step: 0.5 * g / jnp.linalg.norm(ravel(step)), step) for step in steps]
    _, alone = last_update(rule.transformation, clipped)
    assert_close(found.metric["kernel"].values, rule.preconditioner(alone, PARAMS)["kernel"].values, 1e-7)
    assert np.all(np.isinf(getattr(found.metric["bias"], "values", found.metric["bias"])))
    assert_close(found.rate, RATE * 0.5 / np.linalg.norm(ravel(steps[-1])), 1e-7)
    assert_close(found.threshold, rule.edge(found.rate), 1e-12)


@pytest.mark.parametrize(
    "rule", [Shampoo(1e-3), pytest.param(Soap(1e-3), marks=pytest.mark.slow)], ids=["shampoo", "soap"]
)
def test_the_probe_is_the_dense_preconditioned_sharpness(rule, key):
    risk, params = CASES["softmax/square"](key)
    probes = {"edge": stability(rule, Tracking(accuracy=1e-5))}
    run = train(risk, params, rule.transformation, key, steps=6, every=3, probes=probes)
    edge = edge_of_step(rule, rule.transformation, jax.grad(risk)(run.params), run.state.optimizer_state, run.params)
    root = np.linalg.inv(scipy.linalg.sqrtm(np.asarray(dense_of(edge.metric, run.params))))
    dense = root @ oracles.hessian(risk, run.params) @ root
    assert_close(whitened(hessian(risk, run.params), edge.metric).dense(), dense, 1e-6)
    highest = np.linalg.eigvalsh(dense)[-1]
    assert_close(run.records.values["edge"]["values"][-1, -1], highest, 1e-4)
    assert_close(run.records.values["edge"]["threshold"][-1], rule.edge(1e-3), 1e-12)
    assert_close(
        whitened(hessian(risk, run.params), edge.metric).dense(), root @ oracles.hessian(risk, run.params) @ root, 1e-6
    )


class TestBadInput:
    def test_an_operator_of_other_parameters(self, key):
        risk, params = CASES["softmax/square"](key)
        rule = Shampoo(RATE)
        with jax.numpy_dtype_promotion("standard"):
            _, state = rule.transformation.update(params, rule.transformation.init(params), params)
        with pytest.raises(ValueError, match=r"preconditioner has entries of sizes .* one for each parameter"):
            whitened(hessian(risk, params, block="query"), rule.preconditioner(state, params))

    def test_an_eigenvalue_of_zero(self, key):
        risk, params = CASES["softmax/square"](key)
        rule, zero = Shampoo(RATE, eps=0.0), jax.tree.map(jnp.zeros_like, params)
        with jax.numpy_dtype_promotion("standard"):
            _, state = rule.transformation.update(zero, rule.transformation.init(params), params)
        with pytest.raises(ValueError, match="preconditioner has an eigenvalue that is zero or negative"):
            whitened(hessian(risk, params), rule.preconditioner(state, params))

    def test_a_rod_of_a_rotated_rule(self, key):
        risk, params = CASES["softmax/square"](key)
        start = rod_between(Adam(RATE), *[(params, Adam(RATE).transformation.init(params))] * 2)
        with pytest.raises(ValueError, match="rule is soap, whose second moment is no average of squared gradients"):
            rod_flow(risk, params, start, Soap(RATE), steps=2)
