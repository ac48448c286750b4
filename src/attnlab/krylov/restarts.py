"""Thick-restart Lanczos: extreme eigenpairs of a flat symmetric product, in jitted code, cycle by cycle, and a
certificate that none is missing.

Why a certificate. One Krylov space holds a single vector of each eigenspace, and attention Hessians repeat eigenvalues
exactly. So once the wanted pairs V have converged, a random direction r in their complement is drawn (a *draw*), and a
Krylov space grows from it, under the deflated operator B. Its next Lanczos vector is v = P(B) r, with P the product of
(x - s) over all Ritz values s so far, those that restarts dropped among them, over the product of the remainders'
norms. If B u = m u then <u, v> = P(m) <u, r> is at most 1 in modulus, and P grows beyond the largest s. Hence, as soon
as all s lie below a threshold t and P(t) is large, an eigenvalue m >= t that stayed hidden has |<u, r>| <= 1 / P(t).
For r uniform on a sphere in d dimensions that has a probability of at most sqrt(2 d / pi) / P(t). It is a statement
about r alone, so that it holds whenever one looks and stops. (1 / P^2 bounds the Christoffel function, the largest mass
that a measure with these moments can have at m. Kuczynski & Wozniakowski, 1992, bound the largest eigenvalue likewise,
before the fact: here the spectrum that was met counts, and a gap makes it quick.)

The threshold is the wanted value nearest to the middle, by the tolerance further out. A Ritz value beyond it is what
was missing: the iteration goes on with it, and a new draw follows. Draw number k may fail with a probability of
p / (k (k + 1)), which sum to p.

In the first draw, where mostly nothing is missing, some Ritz pairs next to the wanted ones are deflated too, though
they have not converged, so that P grows sooner. Let W be theirs, s_j their residuals (all are parallel: A W - W Theta =
f s^T) and B' the operator deflated of V and W. If B' < t' then A is below t on the complement of V where the Schur
complement says so: Theta - t + s f^T (t - B')^-1 f s^T < 0, for which sum_j s_j^2 / (t - theta_j) <= t - t' is enough.
How many are deflated is what makes the gap from t' to the next Ritz value largest.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.krylov.lanczos import Extension, FlatProduct, KrylovBasis, extend, relative_asymmetry
from attnlab.krylov.ritz import (
    Change,
    RestartPlan,
    Ritz,
    begun_anew,
    changed_basis,
    combinations,
    compressed,
    inwards,
    kept_places,
    locking,
    ritz_of,
)
from attnlab.trees import length
from attnlab.types import PRNGKey

MISSED = 1e-3
"""Largest probability that a wanted eigenvalue is missing from what converged."""

FIRST_LOCK = 0.75
"""Share of the tolerance that the first vectors to be locked may take."""

LOSS = 0.1
"""Largest share of the gap to the next Ritz value that deflated vectors may cost."""

EXHAUSTED_SHARE = 0.1
"""Of that probability, the share of spaces that are exhausted before they say enough; see `_evidence`."""


class RitzPairs(NamedTuple):
    """Wanted Ritz pairs: the low end ascending, then the high end ascending; `residuals` bounds
    ||A v - value v||; `scale` is the largest Ritz value in modulus that was seen, a lower bound of the norm of A;
    `asymmetry` the largest relative |<A u, v> - <u, A v>| between two consecutive basis vectors; `missed` bounds the
    probability that an eigenvalue is missing (1 where the iteration was cut short).

    Where a product was not finite, `scale` is NaN and the pairs are those of the last cycle before it; they are
    infinite if there was none."""

    values: Float[Array, " k"]
    vectors: Float[Array, "k n"]
    residuals: Float[Array, " k"]
    scale: Float[Array, ""]
    asymmetry: Float[Array, ""]
    products: Array
    missed: Float[Array, ""]

    def sound_values(self) -> Float[Array, " k"]:
        """The values, NaN where a product was not finite: for jitted code, which cannot raise."""
        return jnp.where(jnp.isfinite(self.scale), self.values, jnp.nan)


class Draw(NamedTuple):
    """What a random direction has said so far, at the low and the high end: `growth` is log P(t) without the factors of
    the Ritz values that are held, -inf where nothing can be said; `best` the largest log P(t) so far."""

    number: Array
    growth: Float[Array, "2"]
    best: Float[Array, "2"]
    halvings: Array  # exhausted spaces in which a missing eigenvalue had a probability of at most 1/2 to stay hidden


class Restarted(NamedTuple):
    """Where the iteration stands between two cycles: all that the next needs."""

    basis: KrylovBasis
    start: Array  # how many basis vectors stand at the beginning of the next cycle
    values: Array  # wanted Ritz values after the last cycle
    rotation: Array  # (size, wanted): their vectors in the basis
    residuals: Array
    scale: Array  # largest modulus of a Ritz value so far
    asymmetry: Array  # the root of the largest so far
    floor: Array  # bounds the remainders that were dropped when converged vectors were locked
    locked: Array  # how many vectors, the wanted ones first, are deflated while a draw looks for what is missing
    thresholds: Array  # (2,), below and above which it looks
    draw: Draw
    done: Array
    cycle: Array
    products: Array


def thick_restart(
    product: FlatProduct, start: Float[Array, " n"], plan: RestartPlan, tolerance: float | Array, key: PRNGKey
) -> RitzPairs:
    """Extreme eigenpairs by thick-restart Lanczos with full reorthogonalisation of a basis of `plan.size` vectors.

    Stops when every wanted residual is at most `tolerance` times the largest Ritz value in modulus, and when with a
    probability of at most `MISSED` an eigenvalue is missing: one that lies further out than the wanted ones do, by more
    than that tolerance, counted with multiplicity. `start`, a Gaussian vector, is to be independent of the key and of
    all its folds: cycles draw from these.
    """
    state = jax.lax.while_loop(
        lambda state: ~state.done & (state.cycle < plan.cycles) & jnp.isfinite(state.scale),
        lambda state: restart_cycle(product, state, plan, tolerance, key),
        first_state(start, plan),
    )
    return wanted_pairs(state, plan)


def first_state(start: Float[Array, " n"], plan: RestartPlan) -> Restarted:
    """The iteration before its first cycle, from `start` (any length but zero)."""
    dtype, size = start.dtype, plan.size
    vectors = jnp.zeros((size + 1, start.size), dtype).at[0].set(start / length(start))
    unknown, none = jnp.full((plan.wanted,), jnp.inf, dtype), jnp.zeros((), dtype)
    no, zero = jnp.array(False), jnp.array(0)
    basis = KrylovBasis(vectors, jnp.zeros((size, size), dtype))
    # The start is a draw by itself: it tells of eigenvalues, if not of their multiplicity.
    growth = jnp.full(2, 0 if plan.single else -jnp.inf, dtype)
    draw = Draw(jnp.array(int(plan.single)), growth, jnp.full(2, -jnp.inf, dtype), zero)
    rotation = jnp.eye(size, plan.wanted, dtype=dtype)
    nowhere = jnp.array([-jnp.inf, jnp.inf], dtype)
    return Restarted(basis, zero, unknown, rotation, unknown, none, none, none, zero, nowhere, draw, no, zero, zero)


def restart_cycle(
    product: FlatProduct, state: Restarted, plan: RestartPlan, tolerance: float | Array, key: PRNGKey
) -> Restarted:
    """Take some products and look; where the basis is full restart from its wanted Ritz vectors; where the wanted
    converged lock them and draw a random direction, to look for what is missing.

    A product that is not finite makes `scale` NaN and leaves the wanted pairs as they were: the basis is only ever
    written behind them.
    """
    key, looking = jax.random.fold_in(key, state.cycle), state.locked > 0
    stop = jnp.minimum(jnp.maximum(state.start, plan.wanted) + plan.stride, plan.size)
    grown = extend(product, state.basis, state.start, stop, key)
    filled, ritz = grown.filled, ritz_of(grown.basis, grown.filled, state.locked)
    finite = jnp.isfinite(grown.norm) & jnp.all(jnp.isfinite(ritz.values))
    known = ~looking & finite & (filled >= plan.wanted)

    picked = jnp.concatenate([ritz.ascending[: plan.low], ritz.descending[: plan.high]])
    couplings = grown.norm * jnp.abs(ritz.vectors[filled - 1])
    scale = jnp.maximum(state.scale, jnp.max(jnp.where(ritz.hold, 0, jnp.abs(ritz.values))))
    rounding = jnp.finfo(scale.dtype).eps * scale  # below which a residual says nothing
    values = jnp.where(known, ritz.values[picked], state.values)
    remainders = jnp.maximum(couplings[picked], rounding)
    residuals = jnp.where(known, remainders + state.floor, state.residuals)
    rotation = jnp.where(known, ritz.vectors[:, picked], state.rotation)
    limit = tolerance * scale
    converged = known & jnp.all(residuals <= limit)
    floor = state.floor + length(remainders)
    lockable = known & (floor <= limit * _share_of_locks(state.draw.number.astype(limit.dtype), plan))

    thresholds = jnp.where(looking, state.thresholds, _thresholds(values, limit, ritz, plan))
    gaps = _gaps(thresholds, ritz.values)
    outside = looking & jnp.any(gaps <= 0, axis=0) & ~ritz.hold
    beyond = jnp.any(outside)
    draw, certified = _evidence(state, known, gaps, ritz.hold, grown, plan)
    done = finite & jnp.where(looking, certified & ~beyond, converged & certified)
    lock = lockable & ~done & ~(plan.single & jnp.all(draw.growth > -jnp.inf))
    anew = beyond & (state.locked > plan.wanted)
    restart = (filled == plan.size) & finite & ~done & ~lock & ~anew

    kept = kept_places(ritz, state.locked, plan)
    dropped = ~ritz.hold & ~jnp.zeros(plan.size, bool).at[kept].set(True)
    growth = draw.growth + jnp.where(restart, _sum_of_logarithms(gaps, dropped), 0)
    draw = draw._replace(growth=jnp.where(beyond, -jnp.inf, growth))
    draw = jax.tree.map(lambda new, old: jnp.where(lock, new, old), _next_draw(state.draw), draw)
    count, within = _neighbours(thresholds, ritz, couplings, state.draw, plan)

    change = _picked(
        [lock, anew],
        [locking(ritz, picked, count, plan), begun_anew(grown.basis, ritz, outside, plan)],
        compressed(grown.basis, ritz, kept, filled, state.locked, plan),
    )
    basis = changed_basis(grown.basis, change, restart | lock | anew, lock | anew, lock, key, plan)
    first = jnp.where(lock, count, jnp.where(restart, plan.kept, jnp.where(anew, plan.wanted, filled)))
    return Restarted(
        basis=basis,
        start=first,
        values=values,
        rotation=jnp.where(lock | restart, jnp.eye(plan.size, plan.wanted, dtype=rotation.dtype), rotation),
        residuals=residuals,
        scale=jnp.where(finite, scale, jnp.nan),
        asymmetry=jnp.maximum(state.asymmetry, grown.asymmetry),
        floor=jnp.where(lock, floor, state.floor),
        locked=jnp.where(lock, count, jnp.where(beyond, 0, state.locked)),
        thresholds=jnp.where(lock, within, thresholds),
        draw=draw,
        done=done,
        cycle=state.cycle + 1,
        products=state.products + filled - state.start,
    )


def wanted_pairs(state: Restarted, plan: RestartPlan) -> RitzPairs:
    """The pairs that the iteration has come to."""
    low = plan.low
    order = jnp.concatenate([jnp.argsort(state.values[:low]), low + jnp.argsort(state.values[low:])])
    vectors = combinations(state.basis.vectors, state.rotation[:, order], plan.slab)
    asymmetry = relative_asymmetry(state.asymmetry, state.scale)
    missed = jnp.where(state.done, MISSED, 1).astype(state.scale.dtype)
    values, residuals = state.values[order], state.residuals[order]
    return RitzPairs(values, vectors, residuals, state.scale, asymmetry, state.products, missed)


def _picked(conditions: list[Array], changes: list[Change], otherwise: Change) -> Change:
    """The change of the first condition that holds."""
    for condition, change in zip(reversed(conditions), reversed(changes), strict=True):
        otherwise = jax.tree.map(lambda a, b, c=condition: jnp.where(c, a, b), change, otherwise)
    return otherwise


def _share_of_locks(number: Array, plan: RestartPlan) -> Array:
    """The share of the tolerance that all locks up to this one may take.

    A lock drops A V - V Theta = f s^T for good. Vectors of one eigenspace, of which more is found later, are mixed
    after it: what they lack is |<s, c>| at a unit c, up to the length of s, and remainders of several locks add up.
    Mostly there is one; each later one has found another of the wanted, so that their even parts of the rest suffice.
    """
    return jnp.minimum(1, FIRST_LOCK + (1 - FIRST_LOCK) * number / (plan.wanted + 1))


def _thresholds(values: Array, limit: Array, ritz: Ritz, plan: RestartPlan) -> Array:
    """Beyond which no eigenvalue may be missing, at the low and the high end (infinite where none is wanted)."""
    limits = jnp.finfo(limit.dtype)
    largest = jnp.max(jnp.abs(jnp.where(ritz.hold, 0, ritz.values)))
    slack = jnp.maximum(jnp.maximum(limit, 10 * limits.eps * largest), limits.tiny / limits.eps)
    low = jnp.max(values[: plan.low]) - slack if plan.low else -jnp.inf
    high = jnp.min(values[plan.low :]) + slack if plan.high else jnp.inf
    return jnp.stack([jnp.asarray(low, limit.dtype), jnp.asarray(high, limit.dtype)])


def _gaps(thresholds: Array, values: Array) -> Array:
    """(2, m): how far within the thresholds the values lie."""
    return jnp.stack([values - thresholds[0], thresholds[1] - values])


def _neighbours(thresholds: Array, ritz: Ritz, couplings: Array, draw: Draw, plan: RestartPlan) -> tuple[Array, Array]:
    """How many vectors a lock deflates, the wanted ones among them, and the thresholds within the given ones that this
    leaves."""
    most = plan.neighbours + 1
    asked = [end for end, count in enumerate((plan.low, plan.high)) if count]
    places = [order[count : count + most] for order, count in inwards(ritz, plan)]
    # (ends, ends, most): the share of the Ritz vectors next to one end in the loss at another.
    gaps = jnp.stack([_gaps(thresholds, ritz.values[place])[jnp.array(asked)] for place in places], axis=1)
    shares = jnp.stack([couplings[place] for place in places])[None] ** 2 / jnp.where(gaps > 0, gaps, 1)
    shares = jnp.where(gaps > 0, shares, jnp.inf)
    lost = jnp.cumsum(jnp.sum(shares, axis=1), axis=-1)
    lost = jnp.concatenate([jnp.zeros_like(lost[:, :1]), lost[:, :-1]], axis=1)
    next_gaps = jnp.stack([gaps[i, i] for i in range(len(asked))])
    there = plan.wanted + plan.ends * jnp.arange(1, most + 1) <= jnp.sum(~ritz.hold)
    # A large loss tells of vectors that are not yet those next to the wanted ones.
    usable = there & jnp.all(lost <= LOSS * next_gaps, axis=0) & ((jnp.arange(most) == 0) | (draw.number == 0))
    score = jnp.sum(jnp.log(jnp.where(next_gaps > lost, next_gaps - lost, 1)), axis=0)
    best = jnp.where(jnp.any(usable), jnp.argmax(jnp.where(usable, score, -jnp.inf)), 0)
    moved = jnp.zeros(2, lost.dtype).at[jnp.array(asked)].set(lost[:, best])
    return plan.wanted + plan.ends * best, thresholds + moved * jnp.array([1, -1], lost.dtype)


def _sum_of_logarithms(gaps: Array, these: Array) -> Array:
    # An end that nobody asked for has gaps without a bound.
    logarithms = jnp.log(jnp.where((gaps > 0) & jnp.isfinite(gaps), gaps, 1))
    found = jnp.sum(jnp.where(these[None], logarithms, 0), axis=1)
    inside = jnp.all((gaps > 0) | ~these[None], axis=1)
    return jnp.where(inside, found, -jnp.inf)


def _evidence(
    state: Restarted, known: Array, gaps: Array, hold: Array, grown: Extension, plan: RestartPlan
) -> tuple[Draw, Array]:
    """The draw after some products, and whether it says enough.

    A space that is exhausted has no vector v, and the remainder is known to a rounding error: P(t) is at most the
    tolerance over the machine epsilon. In float32 that may say too little. The random direction that follows is a test
    of its own: if each lets what is missing hide with a probability of at most 1/2, then k of them with 2^-k.
    """
    draw, held = state.draw, _sum_of_logarithms(gaps, ~hold)
    growth = draw.growth - grown.log_norms
    best = jnp.where(known | (state.locked > 0), jnp.fmax(draw.best, growth + held), draw.best)
    number = jnp.maximum(draw.number, 1).astype(best.dtype)
    odds = math.log(plan.ends / MISSED) + jnp.log(number * (number + 1))
    hidden = 0.5 * math.log(2 * state.basis.vectors.shape[1] / math.pi) - best  # logarithm of the probability to hide
    unasked = jnp.array([plan.low == 0, plan.high == 0])
    half = grown.exhausted & jnp.all((hidden <= -math.log(2 * plan.ends)) | unasked)
    halvings = draw.halvings + half.astype(draw.halvings.dtype)
    enough = jnp.all((hidden <= math.log(1 - EXHAUSTED_SHARE) - odds) | unasked)
    enough = enough | (halvings.astype(best.dtype) * math.log(2) >= odds - math.log(EXHAUSTED_SHARE))
    # What follows an exhausted space is a new draw: the Ritz values before it have no part in its growth. Only a fixed
    # threshold tells them apart.
    anew = jnp.where(state.locked > 0, -held, -jnp.inf)
    growth = jnp.where(grown.exhausted, anew, growth)
    best = jnp.where(grown.exhausted, -jnp.inf, best)
    return Draw(draw.number, growth, best, halvings), enough


def _next_draw(draw: Draw) -> Draw:
    return Draw(draw.number + 1, jnp.zeros_like(draw.growth), jnp.full_like(draw.best, -jnp.inf), draw.halvings * 0)
