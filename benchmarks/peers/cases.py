"""The models on which all libraries are held side by side."""

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.losses import cross_entropy, square_loss
from attnlab.models.adapters import from_linen
from attnlab.models.attention import AttentionConfig, SelfAttention
from attnlab.models.transformer import LanguageModel, LanguageModelConfig, TransformerConfig
from attnlab.objectives import objective
from attnlab.trees import leaf_names

ENDS = (32, 64, 70)
HEADS = {"attention": 1, "gpt": 4, "gates": 4}


def attention(width=64, length=32, batch=32):
    module = SelfAttention(AttentionConfig(key_dim=width, value_dim=width, output_dim=width))
    inputs, targets = jax.random.normal(jax.random.key(0), (2, batch, length, width), jnp.float32)
    return objective(from_linen(module), square_loss, inputs, targets), module.init(jax.random.key(1), inputs)["params"]


def gpt(layers=2, width=128, vocabulary=512, length=64, batch=16):
    heads = AttentionConfig(width // 4, width // 4, heads=4, causal=True, output_dim=width)
    blocks = TransformerConfig(heads, layers, mlp_width=4 * width, bias=True, final_norm=True)
    module = LanguageModel(LanguageModelConfig(blocks, vocabulary, length, width, dtype="float32"))
    tokens = jax.random.randint(jax.random.key(0), (batch, length + 1), 0, vocabulary)
    params = jax.jit(module.init)(jax.random.key(1), tokens[:, :-1])["params"]
    return objective(from_linen(module), cross_entropy, tokens[:, :-1], tokens[:, 1:]), params


def gates_model():
    """A small `gpt` away from its initialisation, and sequences for batches that end at `ENDS`."""
    risk, params = gpt(width=8, vocabulary=16, length=8, batch=ENDS[-1])
    random = np.random.default_rng(0)
    return risk, jax.tree.map(lambda leaf: jnp.asarray(0.6 * random.standard_normal(leaf.shape), jnp.float32), params)


CASES = {"attention": attention, "gpt": gpt}
MODELS = {**CASES, "gates": gates_model}


def flatten(params):
    return {
        f"params/{name}": np.asarray(leaf)
        for name, leaf in zip(leaf_names(params), jax.tree.leaves(params), strict=True)
    }


def unflatten(arrays):
    """The nested parameters of `flatten`."""
    tree: dict = {}
    for name, array in arrays.items():
        if name.startswith("params/"):
            *parents, leaf = name.split("/")[1:]
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = jnp.asarray(array)
    return tree
