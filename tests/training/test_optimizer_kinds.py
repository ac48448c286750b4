"""Optimizers that take some of what a step knows, and those of several groups, whose curvature Adam preconditions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from attnlab.curvature import hessian, precondition
from attnlab.dynamics.rules import Adam
from attnlab.losses import square_loss
from attnlab.objectives import objective
from attnlab.training import train

INPUTS = jnp.linspace(-1.0, 1.0, 24).reshape(8, 3)
RISK = objective(lambda p, x: jnp.tanh(x @ p["body"]) @ p["head"], square_loss, INPUTS, INPUTS[:, :1] ** 2)
PARAMS = {"body": jnp.linspace(-1.0, 2.0, 6).reshape(3, 2), "head": jnp.array([[0.5], [-1.0]])}
LABELS = {"body": "slow", "head": "fast"}


def sharpness_aware(**options):
    return optax.contrib.sam(optax.sgd(0.1), optax.chain(optax.contrib.normalize(), optax.sgd(0.05)), **options)


@pytest.mark.parametrize(
    ("optimizer", "steps"),
    [
        (sharpness_aware(), 6),
        (optax.chain(sharpness_aware(), optax.identity()), 6),
        (sharpness_aware(opaque_mode=True), 3),
    ],
    ids=["transparent", "chained", "opaque"],
)
def test_sharpness_aware_minimisation(optimizer, steps):
    """Three times: up by 0.05 along the gradient, and down from where that began along the gradient there."""
    params, gradient = PARAMS, jax.grad(RISK)
    for _ in range(3):
        ascent = gradient(params)
        norm = optax.tree.norm(ascent)
        above = jax.tree.map(lambda leaf, g, norm=norm: leaf + 0.05 * g / norm, params, ascent)
        params = jax.tree.map(lambda leaf, g: leaf - 0.1 * g, params, gradient(above))
    found = train(RISK, PARAMS, optimizer, jax.random.key(0), steps=steps).params
    for leaf, expected in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=1e-6)


def moments(steps, moved, rates):
    """Adam's second moments in NumPy, along a path on which only `moved` is moved."""
    params = {name: np.array(leaf) for name, leaf in PARAMS.items()}
    m, v = ({name: np.zeros_like(leaf) for name, leaf in params.items()} for _ in range(2))
    for step in range(1, steps + 1):
        gradients = jax.grad(RISK)({name: jnp.asarray(leaf) for name, leaf in params.items()})
        for name in moved:
            g = np.asarray(gradients[name])
            m[name], v[name] = 0.9 * m[name] + 0.1 * g, 0.999 * v[name] + 0.001 * g**2
            corrected = np.sqrt(v[name] / (1 - 0.999**step)) + 1e-8
            params[name] = params[name] - rates[name] * m[name] / (1 - 0.9**step) / corrected
    scales = {name: (1 - 0.9**steps) * (np.sqrt(v[name] / (1 - 0.999**steps)) + 1e-8) for name in moved}
    return params, scales


@pytest.mark.parametrize(
    ("optimizer", "moved"),
    [
        (optax.partition({"fast": optax.adam(1e-1), "slow": optax.adam(1e-3)}, LABELS), ("body", "head")),
        (optax.multi_transform({"fast": optax.adam(1e-1), "slow": optax.set_to_zero()}, LABELS), ("head",)),
        (optax.partition({"fast": optax.set_to_zero(), "slow": optax.adam(1e-3)}, LABELS), ("body",)),
    ],
    ids=["two Adams", "the body frozen", "the head frozen"],
)
def test_adam_of_several_groups_preconditions(optimizer, moved):
    run = train(RISK, PARAMS, optimizer, jax.random.key(0), steps=5)
    params, scales = moments(5, moved, {"head": 1e-1, "body": 1e-3})
    preconditioner = Adam(1e-3).preconditioner(run.state.optimizer_state, run.params)
    exact = {name: jnp.asarray(leaf) for name, leaf in params.items()}
    for name in moved:
        np.testing.assert_allclose(preconditioner[name], scales[name], rtol=1e-6)
        matrix = jax.hessian(lambda leaf, name=name: RISK(exact | {name: leaf}))(exact[name])
        root = np.sqrt(scales[name].ravel())
        expected = matrix.reshape(root.size, root.size) / np.outer(root, root)
        block = precondition(hessian(RISK, run.params, block=name), preconditioner)
        np.testing.assert_allclose(block.dense(), expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    if len(moved) == 1:
        with pytest.raises(ValueError, match="which the optimizer holds fixed"):
            precondition(hessian(RISK, run.params), preconditioner)


def test_two_adams_of_one_parameter_are_refused():
    run = train(RISK, PARAMS, optax.chain(optax.adam(1e-2), optax.adam(1e-2)), jax.random.key(0), steps=1)
    with pytest.raises(ValueError, match="holds 2 parts that move body"):
        Adam(1e-3).preconditioner(run.state.optimizer_state, PARAMS)
    with pytest.raises(ValueError, match="holds no part of type ScaleByAdamState"):
        Adam(1e-3).preconditioner(optax.sgd(0.1).init(PARAMS), PARAMS)
