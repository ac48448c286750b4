"""Extreme eigenpairs of an operator that moves slowly: block Krylov from the last ones, with computed residuals."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.curvature.lanczos import FlatProduct
from attnlab.curvature.operators import Operator
from attnlab.curvature.restarts import plan_restarts, thick_restart
from attnlab.trees import ravel
from attnlab.types import PRNGKey

DENSE_DIMENSION = 64
"""Up to this dimension a cold start takes the dense matrix."""

COLD_TOLERANCE = 1e-4
"""Residual of a cold start, relative to the largest eigenvalue in modulus."""


class TopPairs(NamedTuple):
    """The k algebraically highest Ritz pairs, ascending: the sharpness is `values[-1]`.

    `residuals` are ||A v - value v||, computed: within that distance of each value lies an eigenvalue, and no Ritz
    value exceeds the highest eigenvalue. `vectors` have orthonormal rows.
    """

    values: Float[Array, " k"]
    vectors: Float[Array, "k n"]
    residuals: Float[Array, " k"]


def warm_top_pairs(
    product: FlatProduct, start: Float[Array, "k n"], depth: int = 1, *, batched: bool = False
) -> TopPairs:
    """Rayleigh-Ritz in the block Krylov space span{V, A V, ..., A^depth V} of V = `start` (orthonormal rows): one
    round, k (depth + 1) products, residuals included.

    From the pairs of a nearby matrix the error is squared twice over a round: a Ritz value's error is quadratic in its
    vector's, and one Krylov step is a step of steepest ascent. `batched` takes the k products of a block at once
    (`fastest_batching` tells whether that pays). Pure; for jitted code.
    """
    depth = min(depth, start.shape[1] // start.shape[0] - 1)  # no more vectors than dimensions
    apply = jax.vmap(product) if batched else lambda block: jax.lax.map(product, block)
    basis, images = start, apply(start)
    for _ in range(depth):
        block = _orthonormal_block(images[-start.shape[0] :], basis)
        basis, images = jnp.concatenate([basis, block]), jnp.concatenate([images, apply(block)])
    projected = basis @ images.T
    values, rotation = jnp.linalg.eigh((projected + projected.T) / 2)
    values, rotation = values[-start.shape[0] :], rotation[:, -start.shape[0] :].T
    vectors = rotation @ basis
    residuals = jnp.linalg.norm(rotation @ images - values[:, None] * vectors, axis=1)
    return TopPairs(values, vectors, residuals)


def refined_top_pairs(
    product: FlatProduct,
    start: Float[Array, "k n"],
    depth: int = 1,
    *,
    tolerance: float,
    rounds: int,
    batched: bool = False,
) -> TopPairs:
    """`warm_top_pairs` again, at most `rounds` times, until the highest pair's residual is at most `tolerance` times
    its value in modulus: one round nearly always, more after the operator has moved far. Pure; for jitted code."""

    def unfinished(state: tuple[Array, TopPairs]) -> Array:
        number, pairs = state
        return (number < rounds) & (pairs.residuals[-1] > tolerance * jnp.abs(pairs.values[-1]))

    def again(state: tuple[Array, TopPairs]) -> tuple[Array, TopPairs]:
        number, pairs = state
        return number + 1, warm_top_pairs(product, pairs.vectors, depth, batched=batched)

    first = warm_top_pairs(product, start, depth, batched=batched)
    return jax.lax.while_loop(unfinished, again, (jnp.array(1), first))[1]


def _orthonormal_block(block: Float[Array, "k n"], basis: Float[Array, "m n"]) -> Float[Array, "k n"]:
    """Orthonormal rows that span `block` up to `basis`, and are orthogonal to it.

    Twice is enough: what the first pass leaves as rounding noise becomes some unit row, and the second pass makes that
    orthogonal too. An exactly converged pair leaves nothing at all: a filler of the size of rounding errors takes its
    place, a direction that does no harm.
    """
    size = jnp.max(jnp.abs(block))
    places = jnp.outer(jnp.arange(1, block.shape[0] + 1), jnp.arange(1, block.shape[1] + 1)).astype(block.dtype)
    block = block + jnp.finfo(block.dtype).eps * jnp.where(size > 0, size, 1) * jnp.cos(2**0.5 * places)
    for _ in range(2):
        block = block - (block @ basis.T) @ basis
        block = jnp.linalg.qr(block.T)[0].T
    return block


def cold_top_pairs(product: FlatProduct, dimension: int, count: int, key: PRNGKey, dtype: jnp.dtype) -> TopPairs:
    """The `count` highest pairs from nothing: the dense matrix up to dimension 64, above it thick-restart Lanczos to a
    residual of 1e-4 of the largest eigenvalue in modulus. Pure; for jitted code."""
    if dimension <= max(DENSE_DIMENSION, 2 * count + 10):
        matrix = jax.lax.map(product, jnp.eye(dimension, dtype=dtype))
        values, vectors = jnp.linalg.eigh((matrix + matrix.T) / 2)
        values, vectors = values[-count:], vectors[:, -count:].T
        return TopPairs(values, vectors, jnp.linalg.norm(vectors @ matrix - values[:, None] * vectors, axis=1))
    start_key, key = jax.random.split(key)
    start = jax.random.normal(start_key, (dimension,), dtype)
    pairs = thick_restart(product, start, plan_restarts(0, count, dimension), COLD_TOLERANCE, key)
    return TopPairs(pairs.values, pairs.vectors, pairs.residuals)


def fastest_batching(operator: Operator, count: int = 2, repeats: int = 5) -> bool:
    """Whether `count` products are faster at once than one after another, by a timing of both (medians).

    Small models gain from batches; large ones on a CPU, bound by memory, do not.
    """
    vectors = jnp.ones((count, operator.dimension), ravel(operator.point).dtype)
    one_by_one = jax.jit(lambda operator, vectors: jax.lax.map(operator.flat_mv, vectors))
    at_once = jax.jit(lambda operator, vectors: jax.vmap(operator.flat_mv)(vectors))
    return _seconds(at_once, operator, vectors, repeats) < _seconds(one_by_one, operator, vectors, repeats)


def _seconds(function: Callable, operator: Operator, vectors: Array, repeats: int) -> float:
    jax.block_until_ready(function(operator, vectors))
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(function(operator, vectors))
        times.append(time.perf_counter() - started)
    return statistics.median(times)
