"""One attention layer at one point: configuration, weights, tokens and mask, checked once and shaped for the theory."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from attnlab.checks import check_finite, check_floating, check_not_empty, is_concrete
from attnlab.models import heads as equations
from attnlab.models.attention import AttentionConfig
from attnlab.models.weightings import weighting
from attnlab.types import Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionLayer:
    """Weights, B sequences of L tokens of dimension D, and the mask of an attention layer.

    Build it with `checked_layer(...)`. The properties give the weights per head: H heads, K key, V value, O output
    features.
    """

    params: dict[str, Array]
    inputs: Float[Array, "B L D"]
    mask: Bool[Array, "B H L L"] | None
    config: AttentionConfig = field(metadata={"static": True})

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameter blocks, in flattening order."""
        return tuple(sorted(self.params))

    @property
    def query(self) -> Float[Array, "H D K"]:
        """W_Q of every head; W_QK of a merged layer."""
        return equations.split_heads(self.params["query_key" if self.config.merged else "query"], self.config.heads)

    @property
    def key(self) -> Float[Array, "H D K"]:
        """W_K that every query head looks at; the identity in a merged layer."""
        if not self.config.merged:
            return self._by_query_head("key")
        width, dtype = self.inputs.shape[-1], self.inputs.dtype
        return jnp.broadcast_to(jnp.eye(width, dtype=dtype), (self.config.heads, width, width))

    @property
    def value(self) -> Float[Array, "H D V"]:
        """W_V that every query head looks at."""
        return self._by_query_head("value")

    def _by_query_head(self, name: str) -> Float[Array, "H D W"]:
        by_group = equations.split_heads(self.params[name], self.config.groups)
        return equations.share_heads(by_group, self.config.heads)

    @property
    def output(self) -> Float[Array, "H V O"]:
        """W_O of every head; without a projection, the part of the identity that puts the heads side by side."""
        heads, width = self.config.heads, self.config.value_dim
        if "output" in self.params:
            return self.params["output"].reshape(heads, width, -1)
        return jnp.eye(heads * width, dtype=self.inputs.dtype).reshape(heads, width, heads * width)

    @property
    def output_features(self) -> int:
        """Number O of output features of the layer."""
        return self.output.shape[-1]


def expected_shapes(config: AttentionConfig, width: int) -> dict[str, tuple[int, int]]:
    """Shape of every weight of the layer for tokens of dimension `width`."""
    score = {"query": (width, config.heads * config.key_dim), "key": (width, config.groups * config.key_dim)}
    if config.merged:
        score = {"query_key": (width, config.heads * width)}
    shapes = {**score, "value": (width, config.groups * config.value_dim)}
    if config.output_dim is not None:
        shapes["output"] = (config.heads * config.value_dim, config.output_dim)
    return shapes


def checked_layer(
    config: AttentionConfig,
    params: Params,
    inputs: Float[Array, "*B L D"],
    mask: Bool[Array, "..."] | None = None,
) -> AttentionLayer:
    """The layer of `config` with the weights `params` on `inputs`.

    `params` is `SelfAttention(config).init(key, inputs)["params"]`, `mask` as in `SelfAttention`: boolean, broadcast
    against (..., H, L, L), true where a query may look; a causal config adds its own. Leading axes of `inputs` are
    sequences. Raises `ValueError` for options without a closed form, weights, inputs or masks whose shapes do not fit,
    values that are not finite, and, with softmax, a query that may look nowhere; `TypeError` for dtypes.
    """
    _check_covered(config)
    inputs = jnp.asarray(inputs)
    if inputs.ndim < 2:
        raise ValueError(
            f"inputs have shape {inputs.shape}; expected (..., tokens, token dimension). Add the missing axes."
        )
    check_not_empty("inputs", inputs)
    _check_params(config, params, inputs.shape[-1])
    for name, arrays in (("inputs", inputs), ("params", params)):
        check_floating(name, arrays)
        check_finite(name, arrays)
    full = _full_mask(config, inputs.shape, mask)
    inputs = inputs.reshape(-1, *inputs.shape[-2:])
    return AttentionLayer({name: jnp.asarray(params[name]) for name in sorted(params)}, inputs, full, config)


def _check_covered(config: AttentionConfig) -> None:
    if config.bias:
        raise ValueError(
            "bias is True; the closed form covers layers without biases. "
            "Use bias=False, or the matrix-free operators of attnlab.curvature."
        )


def _check_params(config: AttentionConfig, params: Params, width: int) -> None:
    shapes = expected_shapes(config, width)
    if not hasattr(params, "keys") or set(params.keys()) != set(shapes):
        found = sorted(params.keys()) if hasattr(params, "keys") else type(params).__name__
        raise ValueError(
            f"params hold {found}; this config has {sorted(shapes)}. Pass the dict of the attention layer alone."
        )
    for name, shape in shapes.items():
        if jnp.shape(params[name]) != shape:
            raise ValueError(
                f"params: {name} has shape {jnp.shape(params[name])}; expected {shape} for tokens of dimension "
                f"{width}. Check inputs and config against each other."
            )


def _full_mask(
    config: AttentionConfig, shape: tuple[int, ...], mask: Bool[Array, "..."] | None
) -> Bool[Array, "B H L L"] | None:
    *batch, length, _ = shape
    target = (*batch, config.heads, length, length)
    if mask is not None:
        mask = jnp.asarray(mask)
        equations.check_mask(mask, target)
    if config.causal:
        mask = equations.with_causal(mask, length)
    if mask is None:
        return None
    full = jnp.broadcast_to(mask, target).reshape(-1, *target[-3:])
    if weighting(config.weights).normalised and is_concrete(full):
        _check_no_empty_row(full)
    return full


def _check_no_empty_row(mask: Bool[Array, "B H L L"]) -> None:
    empty = jnp.argwhere(~jnp.any(mask, axis=-1))
    if empty.shape[0]:
        sequence, head, token = (int(i) for i in empty[0])
        raise ValueError(
            f"mask lets {empty.shape[0]} queries look nowhere, first token {token} of sequence {sequence} in head "
            f"{head}; a softmax needs at least one key per query. Let padded queries see themselves."
        )
