"""Lanczos recurrences on a flat symmetric product, for jitted code; they know no parameters and no objectives."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.types import PRNGKey

FlatProduct = Callable[[Float[Array, " n"]], Float[Array, " n"]]


class Tridiagonal(NamedTuple):
    """The projection of an operator on a Krylov space: `diagonal` (m), `off_diagonal` (m - 1)."""

    diagonal: Float[Array, " m"]
    off_diagonal: Float[Array, " m-1"]

    def dense(self) -> Float[Array, "m m"]:
        """The m x m matrix."""
        return jnp.diag(self.diagonal) + jnp.diag(self.off_diagonal, 1) + jnp.diag(self.off_diagonal, -1)


def tridiagonalize(product: FlatProduct, start: Float[Array, " n"], steps: int) -> Tridiagonal:
    """`steps` of the three-term Lanczos recurrence from `start` (any length but zero).

    No reorthogonalisation: memory is three vectors whatever the number of steps. Spurious copies of converged Ritz
    values appear, but the copies share the weight of the true one, so that densities and moments are unaffected (Paige
    1980; Golub & Meurant, Matrices, Moments and Quadrature, section 4).
    """

    def step(state, _):
        previous, vector, beta = state
        image = product(vector) - beta * previous
        alpha = jnp.vdot(image, vector)
        image = image - alpha * vector
        norm = jnp.linalg.norm(image)
        return (vector, _normalize(image, norm), norm), (alpha, norm)

    first = start / jnp.linalg.norm(start)
    _, (diagonal, norms) = jax.lax.scan(step, (jnp.zeros_like(first), first, jnp.zeros((), first.dtype)), length=steps)
    return Tridiagonal(diagonal, norms[:-1])


def _normalize(vector: Float[Array, " n"], norm: Float[Array, ""]) -> Float[Array, " n"]:
    # An exactly invariant space leaves no remainder: continue with zeros, which get no quadrature weight.
    return jnp.where(norm > 0, vector / jnp.where(norm > 0, norm, 1), 0)


def gauss_quadrature(projection: Tridiagonal) -> tuple[Float[Array, " m"], Float[Array, " m"]]:
    """Nodes (ascending Ritz values) and weights (squared first components, summing to 1) of the Gauss rule of a start
    vector's spectral measure (Golub & Welsch 1969)."""
    nodes, vectors = jnp.linalg.eigh(projection.dense())
    return nodes, vectors[0] ** 2


class KrylovBasis(NamedTuple):
    """An orthonormal basis under construction: `vectors` (m + 1, n), of which the last is the next direction, and the
    `projected` operator (m, m) on the first m."""

    vectors: Float[Array, "m+1 n"]
    projected: Float[Array, "m m"]


def orthogonalize(
    vector: Float[Array, " n"], basis: Float[Array, "m n"]
) -> tuple[Float[Array, " n"], Float[Array, " m"]]:
    """`vector` minus its components in an orthonormal (zero-padded) basis, and those components.

    Classical Gram-Schmidt, twice: enough for orthogonality to working precision (Giraud, Langou, Rozloznik 2005).
    """
    first = basis @ vector
    vector = vector - first @ basis
    second = basis @ vector
    return vector - second @ basis, first + second


def extend(
    product: FlatProduct, basis: KrylovBasis, start: int | Array, key: PRNGKey
) -> tuple[KrylovBasis, Float[Array, ""]]:
    """Grow the basis from `start` vectors (and a next direction) to all m; also the norm of the last remainder.

    Only the upper triangle of `projected` is written. Where the space becomes invariant the recurrence continues with a
    random direction orthogonal to it, so that repeated eigenvalues are not lost.
    """
    size = basis.projected.shape[0]

    def step(i, state):
        vectors, projected, _ = state
        image, components = orthogonalize(product(vectors[i]), vectors)
        norm = jnp.linalg.norm(image)
        negligible = norm <= 10 * jnp.finfo(norm.dtype).eps * jnp.linalg.norm(components)

        def replacement(_):
            random = jax.random.normal(jax.random.fold_in(key, i), image.shape, image.dtype)
            return orthogonalize(random, vectors)[0]

        direction = jax.lax.cond(negligible, replacement, lambda image: image, image)
        vectors = vectors.at[i + 1].set(direction / jnp.linalg.norm(direction))
        projected = projected.at[:, i].set(components[:size])
        return vectors, projected, jnp.where(negligible, 0, norm)

    zero = jnp.zeros((), basis.vectors.dtype)
    vectors, projected, norm = jax.lax.fori_loop(start, size, step, (*basis, zero))
    return KrylovBasis(vectors, projected), norm


class RestartPlan(NamedTuple):
    """Sizes of a thick-restart iteration: wanted pairs at the `low` and `high` end, basis `size`, how many Ritz vectors
    are kept at a restart (`keep_low`, `keep_high`, the wanted among them), and the bound on restarts."""

    low: int
    high: int
    size: int
    keep_low: int
    keep_high: int
    cycles: int

    def kept(self) -> list[int]:
        """Positions among the m ascending Ritz values of those kept: the wanted first, then the others."""
        m, low, high = self.size, self.low, self.high
        wanted = [*range(low), *range(m - high, m)]
        return [*wanted, *range(low, self.keep_low), *range(m - self.keep_high, m - high)]


def plan_restarts(low: int, high: int, dimension: int, cycles: int = 300) -> RestartPlan:
    """Sizes for `low` + `high` wanted pairs: a basis of twice the wanted plus ten (at least 20), of which a restart
    keeps the wanted and about a third of the rest (Wu & Simon 2000, thick-restart Lanczos)."""
    wanted = low + high
    size = min(max(2 * wanted + 10, 20), dimension)
    extra = (size - wanted) // 3
    extra_low = extra * low // wanted
    return RestartPlan(low, high, size, low + extra_low, high + extra - extra_low, cycles)


class RitzPairs(NamedTuple):
    """Wanted Ritz pairs: the low end ascending, then the high end ascending; `residuals` bounds
    ||A v - value v||; `scale` is the largest Ritz value in modulus that was seen, a lower bound of the norm of A."""

    values: Float[Array, " k"]
    vectors: Float[Array, "k n"]
    residuals: Float[Array, " k"]
    scale: Float[Array, ""]
    products: Array


class _Restarted(NamedTuple):
    basis: KrylovBasis
    start: Array  # how many basis vectors stand at the beginning of the next cycle
    values: Array  # wanted Ritz values after the last cycle
    residuals: Array
    scale: Array  # largest modulus of a Ritz value so far
    floor: Array  # coupling that was dropped when converged vectors were locked
    confirming: Array  # whether the cycle to come starts from a fresh direction, to look for missed copies
    done: Array
    cycle: Array
    products: Array


def thick_restart(
    product: FlatProduct, start: Float[Array, " n"], plan: RestartPlan, tolerance: float, key: PRNGKey
) -> RitzPairs:
    """Extreme eigenpairs by thick-restart Lanczos with full reorthogonalisation of a basis of `plan.size` vectors.

    Stops when every wanted residual is at most `tolerance` times the largest Ritz value in modulus *and* one more
    cycle, from a random direction orthogonal to the converged vectors, brings up no further wanted eigenvalue: one
    Krylov space holds a single vector of each eigenspace, and attention Hessians repeat eigenvalues exactly.
    """
    size, wanted, kept = plan.size, plan.low + plan.high, jnp.array(plan.kept())

    def cycle(state: _Restarted) -> _Restarted:
        key_cycle = jax.random.fold_in(key, state.cycle)
        basis, norm = extend(product, state.basis, state.start, key_cycle)
        values, rotation = jnp.linalg.eigh(basis.projected, UPLO="U", symmetrize_input=False)
        residuals = jnp.hypot(norm * jnp.abs(rotation[-1, kept[:wanted]]), state.floor)
        scale = jnp.maximum(state.scale, jnp.max(jnp.abs(values)))
        limit = tolerance * scale
        converged = jnp.all(residuals <= limit)
        moved = jnp.max(jnp.abs(values[kept[:wanted]] - state.values)) > limit
        done = converged & state.confirming & ~moved
        confirm = converged & ~done
        basis = _compress(basis, values, rotation, kept)
        basis = jax.lax.cond(confirm, lambda b: _lock(b, wanted, len(kept), key_cycle), lambda b: b, basis)
        next_start = jnp.where(confirm, wanted, len(kept))
        return _Restarted(
            basis=basis,
            start=next_start,
            values=values[kept[:wanted]],
            residuals=residuals,
            scale=scale,
            floor=jnp.where(confirm, jnp.maximum(state.floor, jnp.max(residuals)), state.floor),
            confirming=confirm,
            done=done,
            cycle=state.cycle + 1,
            products=state.products + size - state.start,
        )

    pairs = jax.lax.while_loop(
        lambda state: ~state.done & (state.cycle < plan.cycles), cycle, _first_state(start, size, wanted)
    )
    order = jnp.concatenate([jnp.argsort(pairs.values[: plan.low]), plan.low + jnp.argsort(pairs.values[plan.low :])])
    vectors = pairs.basis.vectors[:wanted][order]
    return RitzPairs(pairs.values[order], vectors, pairs.residuals[order], pairs.scale, pairs.products)


def _first_state(start: Float[Array, " n"], size: int, wanted: int) -> _Restarted:
    dtype = start.dtype
    vectors = jnp.zeros((size + 1, start.size), dtype).at[0].set(start / jnp.linalg.norm(start))
    unknown, none = jnp.full((wanted,), jnp.inf, dtype), jnp.zeros((), dtype)
    no, zero = jnp.array(False), jnp.array(0)
    basis = KrylovBasis(vectors, jnp.zeros((size, size), dtype))
    return _Restarted(basis, zero, unknown, unknown, none, none, no, no, zero, zero)


def _compress(basis: KrylovBasis, values: Array, rotation: Array, kept: Array) -> KrylovBasis:
    """Keep some Ritz vectors and the next direction; everything behind them is zero again."""
    size, count = rotation.shape[0], kept.size
    vectors = jnp.zeros_like(basis.vectors).at[:count].set(rotation[:, kept].T @ basis.vectors[:size])
    vectors = vectors.at[count].set(basis.vectors[size])
    diagonal = jnp.zeros(size, values.dtype).at[:count].set(values[kept])
    return KrylovBasis(vectors, jnp.diag(diagonal))


def _lock(basis: KrylovBasis, wanted: int, count: int, key: PRNGKey) -> KrylovBasis:
    """Keep the wanted Ritz vectors alone, and continue from a random direction orthogonal to them."""
    locked = basis.vectors.at[wanted : count + 1].set(0)
    random = jax.random.normal(key, locked.shape[1:], locked.dtype)
    direction, _ = orthogonalize(random, locked)
    keep = jnp.arange(basis.projected.shape[0]) < wanted
    projected = jnp.where(keep[:, None] & keep[None, :], basis.projected, 0)
    return KrylovBasis(locked.at[wanted].set(direction / jnp.linalg.norm(direction)), projected)
