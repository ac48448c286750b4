"""Blocks between two attention layers against the dense Gauss-Newton matrix."""

import jax
import numpy as np
import pytest

import oracles
from attnlab.attention import cross_layer_outer
from attnlab.losses import loss_by_name
from attnlab.trees import block_slices
from cases import CASES
from compare import assert_close

LAYERS = ("layer_0/attention", "layer_1/attention")


@pytest.mark.parametrize("loss", ["square", "cross_entropy"])
@pytest.mark.parametrize(("row", "column"), [LAYERS, LAYERS[::-1], (LAYERS[0], LAYERS[0])])
def test_blocks_between_layers_equal_autodiff(loss, row, column, key):
    risk, params = CASES[f"two_layers/{loss}"](key)
    dense, slices = oracles.ggn(risk, params), block_slices(params)
    module = risk.predict.func.module
    loss_of_outputs = lambda outputs: loss_by_name(loss)(outputs, risk.targets)  # noqa: E731
    blocks = jax.jit(lambda params: cross_layer_outer(module, params, risk.inputs, loss_of_outputs, row, column))(
        params
    )
    assert len(blocks) == 16
    for (mine, other), block in blocks.items():
        expected = dense[slices[f"{row}/{mine}"], slices[f"{column}/{other}"]]
        assert_close(block.dense(), expected)
        assert_close(block.norm(), np.linalg.norm(expected))


def test_unknown_layer(key):
    risk, params = CASES["two_layers/square"](key)
    with pytest.raises(ValueError, match=r"path is 'layer_2/attention'"):
        cross_layer_outer(
            risk.predict.func.module, params, risk.inputs, lambda out: out.sum(), *LAYERS[:1], "layer_2/attention"
        )
