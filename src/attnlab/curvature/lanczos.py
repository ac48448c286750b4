"""Lanczos recurrences on a flat symmetric product, for jitted code; they know no parameters and no objectives."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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
    asymmetry: Float[Array, ""]  # largest so far, times scale^2
    scale: Float[Array, ""]  # largest entry so far, a lower bound of ||A||


def begin(start: Float[Array, " n"]) -> Recurrence:
    """The recurrence before its first step, from `start` (any length but zero)."""
    first, zero = start / jnp.linalg.norm(start), jnp.zeros((), start.dtype)
    return Recurrence(jnp.zeros_like(first), first, zero, zero, zero)


def advance(
    product: FlatProduct, state: Recurrence, steps: int
) -> tuple[Recurrence, tuple[Float[Array, " steps"], Float[Array, " steps"]]]:
    """`steps` of the three-term Lanczos recurrence; also the diagonal entries and the norms of the remainders.

    No reorthogonalisation: memory is three vectors whatever the number of steps. Spurious copies of converged Ritz
    values appear, but the copies share the weight of the true one, so that densities and moments are unaffected (Paige
    1980; Golub & Meurant, Matrices, Moments and Quadrature, section 4).

    Every step tests the symmetry of A at no product's cost: with r the remainder of A u and v = r / |r|, a symmetric A
    has <A v, u> = <v, A u> = |r|, to a rounding error of order eps ||A||^2 / |r|.
    """

    def step(state: Recurrence, _: None) -> tuple[Recurrence, tuple[Array, Array]]:
        product_of_vector = product(state.vector)
        coupling = jnp.vdot(product_of_vector, state.previous)
        asymmetry = jnp.abs(coupling - state.norm) * state.norm
        image = product_of_vector - state.norm * state.previous
        alpha = jnp.vdot(image, state.vector)
        image = image - alpha * state.vector
        norm = jnp.linalg.norm(image)
        scale = jnp.maximum(state.scale, jnp.maximum(jnp.abs(alpha), norm))
        asymmetry = jnp.maximum(state.asymmetry, asymmetry)
        return Recurrence(state.vector, _normalize(image, norm), norm, asymmetry, scale), (alpha, norm)

    return jax.lax.scan(step, state, length=steps)


def finish(
    diagonal: Float[Array, " m"], norms: Float[Array, " m"], asymmetry: Float[Array, ""], scale: Float[Array, ""]
) -> Tridiagonal:
    """The projection, from the entries that `advance` returned and the end of its state."""
    scale = jnp.where(scale > 0, scale, 1)
    return Tridiagonal(diagonal, norms[:-1], asymmetry / scale / scale)


def tridiagonalize(product: FlatProduct, start: Float[Array, " n"], steps: int) -> Tridiagonal:
    """`steps` of the recurrence of `advance` from `start` (any length but zero)."""
    state, entries = advance(product, begin(start), steps)
    return finish(*entries, state.asymmetry, state.scale)


def _normalize(vector: Float[Array, " n"], norm: Float[Array, ""]) -> Float[Array, " n"]:
    # An exactly invariant space leaves no remainder: continue with zeros, which get no quadrature weight.
    return jnp.where(norm > 0, vector / jnp.where(norm > 0, norm, 1), 0)


def gauss_quadrature(projection: Tridiagonal) -> tuple[Float[Array, " m"], Float[Array, " m"]]:
    """Nodes (ascending Ritz values) and weights (squared first components, summing to 1) of the Gauss rule of a start
    vector's spectral measure (Golub & Welsch 1969)."""
    nodes, vectors = jnp.linalg.eigh(projection.dense())
    return nodes, vectors[0] ** 2


def with_node(projection: Tridiagonal, node: Float[Array, ""]) -> Tridiagonal:
    """The projection whose Gauss rule is that of Gauss and Radau: one of its nodes is `node`, below all others.

    Golub (1973): the last diagonal entry becomes node + beta^2 [(T' - node I)^-1]_{last, last}, with T' the matrix
    without its last row, whose last pivot is found by elimination.
    """

    def eliminate(pivot: Array, entries: tuple[Array, Array]) -> tuple[Array, None]:
        diagonal, off_diagonal = entries
        return diagonal - node - off_diagonal**2 / pivot, None

    diagonal, off_diagonal, _ = projection
    if len(diagonal) == 1:
        return projection._replace(diagonal=node[None])
    pivot, _ = jax.lax.scan(eliminate, diagonal[0] - node, (diagonal[1:-1], off_diagonal[:-1]))
    return projection._replace(diagonal=diagonal.at[-1].set(node + off_diagonal[-1] ** 2 / pivot))


class KrylovBasis(NamedTuple):
    """An orthonormal basis under construction: `vectors` (m + 1, n), of which the last is the next direction, and the
    `projected` operator (m, m) on the first m."""

    vectors: Float[Array, "m+1 n"]
    projected: Float[Array, "m m"]


def orthogonalize(
    vector: Float[Array, " n"], basis: Float[Array, "m n"]
) -> tuple[Float[Array, " n"], Float[Array, " m"]]:
    """`vector` minus its components in an orthonormal (zero-padded) basis, and those components: one pass of classical
    Gram-Schmidt. Two are enough for orthogonality to working precision (Giraud, Langou, Rozloznik 2005)."""
    components = basis @ vector
    return vector - components @ basis, components


def extend(
    product: FlatProduct, basis: KrylovBasis, start: int | Array, stop: int | Array, key: PRNGKey
) -> tuple[KrylovBasis, Float[Array, ""], Float[Array, ""]]:
    """Grow the basis from `start` vectors (and a next direction) to `stop`; also the norm of the last remainder, and
    the asymmetry that was seen (as in `advance`, times the square of the scale).

    Only the upper triangle of `projected` is written. Where the space becomes invariant the recurrence continues with a
    random direction orthogonal to it, so that repeated eigenvalues are not lost.
    """
    size = basis.projected.shape[0]

    def step(i: Array, state: tuple) -> tuple:
        vectors, projected, last, asymmetry = state
        image = product(vectors[i])
        # The first of two passes: A v has components along v and its predecessor alone, but after a restart along all.
        image, components = jax.lax.cond(
            i == start, orthogonalize, lambda image, vectors: _orthogonalize_locally(image, vectors, i), image, vectors
        )
        image, corrections = orthogonalize(image, vectors)
        components = components + corrections
        coupling = jnp.where(i > start, components[i - 1], last)
        asymmetry = jnp.maximum(asymmetry, jnp.abs(coupling - last) * last)
        norm = jnp.linalg.norm(image)
        negligible = norm <= 10 * jnp.finfo(norm.dtype).eps * jnp.linalg.norm(components)
        # A remainder that is mostly rounding, brought to unit length, is orthogonal no more.
        direction = jax.lax.cond(
            norm <= jnp.finfo(norm.dtype).eps ** 0.5 * jnp.linalg.norm(components),
            lambda image: _fresh_direction(jnp.where(negligible, 0, image), jax.random.fold_in(key, i), vectors),
            lambda image: image,
            image,
        )
        vectors = vectors.at[i + 1].set(direction / jnp.linalg.norm(direction))
        projected = projected.at[:, i].set(components[:size])
        return vectors, projected, jnp.where(negligible, 0, norm), asymmetry

    zero = jnp.zeros((), basis.vectors.dtype)
    vectors, projected, norm, asymmetry = jax.lax.fori_loop(start, stop, step, (*basis, zero, zero))
    return KrylovBasis(vectors, projected), norm, asymmetry


def _orthogonalize_locally(image: Array, vectors: Array, i: Array) -> tuple[Array, Array]:
    previous, vector = vectors[i - 1], vectors[i]
    beta = jnp.vdot(image, previous)
    image = image - beta * previous
    alpha = jnp.vdot(image, vector)
    return image - alpha * vector, jnp.zeros(len(vectors), image.dtype).at[i - 1].set(beta).at[i].set(alpha)


def _fresh_direction(image: Array, key: PRNGKey, vectors: Array) -> Array:
    """A direction orthogonal to the vectors: that of `image`, or a random one if it is zero."""
    norm = jnp.linalg.norm(image)
    random = jax.random.normal(key, image.shape, image.dtype)
    unit = jnp.where(norm > 0, image / jnp.where(norm > 0, norm, 1), random)
    return orthogonalize(orthogonalize(unit, vectors)[0], vectors)[0]
