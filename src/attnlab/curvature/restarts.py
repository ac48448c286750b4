"""Thick-restart Lanczos: extreme eigenpairs of a flat symmetric product, in jitted code, cycle by cycle."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.curvature.lanczos import FlatProduct, KrylovBasis, extend, orthogonalize
from attnlab.types import PRNGKey


class RestartPlan(NamedTuple):
    """Sizes of a thick-restart iteration: wanted pairs at the `low` and `high` end, basis `size`, how many Ritz vectors
    are kept at a restart (`keep_low`, `keep_high`, the wanted among them), how many steps look for missed copies
    (`confirm`), and the bound on cycles."""

    low: int
    high: int
    size: int
    keep_low: int
    keep_high: int
    confirm: int
    cycles: int

    def kept(self) -> list[int]:
        """Positions among the m ascending Ritz values of those kept: the wanted first, then the others."""
        m, low, high = self.size, self.low, self.high
        wanted = [*range(low), *range(m - high, m)]
        return [*wanted, *range(low, self.keep_low), *range(m - self.keep_high, m - high)]


def plan_restarts(low: int, high: int, dimension: int, cycles: int = 300) -> RestartPlan:
    """Sizes for `low` + `high` wanted pairs: a basis of twice the wanted plus ten (at least 20), of which a restart
    keeps the wanted and two thirds of the rest (Wu & Simon 2000, thick-restart Lanczos): short cycles, as convergence
    is looked at once in each."""
    wanted = low + high
    size = min(max(2 * wanted + 10, 20), dimension)
    extra = 2 * (size - wanted) // 3
    extra_low = extra * low // wanted
    confirm = min(8, size - wanted)
    return RestartPlan(low, high, size, low + extra_low, high + extra - extra_low, confirm, cycles)


class RitzPairs(NamedTuple):
    """Wanted Ritz pairs: the low end ascending, then the high end ascending; `residuals` bounds
    ||A v - value v||; `scale` is the largest Ritz value in modulus that was seen, a lower bound of the norm of A;
    `asymmetry` the largest relative |<A u, v> - <u, A v>| between two consecutive basis vectors.

    Where a product was not finite, `scale` is NaN and the pairs are those of the last cycle before it; they are
    infinite if there was none."""

    values: Float[Array, " k"]
    vectors: Float[Array, "k n"]
    residuals: Float[Array, " k"]
    scale: Float[Array, ""]
    asymmetry: Float[Array, ""]
    products: Array

    def sound_values(self) -> Float[Array, " k"]:
        """The values, NaN where a product was not finite: for jitted code, which cannot raise."""
        return jnp.where(jnp.isfinite(self.scale), self.values, jnp.nan)


class Restarted(NamedTuple):
    """Where the iteration stands between two cycles: all that the next needs."""

    basis: KrylovBasis
    start: Array  # how many basis vectors stand at the beginning of the next cycle
    values: Array  # wanted Ritz values after the last cycle
    residuals: Array
    scale: Array  # largest modulus of a Ritz value so far
    asymmetry: Array  # times scale^2
    floor: Array  # coupling that was dropped when converged vectors were locked
    confirming: Array  # whether the cycle to come starts from a fresh direction, to look for missed copies
    done: Array
    cycle: Array
    products: Array


def thick_restart(
    product: FlatProduct, start: Float[Array, " n"], plan: RestartPlan, tolerance: float | Array, key: PRNGKey
) -> RitzPairs:
    """Extreme eigenpairs by thick-restart Lanczos with full reorthogonalisation of a basis of `plan.size` vectors.

    Stops when every wanted residual is at most `tolerance` times the largest Ritz value in modulus *and* a few more
    steps, from a random direction orthogonal to the converged vectors, bring up no further wanted eigenvalue: one
    Krylov space holds a single vector of each eigenspace, and attention Hessians repeat eigenvalues exactly.
    """
    state = jax.lax.while_loop(
        lambda state: ~state.done & (state.cycle < plan.cycles) & jnp.isfinite(state.scale),
        lambda state: restart_cycle(product, state, plan, tolerance, key),
        first_state(start, plan),
    )
    return wanted_pairs(state, plan)


def first_state(start: Float[Array, " n"], plan: RestartPlan) -> Restarted:
    """The iteration before its first cycle, from `start` (any length but zero)."""
    dtype, size, wanted = start.dtype, plan.size, plan.low + plan.high
    vectors = jnp.zeros((size + 1, start.size), dtype).at[0].set(start / jnp.linalg.norm(start))
    unknown, none = jnp.full((wanted,), jnp.inf, dtype), jnp.zeros((), dtype)
    no, zero = jnp.array(False), jnp.array(0)
    basis = KrylovBasis(vectors, jnp.zeros((size, size), dtype))
    return Restarted(basis, zero, unknown, unknown, none, none, none, no, no, zero, zero)


def restart_cycle(
    product: FlatProduct, state: Restarted, plan: RestartPlan, tolerance: float | Array, key: PRNGKey
) -> Restarted:
    """Fill the basis, and restart from its wanted Ritz vectors; or, once they converged, look for missed copies.

    A product that is not finite makes `scale` NaN and leaves the wanted pairs as they were: their vectors stand at the
    beginning of the basis, which is only ever written behind them.
    """
    wanted, kept = plan.low + plan.high, jnp.array(plan.kept())
    key = jax.random.fold_in(key, state.cycle)
    stop = jnp.where(state.confirming, wanted + plan.confirm, plan.size)
    basis, norm, asymmetry = extend(product, state.basis, state.start, stop, key)
    values, rotation = _ritz(basis, stop, state, plan)
    found = values[kept[:wanted]]
    residuals = jnp.hypot(norm * jnp.abs(rotation[stop - 1, kept[:wanted]]), state.floor)
    finite = jnp.isfinite(norm) & jnp.all(jnp.isfinite(values))
    scale = jnp.where(finite, jnp.maximum(state.scale, jnp.max(jnp.abs(found))), jnp.nan)
    limit = tolerance * scale
    converged = jnp.all(residuals <= limit)
    done = state.confirming & converged & ~(jnp.max(jnp.abs(found - state.values)) > limit)
    confirm = converged & ~state.confirming
    # While looking for copies the basis stays: it holds the answer, or one came up and the next cycle fills it.
    stay = state.confirming | ~finite
    basis = jax.lax.cond(stay, lambda b: b, lambda b: _compress(b, values, rotation, kept), basis)
    basis = jax.lax.cond(confirm, lambda b: _lock(b, wanted, len(kept), key), lambda b: b, basis)
    return Restarted(
        basis=basis,
        start=jnp.where(state.confirming, stop, jnp.where(confirm, wanted, len(kept))),
        values=jnp.where(done | ~finite, state.values, found),
        residuals=jnp.where(done, state.floor, jnp.where(finite, residuals, state.residuals)),
        scale=scale,
        asymmetry=jnp.maximum(state.asymmetry, asymmetry),
        floor=jnp.where(confirm, jnp.maximum(state.floor, jnp.max(residuals)), state.floor),
        confirming=confirm,
        done=done,
        cycle=state.cycle + 1,
        products=state.products + stop - state.start,
    )


def wanted_pairs(state: Restarted, plan: RestartPlan) -> RitzPairs:
    """The pairs that the iteration has come to."""
    low, wanted = plan.low, plan.low + plan.high
    order = jnp.concatenate([jnp.argsort(state.values[:low]), low + jnp.argsort(state.values[low:])])
    scale = jnp.where(state.scale > 0, state.scale, 1)
    asymmetry = state.asymmetry / scale / scale
    vectors = state.basis.vectors[:wanted][order]
    return RitzPairs(state.values[order], vectors, state.residuals[order], state.scale, asymmetry, state.products)


def _ritz(basis: KrylovBasis, stop: Array, state: Restarted, plan: RestartPlan) -> tuple[Array, Array]:
    """Ritz values, ascending, and vectors of the first `stop` basis vectors. The others count as eigenvectors whose
    values lie between the two wanted ends, so that both ends stand where `plan.kept` looks for them."""
    filled = jnp.arange(plan.size) < stop
    if plan.low and plan.high:
        middle = (jnp.max(state.values[: plan.low]) + jnp.min(state.values[plan.low :])) / 2
    else:
        middle = 2 * state.scale if plan.low else -2 * state.scale
    projected = jnp.where(filled[:, None] & filled[None, :], basis.projected, 0)
    projected = projected + jnp.diag(jnp.where(filled, 0, middle))
    return jnp.linalg.eigh(projected, UPLO="U", symmetrize_input=False)


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
    direction = orthogonalize(orthogonalize(random, locked)[0], locked)[0]
    keep = jnp.arange(basis.projected.shape[0]) < wanted
    projected = jnp.where(keep[:, None] & keep[None, :], basis.projected, 0)
    return KrylovBasis(locked.at[wanted].set(direction / jnp.linalg.norm(direction)), projected)
