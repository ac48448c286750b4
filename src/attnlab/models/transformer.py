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
from attnlab.logits import Logits
from attnlab.models.attention import AttentionConfig, SelfAttention
from attnlab.models.initializers import initializer
from attnlab.models.layers import NORMALIZATIONS, activation_by_name, check_inputs, linear
from attnlab.types import Params

NORMS = ("pre", "post")
POSITIONS = ("learned", "none")
REMATS = {"elementwise": jax.checkpoint_policies.dots_saveable, "block": None}


@dataclass(frozen=True)
class TransformerConfig:
    """Every choice of a stack of transformer blocks; hashable, so that it can be static under `jit`.

    Attributes:
        attention: the attention layer of every block.
        layers: number of blocks.
        mlp_width: hidden width of the MLP; None is no MLP.
        mlp: the kind of MLP, a key of `MLPS`: `plain` or `gated`.
        activation: of the MLP, a key of `layers.ACTIVATIONS`.
        norm: a norm before each sublayer (`pre`), after each residual sum (`post`), or None.
        normalization: the kind of norm, a key of `layers.NORMALIZATIONS`: `layer_norm` or `rms_norm`.
        final_norm: another norm after the last block, usual with `pre`.
        residual: add each sublayer to its input; without, the sublayers are composed.
        parallel: both sublayers read the block's input, and both are added to it (GPT-NeoX); with `pre` and residuals.
        bias: add biases to the MLP, zero at initialisation (those of the attention layer are its own config's).
        epsilon: added to the variance, or the mean square, in every norm.
        scan: one program for all blocks instead of one for each, so that the time to compile does not grow with their
            number; the parameters of the blocks are then stacked (`stack_layers`).
        remat: what derivatives compute again rather than keep (`jax.checkpoint` of every block), a key of `REMATS`:
            `elementwise` keeps the matrix products alone, `block` the input of each block, for the least memory and one
            more forward pass a derivative; None keeps everything.
        init: name of the initialisation scheme of the MLP's matrices (the attention layer has its own).
        gain: scale of that scheme.
    """

    attention: AttentionConfig
    layers: int = 1
    mlp_width: int | None = None
    mlp: str = "plain"
    activation: str = "gelu"
    norm: Literal["pre", "post"] | None = "pre"
    normalization: str = "layer_norm"
    final_norm: bool = False
    residual: bool = True
    parallel: bool = False
    bias: bool = False
    epsilon: float = 1e-6
    scan: bool = False
    remat: str | None = None
    init: str = "lecun_normal"
    gain: float = 1.0

    def __post_init__(self) -> None:
        check_positive(layers=self.layers, mlp_width=1 if self.mlp_width is None else self.mlp_width)
        activation_by_name(self.activation)
        initializer(self.init, self.gain)
        if self.norm is not None and self.norm not in NORMS:
            raise unknown_name("place of the norm", self.norm, (*NORMS, "None"))
        if self.normalization not in NORMALIZATIONS:
            raise unknown_name("kind of norm", self.normalization, NORMALIZATIONS)
        if self.mlp not in MLPS:
            raise unknown_name("kind of MLP", self.mlp, MLPS)
        if self.remat is not None and self.remat not in REMATS:
            raise unknown_name("rematerialisation", self.remat, (*REMATS, "None"))
        if not self.epsilon > 0:
            raise ValueError(f"epsilon is {self.epsilon}; expected a positive number, such as 1e-6.")
        if self.parallel and (self.norm != "pre" or not self.residual or self.mlp_width is None):
            raise ValueError(
                f"parallel is True with norm={self.norm!r}, residual={self.residual} and mlp_width={self.mlp_width}; "
                "expected norm='pre', residual=True and an MLP, whose updates are added to the block's input."
            )


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


class GatedFeedForward(nn.Module):
    """A gated MLP, (activation(X W_gate) * X W_up) W_down (Shazeer, arXiv 2002.05202): parameters `gate` and `up` (both
    D x M), `down` (M x D), and their biases."""

    width: int
    config: TransformerConfig

    @nn.compact
    def __call__(self, inputs: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """See the class."""
        config = self.config
        init, activation = initializer(config.init, config.gain), activation_by_name(config.activation)
        gate, up = (linear(self, name, inputs, self.width, init, config.bias) for name in ("gate", "up"))
        return linear(self, "down", activation(gate) * up, inputs.shape[-1], init, config.bias)


MLPS: dict[str, type[FeedForward] | type[GatedFeedForward]] = {"plain": FeedForward, "gated": GatedFeedForward}


class TransformerBlock(nn.Module):
    """Attention then MLP, each with its norm and residual as the config says.

    `pre` is x + f(norm(x)) (Xiong et al., arXiv 2002.04745), `post` norm(x + f(x)) (Vaswani et al., arXiv 1706.03762);
    `parallel` is x + attention(norm(x)) + mlp(norm'(x)) (Black et al., arXiv 2204.06745).
    Parameters: `attention/...`, `mlp/up`, `mlp/down` (and `mlp/gate`), and the norms' `attention_norm/scale`,
    `attention_norm/bias`, `mlp_norm/...`.
    Tokens (..., L, D) in and out; raises `ValueError` where a residual meets an attention layer of another width.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "*B L D"], mask: Bool[Array, "..."] | None = None
    ) -> Float[Array, "*B L O"]:
        """See the class."""
        config = self.config
        attention = SelfAttention(config.attention, name="attention")
        tokens = self._sublayer("attention", inputs, lambda x: attention(x, mask))
        if config.mlp_width is None:
            return tokens
        mlp = MLPS[config.mlp](config.mlp_width, config, name="mlp")
        if config.parallel:
            return tokens + mlp(self._normalize("mlp", inputs))
        return self._sublayer("mlp", tokens, mlp)

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
        return NORMALIZATIONS[self.config.normalization](self.config.epsilon, name=f"{name}_norm")(tokens)


class Transformer(nn.Module):
    """A stack of `TransformerBlock`s: parameters `layer_0/...`, `layer_1/...`, and `final_norm/...` if it has one.

    With `scan` the blocks' parameters are those of `layers/...`, each with a leading axis of layers.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "*B L D"], mask: Bool[Array, "..."] | None = None
    ) -> Float[Array, "*B L O"]:
        """Tokens (..., L, D) to tokens; `mask` as in `SelfAttention`, the same in every block."""
        check_inputs(inputs, ("tokens", "token dimension"))
        config, tokens = self.config, inputs
        # Within a scan nothing is shared between the two passes that could be found again.
        block = TransformerBlock
        if config.remat is not None:
            block = nn.remat(TransformerBlock, prevent_cse=not config.scan, policy=REMATS[config.remat])
        if config.scan:
            tokens = _scanned(block(config, name="layers"), tokens, mask)
        else:
            for index in range(config.layers):
                tokens = block(config, name=f"layer_{index}")(tokens, mask)
        if not config.final_norm:
            return tokens
        return NORMALIZATIONS[config.normalization](config.epsilon, name="final_norm")(tokens)


def _scanned(block: TransformerBlock, tokens: jax.Array, mask: jax.Array | None) -> jax.Array:
    step = nn.scan(
        lambda block, tokens, mask: (block(tokens, mask), None),
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=block.config.layers,
    )
    return step(block, tokens, mask)[0]


def stack_layers(params: Params) -> Params:
    """The parameters of a model with `scan` from those of the same model without: `layer_0/...`, ... into `layers/...`.

    `params` are those of a `Transformer`, or of a model around one. Raises `ValueError` where there are no layers.
    """
    if "transformer" in params:
        return {**params, "transformer": stack_layers(params["transformer"])}
    count = sum(name.startswith("layer_") for name in params)
    if not count:
        raise ValueError(f"params hold {sorted(params)}; expected layer_0, layer_1, ... of a Transformer without scan.")
    layers = [params[f"layer_{index}"] for index in range(count)]
    rest = {name: leaf for name, leaf in params.items() if not name.startswith("layer_")}
    return {**rest, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


def unstack_layers(params: Params) -> Params:
    """The inverse of `stack_layers`. Raises `ValueError` where the layers are not stacked."""
    if "transformer" in params:
        return {**params, "transformer": unstack_layers(params["transformer"])}
    if "layers" not in params:
        raise ValueError(f"params hold {sorted(params)}; expected layers/..., stacked, of a Transformer with scan.")
    stacked = params["layers"]
    count = len(jax.tree.leaves(stacked)[0])
    rest = {name: leaf for name, leaf in params.items() if name != "layers"}
    return rest | {f"layer_{index}": jax.tree.map(lambda leaf: leaf[index], stacked) for index in range(count)}  # noqa: B023


@dataclass(frozen=True)
class EmbeddingConfig:
    """What models of tokens share: a transformer over an embedding of tokens and positions.

    Attributes:
        transformer: the stack of blocks; it is as causal as its attention layer.
        vocabulary: number of different tokens, named 0 ... vocabulary - 1.
        length: the longest sequence.
        width: width D of the embeddings.
        positions: `learned` adds an embedding of each of the `length` positions; `none`, where attention turns its
            queries and keys.
        embedding_std: token and position embeddings have entries N(0, embedding_std^2).
        dtype: of the parameters, such as `float64`; None is JAX's default (float32, or float64 in 64-bit mode).
    """

    transformer: TransformerConfig
    vocabulary: int
    length: int
    width: int
    positions: Literal["learned", "none"] = "learned"
    embedding_std: float = 1.0
    dtype: str | None = None

    def __post_init__(self) -> None:
        check_positive(vocabulary=self.vocabulary, length=self.length, width=self.width)
        if not self.embedding_std >= 0:
            raise ValueError(f"embedding_std is {self.embedding_std}; expected zero or a positive number.")
        if self.positions not in POSITIONS:
            raise unknown_name("kind of position embeddings", self.positions, POSITIONS)

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
    return embed_with_table(module, tokens, config)[0]


def embed_with_table(
    module: nn.Module, tokens: Int[Array, "*B L"], config: EmbeddingConfig
) -> tuple[Float[Array, "*B L D"], Float[Array, "C D"]]:
    """`embed`, and the table of token embeddings, which may serve once more as the map to logits."""
    _check_tokens(tokens, config)
    dtype, init = config.parameter_dtype, initializer("normal", config.embedding_std)
    token_table = module.param("token_embedding", init, (config.vocabulary, config.width), dtype)
    # Under jit a token cannot be looked at: one outside the vocabulary embeds as NaN rather than as its neighbour.
    embedded = token_table.at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    if config.positions == "none":
        return embedded, token_table
    position_table = module.param("position_embedding", init, (config.length, config.width), dtype)
    return embedded + jnp.broadcast_to(position_table[: tokens.shape[-1]], embedded.shape), token_table


@dataclass(frozen=True)
class LanguageModelConfig(EmbeddingConfig):
    """A transformer between an embedding of tokens and positions and a linear map to logits.

    Beside the attributes of `EmbeddingConfig` it has its own.

    Attributes:
        tied: the map to logits is the transposed token embedding instead of a matrix of its own.
        factored: the model returns `attnlab.logits.Logits`, the two factors of the logits, whose loss and curvature are
            had without the whole array of positions x vocabulary.
        init: name of the initialisation scheme of the unembedding matrix.
        gain: scale of that scheme.
    """

    tied: bool = False
    factored: bool = False
    init: str = "lecun_normal"
    gain: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        initializer(self.init, self.gain)


class LanguageModel(nn.Module):
    """Next-token logits of whole-number tokens (..., L): (..., L, vocabulary).

    Parameters: `token_embedding` (vocabulary x D), `position_embedding` (length x D; not without positions),
    `transformer/layer_0/...`, `unembedding` (D x vocabulary; not where it is tied).
    """

    config: LanguageModelConfig

    @nn.compact
    def __call__(self, tokens: Int[Array, "*B L"]) -> Float[Array, "*B L C"] | Logits:
        """See the class. Raises for tokens that are not whole numbers of the vocabulary or too long a sequence."""
        config = self.config
        embedded, table = embed_with_table(self, tokens, config)
        hidden = Transformer(config.transformer, name="transformer")(embedded)
        if not config.tied:
            init, shape = initializer(config.init, config.gain), (hidden.shape[-1], config.vocabulary)
            table = self.param("unembedding", init, shape, hidden.dtype).T
        logits = Logits(hidden, table)
        return logits if config.factored else logits.dense()


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
