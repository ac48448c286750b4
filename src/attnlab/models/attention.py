"""One self-attention layer as a Flax module with the parameters that the theory names."""

import sys
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from attnlab.checks import check_number, check_positive, is_concrete
from attnlab.models import heads as equations
from attnlab.models.initializers import initializer
from attnlab.models.layers import check_inputs, linear
from attnlab.models.positions import Rotary
from attnlab.models.weightings import weighting
from attnlab.trees import leaf_names
from attnlab.types import Params


@dataclass(frozen=True)
class AttentionConfig:
    """Every choice of an attention layer; hashable, so that it can be static under `jit`.

    Attributes:
        key_dim: width K of queries and keys per head; with `merged` it only sets the default scale.
        value_dim: width V of values per head.
        heads: number of heads H.
        weights: the kind of attention, a row of `attnlab.models.weightings`: `softmax`, `linear` for the bare scores
            (not normalised), `softmax_sink` (with a logit of zero beside the scores), or `sigmoid`.
        merged: one matrix `query_key` = W_Q W_K^T per head instead of `query` and `key`.
        scale: factor of the scores; None is 1/sqrt(key_dim), 1.0 is no scale, any temperature is 1/temperature.
        causal: each token sees itself and what precedes it.
        output_dim: width of the output projection `output`; None is no projection.
        key_value_heads: number G of heads of keys and values, each shared by H / G neighbouring queries (Ainslie et
            al., arXiv 2305.13245); None is one for each query head.
        rotary: how queries and keys are turned by their positions; None is not at all.
        bias: add `query_bias`, `key_bias`, `value_bias` (and `output_bias`), zero at initialisation.
        init: name of the initialisation scheme of the matrices.
        gain: scale of that scheme.

    Example:
        >>> import attnlab as al
        >>> al.AttentionConfig(key_dim=4, value_dim=2, heads=2).score_scale
        0.5
    """

    key_dim: int
    value_dim: int
    heads: int = 1
    weights: str = "softmax"
    merged: bool = False
    scale: float | None = None
    causal: bool = False
    output_dim: int | None = None
    key_value_heads: int | None = None
    rotary: Rotary | None = None
    bias: bool = False
    init: str = "lecun_normal"
    gain: float = 1.0

    def __post_init__(self) -> None:
        check_positive(key_dim=self.key_dim, value_dim=self.value_dim, heads=self.heads)
        check_positive(output_dim=1 if self.output_dim is None else self.output_dim)
        initializer(self.init, self.gain)
        for name in ("gain", "scale"):
            value = getattr(self, name)
            if value is not None and is_concrete(value):
                check_number(name, value, -sys.float_info.max, sys.float_info.max, "Leave it out for the default.")
        weighting(self.weights)
        if self.merged:
            self._check_merged()
        check_positive(key_value_heads=self.groups)
        if self.heads % self.groups:
            raise ValueError(
                f"key_value_heads is {self.groups}; expected a divisor of the {self.heads} heads, each key and value "
                "head being shared by as many queries. Change one of them."
            )
        if self.rotary is not None:
            self.rotary.turned(self.key_dim)

    def _check_merged(self) -> None:
        if self.bias:
            raise ValueError("merged and bias are both true; a merged query-key matrix has no biases: choose one.")
        for name in ("rotary", "key_value_heads"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"merged is True and {name} is {getattr(self, name)}; a merged query-key matrix has no keys of its "
                    "own to turn or to share: choose one."
                )

    @property
    def groups(self) -> int:
        """Number G of heads of keys and values."""
        return self.heads if self.key_value_heads is None else self.key_value_heads

    @property
    def score_scale(self) -> float:
        """The factor of the scores."""
        return self.key_dim**-0.5 if self.scale is None else self.scale


class SelfAttention(nn.Module):
    """Self-attention F = A X W_V (W_O), A = softmax(scale X W_Q W_K^T X^T), or another kind of weights.

    Parameters: `query`, `key` (D x H K) or `query_key` (D x H D), `value` (D x H V), and `output` (H V x O) where the
    config has an `output_dim`; with `key_value_heads` G, `key` is D x G K and `value` D x G V.
    Call with inputs (..., L, D) and optionally a boolean mask that broadcasts against (..., H, L, L), true where a
    query may look; returns (..., L, H V) or (..., L, O).

    Example:
        >>> import attnlab as al
        >>> import jax
        >>> layer = al.SelfAttention(al.AttentionConfig(key_dim=2, value_dim=3))
        >>> tokens = jax.random.normal(jax.random.key(0), (1, 4, 3))
        >>> params = layer.init(jax.random.key(1), tokens)["params"]
        >>> sorted(params), layer.apply({"params": params}, tokens).shape
        (['key', 'query', 'value'], (1, 4, 3))
    """

    config: AttentionConfig

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "*B L D"], mask: Bool[Array, "..."] | None = None
    ) -> Float[Array, "*B L O"]:
        """See the class."""
        config = self.config
        check_inputs(inputs, ("tokens", "token dimension"))
        attention_weights = self._attention_weights(inputs, mask)
        self.sow("intermediates", "attention_weights", attention_weights, reduce_fn=lambda _, new: new)
        values = equations.split_heads(self._linear("value", inputs, config.groups * config.value_dim), config.groups)
        values = equations.share_heads(values, config.heads)
        merged = equations.merge_heads(equations.attend(attention_weights, values))
        return merged if config.output_dim is None else self._linear("output", merged, config.output_dim)

    def _attention_weights(
        self, inputs: Float[Array, "*B L D"], mask: Bool[Array, "..."] | None
    ) -> Float[Array, "*B H L L"]:
        mask = equations.with_causal(mask, inputs.shape[-2]) if self.config.causal else mask
        scores = equations.attention_scores(*self._queries_and_keys(inputs), self.config.score_scale)
        return weighting(self.config.weights).weights(scores, mask)

    def _queries_and_keys(self, inputs: Float[Array, "*B L D"]) -> tuple[Array, Array]:
        heads, groups, width = self.config.heads, self.config.groups, inputs.shape[-1]
        if self.config.merged:
            # X W_QK X^T per head: the query is X W_QK, the key X itself.
            queries = equations.split_heads(self._linear("query_key", inputs, heads * width), heads)
            return queries, jnp.broadcast_to(inputs[..., None, :, :], queries.shape)
        queries, keys = (
            equations.split_heads(self._linear(name, inputs, count * self.config.key_dim), count)
            for name, count in (("query", heads), ("key", groups))
        )
        if self.config.rotary is not None:
            positions = jnp.arange(inputs.shape[-2], dtype=float)
            queries, keys = (self.config.rotary(x, positions) for x in (queries, keys))
        return queries, equations.share_heads(keys, heads)

    def _linear(self, name: str, x: Float[Array, "*B L I"], width: int) -> Float[Array, "*B L O"]:
        return linear(self, name, x, width, initializer(self.config.init, self.config.gain), self.config.bias)


def attention_maps(module: nn.Module, params: Params, *inputs: jax.Array) -> dict[str, Float[Array, "*B H L L"]]:
    """The matrix A of every attention layer within `module` called on `inputs` (and a mask, if it takes one).

    Keyed by the path of the layer, such as `layer_0/attention`; that of a bare `SelfAttention` is empty.

    Example:
        >>> import attnlab as al
        >>> import jax
        >>> layer = al.SelfAttention(al.AttentionConfig(key_dim=2, value_dim=3))
        >>> tokens = jax.random.normal(jax.random.key(0), (1, 4, 3))
        >>> params = layer.init(jax.random.key(1), tokens)["params"]
        >>> from attnlab.models.attention import attention_maps
        >>> (weights,) = attention_maps(layer, params, tokens).values()
        >>> weights.shape, weights.sum(-1).round(4).max().item()
        ((1, 1, 4, 4), 1.0)
    """
    _, variables = module.apply({"params": params}, *inputs, mutable=["intermediates"])
    maps = variables.get("intermediates", {})
    names = (name.removesuffix("attention_weights").rstrip("/") for name in leaf_names(maps))
    return dict(zip(names, jax.tree.leaves(maps), strict=True))
