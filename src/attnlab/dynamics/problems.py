"""The small training problems on which the phenomena are shown: real data, minutes of one CPU at most."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.checks import unknown_name
from attnlab.data.addition import VOCABULARY, addition, answer_positions
from attnlab.data.digits import digits
from attnlab.data.gaussian import gaussian_tokens, taught
from attnlab.data.text import next_words
from attnlab.losses import cross_entropy
from attnlab.models.adapters import at_positions, from_function, from_linen
from attnlab.models.attention import AttentionConfig, SelfAttention
from attnlab.models.initializers import initializer
from attnlab.models.transformer import LanguageModel, LanguageModelConfig, Transformer, TransformerConfig
from attnlab.objective import Objective, objective
from attnlab.types import Params, PRNGKey

WIDTH, SIDE, CLASSES = 16, 8, 10
ATTENTION = AttentionConfig(key_dim=WIDTH, value_dim=WIDTH, output_dim=WIDTH)


def half_squared_error(outputs: Float[Array, "*B v"], targets: Float[Array, "*B v"]) -> Float[Array, ""]:
    """Half the squared distance of each output vector from its target, mean over all of them."""
    return jnp.mean(jnp.sum((outputs - targets) ** 2, axis=-1)) / 2


def _digits_attention(params: Params, images: Float[Array, "n L pixels"]) -> Float[Array, "n classes"]:
    tokens = images @ params["embedding"] + params["position"][None]
    tokens = tokens + SelfAttention(ATTENTION).apply({"params": params["attention"]}, tokens)
    return jnp.mean(tokens, axis=-2) @ params["readout"]


def digits_attention(data_key: PRNGKey, key: PRNGKey, count: int = 128) -> tuple[Objective, Params]:
    """Handwritten digits through one layer of softmax attention, with square loss: the risk and a random start.

    The eight rows of each image are its tokens; embedded to width 16 with learned positions, one attention layer with a
    residual, a mean over tokens and a linear read-out to one-hot targets: 1,440 parameters. The read-out starts small,
    so that training starts below the edge of stability.
    """
    data = digits(data_key, count, patch=(1, SIDE), per_token=False)
    keys = jax.random.split(key, 4)
    lecun, normal, dtype = initializer("lecun_normal"), initializer("normal", 1.0), data.inputs.dtype
    params = {
        "embedding": lecun(keys[0], (SIDE, WIDTH), dtype),
        "position": normal(keys[1], (SIDE, WIDTH), dtype),
        "attention": SelfAttention(ATTENTION).init(keys[2], jnp.zeros((1, WIDTH), dtype))["params"],
        "readout": initializer("lecun_normal", 0.1)(keys[3], (WIDTH, CLASSES), dtype),
    }
    return objective(from_function(_digits_attention), half_squared_error, *data), params


def easy_regression(key: PRNGKey, count: int = 192, length: int = 8, width: int = 8) -> tuple[Objective, Params]:
    """One attention layer that learns another: a teacher with weights twice the usual size, a student with half.

    Gaussian tokens, square loss. Gradient descent with learning rate 0.1 fits it before the sharpness reaches the edge:
    the negative control of the edge of stability.
    """
    keys = jax.random.split(key, 3)
    module = SelfAttention(AttentionConfig(key_dim=width, value_dim=width))
    tokens = gaussian_tokens(keys[0], count, length, width)
    teacher, student = (module.init(k, tokens)["params"] for k in keys[1:])
    data = taught(keys[0], from_linen(module), jax.tree.map(lambda leaf: 2 * leaf, teacher), tokens)
    risk = objective(from_linen(module), half_squared_error, *data)
    return risk, jax.tree.map(lambda leaf: leaf / 2, student)


@dataclass(frozen=True)
class _DigitsTransformer:
    """Hashed by its model, so that equal choices share one compiled loop."""

    model: Transformer

    def __call__(self, params: Params, images: Float[Array, "n L pixels"]) -> Float[Array, "n classes"]:
        tokens = images @ params["embedding"] + params["position"][None]
        tokens = from_linen(self.model)(params["blocks"], tokens)
        return jnp.mean(tokens, axis=-2) @ params["readout"]


def digits_transformer(
    data_key: PRNGKey, key: PRNGKey, count: int = 128, *, final_norm: bool = False
) -> tuple[Objective, Params]:
    """Handwritten digits through two pre-norm transformer blocks of width 16, as `digits_attention` otherwise, with a
    read-out of the usual size: training starts far above the edge of stability.

    Without a LayerNorm at the end the outputs grow with the residual stream, and nothing bounds the square loss.
    """
    data = digits(data_key, count, patch=(1, SIDE), per_token=False)
    keys = jax.random.split(key, 4)
    lecun, normal, dtype = initializer("lecun_normal"), initializer("normal", 1.0), data.inputs.dtype
    model = Transformer(TransformerConfig(ATTENTION, 2, 4 * WIDTH, final_norm=final_norm))
    params = {
        "embedding": lecun(keys[0], (SIDE, WIDTH), dtype),
        "position": normal(keys[1], (SIDE, WIDTH), dtype),
        "blocks": model.init(keys[2], jnp.zeros((1, SIDE, WIDTH), dtype))["params"],
        "readout": lecun(keys[3], (WIDTH, CLASSES), dtype),
    }
    return objective(from_function(_DigitsTransformer(model)), half_squared_error, *data), params


ADDITION_KINDS = ("softmax", "linear", "pre-LN")
"""Kinds of attention layer for `addition_attention`; the last is softmax attention behind a LayerNorm."""


def addition_attention(key: PRNGKey, kind: str, count: int = 64, digits: int = 5) -> tuple[Objective, Params]:
    """Addition of two numbers through one causal attention layer with a residual, at initialisation.

    `kind` is one of `ADDITION_KINDS`. Width 16, weights N(0, 0.64 / width), embeddings N(0, 1): scale the two
    embeddings to see how the blocks of the Hessian grow with them. Cross-entropy of the answer.
    """
    if kind not in ADDITION_KINDS:
        raise unknown_name("kind of attention layer", kind, ADDITION_KINDS)
    scheme: dict[str, Any] = {"init": "normal", "gain": 0.8 * WIDTH**-0.5}
    weights: Literal["softmax", "linear"] = "linear" if kind == "linear" else "softmax"
    attention = AttentionConfig(WIDTH, WIDTH, causal=True, output_dim=WIDTH, weights=weights, **scheme)
    blocks = TransformerConfig(attention, norm="pre" if kind == "pre-LN" else None)
    model = LanguageModel(LanguageModelConfig(blocks, len(VOCABULARY), 3 * digits + 3, WIDTH, **scheme))
    data_key, init_key = jax.random.split(key)
    data = addition(data_key, count, digits)
    params = model.init(init_key, data.inputs)["params"]
    return objective(at_positions(from_linen(model), answer_positions(digits)), cross_entropy, *data), params


def next_word_prediction(key: PRNGKey, count: int = 2048, length: int = 16) -> tuple[Objective, Params]:
    """The next word of English text by one causal pre-norm attention layer of width 32, with cross-entropy.

    The data of `data.text.next_words`; its tokens are ranks, the most frequent word first, so that the frequencies
    fall by the law of Zipf. The unembedding starts at zero: every word is equally likely at first.
    """
    data, vocabulary = next_words(count, length)
    attention = AttentionConfig(32, 32, causal=True, output_dim=32)
    blocks = TransformerConfig(attention, final_norm=True)
    model = LanguageModel(LanguageModelConfig(blocks, len(vocabulary), length, 32, init="zeros"))
    return objective(from_linen(model), cross_entropy, *data), model.init(key, data.inputs[:1])["params"]
