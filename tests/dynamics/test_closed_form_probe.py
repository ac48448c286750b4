"""The exact probes of an attention layer's blocks, alone and in a network, against dense autodiff."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import oracles
from attnlab.attention import cut_at_attention
from attnlab.curvature.operators import ggn, hessian
from attnlab.dynamics.closed_form import attention_blocks
from attnlab.losses import cross_entropy, square_loss
from attnlab.models.adapters import at_positions, from_linen
from attnlab.models.attention import AttentionConfig, SelfAttention, attention_maps
from attnlab.models.transformer import LanguageModel, LanguageModelConfig, TransformerConfig
from attnlab.objectives import objective
from attnlab.training import TrainingState, train
from attnlab.trees import block_slices
from compare import assert_close
from nightly import nightly

LAYER = AttentionConfig(key_dim=2, value_dim=3, causal=True)


def problem(key, loss):
    module, tokens = SelfAttention(LAYER), jax.random.normal(key, (2, 4, 3))
    targets = jax.random.normal(key, (2, 4, 3)) if loss is square_loss else jnp.arange(8).reshape(2, 4) % 3
    return objective(from_linen(module), loss, tokens, targets), module.init(key, tokens)["params"]


@pytest.mark.parametrize("loss", nightly((square_loss, cross_entropy), (cross_entropy,)))
def test_blocks_are_those_of_autodiff_along_training(loss, key):
    risk, params = problem(key, loss)
    run = train(risk, params, optax.sgd(0.5), key, steps=2, every=2, probes={"blocks": attention_blocks()})
    values = jax.tree.map(lambda leaf: leaf[-1], run.records.values["blocks"])
    check_norms(values, oracles.hessian(risk, run.params), oracles.ggn(risk, run.params), block_slices(run.params))
    check_moments(values["moments"], LAYER, run.params, risk.inputs)


def check_norms(values, whole, outer, rows):
    """Every recorded norm against the block of the dense matrices; `rows` by name of the weights."""
    for part, matrix in {"hessian": whole, "ggn": outer, "functional": whole - outer}.items():
        assert set(values[part]) == {f"{first}/{second}" for first in rows for second in rows}
        scale = np.linalg.norm(matrix)
        for pair, norm in values[part].items():
            first, second = pair.split("/")
            assert_close(norm, np.linalg.norm(matrix[rows[first], rows[second]]), 1e-10, scale)


def check_moments(found, config, params, tokens):
    """Mean and covariance of the tokens under each query's attention, from the attention map itself."""
    first, second = [], []
    (maps,) = attention_maps(SelfAttention(config), params, tokens).values()
    for sequence, heads in zip(np.asarray(tokens), np.asarray(maps), strict=True):
        for row in heads.reshape(-1, heads.shape[-1]):
            first.append(np.sum((row @ sequence) ** 2))
            second.append(np.sum(row @ sequence**2 - (row @ sequence) ** 2))
    assert_close(found["first"], np.mean(first), 1e-12)
    assert_close(found["second"], np.mean(second), 1e-10)


def network_problem(read):
    """A network of two pre-norm blocks whose loss reads all positions or some, and the probe of its last layer."""
    key = jax.random.key(1)
    blocks = TransformerConfig(replace(LAYER, value_dim=2, output_dim=4), layers=2, mlp_width=5, final_norm=True)
    module = LanguageModel(LanguageModelConfig(blocks, vocabulary=5, length=4, width=4))
    words = jax.random.randint(key, (2, 4), 0, 5)
    predict = from_linen(module) if read is None else at_positions(from_linen(module), read)
    risk = objective(predict, cross_entropy, words, words if read is None else words[:, jnp.array(read)])
    params = jax.jit(module.init)(key, words)["params"]
    return module, risk, params, attention_blocks(LAST)


LAST = "transformer/layer_1/attention"


def check_network_values(values, module, risk, params):
    weights = params["transformer"]["layer_1"]["attention"]
    ends = np.cumsum([0, *(weights[name].size for name in sorted(weights))])
    rows = {name: slice(a, b) for name, a, b in zip(sorted(weights), ends, ends[1:], strict=False)}
    whole, outer = (part(risk, params, block=LAST).dense() for part in (hessian, ggn))
    check_norms(values, whole, outer, rows)
    layer = cut_at_attention(risk, params, LAST).layer
    check_moments(values["moments"], layer.config, layer.params, layer.inputs)


@pytest.mark.slow
def test_blocks_of_a_layer_in_a_network_are_those_of_autodiff():
    module, risk, params, blocks = network_problem((1, 3))
    state = TrainingState(jnp.array(0), params, (), jax.random.key(0), {})
    values, _ = jax.jit(blocks.measure)(risk, state, (), state.key)
    check_network_values(values, module, risk, params)


@pytest.mark.slow
@pytest.mark.parametrize("read", [None, (1, 3)])
def test_blocks_of_a_layer_in_a_network_along_training(read):
    module, risk, params, blocks = network_problem(read)
    run = train(risk, params, optax.sgd(0.5), jax.random.key(0), steps=2, every=2, probes={"blocks": blocks})
    values = jax.tree.map(lambda leaf: leaf[-1], run.records.values["blocks"])
    check_network_values(values, module, risk, run.params)


def test_a_layer_that_is_not_there_is_refused_before_training(key):
    risk, params = problem(key, square_loss)
    probes = {"blocks": attention_blocks("layer_7/attention")}
    with pytest.raises(ValueError, match="there is no attention layer 'layer_7/attention'"):
        train(risk, params, optax.sgd(0.5), key, steps=1, probes=probes)


def test_an_attention_written_by_hand_is_refused_before_training(key):
    """Its formula is not known to be a layer's."""
    risk, params = problem(key, square_loss)
    by_hand = lambda params, inputs: inputs @ params["value"]  # noqa: E731
    other = replace(risk, predict=jax.tree_util.Partial(by_hand))
    with pytest.raises(ValueError, match=r"the objective's model calls no SelfAttention of attnlab.models"):
        train(other, params, optax.sgd(0.5), key, steps=1, probes={"blocks": attention_blocks()})
