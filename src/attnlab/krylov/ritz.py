"""Ritz vectors of a restarted iteration: their order, and which of them a basis keeps at a restart."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from attnlab.krylov.lanczos import KrylovBasis, inner_products
from attnlab.trees import length
from attnlab.types import PRNGKey


class RestartPlan(NamedTuple):
    """Sizes of a thick-restart iteration: wanted pairs at the `low` and `high` end, basis `size`, how many Ritz vectors
    are kept at a restart (`keep_low`, `keep_high`, the wanted among them), after how many products convergence is
    looked at (`stride`), the bound on cycles of that many products, and how many columns of the basis are changed at a
    time (`slab`)."""

    low: int
    high: int
    size: int
    keep_low: int
    keep_high: int
    stride: int
    cycles: int
    slab: int

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


SLAB = 2**16
"""Columns of a basis that are changed at a time: enough to keep the cores busy, few beside the basis."""

FEWEST = 4
"""A basis needs so many vectors more than the wanted ones."""


def plan_restarts(
    low: int, high: int, dimension: int, cycles: int = 1000, *, basis: int | None = None, slab: int | None = None
) -> RestartPlan:
    """Sizes for `low` + `high` wanted pairs: a `basis` of twice the wanted plus twenty, if none is named, of which a
    restart keeps the wanted and two thirds of the rest (Wu & Simon 2000, thick-restart Lanczos)."""
    wanted = low + high
    size = min(2 * wanted + 20 if basis is None else basis, dimension)
    extra = 2 * (size - wanted) // 3
    extra_low = extra * low // wanted
    slab = min(SLAB if slab is None else slab, dimension)
    return RestartPlan(low, high, size, low + extra_low, high + extra - extra_low, 4, cycles, slab)


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


class Change(NamedTuple):
    """What becomes of a basis: the `rotation` whose rows (m + 1, m + 1) make the new vectors of the old ones, the
    `values` (m) of the operator on them, and how many are `held` before the next direction."""

    rotation: Array
    values: Array
    held: Array | int


def compressed(basis: KrylovBasis, ritz: Ritz, kept: Array, filled: Array, locked: Array, plan: RestartPlan) -> Change:
    """Keep what is locked, the Ritz vectors `kept` behind it, and the next direction; all behind is zero again."""
    size, count = plan.size, plan.kept
    fixed = jnp.arange(count) < locked
    rotation = jnp.where(fixed, jnp.eye(size, count, dtype=ritz.vectors.dtype), ritz.vectors[:, kept])
    values = jnp.where(fixed, jnp.diagonal(basis.projected)[:count], ritz.values[kept])
    change = _change(rotation, values, count, plan)
    return change._replace(rotation=change.rotation.at[count, filled].set(1))


def locking(ritz: Ritz, picked: Array, count: Array, plan: RestartPlan) -> Change:
    """Keep the wanted Ritz vectors and those next to them, `count` in all, and nothing else."""
    places = jnp.concatenate([picked, outermost(ritz, 1, plan)])[: plan.wanted + plan.ends * plan.neighbours]
    there = jnp.arange(places.size) < count
    return _change(jnp.where(there, ritz.vectors[:, places], 0), jnp.where(there, ritz.values[places], 0), count, plan)


def begun_anew(basis: KrylovBasis, ritz: Ritz, outside: Array, plan: RestartPlan) -> Change:
    """Keep the wanted, and continue from the sum of the Ritz vectors beyond the thresholds: the residuals of what else
    was deflated are lost, and with them the relation that later restarts would need."""
    size, wanted = plan.size, plan.wanted
    direction = ritz.vectors @ outside.astype(ritz.vectors.dtype)
    rotation = jnp.eye(size, wanted + 1, dtype=direction.dtype).at[:, wanted].set(direction)
    values = jnp.diagonal(basis.projected)[:wanted]
    return _change(rotation, values, wanted, plan)


def _change(rotation: Array, values: Array, count: Array | int, plan: RestartPlan) -> Change:
    """From columns (m, k) of a rotation and k values or fewer."""
    whole = jnp.zeros((plan.size + 1, plan.size + 1), rotation.dtype)
    whole = whole.at[: rotation.shape[1], : plan.size].set(rotation.T)
    return Change(whole, jnp.zeros(plan.size, values.dtype).at[: values.size].set(values), count)


def changed_basis(
    basis: KrylovBasis, change: Change, needed: Array, turned: Array, random: Array, key: PRNGKey, plan: RestartPlan
) -> KrylovBasis:
    """The basis after a `change`, where it is `needed`; where the next direction has `turned` it is made orthogonal to
    the others again, and where it is `random` drawn before.

    The basis is the memory that this takes, and a second one would not fit where the first just does: all is written
    in place, in loops of no or one round, as a conditional would copy.
    """
    last = change.held

    def next_direction(_: int, vectors: Array) -> Array:
        drawn = jax.lax.cond(
            random, lambda old: jax.random.normal(key, old.shape, old.dtype), lambda old: old, vectors[last]
        )
        for _ in range(2):
            drawn = drawn - inner_products(vectors, drawn).at[last].set(0) @ vectors
        return vectors.at[last].set(drawn / length(drawn))

    vectors = _rotated(basis.vectors, change.rotation, needed, plan.slab)
    vectors = jax.lax.fori_loop(0, turned.astype(int), next_direction, vectors)
    return KrylovBasis(vectors, jnp.where(needed, jnp.diag(change.values), basis.projected))


def _rotated(vectors: Array, rotation: Array, needed: Array, slab: int) -> Array:
    """`rotation @ vectors`, `slab` columns at a time."""
    whole, rest = divmod(vectors.shape[1], slab)

    def rotate(width: int, first: Array | int, vectors: Array) -> Array:
        columns = jax.lax.dynamic_slice_in_dim(vectors, first, width, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(vectors, rotation @ columns, first, axis=1)

    rounds = needed.astype(int)
    vectors = jax.lax.fori_loop(0, whole * rounds, lambda i, v: rotate(slab, i * slab, v), vectors)
    if rest:
        vectors = jax.lax.fori_loop(0, rounds, lambda _, v: rotate(rest, whole * slab, v), vectors)
    return vectors


def combinations(vectors: Array, rotation: Array, slab: int) -> Array:
    """(k, n): the combinations of the first m vectors by a `rotation` (m, k); vectors that none uses may hold anything.

    `slab` columns at a time, without a copy of the vectors."""
    size, count = rotation.shape
    used = jnp.any(rotation != 0, axis=1)
    whole, rest = divmod(vectors.shape[1], slab)

    def combine(width: int, first: Array | int, found: Array) -> Array:
        columns = jax.lax.dynamic_slice(vectors, (0, first), (size, width))
        columns = rotation.T @ jnp.where(used[:, None], columns, 0)
        return jax.lax.dynamic_update_slice_in_dim(found, columns, first, axis=1)

    found = jnp.zeros((count, vectors.shape[1]), vectors.dtype)
    found = jax.lax.fori_loop(0, whole, lambda i, found: combine(slab, i * slab, found), found)
    return combine(rest, whole * slab, found) if rest else found
