"""Ritz vectors of a restarted iteration: their order, and which of them a basis keeps at a restart."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from attnlab.krylov.lanczos import KrylovBasis, orthogonalize
from attnlab.trees import length
from attnlab.types import PRNGKey


class RestartPlan(NamedTuple):
    """Sizes of a thick-restart iteration: wanted pairs at the `low` and `high` end, basis `size`, how many Ritz vectors
    are kept at a restart (`keep_low`, `keep_high`, the wanted among them), after how many products convergence is
    looked at (`stride`), and the bound on cycles of that many products."""

    low: int
    high: int
    size: int
    keep_low: int
    keep_high: int
    stride: int
    cycles: int

    @property
    def wanted(self) -> int:
        """How many pairs are wanted in all."""
        return self.low + self.high

    @property
    def kept(self) -> int:
        """How many vectors a restart keeps."""
        return self.keep_low + self.keep_high

    @property
    def neighbours(self) -> int:
        """How many Ritz vectors next to the wanted ones may be deflated at each end."""
        return max(0, (self.kept - self.wanted) // (2 * self.ends))

    @property
    def ends(self) -> int:
        """At how many ends of the spectrum pairs are wanted."""
        return (self.low > 0) + (self.high > 0)

    @property
    def single(self) -> bool:
        """Whether one pair is wanted at an end, of which no copy can be missing."""
        return max(self.low, self.high) == 1


def plan_restarts(low: int, high: int, dimension: int, cycles: int = 1000) -> RestartPlan:
    """Sizes for `low` + `high` wanted pairs: a basis of twice the wanted plus twenty, of which a restart keeps the
    wanted and two thirds of the rest (Wu & Simon 2000, thick-restart Lanczos)."""
    wanted = low + high
    size = min(2 * wanted + 20, dimension)
    extra = 2 * (size - wanted) // 3
    extra_low = extra * low // wanted
    return RestartPlan(low, high, size, low + extra_low, high + extra - extra_low, 4, cycles)


class Ritz(NamedTuple):
    """Ritz values (m) and vectors (m, m) of the basis vectors that are `active` (filled and not locked), and places of
    the others, which `hold` marks; `ascending` and `descending` order them with those last."""

    values: Array
    vectors: Array
    hold: Array
    ascending: Array
    descending: Array


def ritz_of(basis: KrylovBasis, filled: Array, locked: Array) -> Ritz:
    """The Ritz pairs of what is filled of the basis and not locked."""
    places = jnp.arange(basis.projected.shape[0])
    active = (places >= locked) & (places < filled)
    projected = jnp.where(active[:, None] & active[None, :], basis.projected, 0)
    unit = length(projected)
    unit = jnp.where(unit > 0, unit, 1)
    # The others count as eigenvectors of a value above all.
    projected = projected / unit + jnp.diag(jnp.where(active, 0, 2).astype(projected.dtype))
    values, vectors = jnp.linalg.eigh(projected, UPLO="U", symmetrize_input=False)
    descending = (jnp.sum(active) - 1 - places) % places.size
    return Ritz(unit * values, vectors, values > 1.5, places, descending)


def inwards(ritz: Ritz, plan: RestartPlan) -> list[tuple[Array, int]]:
    """At each end that is asked for the Ritz vectors from there inwards, and how many of them are wanted."""
    return [(order, count) for order, count in ((ritz.ascending, plan.low), (ritz.descending, plan.high)) if count]


def outermost(ritz: Ritz, skip: Array | int, plan: RestartPlan) -> Array:
    """Positions of the Ritz vectors from the ends inwards, those of two ends in turn, but for the first at each."""
    orders = [jnp.roll(order, -jnp.asarray(count) * skip) for order, count in inwards(ritz, plan)]
    return jnp.stack(orders, axis=1).reshape(-1)[: plan.size]


def kept_places(ritz: Ritz, locked: Array, plan: RestartPlan) -> Array:
    """Positions of the Ritz vectors that a restart keeps: the wanted and others next to them; while vectors are locked,
    others alone, behind them (their own places are filled with one that is kept anyway)."""
    wanted = jnp.concatenate([order[:count] for order, count in inwards(ritz, plan)])
    free = jnp.concatenate([wanted, outermost(ritz, 1, plan)])[: plan.kept]
    behind = outermost(ritz, 0, plan)[jnp.maximum(jnp.arange(plan.kept) - locked, 0)]
    return jnp.where(locked > 0, behind, free)


def compressed(
    basis: KrylovBasis, ritz: Ritz, kept: Array, filled: Array, locked: Array, plan: RestartPlan
) -> KrylovBasis:
    """Keep what is locked, the Ritz vectors `kept` behind it, and the next direction; all behind is zero again."""
    size, count = plan.size, plan.kept
    fixed = jnp.arange(count) < locked
    rotation = jnp.where(fixed, jnp.eye(size, count, dtype=ritz.vectors.dtype), ritz.vectors[:, kept])
    values = jnp.where(fixed, jnp.diagonal(basis.projected)[:count], ritz.values[kept])
    vectors = jnp.zeros_like(basis.vectors).at[:count].set(rotation.T @ basis.vectors[:size])
    vectors = vectors.at[count].set(basis.vectors[filled])
    return KrylovBasis(vectors, _diagonal(values, size))


def _diagonal(values: Array, size: int) -> Array:
    return jnp.diag(jnp.zeros(size, values.dtype).at[: values.size].set(values))


def locked_basis(
    basis: KrylovBasis, ritz: Ritz, picked: Array, count: Array, key: PRNGKey, plan: RestartPlan
) -> KrylovBasis:
    """Keep the wanted Ritz vectors and those next to them, `count` in all, and continue from a random direction that is
    orthogonal to them."""
    places = jnp.concatenate([picked, outermost(ritz, 1, plan)])[: plan.wanted + plan.ends * plan.neighbours]
    there = jnp.arange(places.size) < count
    rotation = jnp.where(there, ritz.vectors[:, places], 0)
    locked = jnp.zeros_like(basis.vectors).at[: places.size].set(rotation.T @ basis.vectors[: plan.size])
    random = jax.random.normal(key, locked.shape[1:], locked.dtype)
    direction = orthogonalize(orthogonalize(random, locked)[0], locked)[0]
    values = jnp.where(there, ritz.values[places], 0)
    return KrylovBasis(locked.at[count].set(direction / length(direction)), _diagonal(values, plan.size))


def begun_anew(basis: KrylovBasis, ritz: Ritz, outside: Array, plan: RestartPlan) -> KrylovBasis:
    """Keep the wanted, and continue from the sum of the Ritz vectors beyond the thresholds: the residuals of what else
    was deflated are lost, and with them the relation that later restarts would need."""
    size, wanted = plan.size, plan.wanted
    kept = jnp.zeros_like(basis.vectors).at[:wanted].set(basis.vectors[:wanted])
    direction = (ritz.vectors @ outside.astype(ritz.vectors.dtype)) @ basis.vectors[:size]
    direction = orthogonalize(direction, kept)[0]
    projected = _diagonal(jnp.diagonal(basis.projected)[:wanted], size)
    return KrylovBasis(kept.at[wanted].set(direction / length(direction)), projected)
