"""Blocks between two attention layers against the dense Gauss-Newton matrix."""

import jax
import numpy as np
import pytest

import oracles
from attnlab.attention import cross_layer_ggn
from attnlab.trees import block_slices
from cases import CASES
from compare import assert_close
from nightly import nightly

LAYERS = ("layer_0/attention", "layer_1/attention")


@pytest.mark.parametrize("loss", nightly(("square", "cross_entropy"), ("cross_entropy",)))
@pytest.mark.parametrize(("row", "column"), [LAYERS, LAYERS[::-1], (LAYERS[0], LAYERS[0])])
def test_blocks_between_layers_equal_autodiff(loss, row, column, key):
    risk, params = CASES[f"two_layers/{loss}"](key)
    dense, slices = oracles.ggn(risk, params), block_slices(params)
    blocks = jax.jit(cross_layer_ggn, static_argnums=(2, 3))(risk, params, row, column)
    assert len(blocks) == 16
    for (mine, other), block in blocks.items():
        expected = dense[slices[f"{row}/{mine}"], slices[f"{column}/{other}"]]
        assert_close(block.dense(), expected)
        assert_close(block.norm(), np.linalg.norm(expected))


def test_unknown_layer(key):
    risk, params = CASES["two_layers/square"](key)
    with pytest.raises(ValueError, match=r"there is no attention layer 'layer_2/attention'"):
        cross_layer_ggn(risk, params, LAYERS[0], "layer_2/attention")
