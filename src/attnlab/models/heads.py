"""The equations of one attention layer as pure functions: no parameters of their own, no state.

Shapes stand in the names: B sequences (any leading axes), L tokens, D token dimension, H heads, K query/key dimension
per head, V value dimension per head. Weights are two-dimensional, heads side by side: `query` and `key` D x (H K),
`value` D x (H V), `output` (H V) x O, `query_key` D x (H D). With one head they are the W_Q, W_K, W_V of the papers.
Where queries share keys and values, these have G heads.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from attnlab.checks import is_concrete


def split_heads(x_BxLxHK: Float[Array, "*B L HK"], heads: int) -> Float[Array, "*B H L K"]:
    """Separate the heads that stand side by side in the last axis."""
    *batch, length, width = x_BxLxHK.shape
    return jnp.moveaxis(x_BxLxHK.reshape(*batch, length, heads, width // heads), -2, -3)


def merge_heads(x_BxHxLxV: Float[Array, "*B H L V"]) -> Float[Array, "*B L HV"]:
    """Put the heads side by side again: the inverse of `split_heads`."""
    x_BxLxHxV = jnp.moveaxis(x_BxHxLxV, -3, -2)
    return x_BxLxHxV.reshape(*x_BxLxHxV.shape[:-2], -1)


def share_heads(x_BxGxLxK: Float[Array, "*B G L K"], heads: int) -> Float[Array, "*B H L K"]:
    """Each of G heads H / G times, side by side: query head h looks at key and value head h G // H."""
    groups = x_BxGxLxK.shape[-3]
    return x_BxGxLxK if groups == heads else jnp.repeat(x_BxGxLxK, heads // groups, axis=-3)


def attention_scores(
    queries_BxHxLxK: Float[Array, "*B H L K"], keys_BxHxMxK: Float[Array, "*B H M K"], scale: float
) -> Float[Array, "*B H L M"]:
    """T = scale * Q K^T; the papers' temperature 1/sqrt(d_k) is `scale`.

    The queries are scaled, not the scores: XLA joins a product behind the dot with softmax's subtraction of the maximum
    and rounds them once, the maximum itself twice. Where scores are beyond 1e9 in float32 the difference overflows exp.
    """
    return jnp.einsum("...lk,...mk->...lm", scale * queries_BxHxLxK, keys_BxHxMxK)


def additive_scores(
    queries_BxLxK: Float[Array, "*B L K"],
    keys_BxMxK: Float[Array, "*B M K"],
    weight_K: Float[Array, " K"],
    activation: Callable[[jax.Array], jax.Array] = jnp.tanh,
) -> Float[Array, "*B L M"]:
    """T_ij = w . activation(q_i + k_j) for projected queries and keys (Bahdanau, Cho, Bengio, arXiv 1409.0473).

    Without an activation the score is w . q_i + w . k_j, whose first part softmax does not see.
    """
    sums_BxLxMxK = queries_BxLxK[..., :, None, :] + keys_BxMxK[..., None, :, :]
    return activation(sums_BxLxMxK) @ weight_K


def softmax_weights(
    scores_BxHxLxM: Float[Array, "*B L M"], mask: Bool[Array, "..."] | None = None
) -> Float[Array, "*B L M"]:
    """Softmax over the last axis; `mask` (broadcast against the scores) is true where a query may look.

    Every row of the mask must allow at least one token: `ValueError` if one does not, NaN under `jit`, where the mask
    cannot be looked at. Written out in the dtype of the scores: the fused kernel of JAX takes its softmax in float32
    even in 64-bit mode.
    """
    if mask is not None:
        check_mask(mask, scores_BxHxLxM.shape)
        if is_concrete(mask) and not np.asarray(mask).any(axis=-1).all():
            raise ValueError("a row of mask is all false; softmax expects at least one token that each query may see.")
        scores_BxHxLxM = jnp.where(mask, scores_BxHxLxM, -jnp.inf)
    return jax.nn.softmax(scores_BxHxLxM, axis=-1)


def linear_weights(
    scores_BxHxLxM: Float[Array, "*B L M"], mask: Bool[Array, "..."] | None = None
) -> Float[Array, "*B L M"]:
    """The scores themselves, zero where `mask` is false: linear attention, not normalised."""
    if mask is None:
        return scores_BxHxLxM
    check_mask(mask, scores_BxHxLxM.shape)
    return jnp.where(mask, scores_BxHxLxM, 0)


def attend(weights_BxHxLxL: Float[Array, "*B L M"], values_BxHxLxV: Float[Array, "*B M V"]) -> Float[Array, "*B L V"]:
    """Average the values: A V."""
    return jnp.einsum("...lm,...mv->...lv", weights_BxHxLxL, values_BxHxLxV)


def causal_mask(length: int) -> Bool[Array, "L L"]:
    """True where the key stands at or before the query."""
    return jnp.tril(jnp.ones((length, length), dtype=bool))


def with_causal(mask: Bool[Array, "..."] | None, length: int) -> Bool[Array, "*B L L"]:
    """The causal mask, and `mask` besides if there is one."""
    causal = causal_mask(length)
    if mask is None:
        return causal
    check_mask(mask, (*mask.shape[:-2], length, length))
    shape = jnp.broadcast_shapes(mask.shape, causal.shape)
    return jnp.broadcast_to(mask, shape) & jnp.broadcast_to(causal, shape)


def check_mask(mask: jax.Array, shape: tuple[int, ...]) -> None:
    """Raise unless `mask` is boolean (`TypeError`) and broadcasts to `shape`, that of the scores (`ValueError`)."""
    if mask.dtype != jnp.dtype(bool):
        raise TypeError(f"mask has dtype {mask.dtype}; expected bool, true where a query may look. Compare it with 0.")
    broadcasts = len(mask.shape) <= len(shape) and all(
        m in (1, s) for m, s in zip(reversed(mask.shape), reversed(shape), strict=False)
    )
    if not broadcasts:
        raise ValueError(
            f"mask has shape {mask.shape}, which does not broadcast to that of the scores, {shape} "
            "(..., heads, queries, keys)."
        )
