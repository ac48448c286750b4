"""A batched objective has the operators of all its data at once, however they are cut."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.curvature.operators import FISHERS, PARTS, hessian
from attnlab.curvature.spectrum import eigenpairs, spectral_density
from attnlab.losses import cross_entropy, square_loss
from attnlab.models.adapters import from_linen
from attnlab.models.networks import MLP, MLPConfig
from attnlab.objectives import batched, objective
from compare import assert_close
from nightly import nightly

OPERATORS = {**PARTS, **FISHERS}
PREDICT = from_linen(MLP(MLPConfig((4, 3), "tanh", bias=True)))


def data(seed=1, count=70, dtype=np.float64):
    random = np.random.default_rng(seed)
    inputs = random.standard_normal((count, 5)).astype(dtype)
    shapes = jax.eval_shape(MLP(MLPConfig((4, 3), "tanh", bias=True)).init, jax.random.key(0), inputs)["params"]
    params = jax.tree.map(lambda leaf: jnp.asarray(random.standard_normal(leaf.shape), dtype), shapes)
    return inputs, random.integers(3, size=count), params


class Dataset:
    """Batches that can only be iterated over, and count how often each was read."""

    def __init__(self, inputs, targets, ends):
        self.parts = [(inputs[a:b], targets[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
        self.reads = np.zeros(len(self.parts), int)

    def __iter__(self):
        for number, part in enumerate(self.parts):
            self.reads[number] += 1
            yield part


@pytest.mark.parametrize("name", nightly(OPERATORS, ("hessian", "fisher")))
def test_operators_of_unequal_batches_are_those_of_all_data(name):
    inputs, labels, params = data()
    whole = objective(PREDICT, cross_entropy, inputs, labels)
    parts = batched(PREDICT, cross_entropy, Dataset(inputs, labels, [32, 64, 70]))
    build = partial(OPERATORS[name], check=False)
    assert_close(build(parts, params).dense(), build(whole, params).dense(), 1e-12)
    block = build(parts, params, block="layer_1").dense()
    assert_close(block, build(whole, params, block="layer_1").dense(), 1e-12)


@pytest.mark.slow
def test_unequal_batches_in_single_precision():
    inputs, labels, params = data(dtype=np.float32)
    whole = objective(PREDICT, cross_entropy, inputs, labels)
    parts = batched(PREDICT, cross_entropy, Dataset(inputs, labels, [32, 64, 70]))
    assert_close(hessian(parts, params).dense(), hessian(whole, params).dense(), 1e-6)


def test_the_order_of_the_batches_changes_no_more_than_the_last_bit():
    inputs, labels, params = data(count=64, dtype=np.float32)
    batches = [(inputs[i : i + 4], labels[i : i + 4]) for i in range(0, 64, 4)]
    forward, backward = (hessian(batched(PREDICT, cross_entropy, b), params).dense() for b in (batches, batches[::-1]))
    assert np.max(np.abs(forward - backward)) <= np.finfo(np.float32).eps * np.max(np.abs(forward))


def test_value_and_gradient():
    inputs, labels, params = data()
    whole = objective(PREDICT, cross_entropy, inputs, labels)
    parts = batched(PREDICT, cross_entropy, [(inputs[:60], labels[:60]), (inputs[60:], labels[60:])])
    assert_close(jax.jit(parts)(params), whole(params), 1e-14)
    assert_close(jax.jit(jax.grad(parts))(params), jax.grad(whole)(params), 1e-13)


def test_every_product_reads_every_batch_once():
    inputs, labels, params = data()
    dataset = Dataset(inputs, labels, [32, 64, 70])
    operator = hessian(batched(PREDICT, cross_entropy, dataset), params)
    operator.mv(params)
    dataset.reads[:] = 0
    for _ in range(3):
        operator.mv(params)
    np.testing.assert_array_equal(dataset.reads, 3)


@pytest.mark.slow
def test_spectra_of_batches(key):
    inputs, labels, params = data()
    whole = hessian(objective(PREDICT, cross_entropy, inputs, labels), params)
    parts = hessian(batched(PREDICT, cross_entropy, Dataset(inputs, labels, [32, 64, 70])), params)
    assert_close(eigenpairs(parts, key, 3).values, eigenpairs(whole, key, 3).values, 1e-12)
    densities = [spectral_density(operator, key, samples=2, steps=5) for operator in (whole, parts)]
    assert_close(densities[1].nodes, densities[0].nodes, 1e-9)


class TestBadInput:
    def test_a_one_time_iterator(self):
        with pytest.raises(TypeError, match=r"generator, which can be read only once.*starts afresh"):
            batched(PREDICT, square_loss, (batch for batch in []))

    def test_no_batch(self):
        with pytest.raises(ValueError, match="batches holds no batch"):
            batched(PREDICT, square_loss, [])

    def test_an_empty_batch(self):
        with pytest.raises(ValueError, match=r"inputs of batch 1 has shape \(0, 5\)"):
            batched(PREDICT, square_loss, [(np.ones((2, 5)), np.ones((2, 3))), (np.ones((0, 5)), np.ones((0, 3)))])

    def test_a_batch_that_is_not_finite(self):
        with pytest.raises(ValueError, match="targets of batch 1 has 1 non-finite of 6"):
            bad = np.array([[1.0, np.nan, 1.0]] * 2)
            bad[1] = 1.0
            batched(PREDICT, square_loss, [(np.ones((2, 5)), np.ones((2, 3))), (np.ones((2, 5)), bad)])
