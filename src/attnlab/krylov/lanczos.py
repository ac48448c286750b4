"""Lanczos recurrences on a flat symmetric product, for jitted code; they know no parameters and no objectives."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.trees import length, power_of_two
from attnlab.types import PRNGKey

FlatProduct = Callable[[Float[Array, " n"]], Float[Array, " n"]]


class Tridiagonal(NamedTuple):
    """The projection of an operator on a Krylov space: `diagonal` (m), `off_diagonal` (m - 1); `asymmetry` is the
    largest relative |<A u, v> - <u, A v>| between two consecutive basis vectors (see `advance`)."""

    diagonal: Float[Array, " m"]
    off_diagonal: Float[Array, " m-1"]
    asymmetry: Float[Array, ""]

    def dense(self) -> Float[Array, "m m"]:
        """The m x m matrix."""
        return jnp.diag(self.diagonal) + jnp.diag(self.off_diagonal, 1) + jnp.diag(self.off_diagonal, -1)


class Recurrence(NamedTuple):
    """Where a three-term recurrence stands: all that its next step needs."""

    previous: Float[Array, " n"]
    vector: Float[Array, " n"]
    norm: Float[Array, ""]  # of the last remainder: the next off-diagonal entry
    asymmetry: Float[Array, ""]  # the root of the largest so far: in the unit of the operator, so that none overflows
    scale: Float[Array, ""]  # largest entry so far, a lower bound of ||A||
    first: Float[Array, ""]  # the first diagonal entry, a mean of eigenvalues


def begin(start: Float[Array, " n"]) -> Recurrence:
    """The recurrence before its first step, from `start` (any length but zero)."""
    first, zero = start / length(start), jnp.zeros((), start.dtype)
    return Recurrence(jnp.zeros_like(first), first, zero, zero, zero, jnp.full_like(zero, jnp.nan))


def advance(
    product: FlatProduct, state: Recurrence, steps: int
) -> tuple[Recurrence, tuple[Float[Array, " steps"], Float[Array, " steps"]]]:
    """`steps` of the three-term Lanczos recurrence; also the diagonal entries and the norms of the remainders.

    No reorthogonalisation: memory is three vectors whatever the number of steps. Spurious copies of converged Ritz
    values appear, but the copies share the weight of the true one, so that densities and moments are unaffected (Paige
    1980; Golub & Meurant, Matrices, Moments and Quadrature, section 4).

    Where the Krylov space is exhausted, to rounding, the remainder counts as zero, and so does every later vector: the
    rule is exact. The diagonal repeats its first entry from there, which has no weight and lies among the eigenvalues.

    Every step tests the symmetry of A at no product's cost: with r the remainder of A u and v = r / |r|, a symmetric A
    has <A v, u> = <v, A u> = |r|, to a rounding error of order eps ||A||^2 / |r|.
    """

    def step(state: Recurrence, _: None) -> tuple[Recurrence, tuple[Array, Array]]:
        product_of_vector = product(state.vector)
        coupling = jnp.vdot(product_of_vector, state.previous)
        asymmetry = jnp.sqrt(jnp.abs(coupling - state.norm)) * jnp.sqrt(state.norm)
        image = product_of_vector - state.norm * state.previous
        alpha = jnp.vdot(image, state.vector)
        image = image - alpha * state.vector
        norm = length(image)
        scale = jnp.maximum(state.scale, jnp.maximum(jnp.abs(alpha), norm))
        norm = jnp.where(norm <= EXHAUSTED * jnp.finfo(norm.dtype).eps * scale, 0, norm)
        first = jnp.where(jnp.isnan(state.first), alpha, state.first)
        ended = ~jnp.any(state.vector != 0)
        alpha = jnp.where(ended, first, alpha)
        asymmetry = jnp.maximum(state.asymmetry, asymmetry)
        return Recurrence(state.vector, _normalize(image, norm), norm, asymmetry, scale, first), (alpha, norm)

    return jax.lax.scan(step, state, length=steps)


EXHAUSTED = 10
"""A remainder of at most so many rounding errors is none: the Krylov space is exhausted."""


def finish(
    diagonal: Float[Array, " m"], norms: Float[Array, " m"], asymmetry: Float[Array, ""], scale: Float[Array, ""]
) -> Tridiagonal:
    """The projection, from the entries that `advance` returned and the end of its state."""
    return Tridiagonal(diagonal, norms[:-1], relative_asymmetry(asymmetry, scale))


def relative_asymmetry(root: Float[Array, ""], scale: Float[Array, ""]) -> Float[Array, ""]:
    """The asymmetry relative to the square of the `scale`, from its root."""
    return (root / jnp.where(scale > 0, scale, 1)) ** 2


def tridiagonalize(product: FlatProduct, start: Float[Array, " n"], steps: int) -> Tridiagonal:
    """`steps` of the recurrence of `advance` from `start` (any length but zero)."""
    state, entries = advance(product, begin(start), steps)
    return finish(*entries, state.asymmetry, state.scale)


def _normalize(vector: Float[Array, " n"], norm: Float[Array, ""]) -> Float[Array, " n"]:
    # An exactly invariant space leaves no remainder: continue with zeros, which get no quadrature weight.
    return jnp.where(norm > 0, vector / jnp.where(norm > 0, norm, 1), jnp.where(jnp.isnan(norm), norm, 0))


def gauss_quadrature(projection: Tridiagonal) -> tuple[Float[Array, " m"], Float[Array, " m"]]:
    """Nodes (ascending Ritz values) and weights (squared first components, summing to 1) of the Gauss rule of a start
    vector's spectral measure (Golub & Welsch 1969)."""
    unit = power_of_two(jnp.maximum(jnp.max(jnp.abs(projection.diagonal)), _largest(projection.off_diagonal)))
    nodes, vectors = jnp.linalg.eigh(projection.dense() / unit)
    return unit * nodes, vectors[0] ** 2


def _largest(entries: Float[Array, " m"]) -> Float[Array, ""]:
    return jnp.max(jnp.abs(entries), initial=0)


def with_node(projection: Tridiagonal, node: Float[Array, ""], margin: Float[Array, ""]) -> Tridiagonal:
    """The projection whose Gauss rule is that of Gauss and Radau: one of its nodes is `node`, below all others by
    `margin` at least.

    Golub (1973): the last diagonal entry becomes node + beta^2 [(T' - node I)^-1]_{last, last}, with T' the matrix
    without its last row, whose last pivot is found by elimination. No pivot is below the margin, but by rounding.
    """

    def eliminate(pivot: Array, entries: tuple[Array, Array]) -> tuple[Array, None]:
        diagonal, off_diagonal = entries
        return jnp.maximum(diagonal - node - off_diagonal * (off_diagonal / pivot), margin), None

    diagonal, off_diagonal, _ = projection
    if len(diagonal) == 1:
        return projection._replace(diagonal=node[None])
    first = jnp.maximum(diagonal[0] - node, margin)
    pivot, _ = jax.lax.scan(eliminate, first, (diagonal[1:-1], off_diagonal[:-1]))
    last = node + off_diagonal[-1] * (off_diagonal[-1] / jnp.where(pivot > 0, pivot, 1))
    # A space that was exhausted before has its nodes already, and the last row has no weight.
    return projection._replace(diagonal=diagonal.at[-1].set(jnp.where(off_diagonal[-1] > 0, last, diagonal[-1])))


class KrylovBasis(NamedTuple):
    """An orthonormal basis under construction: `vectors` (m + 1, n), of which the last is the next direction, and the
    `projected` operator (m, m) on the first m."""

    vectors: Float[Array, "m+1 n"]
    projected: Float[Array, "m m"]


LONG = 2**17
"""From here on a product of a matrix and a vector is not trusted with its sums."""


def inner_products(basis: Float[Array, "m n"], vector: Float[Array, " n"]) -> Float[Array, " m"]:
    """<b_i, v> for the rows of a basis, each to some rounding errors.

    XLA's CPU product of a matrix and a vector adds the n terms one after another: in float32 it is wrong by 2e-5 at
    n = 1e6, by 6e-3 at 4e7, where a sum of a single row, taken in parts, is right to 1e-7.
    """
    if vector.size <= LONG:
        return basis @ vector
    return jax.lax.map(lambda row: jnp.vdot(row, vector), basis)


def orthogonalize(
    vector: Float[Array, " n"], basis: Float[Array, "m n"]
) -> tuple[Float[Array, " n"], Float[Array, " m"]]:
    """`vector` minus its components in an orthonormal (zero-padded) basis, and those components: one pass of classical
    Gram-Schmidt. Two are enough for orthogonality to working precision (Giraud, Langou, Rozloznik 2005)."""
    components = inner_products(basis, vector)
    return vector - components @ basis, components


class Extension(NamedTuple):
    """What `extend` comes to: the `basis`, how many vectors of it count (`filled`), the `norm` of the last remainder,
    the root of the asymmetry that was seen (as in `Recurrence`), the sum of the logarithms of the remainders' norms,
    and whether the space is `exhausted`: its remainder was rounding, and the next direction is random."""

    basis: KrylovBasis
    filled: Array
    norm: Float[Array, ""]
    asymmetry: Float[Array, ""]
    log_norms: Float[Array, ""]
    exhausted: Array


def extend(product: FlatProduct, basis: KrylovBasis, start: int | Array, stop: int | Array, key: PRNGKey) -> Extension:
    """Grow the basis from `start` vectors (and a next direction) to `stop`, or until the space is invariant.

    Only the upper triangle of `projected` is written. Where the space became invariant the next direction is a random
    one orthogonal to it, so that repeated eigenvalues are not lost.
    """
    size = basis.projected.shape[0]
    limits = jnp.finfo(basis.vectors.dtype)

    def step(state: tuple[Array, Extension]) -> tuple[Array, Extension]:
        i, (basis, _, last, asymmetry, log_norms, _) = state
        vectors = basis.vectors
        image = product(vectors[i])
        # The first of two passes: A v has components along v and its predecessor alone, but after a restart along all.
        image, components = jax.lax.cond(
            i == start, orthogonalize, lambda image, vectors: _orthogonalize_locally(image, vectors, i), image, vectors
        )
        image, corrections = orthogonalize(image, vectors)
        components = components + corrections
        coupling = jnp.where(i > start, components[i - 1], last)
        asymmetry = jnp.maximum(asymmetry, jnp.sqrt(jnp.abs(coupling - last)) * jnp.sqrt(last))
        norm, size_of_image = length(image), length(components)
        negligible = norm <= EXHAUSTED * limits.eps * size_of_image
        # A remainder that is mostly rounding, brought to unit length, is orthogonal no more.
        direction = jax.lax.cond(
            norm <= limits.eps**0.5 * size_of_image,
            lambda image: _fresh_direction(jnp.where(negligible, 0, image), jax.random.fold_in(key, i), vectors),
            lambda image: image,
            image,
        )
        vectors = vectors.at[i + 1].set(direction / length(direction))
        projected = basis.projected.at[:, i].set(components[:size])
        # What is negligible is unknown below a rounding error.
        at_least = jnp.maximum(jnp.where(negligible, limits.eps * size_of_image, 0), limits.tiny)
        log_norms = log_norms + jnp.log(jnp.maximum(norm, at_least))
        norm = jnp.where(negligible, 0, norm)
        return i + 1, Extension(KrylovBasis(vectors, projected), i + 1, norm, asymmetry, log_norms, negligible)

    zero = jnp.zeros((), basis.vectors.dtype)
    first = jnp.asarray(start)
    state = (first, Extension(basis, first, zero, zero, zero, jnp.array(False)))
    return jax.lax.while_loop(lambda state: (state[0] < stop) & ~state[1].exhausted, step, state)[1]


def _orthogonalize_locally(image: Array, vectors: Array, i: Array) -> tuple[Array, Array]:
    previous, vector = vectors[i - 1], vectors[i]
    beta = jnp.vdot(image, previous)
    image = image - beta * previous
    alpha = jnp.vdot(image, vector)
    return image - alpha * vector, jnp.zeros(len(vectors), image.dtype).at[i - 1].set(beta).at[i].set(alpha)


def _fresh_direction(image: Array, key: PRNGKey, vectors: Array) -> Array:
    """A direction orthogonal to the vectors: that of `image`, or a random one if it is zero."""
    norm = length(image)
    random = jax.random.normal(key, image.shape, image.dtype)
    unit = jnp.where(norm > 0, image / jnp.where(norm > 0, norm, 1), random)
    return orthogonalize(orthogonalize(unit, vectors)[0], vectors)[0]
