"""Pairs of tokens in a layer that turns its queries and keys by their positions (rotary embeddings).

With the turn R_i of token i the scores are T_ij = τ (R_i q_i) . (R_j k_j). They are linear in the key as token i sees
it, and in the query as token j does,

    T_ij = τ q_i . κ_ij = ρ_ij . W_K^T x_j,      κ_ij = R_i^T R_j W_K^T x_j,   ρ_ij = τ R_j^T R_i q_i,

so that dT_ij/dQ = τ x_i (x) κ_ij and dT_ij/dK = x_j (x) ρ_ij =: φ_ij. What was a moment of the tokens is now one of the
κ_ij, or of the φ_ij: for the query the Kronecker form stays, as τ x_i does not depend on j; for the key it goes.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.attention.layer import AttentionLayer
from attnlab.attention.moments import AttentionMoments
from attnlab.models.weightings import weighting


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenPairs:
    """All pairs of a query token (N, of all sequences) and a token J that it may see, which includes a sink as the
    last; centres are weighted means over J where the kind of attention has them, else zero.

    Attributes:
        tokens: x_j; zero for a sink.
        centred: x_j - m_i.
        keys: κ_ij less their mean.
        queries: ρ_ij.
        slopes: s_ij, weights of the second moment.
        twists: s_ij u_ij, where u_ij = (x_j - m_i) . W_V W_O g_i: the derivatives of g . f in the scores.
        bends: t_ij u_ij with the weights t_ij of the third moment; None where it is zero.
        turns: R_i.
        about_mean: whether the kind of attention has its moments about the mean.
    """

    tokens: Float[Array, "N J D"]
    centred: Float[Array, "N H J D"]
    keys: Float[Array, "N H J K"]
    queries: Float[Array, "N H J K"]
    slopes: Float[Array, "N H J"]
    twists: Float[Array, "N H J"]
    bends: Float[Array, "N H J"] | None
    turns: Float[Array, "N K K"]
    about_mean: bool = field(metadata={"static": True})

    def features(self) -> Float[Array, "N H J D K"]:
        """φ_ij = x_j (x) ρ_ij less their mean: as many numbers as there are pairs, heads and weights of a key."""
        products = jnp.einsum("njr,nhjc->nhjrc", self.tokens, self.queries)
        if not self.about_mean:
            return products
        return products - jnp.einsum("nhj,nhjrc->nhrc", self.slopes, products)[:, :, None]


def token_pairs(point: AttentionLayer, moments: AttentionMoments, direction: Float[Array, "B H L D"]) -> TokenPairs:
    """The pairs of a checked layer; `direction` is W_V W_O g_i."""
    kind, turns = weighting(point.config.weights), turns_of(point)
    turned_queries, turned_keys = (
        jnp.einsum("izc,bia,hac->bhiz", turns, point.inputs, weights) for weights in (point.query, point.key)
    )
    keys = jnp.einsum("izc,bhjz->bhijc", turns, turned_keys)
    queries = point.config.score_scale * jnp.einsum("jzd,bhiz->bhijd", turns, turned_queries)
    slopes, bends = _visible(point) if moments.slopes is None else moments.slopes, moments.bends
    tokens = point.inputs
    if moments.rest is not None:  # a sink is one token more, at the origin, that nothing turns
        tokens = jnp.pad(tokens, [(0, 0), (0, 1), (0, 0)])
        keys, queries = (jnp.pad(x, [(0, 0)] * 3 + [(0, 1), (0, 0)]) for x in (keys, queries))
        slopes = jnp.concatenate([slopes, moments.rest[..., None]], axis=-1)
        bends = slopes
    centred = jnp.broadcast_to(tokens[:, None, None], (*slopes.shape, tokens.shape[-1]))
    if kind.centred:
        centred = centred - moments.first[..., None, :]
        keys = keys - jnp.einsum("bhij,bhijc->bhic", slopes, keys)[..., None, :]
    along = jnp.einsum("bhija,bhia->bhij", centred, direction)
    batch, length = point.inputs.shape[:2]
    return TokenPairs(
        tokens=jnp.repeat(tokens, length, axis=0),
        centred=by_token(centred),
        keys=by_token(keys),
        queries=by_token(queries),
        slopes=by_token(slopes),
        twists=by_token(slopes * along),
        bends=None if bends is None else by_token(bends * along),
        turns=jnp.tile(turns, (batch, 1, 1)),
        about_mean=kind.centred,
    )


def turns_of(point: AttentionLayer) -> Float[Array, "L K K"]:
    """R_t of every position, [token, row, column]."""
    rotary, width, length = point.config.rotary, point.config.key_dim, point.inputs.shape[1]
    assert rotary is not None
    units = jnp.broadcast_to(jnp.eye(width, dtype=point.inputs.dtype)[:, None], (width, length, width))
    return jnp.einsum("ctz->tzc", rotary(units, jnp.arange(length, dtype=float)))


def _visible(point: AttentionLayer) -> Float[Array, "B H L L"]:
    batch, length, _ = point.inputs.shape
    shape, dtype = (batch, point.config.heads, length, length), point.inputs.dtype
    return jnp.ones(shape, dtype) if point.mask is None else point.mask.astype(dtype)


def by_token(per_head: Float[Array, "B H L *rest"]) -> Float[Array, "N H *rest"]:
    """Heads last, tokens of all sequences in one axis."""
    moved = jnp.moveaxis(per_head, 1, 2)
    return moved.reshape(-1, *moved.shape[2:])
