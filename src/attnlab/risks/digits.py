"""Handwritten digits through one attention layer and through two transformer blocks; and their easy control."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.data.digits import digits
from attnlab.data.gaussian import gaussian_tokens, taught
from attnlab.models.adapters import from_function, from_linen
from attnlab.models.attention import AttentionConfig, SelfAttention
from attnlab.models.initializers import initializer
from attnlab.models.transformer import Transformer, TransformerConfig
from attnlab.objectives import Objective, objective
from attnlab.types import Params, PRNGKey

WIDTH, SIDE, CLASSES = 16, 8, 10
ATTENTION = AttentionConfig(key_dim=WIDTH, value_dim=WIDTH, output_dim=WIDTH)


def half_squared_error(outputs: Float[Array, "*B v"], targets: Float[Array, "*B v"]) -> Float[Array, ""]:
    """Half the squared distance of each output vector from its target, mean over all of them."""
    return jnp.mean(jnp.sum((outputs - targets) ** 2, axis=-1)) / 2


@dataclass(frozen=True)
class _DigitsAttention:
    """Hashed by its layer, so that equal choices share one compiled loop."""

    config: AttentionConfig

    def __call__(self, params: Params, images: Float[Array, "n L pixels"]) -> Float[Array, "n classes"]:
        tokens = images @ params["embedding"] + params["position"][None]
        tokens = tokens + SelfAttention(self.config).apply({"params": params["attention"]}, tokens)
        return jnp.mean(tokens, axis=-2) @ params["readout"]


def digits_attention(
    data_key: PRNGKey, key: PRNGKey, count: int = 128, *, weights: str = "softmax"
) -> tuple[Objective, Params]:
    """Handwritten digits through one layer of attention, softmax unless told, with square loss: the risk and a random
    start.

    The eight rows of each image are its tokens; embedded to width 16 with learned positions, one attention layer with a
    residual, a mean over tokens and a linear read-out to one-hot targets: 1,440 parameters. The read-out starts small,
    so that training starts below the edge of stability.
    """
    data = digits(data_key, count, patch=(1, SIDE), per_token=False)
    keys = jax.random.split(key, 4)
    lecun, normal, dtype = initializer("lecun_normal"), initializer("normal", 1.0), data.inputs.dtype
    config = replace(ATTENTION, weights=weights)
    params = {
        "embedding": lecun(keys[0], (SIDE, WIDTH), dtype),
        "position": normal(keys[1], (SIDE, WIDTH), dtype),
        "attention": SelfAttention(config).init(keys[2], jnp.zeros((1, WIDTH), dtype))["params"],
        "readout": initializer("lecun_normal", 0.1)(keys[3], (WIDTH, CLASSES), dtype),
    }
    return objective(from_function(_DigitsAttention(config)), half_squared_error, *data), params


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
