"""Checks that pass on sound objectives and name what is wrong with others; measurements block by block."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.curvature import (
    VerificationError,
    batched,
    block_densities,
    check_curvature,
    eigenpairs,
    ggn,
    hessian,
    per_block,
)
from attnlab.losses import square_loss
from attnlab.objectives import objective
from attnlab.trees import block_slices, leaf_names
from cases import CASES
from compare import assert_close
from nightly import nightly

INPUTS = np.random.default_rng(0).standard_normal((6, 3))
TARGETS = np.random.default_rng(1).standard_normal((6, 2))
PARAMS = jnp.asarray(np.random.default_rng(2).standard_normal((3, 2)))


@pytest.mark.parametrize("name", nightly(("convnet/square", "language_model/cross_entropy"), ("convnet/square",)))
def test_sound_objectives_pass(name):
    risk, params = CASES[name](jax.random.key(1))
    found = check_curvature(risk, params, jax.random.key(1))
    assert set(found) == {"determinism", "gradient", "hessian", "symmetry", "examples"}
    assert max(found.values()) <= 1e-5


@pytest.mark.slow
def test_a_sound_objective_passes_in_single_precision():
    risk, params = CASES["two_layers/cross_entropy"](jax.random.key(1))
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    low = objective(risk.predict, risk.loss, risk.inputs.astype(jnp.float32), risk.targets)
    check_curvature(low, single, jax.random.key(1))


def linear(params, inputs):
    return jnp.tanh(inputs @ params)


def batch_norm(params, inputs):
    hidden = inputs @ params
    return hidden - jnp.broadcast_to(jnp.mean(hidden, axis=0), hidden.shape)


def dropout(params, inputs):
    kept = jax.random.bernoulli(jax.random.key(0), 0.5, (len(inputs), 2))
    return jnp.where(kept, inputs @ params, 0)


def total_loss(outputs, targets):
    return jnp.sum((outputs - targets) ** 2)


@jax.custom_jvp
def wrong(x):
    return x**2


@wrong.defjvp
def _(primals, tangents):
    return primals[0] ** 2, 3 * primals[0] * tangents[0]


COUPLED = {
    "batch norm": (batch_norm, square_loss, r"depend on the other examples \(batch norm"),
    "dropout": (dropout, square_loss, r"depend on the place in the batch \(dropout"),
    "sum": (linear, total_loss, "not the mean over its examples. Average, do not sum"),
}


@pytest.mark.parametrize("name", COUPLED)
def test_what_couples_the_examples_is_named(name):
    predict, loss, message = COUPLED[name]
    with pytest.raises(VerificationError, match=rf"examples: .*{message}") as caught:
        check_curvature(objective(predict, loss, INPUTS, TARGETS), PARAMS, jax.random.key(1))
    assert caught.value.discrepancies["examples"] > 1e-2
    assert caught.value.discrepancies["hessian"] < 1e-4
    parts = batched(predict, loss, [(INPUTS[:3], TARGETS[:3]), (INPUTS[3:], TARGETS[3:])])
    with pytest.raises(ValueError, match=message):
        hessian(parts, PARAMS)


def test_a_wrong_derivative_is_named():
    risk = objective(lambda params, x: wrong(x @ params), square_loss, INPUTS, TARGETS)
    with pytest.raises(VerificationError, match="gradient: the gradient is not the derivative of the loss"):
        check_curvature(risk, PARAMS, jax.random.key(1))


def test_kinks_are_named():
    random = np.random.default_rng(0)
    inputs, targets = jnp.float32(random.standard_normal((5000, 3))), jnp.float32(5 + random.standard_normal((5000, 2)))
    risk = objective(lambda params, x: jax.nn.relu(x @ params), square_loss, inputs, targets)
    with pytest.raises(VerificationError, match=r"hessian: .*kinks \(relu\)"):
        check_curvature(risk, jnp.float32(PARAMS), jax.random.key(1))


def test_evaluations_that_disagree_are_named():
    random = np.random.default_rng(0)
    risk = objective(lambda params, x: x @ params * random.uniform(0.5, 1.5), square_loss, INPUTS, TARGETS)
    with pytest.raises(VerificationError, match="determinism: two evaluations disagree: dropout or sampling"):
        check_curvature(risk, PARAMS, jax.random.key(1))


def test_data_that_change_between_readings_are_named():
    class Shuffled:
        def __init__(self):
            self.random = np.random.default_rng(0)

        def __iter__(self):
            yield self.random.permutation(INPUTS), TARGETS

    with pytest.raises(ValueError, match=r"batch 0 differs when it is read again \(shuffling"):
        hessian(batched(linear, square_loss, Shuffled()), PARAMS)


def test_a_single_sequence_has_no_examples():
    risk = objective(lambda params, x: jax.nn.softmax(x @ x.T) @ x @ params, square_loss, INPUTS, TARGETS)
    with pytest.raises(VerificationError, match="examples"):
        check_curvature(risk, PARAMS, jax.random.key(1))
    assert "examples" not in check_curvature(risk, PARAMS, jax.random.key(1), examples=False)


@pytest.mark.parametrize("build", nightly((hessian, ggn), (hessian,)))
def test_every_block_is_measured(build):
    risk, params = CASES["softmax/square"](jax.random.key(1))
    dense, slices = np.asarray(build(risk, params).dense()), block_slices(params)
    tops = per_block(lambda op: eigenpairs(op, jax.random.key(1)).values[0], risk, params, operator=build)
    densities = block_densities(risk, params, jax.random.key(1), operator=build, samples=3, steps=64)
    assert set(tops) == set(densities) == set(leaf_names(params))
    for name, rows in slices.items():
        exact = np.linalg.eigvalsh(dense[rows, rows])
        assert_close(tops[name], exact[-1])
        assert_close(np.max(densities[name].nodes), exact[-1], 1e-9)


def test_blocks_that_are_asked_for():
    risk, params = CASES["two_layers/square"](jax.random.key(1))
    sizes = per_block(
        lambda op: op.dimension,
        risk,
        params,
        operator=partial(hessian, check=False),
        blocks=["layer_0/attention", "mlp"],
    )
    slices = block_slices(params)
    expected = {
        block: sum(rows.stop - rows.start for name, rows in slices.items() if f"/{block}/" in f"/{name}")
        for block in sizes
    }
    assert sizes == expected
