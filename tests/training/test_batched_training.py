"""Training on data that is read batch by batch is training on all of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attnlab.losses import square_loss
from attnlab.objectives import batched, objective
from attnlab.runs.session import Session
from attnlab.training import minibatches, probe, train
from compare import assert_close

INPUTS = np.random.default_rng(0).standard_normal((7, 3))
OPTIMIZER, PROBES = optax.sgd(0.1), {"risk": probe(lambda risk, params: risk(params))}


def predict(params, inputs):
    return jnp.tanh(inputs @ params)


def batches(shift=0.0):
    targets = INPUTS[:, 0] + shift
    return [(INPUTS[:4], targets[:4]), (INPUTS[4:], targets[4:])]


def run(risk, key=None, **options):
    key = jax.random.key(1) if key is None else key
    return train(risk, jnp.ones((*key.shape, 3)), OPTIMIZER, key, **({"steps": 6, "probes": PROBES} | options))


def test_batches_train_like_all_data_and_their_directory_is_their_own(tmp_path):
    whole = run(objective(predict, square_loss, INPUTS, INPUTS[:, 0]))
    parts = run(batched(predict, square_loss, batches()), session=Session(directory=tmp_path))
    assert_close(parts.params, whole.params, 1e-12)
    assert_close(parts.records.losses, whole.records.losses, 1e-12)
    assert_close(parts.records.values["risk"], whole.records.values["risk"], 1e-12)
    again = run(batched(predict, square_loss, batches()), session=Session(directory=tmp_path))
    np.testing.assert_array_equal(again.params, parts.params)
    with pytest.raises(ValueError, match="holds another run"):
        run(batched(predict, square_loss, batches(shift=1.0)), session=Session(directory=tmp_path))


class Shuffled:
    """Other rows at every reading."""

    def __init__(self):
        self.random = np.random.default_rng(0)

    def __iter__(self):
        rows = self.random.permutation(INPUTS)
        return iter([(rows[:4], rows[:4, 0]), (rows[4:], rows[4:, 0])])


def test_what_batches_cannot_do_is_said():
    risk = batched(predict, square_loss, batches())
    with pytest.raises(TypeError, match="resample failed: risk is a BatchedObjective, whose rows are not in memory"):
        run(risk, resample=minibatches(2))
    with pytest.raises(ValueError, match="own_risks is for data in memory, and risk is a BatchedObjective"):
        run(risk, jax.random.split(jax.random.key(0), 2), own_risks=True)
    with pytest.raises(ValueError, match="batch 0 differs when it is read again"):
        run(batched(predict, square_loss, Shuffled()))
