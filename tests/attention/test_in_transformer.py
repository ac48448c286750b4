"""The last attention layer inside a transformer: every block of H, H_o and H_f of the network against autodiff."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import oracles
from attnlab.attention import describe
from attnlab.attention.in_transformer import assemble, attention_hessian_in, cut_at_attention
from attnlab.data.addition import addition, answer_positions
from attnlab.losses import cross_entropy, square_loss
from attnlab.models.adapters import at_positions, from_linen
from attnlab.models.attention import AttentionConfig, SelfAttention
from attnlab.models.transformer import LanguageModel, LanguageModelConfig, TransformerConfig
from attnlab.objective import objective, predict_from_block
from attnlab.trees import select
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
    chosen = select(params, path)
    risk = replace(risk, predict=predict_from_block(risk.predict, params, chosen))
    whole, outer = (np.asarray(oracle(risk, chosen.take(params))) for oracle in (oracles.hessian, oracles.ggn))
    for part, dense in {"full": whole, "outer": outer, "functional": whole - outer}.items():
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


def test_an_earlier_layer_is_refused():
    """Behind it tokens meet again: sums over single tokens would be wrong."""
    module, params, tokens, loss, *_ = problem("two_layers", jax.random.key(1))
    with pytest.raises(ValueError, match=r"come others, transformer/layer_1/attention, where its tokens meet again"):
        jax.eval_shape(lambda p: attention_hessian_in(module, p, tokens, loss, "transformer/layer_0/attention"), params)


class Behind(nn.Module):
    """An attention layer and a function of its outputs."""

    last: Callable
    attention: AttentionConfig = ATTENTION

    @nn.compact
    def __call__(self, tokens):
        return self.last(SelfAttention(self.attention, name="attention")(tokens))


def of_squares(outputs):
    return jnp.sum(outputs**2)


READS_LAST = {"loss": lambda outputs: of_squares(outputs[:, 1:]), "positions": (1,)}
BAD = {  # what stands behind the layer, what is asked for, what is said
    "path": (nn.gelu, {"path": "layer_7"}, "path is 'layer_7'; the model called .* 0 times, expected 1"),
    "range": (nn.gelu, {"positions": (3,)}, "is 3; expected 0 <= an entry of positions <= 2"),
    "axes": (
        nn.gelu,
        {"inputs": jnp.ones((3, WIDTH))},
        r"have shape \(3, 8\); expected \(sequences, tokens, features\)",
    ),
    "pooled": (
        lambda out: jnp.mean(out, axis=1),
        {},
        r"outputs have shape \(2, 8\) for \(sequences, tokens\) \(2, 3\)",
    ),
    "mixed": (lambda out: jnp.cumsum(out, axis=1), {}, "the model behind the attention layer couples different tokens"),
    "reads": (nn.gelu, READS_LAST, r"positions are \[1\], but the loss also reads the outputs at \[2\]"),
    "concave": (
        nn.gelu,
        {"loss": lambda outputs: -of_squares(outputs)},
        "the loss has curvature -2 in the outputs of a",
    ),
    "coupled": (
        nn.gelu,
        {"loss": lambda outputs: of_squares(jnp.sum(outputs, axis=1))},
        "second derivative of the loss couples different tokens",
    ),
    "curved": (nn.gelu, {"piecewise_linear": True}, "piecewise_linear is True, but what stands behind the layer has"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, key):
    last, asked, message = BAD[name]
    module, tokens = Behind(last), jax.random.normal(key, (2, 3, WIDTH))
    arguments = {
        "module": module,
        "params": module.init(key, tokens)["params"],
        "inputs": tokens,
        "loss": of_squares,
        "path": "attention",
    }
    with pytest.raises(ValueError, match=message):
        attention_hessian_in(**arguments | asked)


def test_names_of_parameters_that_the_layer_does_not_have(key):
    module, tokens = Behind(nn.relu), jax.random.normal(key, (2, 3, WIDTH))
    params = jax.eval_shape(module.init, key, tokens)["params"]

    def norms(names):
        cut = lambda p: cut_at_attention(module, p, tokens, "attention")  # noqa: E731
        return jax.eval_shape(lambda p: assemble(cut(p), of_squares, None, True).norms(names), params)

    assert set(norms(["query"])["full"]) == {("query", "query")}
    with pytest.raises(ValueError, match=r"\['query', 'keys'\], where 'keys' is no .*; expected some of key, output, "):
        norms(["query", "keys"])
    with pytest.raises(ValueError, match=r"names is 'query', where 'q' is no parameter .*Leave names out for all"):
        norms("query")


def test_relu_behind_the_layer_is_piecewise_linear(key):
    module, tokens = Behind(nn.relu), jax.random.normal(key, (2, 3, WIDTH))
    params = module.init(key, tokens)["params"]
    assert assemble(cut_at_attention(module, params, tokens, "attention"), of_squares, None, True).bend is None


def test_the_factors_make_the_blocks_of_a_layer_in_a_network(key):
    """What `describe` gives, put together as its formulas say: at the tokens that the loss reads, Λ_o and Λ_f apart."""
    config = replace(ATTENTION, heads=1, merged=True, output_dim=None)
    module, tokens = Behind(nn.gelu, config), jax.random.normal(key, (2, 3, WIDTH))
    params, loss = module.init(key, tokens)["params"], lambda outputs: of_squares(outputs[:, 1:])
    hessian = jax.jit(lambda p: attention_hessian_in(module, p, tokens, loss, "attention", positions=(1, 2)))(params)
    rows = {(row.row, row.column, row.part): row for row in describe(hessian)}
    scores, third = "sum_i τ x_i (τ x_i)ᵀ ⊗ ", np.zeros((4, WIDTH, WIDTH))
    for part, curvature, more in (("outer", "Λ_i", ""), ("functional", "Λf_i", f" + {scores}κ̂_i")):
        row = rows["query_key", "query_key", part]
        assert row.formula == f"{scores}Σ_i W_V {curvature} W_Vᵀ Σ_i{more}"
        found = {factor.symbol: np.asarray(factor.array) for factor in row.factors}
        x, second, behind = (found[name].reshape(4, -1, found[name].shape[-1]) for name in ("x_i", "Σ_i", curvature))
        moved = second @ found["W_V"][0]
        matrices = moved @ behind @ np.swapaxes(moved, 1, 2) + found.get("κ̂_i", third).reshape(third.shape)
        x = config.score_scale * x[:, 0]
        expected = np.einsum("nr,ns,ncd->rcsd", x, x, matrices).reshape(WIDTH**2, WIDTH**2)
        assert_close(hessian.block("query_key", "query_key", part).dense(), expected, 1e-12)
        assert_close(row.norm, np.linalg.norm(expected), 1e-12)
