"""Extreme eigenpairs of an operator that moves slowly: block Krylov from the last ones, with computed residuals."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.krylov.lanczos import FlatProduct, advance, begin, inner_products
from attnlab.krylov.restarts import thick_restart
from attnlab.krylov.ritz import plan_restarts
from attnlab.trees import length, power_of_two
from attnlab.types import PRNGKey

DENSE_DIMENSION = 64
"""Up to this dimension a cold start takes the dense matrix."""

COLD_TOLERANCE = 1e-4
"""Residual of a cold start, relative to the largest eigenvalue in modulus."""

RANDOM_SHARE = 0.03
"""Length of the random direction that is mixed into every guard between two measurements. An eigenvector that the
subspace is orthogonal to cannot be found from it, however far its eigenvalue rises; from this share on it grows."""


DOUBT = 1e-3
"""Probability with which the highest eigenvalue may exceed the bound of a search."""


class TopPairs(NamedTuple):
    """The k algebraically highest Ritz pairs, ascending: the sharpness is `values[-1]`.

    `residuals` are ||A v - value v||, computed: within that distance of each value lies an eigenvalue, and no Ritz
    value exceeds the highest eigenvalue. `vectors` have orthonormal rows.
    """

    values: Float[Array, " k"]
    vectors: Float[Array, "k n"]
    residuals: Float[Array, " k"]


class Course(NamedTuple):
    """Where the highest eigenvectors of a moving operator are expected next, `ahead` (k, n) with orthonormal rows, and
    where they were last, `last` (k, n)."""

    ahead: Float[Array, "k n"]
    last: Float[Array, "k n"]


def warm_top_pairs(product: FlatProduct, start: Float[Array, "k n"], depth: int = 1) -> TopPairs:
    """Rayleigh-Ritz in the block Krylov space span{V, A V, ..., A^depth V} of V = `start` (orthonormal rows): one
    round, k (depth + 1) products, residuals included.

    From the pairs of a nearby matrix the error is squared twice over a round: a Ritz value's error is quadratic in its
    vector's, and one Krylov step is a step of steepest ascent. Pure; for jitted code.
    """
    depth = min(depth, start.shape[1] // start.shape[0] - 1)  # no more vectors than dimensions
    basis, images = start, jax.lax.map(product, start)
    for _ in range(depth):
        block = _orthonormal_block(images[-start.shape[0] :], basis)
        basis, images = jnp.concatenate([basis, block]), jnp.concatenate([images, jax.lax.map(product, block)])
    return _rayleigh_ritz(basis, images, start.shape[0])[0]


def followed_top_pairs(
    linearise: Callable[[], FlatProduct],
    course: Course,
    key: PRNGKey,
    *,
    accuracy: float,
    certified: int = 1,
    rounds: int = 10,
    batched: bool = False,
) -> tuple[TopPairs, Course]:
    """The pairs of an operator that moves, at the least cost that will do, and the course for the next time.

    Rayleigh-Ritz in span V (V = `course.ahead`), k products. Only where a residual r of one of the highest `certified`
    pairs says that its value's error, about ||r||^2 / gap, may exceed `accuracy` times the highest value: rounds of
    steepest ascent, Rayleigh-Ritz in span{V, W, R} with R the residuals and W the next k Ritz vectors of the round
    before, k more products each, at most `rounds`. The gap is that to the lowest of the k pairs, the guard; for the
    guard itself, its value.

    The residual tells that an eigenvalue is near, not that it is the highest. One that rises from outside of span V is
    met through the guards, the pairs below the `certified` ones: a little of them is drawn anew each time (`key`), and
    steps of ascent enlarge what belongs to a higher eigenvalue, over some measurements if it overtakes slowly. Where
    the operator was not finite the next measurement starts from random vectors.

    `linearise` returns the product. It is called again for the rounds: most measurements need none, and to keep the
    saved values of a linearisation for them costs more than to make them anew. `batched` takes the k products of a
    block at once (`dynamics.sharpness.fastest_batching` tells whether that pays). Pure; for jitted code.
    """
    product, start, (count, dimension) = linearise(), course.ahead, course.ahead.shape
    images = jax.vmap(product)(start) if batched else jnp.stack([product(vector) for vector in start])
    width = min(count, dimension - count)  # no more vectors than dimensions
    kept = min(2 * count, dimension - width)

    def unsettled(pairs: TopPairs) -> Array:
        pairs = _highest(pairs, count)
        gaps = (pairs.values - pairs.values[0]).at[0].set(jnp.abs(pairs.values[0]))
        unit = power_of_two(jnp.maximum(jnp.max(jnp.abs(pairs.values)), jnp.max(pairs.residuals)))
        highest, gaps, residuals = (part / unit for part in (jnp.abs(pairs.values[-1]), gaps, pairs.residuals))
        allowed = accuracy * highest * jnp.maximum(gaps, residuals)
        return jnp.any((residuals**2 > allowed)[-certified:])

    def refine(state: tuple[TopPairs, Array]) -> tuple[TopPairs, Array]:
        product = linearise()
        apply = jax.vmap(product) if batched else lambda block: jax.lax.map(product, block)

        def once(state: tuple[Array, TopPairs, Array]) -> tuple[Array, TopPairs, Array]:
            number, pairs, images = state
            remainders = (images - pairs.values[:, None] * pairs.vectors)[-width:]
            block = _orthonormal_block(remainders, pairs.vectors)
            basis, images = jnp.concatenate([pairs.vectors, block]), jnp.concatenate([images, apply(block)])
            return number + 1, *_rayleigh_ritz(basis, images, kept)

        empty = partial(jnp.pad, pad_width=((kept - count, 0), (0, 0)))
        pairs, images = state
        padded = TopPairs(*(empty(part[:, None])[:, 0] if part.ndim == 1 else empty(part) for part in pairs))
        initial = jnp.array(0), padded, empty(images)
        _, pairs, images = jax.lax.while_loop(lambda s: (s[0] < rounds) & unsettled(s[1]), once, initial)
        return _highest(pairs, count), images[-count:]

    state = _rayleigh_ritz(start, images, count)
    if width > 0:
        state = jax.lax.cond(unsettled(state[0]), refine, lambda state: state, state)
    return state[0], _next_course(*state, course.last, key, count - certified)


def upper_bound(product: FlatProduct, pairs: TopPairs, key: PRNGKey, steps: int) -> Float[Array, ""]:
    """A number that the highest eigenvalue exceeds with a probability of at most `DOUBT`, at `steps` products.

    Lanczos on B, the operator outside of the pairs, from a random vector r. Its residual polynomial, with the Ritz
    values t_j and the off-diagonal entries b_j, is P(t) = prod_j (t - t_j) / b_j, and an eigenvector u of B with an
    eigenvalue m above all t_j has <u, r> P(m) = <u, q>, q the next Lanczos vector, of length 1. A random unit vector in
    d dimensions has |<u, r>| < c with a probability of at most sqrt(2 d / pi) c: where P(t) is sqrt(2 d / pi) / DOUBT,
    B has no eigenvalue above t but with that probability (of the kind of Kuczynski and Wozniakowski 1992). With a the
    highest of the pairs and R their residuals, the whole has none above the higher eigenvalue of [[a, |R|], [|R|, t]].

    It holds for any operator, over the random `key`; rounding aside. Pure; for jitted code.
    """
    count, dimension = pairs.vectors.shape

    def outside(vector: Array) -> Array:
        return vector - pairs.vectors.T @ inner_products(pairs.vectors, vector)

    start = outside(jax.random.normal(key, (dimension,), pairs.vectors.dtype))
    _, (diagonal, norms) = advance(lambda vector: outside(product(outside(vector))), begin(start), steps)
    nodes = jnp.linalg.eigvalsh(jnp.diag(diagonal) + jnp.diag(norms[:-1], 1) + jnp.diag(norms[:-1], -1))
    scale = jnp.maximum(jnp.max(jnp.abs(nodes)), jnp.finfo(nodes.dtype).tiny)
    entries = jnp.maximum(norms, jnp.finfo(nodes.dtype).eps * scale)  # an exhausted space leaves nothing out
    wanted = jnp.sum(jnp.log(entries)) + 0.5 * jnp.log(2 * (dimension - count) / jnp.pi) - jnp.log(DOUBT)
    gaps = nodes[-1] - nodes

    def narrower(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        enough = jnp.sum(jnp.log(middle + gaps)) >= wanted
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    # The last factor alone is the least of them: (t - t_m)^m >= exp(wanted) is far enough.
    _, beyond = jax.lax.fori_loop(0, 60, narrower, (jnp.zeros_like(scale), jnp.exp(wanted / steps)))
    within, rest = pairs.values[-1], nodes[-1] + beyond
    rounding = 10 * jnp.finfo(nodes.dtype).eps * jnp.maximum(scale, jnp.abs(within))
    return (within + rest) / 2 + jnp.hypot((within - rest) / 2, length(pairs.residuals)) + rounding


def _highest(pairs: TopPairs, count: int) -> TopPairs:
    return TopPairs(*(part[-count:] for part in pairs))


def _next_course(
    pairs: TopPairs, images: Float[Array, "k n"], last: Float[Array, "k n"], key: PRNGKey, guards: int
) -> Course:
    """Free of products: a step of ascent V + R / (0.8 highest), which multiplies what V holds of an eigenvalue m by
    (m - 0.2 highest) / (0.8 highest), at most a half for m from -0.2 to 0.6 of the highest; then as far again as the
    vectors have turned since the last time, where they have turned little; then a random share for the guards."""
    highest = pairs.values[-1]
    step = jnp.where(highest > 0, 1 / (0.8 * jnp.where(highest > 0, highest, 1)), 0)
    now = pairs.vectors + step * (images - pairs.values[:, None] * pairs.vectors)
    cosines = jnp.sum(now * last, axis=1) / (jnp.linalg.norm(now, axis=1) * jnp.linalg.norm(last, axis=1))
    turned = now - jnp.sign(cosines)[:, None] * last
    ahead = now + jnp.where(jnp.abs(cosines) > 0.95, 1, 0).astype(now.dtype)[:, None] * turned
    random = jax.random.normal(key, ahead.shape, ahead.dtype) / ahead.shape[1] ** 0.5
    shares = jnp.where(jnp.arange(len(ahead)) < guards, RANDOM_SHARE, 0).astype(ahead.dtype)
    ahead = jnp.where(jnp.all(jnp.isfinite(ahead)), ahead + shares[:, None] * random, random)
    ahead = jnp.linalg.qr(ahead[::-1].T)[0].T[::-1]
    return Course(ahead, jnp.where(jnp.all(jnp.isfinite(now)), now, ahead))


def _rayleigh_ritz(
    basis: Float[Array, "m n"], images: Float[Array, "m n"], count: int
) -> tuple[TopPairs, Float[Array, "k n"]]:
    """The highest `count` Ritz pairs of span `basis` (orthonormal rows), and the images of their vectors. Rows of zeros
    hold the place of a vector that is not there: they come below everything."""
    unit = power_of_two(jnp.max(jnp.abs(images)))
    projected = basis @ (images / unit).T
    missing = jnp.where(jnp.any(basis != 0, axis=1), 0, 1 + jnp.linalg.norm(projected))
    values, rotation = jnp.linalg.eigh((projected + projected.T) / 2 - jnp.diag(missing))
    values, rotation = unit * values[-count:], rotation[:, -count:].T
    vectors, images = rotation @ basis, rotation @ images
    return TopPairs(values, vectors, jax.vmap(length)(images - values[:, None] * vectors)), images


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
    if dimension <= max(DENSE_DIMENSION, 2 * count + 20):
        matrix = jax.lax.map(product, jnp.eye(dimension, dtype=dtype))
        unit = power_of_two(jnp.max(jnp.abs(matrix)))
        matrix = matrix / unit
        values, vectors = jnp.linalg.eigh((matrix + matrix.T) / 2)
        values, vectors = values[-count:], vectors[:, -count:].T
        residuals = jnp.linalg.norm(vectors @ matrix - values[:, None] * vectors, axis=1)
        return TopPairs(unit * values, vectors, unit * residuals)
    start_key, key = jax.random.split(key)
    start = jax.random.normal(start_key, (dimension,), dtype)
    pairs = thick_restart(product, start, plan_restarts(0, count, dimension), COLD_TOLERANCE, key)
    return TopPairs(pairs.sound_values(), pairs.vectors, pairs.residuals)
