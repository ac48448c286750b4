"""What the theory compares one attention layer with: transformer blocks, stacks of them, a causal language model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from attnlab.checks import check_positive, is_concrete, unknown_name
from attnlab.models.attention import AttentionConfig, SelfAttention
from attnlab.models.initializers import initializer
from attnlab.models.layers import LayerNorm, activation_by_name, check_inputs, linear

NORMS = ("pre", "post")


@dataclass(frozen=True)
class TransformerConfig:
    """Every choice of a stack of transformer blocks; hashable, so that it can be static under `jit`.

    Attributes:
        attention: the attention layer of every block.
        layers: number of blocks.
        mlp_width: hidden width of the MLP; None is no MLP.
        activation: of the MLP, a key of `layers.ACTIVATIONS`.
        norm: LayerNorm before each sublayer (`pre`), after each residual sum (`post`), or None.
        final_norm: another LayerNorm after the last block, usual with `pre`.
        residual: add each sublayer to its input; without, the sublayers are composed.
        bias: add biases to the MLP, zero at initialisation (those of the attention layer are its own config's).
        epsilon: added to the variance in every LayerNorm.
        init: name of the initialisation scheme of the MLP's matrices (the attention layer has its own).
        gain: scale of that scheme.
    """

    attention: AttentionConfig
    layers: int = 1
    mlp_width: int | None = None
    activation: str = "gelu"
    norm: Literal["pre", "post"] | None = "pre"
    final_norm: bool = False
    residual: bool = True
    bias: bool = False
    epsilon: float = 1e-6
    init: str = "lecun_normal"
    gain: float = 1.0

    def __post_init__(self) -> None:
        check_positive(layers=self.layers, mlp_width=1 if self.mlp_width is None else self.mlp_width)
        activation_by_name(self.activation)
        initializer(self.init, self.gain)
        if self.norm is not None and self.norm not in NORMS:
            raise unknown_name("place of the LayerNorm", self.norm, (*NORMS, "None"))
        if not self.epsilon > 0:
            raise ValueError(f"epsilon is {self.epsilon}; expected a positive number, such as 1e-6.")


class FeedForward(nn.Module):
    """The MLP of a block, activation(X W_up) W_down: parameters `up` (D x M) and `down` (M x D), and their biases."""

    width: int
    config: TransformerConfig

    @nn.compact
    def __call__(self, inputs: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """See the class."""
        config = self.config
        init, activation = initializer(config.init, config.gain), activation_by_name(config.activation)
        hidden = activation(linear(self, "up", inputs, self.width, init, config.bias))
        return linear(self, "down", hidden, inputs.shape[-1], init, config.bias)


class TransformerBlock(nn.Module):
    """Attention then MLP, each with its LayerNorm and residual as the config says.

    `pre` is x + f(norm(x)) (Xiong et al., arXiv 2002.04745), `post` norm(x + f(x)) (Vaswani et al., arXiv 1706.03762).
    Parameters: `attention/...`, `mlp/up`, `mlp/down`, and the norms' `attention_norm/scale`, `attention_norm/bias`,
    `mlp_norm/...`.
    Tokens (..., L, D) in and out; raises `ValueError` where a residual meets an attention layer of another width.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "*B L D"], mask: Bool[Array, "..."] | None = None
    ) -> Float[Array, "*B L O"]:
        """See the class."""
        attention = SelfAttention(self.config.attention, name="attention")
        tokens = self._sublayer("attention", inputs, lambda x: attention(x, mask))
        if self.config.mlp_width is None:
            return tokens
        return self._sublayer("mlp", tokens, FeedForward(self.config.mlp_width, self.config, name="mlp"))

    def _sublayer(self, name: str, tokens: jax.Array, function: Callable[[jax.Array], jax.Array]) -> jax.Array:
        norm, residual = self.config.norm, self.config.residual
        updates = function(self._normalize(name, tokens) if norm == "pre" else tokens)
        if residual and updates.shape != tokens.shape:
            raise ValueError(
                f"{name} maps width {tokens.shape[-1]} to {updates.shape[-1]}, which a residual cannot add; set "
                f"output_dim={tokens.shape[-1]} in the attention config, or heads * value_dim to it, or residual=False."
            )
        tokens = tokens + updates if residual else updates
        return self._normalize(name, tokens) if norm == "post" else tokens

    def _normalize(self, name: str, tokens: jax.Array) -> jax.Array:
        return LayerNorm(self.config.epsilon, name=f"{name}_norm")(tokens)


class Transformer(nn.Module):
    """A stack of `TransformerBlock`s: parameters `layer_0/...`, `layer_1/...`, and `final_norm/...` if it has one."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "*B L D"], mask: Bool[Array, "..."] | None = None
    ) -> Float[Array, "*B L O"]:
        """Tokens (..., L, D) to tokens; `mask` as in `SelfAttention`, the same in every block."""
        check_inputs(inputs, ("tokens", "token dimension"))
        tokens = inputs
        for index in range(self.config.layers):
            tokens = TransformerBlock(self.config, name=f"layer_{index}")(tokens, mask)
        return LayerNorm(self.config.epsilon, name="final_norm")(tokens) if self.config.final_norm else tokens


@dataclass(frozen=True)
class EmbeddingConfig:
    """What models of tokens share: a transformer over an embedding of tokens and positions.

    Attributes:
        transformer: the stack of blocks; it is as causal as its attention layer.
        vocabulary: number of different tokens, named 0 ... vocabulary - 1.
        length: the longest sequence, the number of position embeddings.
        width: width D of the embeddings.
        embedding_std: token and position embeddings have entries N(0, embedding_std^2).
        dtype: of the parameters, such as `float64`; None is JAX's default (float32, or float64 in 64-bit mode).
    """

    transformer: TransformerConfig
    vocabulary: int
    length: int
    width: int
    embedding_std: float = 1.0
    dtype: str | None = None

    def __post_init__(self) -> None:
        check_positive(vocabulary=self.vocabulary, length=self.length, width=self.width)
        if not self.embedding_std >= 0:
            raise ValueError(f"embedding_std is {self.embedding_std}; expected zero or a positive number.")

    @property
    def parameter_dtype(self) -> jnp.dtype:
        """The dtype of the parameters; raises `ValueError` for float64 without 64-bit mode."""
        dtype = jnp.dtype(jax.dtypes.canonicalize_dtype(float) if self.dtype is None else self.dtype)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"dtype is {self.dtype}; expected a real floating-point dtype such as float32.")
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise ValueError(
                f"dtype is {self.dtype}, but JAX runs in 32-bit mode; call "
                "jax.config.update('jax_enable_x64', True) first, or take float32."
            )
        return dtype


def embed(module: nn.Module, tokens: Int[Array, "*B L"], config: EmbeddingConfig) -> Float[Array, "*B L D"]:
    """The sum of token and position embeddings, parameters `token_embedding` and `position_embedding` of `module`.

    Raises for tokens that are not whole numbers of the vocabulary (`TypeError`, `ValueError`) or too long a sequence
    (`ValueError`).
    """
    _check_tokens(tokens, config)
    dtype, init = config.parameter_dtype, initializer("normal", config.embedding_std)
    token_table = module.param("token_embedding", init, (config.vocabulary, config.width), dtype)
    position_table = module.param("position_embedding", init, (config.length, config.width), dtype)
    # Under jit a token cannot be looked at: one outside the vocabulary embeds as NaN rather than as its neighbour.
    embedded = token_table.at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    return embedded + jnp.broadcast_to(position_table[: tokens.shape[-1]], embedded.shape)


@dataclass(frozen=True)
class LanguageModelConfig(EmbeddingConfig):
    """A transformer between an embedding of tokens and positions and a linear map to logits.

    Attributes, besides those of `EmbeddingConfig`:
        init: name of the initialisation scheme of the unembedding matrix.
        gain: scale of that scheme.
    """

    init: str = "lecun_normal"
    gain: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        initializer(self.init, self.gain)


class LanguageModel(nn.Module):
    """Next-token logits of whole-number tokens (..., L): (..., L, vocabulary).

    Parameters: `token_embedding` (vocabulary x D), `position_embedding` (length x D), `transformer/layer_0/...`,
    `unembedding` (D x vocabulary), not tied to the embedding.
    """

    config: LanguageModelConfig

    @nn.compact
    def __call__(self, tokens: Int[Array, "*B L"]) -> Float[Array, "*B L C"]:
        """See the class. Raises for tokens that are not whole numbers of the vocabulary or too long a sequence."""
        config = self.config
        hidden = Transformer(config.transformer, name="transformer")(embed(self, tokens, config))
        return linear(self, "unembedding", hidden, config.vocabulary, initializer(config.init, config.gain), bias=False)


def _check_tokens(tokens: jax.Array, config: EmbeddingConfig) -> None:
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"tokens have dtype {tokens.dtype}; expected whole numbers below {config.vocabulary}.")
    if tokens.ndim < 1 or tokens.size == 0 or tokens.shape[-1] > config.length:
        raise ValueError(
            f"tokens have shape {tokens.shape}; expected (..., L) with 1 <= L <= {config.length}, the length in the "
            "config. Shorten the sequences or raise the length."
        )
    if not is_concrete(tokens):
        return
    low, high = int(np.asarray(tokens).min()), int(np.asarray(tokens).max())
    if low < 0 or high >= config.vocabulary:
        raise ValueError(
            f"tokens range from {low} to {high}; expected 0 ... {config.vocabulary - 1}, the vocabulary in the config."
        )
