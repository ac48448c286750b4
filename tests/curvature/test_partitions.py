"""Shares off the block diagonal and the last layer's norms against matrices of autodiff."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attnlab as al
from attnlab.curvature import matrix_operator
from attnlab.curvature.partitions import (
    off_diagonal_share,
    off_diagonal_share_estimate,
    partition_by,
    partition_by_unit,
    solve_blocks,
)
from attnlab.curvature.readout import readout
from attnlab.risks.networks import clusters, digits_attention_classes, digits_perceptron, text_model

RISK, PARAMS = clusters(jax.random.key(0), 4, count=12, width=3, hidden=(5,))
OPERATOR = al.hessian(RISK, PARAMS)
MATRIX = np.asarray(OPERATOR.dense())
BY_MATRIX, BY_UNIT = partition_by(PARAMS, str), partition_by_unit(PARAMS)


def naive_share(partition):
    kept = sum(np.sum(MATRIX[np.ix_(inside, inside)] ** 2) for inside in map(partition.__eq__, np.unique(partition)))
    return 1 - kept / np.sum(MATRIX**2)


def test_units_are_columns():
    assert BY_MATRIX.tolist() == [0] * 15 + [1] * 20
    assert BY_UNIT[:15].reshape(3, 5).tolist() == [[0, 1, 2, 3, 4]] * 3
    assert BY_UNIT[15:].reshape(5, 4).tolist() == [[5, 6, 7, 8]] * 5


@pytest.mark.parametrize("partition", [BY_MATRIX, BY_UNIT])
def test_shares_are_those_of_the_blocks(partition):
    share = naive_share(partition)
    assert float(off_diagonal_share(jnp.asarray(MATRIX), partition)) == pytest.approx(share, rel=1e-12)
    for seed in range(3):
        found = off_diagonal_share_estimate(OPERATOR, partition, jax.random.key(seed), samples=100)
        assert abs(found.value - share) < 4 * found.standard_error
        assert found.standard_error < 0.1


def test_steps_of_blocks_are_those_of_the_block_diagonal():
    vector = np.arange(35.0)
    blocks = np.where(BY_UNIT[:, None] == BY_UNIT, MATRIX, 0) + 10 * np.eye(35)
    np.testing.assert_allclose(solve_blocks(MATRIX, BY_UNIT, vector, 10.0), np.linalg.solve(blocks, vector), rtol=1e-11)
    with pytest.raises(ValueError, match=r"block 0 of 1 parameters is singular at damping 0\.0"):
        solve_blocks(np.zeros((2, 2)), np.array([0, 1]), np.ones(2), 0.0)


@pytest.mark.parametrize("weights", [None, jnp.arange(12.0)])
def test_the_last_layer_has_the_norms_of_its_block(weights):
    risk = al.objective(RISK.predict, al.cross_entropy, RISK.inputs, RISK.targets, weights=weights)
    block = np.asarray(al.hessian(risk, PARAMS, block="layer_1").dense()).reshape(5, 4, 5, 4)
    end = readout(risk, PARAMS, "layer_1")
    whole, by_class = end.squared_norms()
    diagonal = np.einsum("icjc->cij", block)
    assert float(whole) == pytest.approx(np.sum(block**2), rel=1e-12)
    assert float(by_class) == pytest.approx(np.sum(diagonal**2), rel=1e-12)
    np.testing.assert_allclose(end.class_blocks(), diagonal, atol=1e-14)


@pytest.mark.slow
def test_the_last_layer_of_a_language_model():
    risk, params = text_model(jax.random.key(0), sequences=2, length=3, vocabulary=4, width=4, layers=1)
    block = np.asarray(al.ggn(risk, params, block="unembedding").dense())
    assert float(readout(risk, params, "unembedding").squared_norms()[0]) == pytest.approx(np.sum(block**2), rel=1e-11)
    with pytest.raises(ValueError, match="'transformer/layer_0/mlp/down' is not the last layer"):
        readout(risk, params, "transformer/layer_0/mlp/down")


@pytest.mark.slow
def test_networks_have_the_classes_that_they_say():
    for build in (digits_perceptron, digits_attention_classes):
        risk, params = build(jax.random.key(0), 8)
        assert jax.eval_shape(risk.outputs, params).shape == (8, 10)
        assert risk.targets.shape == (8,)
    assert set(np.asarray(RISK.targets).tolist()) == {0, 1, 2, 3}


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"partition has shape \(3,\); expected \(35,\)"):
        off_diagonal_share(jnp.asarray(MATRIX), np.zeros(3, int))
    with pytest.raises(ValueError, match=r"'b' has shape \(2,\); expected kernels"):
        partition_by_unit({"b": jnp.zeros(2)})
    with pytest.raises(ValueError, match=r"matrix has shape \(2, 2\); expected \(35, 35\)"):
        matrix_operator(jnp.eye(2), PARAMS)
    with pytest.raises(ValueError, match="'layer_0' is not the last layer"):
        readout(RISK, PARAMS, "layer_0")
    square = al.objective(RISK.predict, al.square_loss, RISK.inputs, jnp.zeros((12, 4)))
    with pytest.raises(TypeError, match="known under the cross-entropy of labels"):
        readout(square, PARAMS, "layer_1")


def test_an_operator_of_a_matrix_is_that_matrix():
    operator = matrix_operator(jnp.asarray(MATRIX), PARAMS)
    vector = jax.tree.map(jnp.ones_like, PARAMS)
    np.testing.assert_allclose(operator.dense(), MATRIX)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), operator.mv(vector), OPERATOR.mv(vector))
    assert re.match("layer", next(iter(operator.blocks()))[0])
