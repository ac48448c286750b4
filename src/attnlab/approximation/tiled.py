"""Exact softmax attention in tiles with memory linear in the number of tokens, to every order of derivative.

Fused kernels have a hand-written first derivative and no second. Here everything is made of `scan` and `checkpoint`:
reverse mode keeps the inputs alone and makes the scores of a tile again, so gradients and Hessian-vector products are
as frugal as the output. Rabe and Staats (arXiv 2112.05682) and Dao et al. (arXiv 2205.14135) for the output.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.checks import check_positive
from attnlab.types import Real


class Partition(NamedTuple):
    """Attention over some of the keys: `total` = sum e^(s - peak), `sums` = sum e^(s - peak) v for every query."""

    peak: Float[Array, " L"]
    total: Float[Array, " L"]
    sums: Float[Array, "L v"]


def partition(
    queries: Float[Array, "L d"], keys: Float[Array, "M d"], values: Float[Array, "M v"], scale: Real
) -> Partition:
    """Attention over one set of keys."""
    scores = scale * (queries @ keys.T)
    # The result does not depend on the peak, so no derivative needs to flow through it.
    peak = jax.lax.stop_gradient(jnp.max(scores, axis=-1))
    masses = jnp.exp(scores - peak[:, None])
    return Partition(peak, jnp.sum(masses, axis=-1), masses @ values)


def merge(first: Partition, second: Partition) -> Partition:
    """Attention over the union of two disjoint sets of keys: associative and commutative."""
    peak = jnp.maximum(first.peak, second.peak)
    weights = [jnp.exp(part.peak - peak) for part in (first, second)]
    total = weights[0] * first.total + weights[1] * second.total
    return Partition(peak, total, weights[0][:, None] * first.sums + weights[1][:, None] * second.sums)


def output(whole: Partition) -> Float[Array, "L v"]:
    """The average of the values."""
    return whole.sums / whole.total[:, None]


def tiled_attention(
    queries: Float[Array, "L d"],
    keys: Float[Array, "M d"],
    values: Float[Array, "M v"],
    scale: Real = 1.0,
    tile: int = 128,
) -> Float[Array, "L v"]:
    """softmax(scale Q K^T) V, `tile` queries by `tile` keys at a time.

    Raises `ValueError` unless the tile divides the numbers of queries and of keys.
    """
    check_positive(tile=tile)
    for name, count in (("queries", queries.shape[0]), ("keys", keys.shape[0])):
        if count % tile:
            raise ValueError(f"tile is {tile}, which does not divide the {count} {name}; expected a divisor.")
    recomputed = jax.checkpoint(lambda part, keys, values: partition(part, keys, values, scale))
    tiles = jax.tree.map(lambda x: x.reshape(-1, tile, x.shape[-1]), (queries, keys, values))

    @jax.checkpoint
    def one_tile(part: Array) -> Array:
        def take_in(so_far: Partition, pair: tuple[Array, Array]) -> tuple[Partition, None]:
            return merge(so_far, recomputed(part, *pair)), None

        first = jax.tree.map(lambda x: x[0], tiles[1:])
        rest = jax.tree.map(lambda x: x[1:], tiles[1:])
        return output(jax.lax.scan(take_in, recomputed(part, *first), rest)[0])

    return jax.lax.map(one_tile, tiles[0]).reshape(queries.shape[0], values.shape[1])
