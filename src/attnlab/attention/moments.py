"""Moments of the tokens under the attention distribution of every query: all that the curvature knows of softmax.

The layer sees its scores only through z_i = scale W_K W_Q^T x_i, since T_ij = z_i . x_j. Softmax makes A_i the
exponential family with natural parameter z_i over the tokens, so the derivatives of the head's average are cumulants:

    m_i = sum_j A_ij x_j,   dm_i/dz_i = Sigma_i,   d^2 m_i/dz_i^2 = kappa_i,

the mean, the covariance and the third central moment (Ormaniec, Dangel, Singh, arXiv 2410.10986, write them as Z_1 and
Z_2). Linear attention has m_i = (sum_j x_j x_j^T) z_i, hence Sigma_i = sum_j x_j x_j^T over the visible tokens and
kappa = 0. What they are for each kind of attention stands in `attnlab.models.weightings`.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from attnlab.attention.layer import AttentionLayer, checked_layer
from attnlab.models import heads as equations
from attnlab.models.attention import AttentionConfig
from attnlab.models.weightings import weighting
from attnlab.types import Params

_QUERIES_AT_ONCE = 64
"""Queries whose L x D centred tokens are held together: memory stays of the order L D max(D, 64)."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionMoments:
    """Moments per sequence B, head H and query token L.

    Attributes:
        tokens: the inputs x_j.
        weights: the attention matrix A (the bare scores for linear attention).
        first: m_i = sum_j A_ij x_j.
        second: Sigma_i, the covariance under A_i (linear attention: the sum of x_j x_j^T), which is dm_i/dz_i but in a
            layer that turns its keys, whose scores are not of the form z_i . x_j: see `attnlab.attention.turned`.
        slopes: its weights; None is 1 at every token that a query sees.
        bends: weights of the third moment; None where it is zero.
        rest: weight of the sink, a token at the origin; None where there is none.
        kind: the row of `attnlab.models.weightings`.
    """

    tokens: Float[Array, "B L D"]
    weights: Float[Array, "B H L L"]
    first: Float[Array, "B H L D"]
    second: Float[Array, "B H L D D"]
    slopes: Float[Array, "B H L L"] | None
    bends: Float[Array, "B H L L"] | None
    rest: Float[Array, "B H L"] | None
    kind: str = field(metadata={"static": True})

    def third_along(self, direction: Float[Array, "B H L D"]) -> Float[Array, "B H L D D"]:
        """kappa_i contracted with one vector per head and query, without the D^3 array: O(L^2 D^2) operations.

        Zero for linear attention.
        """
        if self.bends is None:
            return jnp.zeros((*self.first.shape, self.first.shape[-1]), self.first.dtype)
        # sum_j t_ij (y_ij . w_i) y_ij y_ij^T, y_ij = x_j - c_i; the bracket is split so that it stays centred.
        along = jnp.einsum("bjd,bhid->bhij", self.tokens, direction)
        if not weighting(self.kind).centred:
            return _weighted_squares(self.bends * along, self.tokens, jnp.zeros_like(self.first))
        centre_along = jnp.einsum("bhid,bhid->bhi", self.first, direction)
        third = _weighted_squares(self.bends * (along - centre_along[..., None]), self.tokens, self.first)
        return third if self.rest is None else third - _squares(self.rest * centre_along, self.first)

    def third(self) -> Float[Array, "B H L D D D"]:
        """kappa_i in full, for small D."""
        basis = jnp.eye(self.tokens.shape[-1], dtype=self.tokens.dtype)
        along = jax.vmap(lambda unit: self.third_along(jnp.broadcast_to(unit, self.first.shape)), out_axes=-1)
        return along(basis)


def attention_moments(
    config: AttentionConfig,
    params: Params,
    inputs: Float[Array, "*B L D"],
    mask: Bool[Array, "..."] | None = None,
) -> AttentionMoments:
    """Moments of the attention of one layer; leading axes of `inputs` are flattened into B.

    Arguments and errors as for `attnlab.attention.attention_hessian`.

    Example:
        >>> import attnlab as al
        >>> import jax
        >>> layer = al.SelfAttention(al.AttentionConfig(key_dim=2, value_dim=3))
        >>> tokens = jax.random.normal(jax.random.key(0), (1, 4, 3))
        >>> params = layer.init(jax.random.key(1), tokens)["params"]
        >>> from attnlab.attention import attention_moments
        >>> moments = attention_moments(layer.config, params, tokens)
        >>> moments.first.shape, moments.second.shape
        ((1, 1, 4, 3), (1, 1, 4, 3, 3))
    """
    return moments_of(checked_layer(config, params, inputs, mask))


@jax.jit
def moments_of(point: AttentionLayer) -> AttentionMoments:
    """Moments of a checked layer."""
    kind = weighting(point.config.weights)
    weights, slopes, bends, rest = kind.derivatives(_scores(point), point.mask)
    first = jnp.einsum("bhij,bjd->bhid", weights, point.inputs)
    second = _second(point, slopes, rest, first)
    return AttentionMoments(point.inputs, weights, first, second, slopes, bends, rest, point.config.weights)


def _second(point: AttentionLayer, slopes: Array | None, rest: Array | None, first: Array) -> Array:
    kind = weighting(point.config.weights)
    if slopes is None:
        second = _visible_squares(point)
    else:
        second = _weighted_squares(slopes, point.inputs, first if kind.centred else jnp.zeros_like(first))
    return second if rest is None else second + _squares(rest, first)


def _scores(point: AttentionLayer) -> Float[Array, "B H L L"]:
    tokens = point.inputs
    if weighting(point.config.weights).normalised and point.config.rotary is None:
        # The weights do not see a shift of all keys; without their mean the scores keep their digits.
        tokens = tokens - jnp.mean(tokens, axis=1, keepdims=True)
    queries = jnp.einsum("bid,hdk->bhik", point.inputs, point.query)
    keys = jnp.einsum("bjd,hdk->bhjk", tokens, point.key)
    if point.config.rotary is not None:
        queries, keys = (point.config.rotary(x, jnp.arange(tokens.shape[1], dtype=float)) for x in (queries, keys))
    return equations.attention_scores(queries, keys, point.config.score_scale)


def _squares(weights: Float[Array, "B H L"], vectors: Float[Array, "B H L D"]) -> Float[Array, "B H L D D"]:
    return jnp.einsum("bhi,bhia,bhic->bhiac", weights, vectors, vectors)


def _visible_squares(point: AttentionLayer) -> Float[Array, "B H L D D"]:
    batch, length, width = point.inputs.shape
    if point.mask is None:
        gram = jnp.einsum("bja,bjc->bac", point.inputs, point.inputs)
        return jnp.broadcast_to(gram[:, None, None], (batch, point.config.heads, length, width, width))
    squares = jnp.einsum("bja,bjc->bjac", point.inputs, point.inputs)
    return jnp.einsum("bhij,bjac->bhiac", point.mask.astype(squares.dtype), squares)


def _weighted_squares(
    weights: Float[Array, "B H L L"], tokens: Float[Array, "B L D"], centres: Float[Array, "B H L D"]
) -> Float[Array, "B H L D D"]:
    """sum_j w_ij (x_j - c_i)(x_j - c_i)^T, centred before squaring: an offset of the tokens costs no digits."""
    batch, heads, length, width = centres.shape

    def one_query(query: tuple[Array, Array, Array]) -> Array:
        sequence, weight, centre = query
        centred = tokens[sequence] - centre[None, :]
        return (weight[:, None] * centred).T @ centred

    sequence = jnp.repeat(jnp.arange(batch), heads * length)
    queries = (sequence, weights.reshape(-1, length), centres.reshape(-1, width))
    squares = jax.lax.map(one_query, queries, batch_size=max(width, _QUERIES_AT_ONCE))
    return squares.reshape(batch, heads, length, width, width)
