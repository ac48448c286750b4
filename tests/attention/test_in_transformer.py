"""The last attention layer inside a transformer: every block of H, H_o and H_f of the network against autodiff."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention.in_transformer import assemble, attention_hessian_in, cut_at_attention
from attnlab.curvature.operators import PARTS as OPERATORS
from attnlab.data.addition import addition, answer_positions
from attnlab.losses import cross_entropy, square_loss
from attnlab.models.adapters import at_positions, from_linen
from attnlab.models.attention import AttentionConfig
from attnlab.models.transformer import LanguageModel, LanguageModelConfig, TransformerConfig
from attnlab.objective import objective
from compare import assert_close

WIDTH, DIGITS = 8, 1
ATTENTION = AttentionConfig(4, 4, heads=2, causal=True, output_dim=WIDTH, init="normal", gain=0.5)
BLOCKS = TransformerConfig(ATTENTION, mlp_width=10, norm=None, bias=True, init="normal", gain=0.5)
LINEAR = replace(ATTENTION, weights="linear", output_dim=None)

# name: (the blocks, whether the rest of the network behind the last attention layer is piecewise linear)
NETWORKS = {
    "no_norm": (BLOCKS, False),
    "two_layers": (replace(BLOCKS, layers=2), False),
    "pre_norm": (replace(BLOCKS, layers=2, norm="pre", final_norm=True), False),
    "post_norm": (replace(BLOCKS, norm="post"), False),
    "relu": (replace(BLOCKS, activation="relu", attention=replace(ATTENTION, key_dim=8, value_dim=8, heads=1)), True),
    "merged": (replace(BLOCKS, layers=2, norm="pre", attention=replace(ATTENTION, merged=True)), False),
    "linear": (TransformerConfig(LINEAR, 2, norm=None, residual=False), True),
}


def problem(name, key):
    """Model, parameters, tokens, the loss of all outputs, and the same risk for autodiff."""
    blocks, piecewise_linear = NETWORKS[name]
    module = LanguageModel(LanguageModelConfig(blocks, vocabulary=12, length=6, width=WIDTH))
    data, positions = addition(key, 3, DIGITS), answer_positions(DIGITS)
    targets = jax.nn.one_hot(data.targets, 12, dtype=jnp.float64) if name == "linear" else data.targets
    loss = square_loss if name == "linear" else cross_entropy
    params = jax.jit(module.init)(key, data.inputs)["params"]
    risk = objective(at_positions(from_linen(module), positions), loss, data.inputs, targets)
    at_answer = lambda outputs: loss(outputs[:, jnp.asarray(positions)], targets)  # noqa: E731
    path = f"transformer/layer_{blocks.layers - 1}/attention"
    return module, params, data.inputs, at_answer, path, risk, positions, piecewise_linear


QUICK = ("pre_norm", "two_layers", "linear")  # the others differ in one choice each, and run nightly


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS]
)
def test_blocks_of_the_network(name):
    module, params, tokens, loss, path, risk, positions, piecewise_linear = problem(name, jax.random.key(1))

    @jax.jit
    def closed_forms(params):
        options = {"positions": positions, "piecewise_linear": piecewise_linear}
        whole = attention_hessian_in(module, params, tokens, loss, path, **options)
        parts = assemble(cut_at_attention(module, params, tokens, path), loss, positions, piecewise_linear)
        return whole, parts.norms()

    hessian, norms = closed_forms(params)
    ends = np.cumsum([0, *(np.size(hessian.point.params[leaf]) for leaf in hessian.names)])
    rows = {leaf: slice(a, b) for leaf, a, b in zip(hessian.names, ends, ends[1:], strict=False)}
    for part, operator in zip(("full", "outer", "functional"), ("hessian", "ggn", "functional"), strict=True):
        dense = np.asarray(OPERATORS[operator](risk, params, block=path).dense())
        assert_close(hessian.dense(part), dense)
        size = np.linalg.norm(dense)
        for (row, column), norm in norms[part].items():
            assert_close(norm, np.linalg.norm(dense[rows[row], rows[column]]), scale=size)
        assert_close(norms[part], hessian.norms()[part])


def test_a_square_root_of_a_cancelling_sum_is_not_nan(key):
    """Without a functional block, the norm of H is that of H_o."""
    module, params, tokens, loss, path, _, positions, _ = problem("relu", key)
    norms = jax.jit(lambda p: assemble(cut_at_attention(module, p, tokens, path), loss, positions, True).norms())(
        params
    )
    assert_close(norms["full"]["value", "value"], norms["outer"]["value", "value"], 1e-14)
    assert float(norms["functional"]["value", "value"]) == 0


def test_all_positions_are_the_default(key):
    module, params, tokens, loss, path, *_ = problem("two_layers", key)
    some = attention_hessian_in(module, params, tokens, loss, path, positions=answer_positions(DIGITS))
    every = attention_hessian_in(module, params, tokens, loss, path)
    assert_close(some.norms(), every.norms(), 1e-12)


def test_the_rest_behind_the_cut_is_the_network(key):
    module, params, tokens, _, _, _, _, _ = problem("pre_norm", key)
    cut = cut_at_attention(module, params, tokens, "transformer/layer_0/attention")
    assert_close(cut.rest(cut.outputs), module.apply({"params": params}, tokens), 0)
    assert float(jnp.max(jnp.abs(cut.rest(0 * cut.outputs) - cut.rest(cut.outputs)))) > 1e-6


def test_bad_input():
    module, params, tokens, loss, path, *_ = problem("two_layers", jax.random.key(1))
    build = partial(attention_hessian_in, module, params, tokens, loss)
    with pytest.raises(ValueError, match=r"path is 'layer_7/attention'; the model called .* 0 times, expected 1"):
        build("layer_7/attention")
    with pytest.raises(ValueError, match="an entry of positions is 6; expected 0 <= an entry of positions <= 5"):
        build(path, positions=(6,))
