"""Transformer blocks, stacks and the language model against loops in numpy, and their symmetries."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive_models import language_model as naive_language_model
from naive_models import transformer as naive_transformer

from attnlab.data.addition import addition, answer_positions
from attnlab.losses import cross_entropy
from attnlab.models.adapters import at_positions, from_linen
from attnlab.models.attention import AttentionConfig, attention_maps
from attnlab.models.positions import Rotary
from attnlab.models.transformer import (
    LanguageModel,
    LanguageModelConfig,
    Transformer,
    TransformerConfig,
    stack_layers,
    unstack_layers,
)
from attnlab.objectives import check_objective, objective
from attnlab.trees import dimension, leaf_names
from cases import generator, generic_params
from compare import assert_close
from nightly import nightly

BATCH, LENGTH, DIM = 2, 4, 3
ATTENTION = AttentionConfig(key_dim=2, value_dim=2, heads=2, output_dim=DIM)
CONFIG = TransformerConfig(ATTENTION, mlp_width=5)

CONFIGS = {
    "pre": CONFIG,
    "pre_final": replace(CONFIG, final_norm=True, activation="relu"),
    "post": replace(CONFIG, norm="post", bias=True, epsilon=0.1),
    "no_norm": replace(CONFIG, norm=None, activation="tanh"),
    "no_mlp": replace(CONFIG, mlp_width=None),
    "no_residual": replace(CONFIG, residual=False, norm=None, activation="identity"),
    "post_no_residual": replace(CONFIG, residual=False, norm="post"),
    "two_layers": replace(CONFIG, layers=2),
    "three_causal_layers": replace(CONFIG, layers=3, attention=replace(ATTENTION, causal=True), bias=True),
}
LLAMA_ATTENTION = AttentionConfig(
    key_dim=4, value_dim=2, heads=4, key_value_heads=2, rotary=Rotary(base=50.0), causal=True, output_dim=DIM
)
LLAMA = TransformerConfig(
    LLAMA_ATTENTION, 2, 5, mlp="gated", activation="silu", normalization="rms_norm", final_norm=True, epsilon=1e-5
)
NEOX_ATTENTION = replace(LLAMA_ATTENTION, key_value_heads=None, rotary=Rotary(share=0.5), bias=True)
NEOX = TransformerConfig(NEOX_ATTENTION, 2, 5, parallel=True, final_norm=True, bias=True)
GPT2 = TransformerConfig(replace(ATTENTION, causal=True, bias=True), 2, 5, "plain", "gelu_tanh", bias=True)
NEIGHBOURS = replace(LLAMA, attention=replace(LLAMA_ATTENTION, rotary=Rotary(pairs="neighbours")), bias=True)
MODEL = LanguageModelConfig(replace(CONFIG, layers=2, attention=replace(ATTENTION, causal=True)), 6, LENGTH, DIM)

LANGUAGE_MODELS = {
    "untied": MODEL,
    "llama": LanguageModelConfig(LLAMA, 6, LENGTH, DIM, positions="none", tied=True),
    "neox": LanguageModelConfig(NEOX, 6, LENGTH, DIM, positions="none"),
    "gpt2": LanguageModelConfig(GPT2, 6, LENGTH, DIM, tied=True),
    "neighbours": LanguageModelConfig(NEIGHBOURS, 6, LENGTH, DIM, positions="none", tied=True),
}


def transformer(key, config, dtype=jnp.float64):
    random, module = generator(key), Transformer(config)
    tokens = jnp.asarray(random.standard_normal((BATCH, LENGTH, DIM)), dtype)
    return module, generic_params(module, tokens, random), tokens


def language_model(key, config=MODEL):
    random, module = generator(key), LanguageModel(config)
    tokens = jnp.asarray(random.integers(config.vocabulary, size=(BATCH, LENGTH)))
    return module, generic_params(module, tokens, random), tokens


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_transformer_is_the_loop(config):
    module, params, tokens = transformer(jax.random.key(1), config)
    numbers = jax.tree.map(np.asarray, params)
    expected = np.stack([naive_transformer(numbers, sequence, config) for sequence in np.asarray(tokens)])
    assert_close(jax.jit(module.apply)({"params": params}, tokens), expected, 1e-12)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_model_is_the_loop(name):
    config = LANGUAGE_MODELS[name]
    module, params, tokens = language_model(jax.random.key(1), config)
    numbers = jax.tree.map(np.asarray, params)
    expected = np.stack([naive_language_model(numbers, sequence, config) for sequence in np.asarray(tokens)])
    assert_close(jax.jit(module.apply)({"params": params}, tokens), expected, 1e-12)
    logits = LanguageModel(replace(config, factored=True)).apply({"params": params}, tokens)
    assert logits.shape == expected.shape
    assert_close(logits.dense(), expected, 1e-12)


@pytest.mark.parametrize(
    "options",
    nightly(
        ({"scan": True}, {"remat": "block"}, {"scan": True, "remat": "elementwise"}),
        ({"scan": True, "remat": "elementwise"},),
    ),
    ids=str,
)
def test_scanned_and_recomputed_blocks_are_the_same_function(options):
    config = LANGUAGE_MODELS["llama"]
    module, params, tokens = language_model(jax.random.key(1), config)
    other = LanguageModel(replace(config, transformer=replace(LLAMA, **options)))
    stacked = "scan" in options
    theirs = stack_layers(params) if stacked else params
    assert jax.tree.map(jnp.shape, theirs) == jax.tree.map(jnp.shape, other.init(jax.random.key(0), tokens)["params"])

    def slopes(module, params):
        return jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(module.apply({"params": params}, tokens)))))(params)

    found = slopes(other, theirs)
    assert_close(unstack_layers(found) if stacked else found, slopes(module, params), 1e-12)
    maps = attention_maps(other, theirs, tokens)
    expected = jnp.stack(list(attention_maps(module, params, tokens).values()))
    assert_close(jnp.concatenate([jnp.atleast_2d(m).reshape(-1, *expected.shape[1:]) for m in maps.values()]), expected)


def test_layers_that_are_not_there_to_stack():
    with pytest.raises(ValueError, match=r"params hold \['query'\]; expected layer_0"):
        stack_layers({"query": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"expected layers/\.\.\., stacked"):
        unstack_layers({"transformer": {"layer_0": jnp.ones(2)}})


def test_stack_is_the_composition_of_its_blocks(key):
    module, params, tokens = transformer(key, CONFIGS["two_layers"])
    one_layer = jax.jit(Transformer(CONFIG).apply)
    expected = tokens
    for name in ("layer_0", "layer_1"):
        expected = one_layer({"params": {"layer_0": params[name]}}, expected)
    assert_close(module.apply({"params": params}, tokens), expected, 1e-13)


@pytest.mark.parametrize("name", ["pre_final", "post", "no_norm", "two_layers"])
def test_without_positions_it_commutes_with_permutations(name):
    module, params, tokens = transformer(jax.random.key(1), CONFIGS[name])
    order = jax.random.permutation(jax.random.key(2), LENGTH)
    predict = jax.jit(from_linen(module))
    assert_close(predict(params, tokens[:, order]), predict(params, tokens)[:, order], 1e-13)


def test_causal_stack_does_not_depend_on_later_tokens(key):
    module, params, tokens = transformer(key, CONFIGS["three_causal_layers"])
    jacobian = jax.jit(jax.jacobian(from_linen(module), argnums=1))(params, tokens[0])
    size = np.asarray(jnp.max(jnp.abs(jacobian), axis=(1, 3)))  # (query, key)
    assert np.all(size[np.triu_indices(LENGTH, 1)] == 0)
    assert np.all(size[np.tril_indices(LENGTH)] > 0)


def test_logits_do_not_depend_on_later_tokens(key):
    module, params, tokens = language_model(key)
    changed = tokens.at[:, -1].set((tokens[:, -1] + 1) % MODEL.vocabulary)
    predict = jax.jit(from_linen(module))
    before, after = predict(params, tokens), predict(params, changed)
    assert_close(after[:, :-1], before[:, :-1], 0)
    assert float(jnp.max(jnp.abs(after[:, -1] - before[:, -1]))) > 1e-3


def test_positions_are_told_apart(key):
    """One token repeated: without position embeddings every logit would be the same at every position."""
    module, params, tokens = language_model(key)
    logits = module.apply({"params": params}, jnp.zeros_like(tokens))[0]
    assert float(jnp.max(jnp.std(logits, axis=0))) > 1e-3
    params["position_embedding"] = jnp.zeros_like(params["position_embedding"])
    logits = module.apply({"params": params}, jnp.zeros_like(tokens))[0]
    assert_close(jnp.std(logits, axis=0), jnp.zeros(MODEL.vocabulary), 1e-13, scale=1)


def test_outputs_of_post_norm_are_normalised(key):
    module, params, tokens = transformer(key, replace(CONFIG, norm="post", epsilon=1e-12))
    params["layer_0"]["mlp_norm"] = {"scale": jnp.ones(DIM), "bias": jnp.zeros(DIM)}
    outputs = module.apply({"params": params}, tokens)
    assert_close(jnp.mean(outputs, axis=-1), jnp.zeros((BATCH, LENGTH)), 1e-13, scale=1)
    assert_close(jnp.var(outputs, axis=-1), jnp.ones((BATCH, LENGTH)), 1e-9)


def test_pre_norm_with_zero_matrices_is_the_identity(key):
    module, params, tokens = transformer(key, replace(CONFIG, layers=2, init="zeros"))
    for layer in params.values():
        layer["attention"]["output"] = jnp.zeros_like(layer["attention"]["output"])
        layer["mlp"]["down"] = jnp.zeros_like(layer["mlp"]["down"])
    assert_close(module.apply({"params": params}, tokens), tokens, 0)


def test_attention_maps_name_their_layers(key):
    module, params, tokens = language_model(key)
    maps = attention_maps(module, params, tokens)
    assert list(maps) == ["transformer/layer_0/attention", "transformer/layer_1/attention"]
    for weights in maps.values():
        assert weights.shape == (BATCH, 2, LENGTH, LENGTH)
        assert_close(weights.sum(axis=-1), jnp.ones((BATCH, 2, LENGTH)), 1e-14)


def test_mask_reaches_every_block(key):
    config = replace(CONFIG, layers=2)
    module, params, tokens = transformer(key, config)
    causal = Transformer(replace(config, attention=replace(ATTENTION, causal=True)))
    mask = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))
    expected = causal.apply({"params": params}, tokens)
    assert_close(module.apply({"params": params}, tokens, mask), expected, 1e-14)


BLOCK = ("attention/key", "attention/output", "attention/query", "attention/value")
NAMES = {
    "no_mlp": (*BLOCK, "attention_norm/bias", "attention_norm/scale"),
    "no_norm": (*BLOCK, "mlp/down", "mlp/up"),
    "post": (
        *BLOCK,
        *("attention_norm/bias", "attention_norm/scale"),
        *("mlp/down", "mlp/down_bias", "mlp/up", "mlp/up_bias", "mlp_norm/bias", "mlp_norm/scale"),
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_parameter_names(name):
    _, params, _ = transformer(jax.random.key(1), CONFIGS[name])
    assert leaf_names(params) == tuple(f"layer_0/{leaf}" for leaf in NAMES[name])


def test_parameter_names_of_the_language_model():
    names = leaf_names(language_model(jax.random.key(1))[1])
    assert names[:2] == ("position_embedding", "token_embedding")
    assert names[-1] == "unembedding"
    assert all(name.startswith(("transformer/layer_0/", "transformer/layer_1/")) for name in names[2:-1])


@pytest.mark.parametrize("dtype", ["float32", "float64", None])
def test_dtype_of_a_language_model(dtype):
    module, params, tokens = language_model(jax.random.key(1), replace(MODEL, dtype=dtype))
    arrays = (params, module.apply({"params": params}, tokens))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(arrays)} == {dtype or "float64"}


def test_float64_needs_64_bit_mode():
    with jax.enable_x64(False), pytest.raises(ValueError, match=r"JAX runs in 32-bit mode.*jax_enable_x64"):
        language_model(jax.random.key(1), replace(MODEL, dtype="float64"))


def figure_3(depth, embedding_std, width=128):
    """The model of arXiv 2410.10986, figure 3: all weights N(0, (0.8 / sqrt(width))^2), biases zero."""
    scheme = {"init": "normal", "gain": 0.8 / math.sqrt(width)}
    attention = AttentionConfig(key_dim=width, value_dim=width, causal=True, output_dim=width, **scheme)
    blocks = TransformerConfig(attention, depth, 4 * width, activation="relu", norm=None, bias=True, **scheme)
    return LanguageModelConfig(blocks, vocabulary=12, length=18, width=width, embedding_std=embedding_std, **scheme)


def test_model_and_task_of_figure_3():
    config, key = figure_3(depth=2, embedding_std=0.3), jax.random.key(1)
    tokens, targets = addition(key, count=2)
    params = jax.jit(LanguageModel(config).init)(key, tokens)["params"]
    # embeddings, then per layer four square matrices and an MLP of four times the width with biases, then unembedding
    assert dimension(params) == (12 + 18) * 128 + 2 * (4 * 128**2 + 8 * 128**2 + 5 * 128) + 128 * 12
    for name, leaf in zip(leaf_names(params), map(np.asarray, jax.tree.leaves(params)), strict=True):
        std = 0.0 if name.endswith("bias") else 0.3 if "embedding" in name.split("_") else 0.8 / math.sqrt(128)
        assert abs(np.mean(leaf**2) - std**2) <= 5 * std**2 * math.sqrt(2 / leaf.size), name
    predict = at_positions(from_linen(LanguageModel(config)), answer_positions())
    risk = objective(predict, cross_entropy, tokens, targets)
    check_objective(risk, params)
    assert jax.eval_shape(predict, params, tokens).shape == (2, 6, 12)


BAD_CONFIGS = [
    (lambda: replace(CONFIG, layers=0), "layers is 0"),
    (lambda: replace(CONFIG, mlp_width=0), "mlp_width is 0"),
    (lambda: replace(CONFIG, activation="gleu"), "no activation 'gleu'.*Did you mean"),
    (lambda: replace(CONFIG, norm="preln"), "no place of the norm 'preln'; expected one of: pre, post, None"),
    (lambda: replace(CONFIG, normalization="rms"), "no kind of norm 'rms'; expected one of: layer_norm, rms_norm"),
    (lambda: replace(CONFIG, remat="all"), "no rematerialisation 'all'; expected one of: elementwise, block, None"),
    (lambda: replace(CONFIG, mlp="swiglu"), "no kind of MLP 'swiglu'; expected one of: plain, gated"),
    (lambda: replace(CONFIG, parallel=True, norm="post"), "parallel is True with norm='post'"),
    (lambda: replace(MODEL, positions="rotary"), "no kind of position embeddings 'rotary'"),
    (lambda: replace(LLAMA_ATTENTION, key_value_heads=3), "key_value_heads is 3; expected a divisor of the 4 heads"),
    (
        lambda: replace(LLAMA_ATTENTION, key_dim=3),
        "rotary turns 3 of the 3 entries of a head; expected a positive even",
    ),
    (lambda: replace(LLAMA_ATTENTION, merged=True), "merged is True and rotary is Rotary"),
    (lambda: Rotary(pairs="interleaved"), "no pairing of rotary embeddings 'interleaved'; expected one of: neigh"),
    (lambda: Rotary(base=float("nan")), "base is nan"),
    (lambda: replace(CONFIG, epsilon=0.0), "epsilon is 0.0; expected a positive number"),
    (lambda: replace(CONFIG, init="he"), "no initialisation scheme 'he'"),
    (lambda: replace(MODEL, vocabulary=0), "vocabulary is 0"),
    (lambda: replace(MODEL, embedding_std=-1.0), "embedding_std is -1.0"),
    (lambda: replace(MODEL, dtype="int32").parameter_dtype, "dtype is int32; expected a real floating-point"),
]


@pytest.mark.parametrize(("make", "message"), BAD_CONFIGS)
def test_bad_config(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_residual_needs_an_attention_layer_of_the_same_width():
    module = Transformer(TransformerConfig(AttentionConfig(key_dim=2, value_dim=2)))
    with pytest.raises(ValueError, match="attention maps width 3 to 2, which a residual cannot add; set output_dim=3"):
        module.init(jax.random.key(0), jnp.ones((LENGTH, DIM)))


BAD_TOKENS = [
    (jnp.ones((2, 4)), TypeError, "tokens have dtype float64; expected whole numbers below 6"),
    (jnp.zeros((2, 5), int), ValueError, r"tokens have shape \(2, 5\); expected .* 1 <= L <= 4"),
    (jnp.zeros((0, 4), int), ValueError, r"tokens have shape \(0, 4\)"),
    (jnp.full((2, 4), 6), ValueError, r"tokens range from 6 to 6; expected 0 ... 5"),
    (jnp.full((2, 4), -1), ValueError, r"tokens range from -1 to -1"),
]


@pytest.mark.parametrize(("tokens", "error", "message"), BAD_TOKENS)
def test_bad_tokens(tokens, error, message):
    with pytest.raises(error, match=message):
        LanguageModel(MODEL).init(jax.random.key(0), tokens)


@pytest.mark.parametrize("token", [6, -1])
def test_bad_token_under_jit_is_not_silently_another(token):
    module, params, tokens = language_model(jax.random.key(1))
    logits = jax.jit(module.apply)({"params": params}, tokens.at[0, 1].set(token))
    assert bool(jnp.all(jnp.isnan(logits[0, 1])))
    assert bool(jnp.all(jnp.isfinite(logits[1])))
