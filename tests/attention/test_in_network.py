"""An attention layer inside a network: every block of H, H_o and H_f of the network against autodiff."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.tree_util import Partial

import oracles
from attnlab.attention import PARTS, attention_hessian, cut_at_attention, describe
from attnlab.attention.hessian import layer_curvature
from attnlab.data.addition import addition, answer_positions
from attnlab.losses import cross_entropy, square_loss
from attnlab.models.adapters import at_positions, from_linen
from attnlab.models.attention import AttentionConfig, SelfAttention
from attnlab.models.positions import Rotary
from attnlab.models.transformer import LanguageModel, LanguageModelConfig, TransformerConfig
from attnlab.objectives import objective, predict_from_block
from attnlab.trees import block_slices, select
from compare import assert_close
from nightly import nightly

WIDTH, DIGITS = 8, 1
ATTENTION = AttentionConfig(4, 4, heads=2, causal=True, output_dim=WIDTH, init="normal", gain=0.5)
BLOCKS = TransformerConfig(ATTENTION, mlp_width=10, norm=None, bias=True, init="normal", gain=0.5)
LLAMA_HEAD = replace(ATTENTION, rotary=Rotary(base=20.0), key_value_heads=1)
LLAMA = TransformerConfig(
    LLAMA_HEAD, 2, 10, "gated", "silu", normalization="rms_norm", final_norm=True, init="normal", gain=0.5
)
LINEAR = replace(ATTENTION, weights="linear", output_dim=None)

# name: (the blocks, whether the rest of the network behind the last attention layer is piecewise linear)
NETWORKS = {
    "no_norm": (BLOCKS, False),
    "two_layers": (replace(BLOCKS, layers=2), False),
    "pre_norm": (replace(BLOCKS, layers=2, norm="pre", final_norm=True), False),
    "post_norm": (replace(BLOCKS, norm="post"), False),
    "relu": (replace(BLOCKS, activation="relu", attention=replace(ATTENTION, key_dim=8, value_dim=8, heads=1)), True),
    "merged": (replace(BLOCKS, layers=2, norm="pre", attention=replace(ATTENTION, merged=True)), False),
    "llama": (LLAMA, False),
    "linear": (TransformerConfig(LINEAR, 2, norm=None, residual=False), True),
}


def problem(name, key):
    """Model, parameters, the risk, the path of the last layer, and whether what stands behind is piecewise linear."""
    blocks, piecewise_linear = NETWORKS[name]
    module = LanguageModel(LanguageModelConfig(blocks, vocabulary=12, length=6, width=WIDTH))
    data, positions = addition(key, 3, DIGITS), answer_positions(DIGITS)
    targets = jax.nn.one_hot(data.targets, 12, dtype=jnp.float64) if name == "linear" else data.targets
    loss = square_loss if name == "linear" else cross_entropy
    params = jax.jit(module.init)(key, data.inputs)["params"]
    risk = objective(at_positions(from_linen(module), positions), loss, data.inputs, targets)
    return module, params, risk, f"transformer/layer_{blocks.layers - 1}/attention", piecewise_linear


@jax.jit(static_argnames=("path", "options"))
def closed_forms(risk, params, path, options=()):
    whole = attention_hessian(risk, params, path, **dict(options))
    return whole, layer_curvature(risk, params, path, **dict(options)).norms()


def check_blocks(risk, params, path, **options):
    """All parts of the layer's blocks, and their norms, against autodiff of the risk in its weights alone."""
    hessian, norms = closed_forms(risk, params, path, tuple(options.items()))
    chosen = select(params, path)
    rows = block_slices(hessian.point.params)
    risk = replace(risk, predict=predict_from_block(risk.predict, params, chosen))
    whole, outer = (np.asarray(oracle(risk, chosen.take(params))) for oracle in (oracles.hessian, oracles.ggn))
    for part, dense in {"hessian": whole, "ggn": outer, "functional": whole - outer}.items():
        assert_close(hessian.dense(part), dense)
        size = np.linalg.norm(dense)
        for (row, column), norm in norms[part].items():
            assert_close(norm, np.linalg.norm(dense[rows[row], rows[column]]), scale=size)
        assert_close(norms[part], hessian.norms()[part])


# The others differ in one choice each, or have one layer more to compile.
@pytest.mark.parametrize("name", nightly(NETWORKS, ("linear",)))
def test_blocks_of_the_network(name):
    _, params, risk, path, piecewise_linear = problem(name, jax.random.key(1))
    check_blocks(risk, params, path, piecewise_linear=piecewise_linear)


@pytest.mark.slow  # minutes of compiling; what tokens that meet do is held every time against the tokenwise form
@pytest.mark.parametrize("name", ["pre_norm", "merged"])
def test_blocks_of_an_earlier_layer(name):
    """Behind it tokens meet again."""
    _, params, risk, _, _ = problem(name, jax.random.key(1))
    check_blocks(risk, params, "transformer/layer_0/attention")


@pytest.mark.slow
@pytest.mark.parametrize("name", nightly(("no_norm", "two_layers"), ("no_norm",)))
def test_coupled_and_tokenwise_agree_where_both_hold(name, key):
    _, params, risk, path, _ = problem(name, key)
    build = jax.jit(attention_hessian, static_argnames=("layer", "coupled"))
    tokenwise, coupled = (build(risk, params, path, coupled=coupled) for coupled in (False, True))
    for part in PARTS:
        assert_close(coupled.dense(part), tokenwise.dense(part), 1e-12)
    assert_close(coupled.norms(), tokenwise.norms(), 1e-10)
    assert_close(coupled.traces(), tokenwise.traces(), 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("layer", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_logits_in_two_factors(layer):
    """The same blocks as those of the logits multiplied out: in the last layer, and where tokens meet again."""
    module, params, risk, _, _ = problem("llama", jax.random.key(1))
    factored = from_linen(LanguageModel(replace(module.config, factored=True)))
    tokens, path = risk.inputs, f"transformer/layer_{layer}/attention"
    risks = (objective(model, cross_entropy, tokens, tokens[:, ::-1]) for model in (factored, from_linen(module)))
    found, expected = (attention_hessian(risk, params, path) for risk in risks)
    for part in PARTS:
        assert_close(found.dense(part), expected.dense(part), 1e-10)


@pytest.mark.slow
def test_a_square_root_of_a_cancelling_sum_is_not_nan(key):
    """Without a functional block, the norm of H is that of H_o."""
    _, params, risk, path, _ = problem("relu", key)
    _, norms = closed_forms(risk, params, path, (("piecewise_linear", True),))
    assert_close(norms["hessian"]["value", "value"], norms["ggn"]["value", "value"], 1e-14)
    assert float(norms["functional"]["value", "value"]) == 0


@pytest.mark.slow
def test_some_positions_are_weights_of_zero_elsewhere(key):
    """Read at some positions, or at all with a weight of 0 at the others."""
    module, params, risk, path, _ = problem("two_layers", key)
    places = jnp.asarray(answer_positions(DIGITS))
    targets = jnp.zeros(risk.inputs.shape, risk.targets.dtype).at[:, places].set(risk.targets)
    weights = jnp.zeros(risk.inputs.shape).at[:, places].set(1)
    every = objective(from_linen(module), cross_entropy, risk.inputs, targets, weights=weights)
    found, expected = (attention_hessian(each, params, path).norms() for each in (risk, every))
    assert_close(found, expected, 1e-12)


def test_the_rest_behind_the_cut_is_the_network(key):
    module, params, risk, _, _ = problem("pre_norm", key)
    cut = cut_at_attention(replace(risk, predict=from_linen(module)), params, "transformer/layer_0/attention")
    assert_close(cut.rest(cut.outputs), module.apply({"params": params}, risk.inputs), 0)
    assert float(jnp.max(jnp.abs(cut.rest(0 * cut.outputs) - cut.rest(cut.outputs)))) > 1e-6


def test_a_model_written_by_hand_around_the_layer(key):
    """What stands around may be any function, and other attention layers may be bound in it."""
    later = AttentionConfig(3, 3, causal=True, output_dim=WIDTH)
    tokens = jax.random.normal(key, (2, 3, WIDTH))
    params = SelfAttention(ATTENTION).init(key, tokens)["params"]
    bound = SelfAttention(later).init(key, tokens)["params"]

    def predict(params, tokens):
        tokens = tokens + SelfAttention(ATTENTION).apply({"params": params["mine"]}, jnp.tanh(tokens))
        return tokens + SelfAttention(later).apply({"params": bound}, tokens)

    risk = objective(predict, square_loss, tokens, jnp.zeros_like(tokens))
    params = {"mine": params}
    hessian = attention_hessian(risk, params)
    for part, oracle in (("hessian", oracles.hessian), ("ggn", oracles.ggn)):
        assert_close(hessian.dense(part), oracle(risk, params))


class Behind(nn.Module):
    """An attention layer and a function of its outputs."""

    last: Callable
    attention: AttentionConfig = ATTENTION

    @nn.compact
    def __call__(self, tokens):
        return self.last(SelfAttention(self.attention, name="attention")(tokens))


def mean_of_squares(outputs, targets):
    return jnp.mean(outputs**2)


BAD = {  # what stands behind the layer, the loss, what is asked for, what is said
    "path": (
        nn.gelu,
        mean_of_squares,
        {"layer": "layer_7"},
        "there is no attention layer 'layer_7'; expected .*: atten",
    ),
    "mixed": (
        lambda out: jnp.cumsum(out, axis=1),
        mean_of_squares,
        {},
        "the model behind the attention layer couples different tokens",
    ),
    "concave": (nn.gelu, lambda *data: -mean_of_squares(*data), {}, "the loss has curvature -.* in the outputs of a"),
    "coupled": (
        nn.gelu,
        lambda out, targets: jnp.sum(jnp.sum(out, axis=1) ** 2),
        {},
        "second derivative of the loss couples different tokens",
    ),
    "sequences": (
        lambda out: jnp.cumsum(out, axis=0),
        mean_of_squares,
        {"coupled": True},
        "what stands behind the attention layer couples different sequences",
    ),
    "curved": (
        nn.gelu,
        mean_of_squares,
        {"piecewise_linear": True},
        "piecewise_linear is True, but what stands behind the layer has",
    ),
}


def behind(last, loss, key, positions=None):
    module, tokens = Behind(last), jax.random.normal(key, (2, 3, WIDTH))
    predict = from_linen(module) if positions is None else at_positions(from_linen(module), positions)
    return objective(predict, loss, tokens, tokens), module.init(key, tokens)["params"]


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, key):
    last, loss, asked, message = BAD[name]
    risk, params = behind(last, loss, key)
    with pytest.raises(ValueError, match=message):
        attention_hessian(risk, params, **asked)


def test_positions_are_read_alone_and_once(key):
    risk, params = behind(lambda out: out[:, ::-1], mean_of_squares, key, (0,))
    with pytest.raises(
        ValueError, match=r"outputs at positions \[0\] depend on other tokens behind the attention layer"
    ):
        attention_hessian(risk, params)
    risk, params = behind(nn.gelu, mean_of_squares, key, (1, 1))
    with pytest.raises(ValueError, match=r"positions are \[1, 1\]; expected each token once"):
        attention_hessian(risk, params)


def test_models_without_a_layer_of_their_own(key):
    risk, params = behind(nn.gelu, mean_of_squares, key)
    for predict, message in (
        (lambda params, tokens: tokens @ params["attention"]["output"].T, "calls no SelfAttention of attnlab.models"),
        (lambda params, tokens: risk.predict(jax.tree.map(jnp.sin, params), tokens), "are not arrays of params"),
        (
            lambda params, tokens: risk.predict(params, risk.predict(params, tokens)),
            r"calls the attention layer attention 2 times; expected once",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            attention_hessian(replace(risk, predict=Partial(predict)), params)
    with pytest.raises(TypeError, match="risk is a dict; expected an objective"):
        attention_hessian({}, params)
    _, params, risk, _, _ = problem("two_layers", key)
    with pytest.raises(ValueError, match="layer is None and the model has 2; expected one of: transformer/layer_0"):
        attention_hessian(risk, params)


@pytest.mark.slow
def test_a_pooled_prediction_couples_the_tokens(key):
    """One row for a sequence: its tokens meet in the mean."""
    risk, params = behind(lambda out: jnp.mean(nn.gelu(out), axis=1), square_loss, key)
    risk = replace(risk, targets=risk.targets[:, 0])
    check_blocks(risk, params, "attention")


def test_names_of_parameters_that_the_layer_does_not_have(key):
    risk, params = behind(nn.relu, mean_of_squares, key)

    def norms(names):
        found = lambda params: layer_curvature(risk, params, piecewise_linear=True).norms(names)  # noqa: E731
        return jax.eval_shape(found, params)

    assert set(norms(["query"])["hessian"]) == {("query", "query")}
    with pytest.raises(ValueError, match=r"\['query', 'keys'\], where 'keys' is no .*; expected some of key, output, "):
        norms(["query", "keys"])
    with pytest.raises(ValueError, match=r"names is 'query', where 'q' is no parameter .*Leave names out for all"):
        norms("query")


def test_relu_behind_the_layer_is_piecewise_linear(key):
    risk, params = behind(nn.relu, mean_of_squares, key)
    assert layer_curvature(risk, params, piecewise_linear=True).bend is None


@pytest.mark.slow
def test_the_factors_make_the_blocks_of_a_layer_in_a_network(key):
    """What `describe` gives, put together as its formulas say: at the tokens that the loss reads, Λ_o and Λ_f apart."""
    config = replace(ATTENTION, heads=1, merged=True, output_dim=None)
    module, tokens = Behind(nn.gelu, config), jax.random.normal(key, (2, 3, WIDTH))
    params = module.init(key, tokens)["params"]
    risk = objective(at_positions(from_linen(module), (1, 2)), mean_of_squares, tokens, tokens[:, 1:])
    hessian = jax.jit(attention_hessian)(risk, params)
    rows = {(row.row, row.column, row.part): row for row in describe(hessian)}
    scores, third = "sum_i τ x_i (τ x_i)ᵀ ⊗ ", np.zeros((4, WIDTH, WIDTH))
    for part, curvature, more in (("ggn", "Λ_i", ""), ("functional", "Λf_i", f" + {scores}κ̂_i")):
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
