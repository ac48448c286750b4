"""The attention layer and its equations against loops in numpy, and the identities that define it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive_models import attention as naive_attention

from attnlab.models import heads
from attnlab.models.adapters import from_linen
from attnlab.models.attention import AttentionConfig, SelfAttention, attention_maps
from attnlab.trees import leaf_names
from cases import generator, generic_params
from compare import assert_close

BATCH, LENGTH, DIM = 2, 4, 3

CONFIGS = {
    "softmax": {},
    "linear": {"weights": "linear"},
    "no_scale": {"scale": 1.0},
    "temperature": {"scale": 1 / 0.3},
    "merged": {"merged": True},
    "merged_heads": {"merged": True, "heads": 2},
    "heads": {"heads": 3},
    "output": {"heads": 2, "output_dim": 5},
    "biases": {"heads": 2, "output_dim": 5, "bias": True},
    "causal": {"causal": True, "heads": 2},
    "causal_linear": {"causal": True, "weights": "linear"},
    "sink": {"weights": "softmax_sink"},
    "sigmoid": {"weights": "sigmoid", "heads": 2},
}


def layer(key, dtype=jnp.float64, **options):
    config = AttentionConfig(**{"key_dim": 2, "value_dim": 4, **options})
    random, module = generator(key), SelfAttention(config)
    tokens = jnp.asarray(random.standard_normal((BATCH, LENGTH, DIM)), dtype)
    return module, generic_params(module, tokens, random), tokens


def random_mask(key):
    """A mask in which every query sees itself, whatever else."""
    return jax.random.bernoulli(key, 0.5, (LENGTH, LENGTH)) | jnp.eye(LENGTH, dtype=bool)


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_layer_is_the_loop(key, options):
    module, params, tokens = layer(key, **options)
    expected = np.stack([naive_attention(params, sequence, module.config) for sequence in np.asarray(tokens)])
    assert_close(jax.jit(module.apply)({"params": params}, tokens), expected, 1e-13)


@pytest.mark.parametrize("name", ["softmax", "linear", "causal", "causal_linear", "sink", "sigmoid"])
def test_masked_layer_is_the_loop(key, name):
    module, params, tokens = layer(key, **CONFIGS[name])
    mask = random_mask(key)
    expected = np.stack([naive_attention(params, sequence, module.config, mask) for sequence in np.asarray(tokens)])
    assert_close(module.apply({"params": params}, tokens, mask), expected, 1e-13)
    per_sequence = jnp.broadcast_to(mask, (BATCH, 1, LENGTH, LENGTH))
    assert_close(module.apply({"params": params}, tokens, per_sequence), expected, 1e-13)


@pytest.mark.parametrize("name", ["softmax", "linear", "merged_heads", "biases"])
def test_without_mask_the_layer_commutes_with_permutations(key, name):
    module, params, tokens = layer(key, **CONFIGS[name])
    order = jax.random.permutation(key, LENGTH)
    outputs = module.apply({"params": params}, tokens)
    assert_close(module.apply({"params": params}, tokens[:, order]), outputs[:, order], 1e-13)


@pytest.mark.parametrize("name", ["causal", "causal_linear"])
def test_causal_layer_does_not_depend_on_later_tokens(key, name):
    module, params, tokens = layer(key, **CONFIGS[name])
    jacobian = jax.jit(jax.jacobian(from_linen(module), argnums=1))(params, tokens[0])
    size = np.asarray(jnp.max(jnp.abs(jacobian), axis=(1, 3)))  # (query, key)
    assert np.all(size[np.triu_indices(LENGTH, 1)] == 0)
    assert np.all(size[np.tril_indices(LENGTH)] > 0)


def test_merged_matrix_is_the_product_of_query_and_key(key):
    module, params, tokens = layer(key)
    merged = SelfAttention(AttentionConfig(key_dim=2, value_dim=4, merged=True))
    one_matrix = {"query_key": params["query"] @ params["key"].T, "value": params["value"]}
    assert_close(merged.apply({"params": one_matrix}, tokens), module.apply({"params": params}, tokens), 1e-13)


def test_heads_of_the_theory_are_slices(key):
    module, params, tokens = layer(key, heads=2)
    one_head = SelfAttention(AttentionConfig(key_dim=2, value_dim=4))
    outputs = []
    for head in range(2):
        widths = {"query": 2, "key": 2, "value": 4}
        own = {name: params[name][:, head * w : (head + 1) * w] for name, w in widths.items()}
        outputs.append(one_head.apply({"params": own}, tokens))
    assert_close(module.apply({"params": params}, tokens), jnp.concatenate(outputs, axis=-1), 1e-13)


@pytest.mark.parametrize("name", ["softmax", "causal", "heads"])
def test_softmax_rows_sum_to_one(key, name):
    module, params, tokens = layer(key, **CONFIGS[name])
    (weights,) = attention_maps(module, params, tokens).values()
    assert weights.shape == (BATCH, module.config.heads, LENGTH, LENGTH)
    assert_close(weights.sum(axis=-1), jnp.ones(weights.shape[:-1]), 1e-14)


def test_attention_maps_are_the_weights_of_the_outputs(key):
    module, params, tokens = layer(key, causal=True)
    maps = attention_maps(module, params, tokens, random_mask(key))
    values = tokens @ params["value"]
    assert list(maps) == [""]
    assert_close(maps[""][:, 0] @ values, module.apply({"params": params}, tokens, random_mask(key)), 1e-13)


def test_large_scores_do_not_overflow():
    weights = heads.softmax_weights(jnp.array([[1e4, 0.0], [-1e4, 0.0]]))
    assert_close(weights, jnp.array([[1.0, 0.0], [0.0, 1.0]]), 1e-15)


def test_masked_softmax_has_finite_second_derivatives():
    scores, mask = jnp.arange(9.0).reshape(3, 3), heads.causal_mask(3)
    hessian = jax.jit(jax.hessian(lambda x: jnp.sum(heads.softmax_weights(x, mask) ** 3)))(scores)
    assert bool(jnp.all(jnp.isfinite(hessian)))


def test_split_heads_is_undone_by_merge_heads(key):
    x = jax.random.normal(key, (BATCH, LENGTH, 6))
    assert heads.split_heads(x, 3).shape == (BATCH, 3, LENGTH, 2)
    assert_close(heads.merge_heads(heads.split_heads(x, 3)), x, 0)


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_jit_and_vmap_change_nothing(options):
    module, params, tokens = layer(jax.random.key(1), **options)
    predict = from_linen(module)
    outputs = predict(params, tokens)
    assert_close(jax.jit(predict)(params, tokens), outputs, 1e-13)
    assert_close(jax.vmap(predict, (None, 0))(params, tokens), outputs, 1e-13)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_dtype_is_that_of_the_inputs(dtype):
    module, params, tokens = layer(jax.random.key(1), dtype, **CONFIGS["biases"])
    arrays = (params, module.apply({"params": params}, tokens))
    assert {leaf.dtype for leaf in jax.tree.leaves(arrays)} == {jnp.dtype(dtype)}


def test_float64_is_exact_to_float64(key):
    """The same layer with numbers rounded to float32 differs by float32's precision, the float64 one does not."""
    module, params, tokens = layer(key)
    single = jax.tree.map(lambda x: x.astype(jnp.float32), (params, tokens))
    error = module.apply({"params": single[0]}, single[1]) - module.apply({"params": params}, tokens).astype(
        jnp.float32
    )
    assert 1e-9 < float(jnp.max(jnp.abs(error))) < 1e-4


NAMES = {
    "softmax": ("key", "query", "value"),
    "merged": ("query_key", "value"),
    "output": ("key", "output", "query", "value"),
    "biases": ("key", "key_bias", "output", "output_bias", "query", "query_bias", "value", "value_bias"),
}


@pytest.mark.parametrize("name", NAMES)
def test_parameter_names(name):
    _, params, _ = layer(jax.random.key(1), **CONFIGS[name])
    assert leaf_names(params) == NAMES[name]


BAD_CONFIGS = [
    ({"key_dim": 0}, "key_dim is 0; expected a positive"),
    ({"heads": -1}, "heads is -1"),
    ({"output_dim": 0}, "output_dim is 0"),
    ({"weights": "sofmax"}, "no kind of attention weights 'sofmax'.*Did you mean 'softmax'"),
    ({"merged": True, "bias": True}, "merged and bias are both true"),
    ({"init": "lecun"}, "no initialisation scheme 'lecun'.*lecun_normal"),
    ({"gain": -1.0}, "gain is -1.0"),
]


@pytest.mark.parametrize(("options", "message"), BAD_CONFIGS)
def test_bad_config(options, message):
    with pytest.raises(ValueError, match=message):
        AttentionConfig(**{"key_dim": 2, "value_dim": 2, **options})


BAD_INPUTS = [
    (jnp.ones(3), ValueError, r"inputs have shape \(3,\); expected \(..., tokens, token dimension\)"),
    (jnp.ones((0, 4, 3)), ValueError, r"shape \(0, 4, 3\), which holds no element"),
    (jnp.ones((4, 3), dtype=int), TypeError, "inputs have dtype int64"),
]


@pytest.mark.parametrize(("inputs", "error", "message"), BAD_INPUTS)
def test_bad_inputs(inputs, error, message):
    with pytest.raises(error, match=message):
        SelfAttention(AttentionConfig(key_dim=2, value_dim=2)).init(jax.random.key(0), inputs)


BAD_MASKS = [
    (jnp.zeros((LENGTH, LENGTH), bool), ValueError, "a row of mask is all false"),
    (jnp.ones((3, LENGTH), bool), ValueError, r"mask has shape \(3, 4\), which does not broadcast"),
    (jnp.ones((LENGTH, LENGTH)), TypeError, "mask has dtype float64; expected bool"),
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("mask", "error", "message"), BAD_MASKS)
def test_bad_mask(mask, error, message, causal):
    module, params, tokens = layer(jax.random.key(1), causal=causal)
    with pytest.raises(error, match=message):
        module.apply({"params": params}, tokens, mask)


def test_row_that_the_causal_mask_empties():
    """A query that may only look ahead sees nothing under a causal mask."""
    module, params, tokens = layer(jax.random.key(1), causal=True)
    ahead = ~heads.causal_mask(LENGTH) | jnp.eye(LENGTH, dtype=bool).at[0, 0].set(False)
    with pytest.raises(ValueError, match="a row of mask is all false"):
        module.apply({"params": params}, tokens, ahead)
