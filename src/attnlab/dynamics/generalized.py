"""The largest curvature in the unit ball of a norm, between two bounds; and a probe of it against the rule's edge.

S = max over ||d|| <= 1 of <d, H d> decides whether steepest descent in the norm is stable (`rules.geometric`). For the
largest entry it is NP-hard. From below: d <- the steepest direction of H d, which climbs where H >= 0 (Journee et al.,
arXiv 0811.4724), from several starts. From above: for every A >= 0 on the rows and Q > 0,

    S <= tr A + mu tr Q,    mu = the highest eigenvalue of Q^-1/2 (H - A) Q^-1/2, or 0 if that is negative,

as <d, A d> <= tr A in the ball. The best A solves a semidefinite program; its primal, with k directions in the place
of one (Burer and Monteiro), climbs by the same step, and its maximiser V gives A = sqrt(H V (H V)^T). With H >= 0 the
best bound is at most pi / 2 times S for the largest entry (Nesterov 1998); where one direction suffices it is S.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial
from jaxtyping import Array, Float

from attnlab.checks import check_key, check_number, check_whole
from attnlab.curvature.operator import Operator, flat_dtype
from attnlab.curvature.operators import hessian
from attnlab.display import line, parameters, whatever_it_holds
from attnlab.dynamics.norms import LargestBlock, LargestPart, Norm, norm_by_name
from attnlab.dynamics.rules import UpdateRule, edge_of_step
from attnlab.krylov.tracking import TopPairs, cold_top_pairs, upper_bound
from attnlab.objectives import Objective
from attnlab.training.optimizer import check_optimizer
from attnlab.training.probe import Probe, TrainingState
from attnlab.trees import block_slices, dimension, length
from attnlab.types import Params, PRNGKey, PyTree, Scalar

BLEND = 0.1
"""Share of the mean of A in Q: pure A would divide by the rows that hardly matter, pure identity weighs all alike."""


class Bracket(NamedTuple):
    """The generalized sharpness between two bounds.

    Attributes:
        lower: attained by `direction`.
        upper: exceeded with a probability of at most 0.001 over the key (`krylov.tracking.upper_bound`).
        direction: parameters of norm 1.
        stack: directions of the relaxed problem, with a leading axis, to start the next search from.
    """

    lower: Scalar
    upper: Scalar
    direction: Params
    stack: PyTree

    @whatever_it_holds
    def __repr__(self) -> str:
        """The bounds and their distance."""
        return line(
            "Bracket", lower=self.lower, upper=self.upper, width=self.width, direction=parameters(self.direction)
        )

    @property
    def width(self) -> Scalar:
        """The distance of the bounds as a share of the upper one."""
        return (self.upper - self.lower) / jnp.where(self.upper > 0, self.upper, 1)


@dataclass(frozen=True)
class Search:
    """How much is spent on a bracket.

    Attributes:
        restarts: k, starts of the ascent and directions of the relaxed problem; their products are taken at once. With
            too few directions (6 of 1,440 parameters) the upper bound stays far above.
        rounds: at most so many times k products for the relaxed problem, and as many for the ascent.
        tolerance: an ascent ends where a round raises it by less than this share.
        products: of the upper bound, one after another.
    """

    restarts: int = 12
    rounds: int = 100
    tolerance: float = 1e-4
    products: int = 60

    def __post_init__(self) -> None:
        check_whole(restarts=self.restarts, rounds=self.rounds, products=self.products)
        check_number("tolerance", self.tolerance, 0, 1, "It is a relative rise.")


def generalized_sharpness(
    operator: Operator, norm: Norm | str, key: PRNGKey, search: Search = Search(), start: Bracket | None = None
) -> Bracket:
    """max over ||d|| <= 1 of <d, H d>, bracketed.

    Args:
        operator: H, symmetric; at least one of its eigenvalues should be positive, else both bounds end at 0 or below.
        norm: "entry" (the largest modulus: sign descent), "matrix" (the largest spectral norm: Muon), "block" (the sum
            of the leaves' lengths: block coordinate descent), or a `Norm` such as `LargestMatrix(scaled=True)`.
        key: for starts and for the bound.
        search: what may be spent.
        start: of a nearby operator, for a warm start.

    Of "block" the lower bound is the highest eigenvalue of a leaf's block, and the upper one that plus the modulus of
    the lowest eigenvalue of H, if that is negative: with H >= 0 they are one. Pure. Raises `TypeError` for what is no
    norm, `ValueError` for one whose dual is not known.

    Example:
        >>> import attnlab as al
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from attnlab.dynamics.generalized import generalized_sharpness
        >>> inputs = jnp.diag(jnp.array([1.0, 2.0]))
        >>> risk = al.objective(lambda params, x: x @ params, al.square_loss, inputs, jnp.zeros(2))
        >>> found = generalized_sharpness(al.hessian(risk, jnp.ones(2)), "entry", jax.random.key(0))
        >>> round(float(found.lower), 3), round(float(found.upper), 3)  # the trace of a diagonal matrix
        (5.0, 5.0)
    """
    norm = norm_by_name(norm)
    check_key(key)
    if isinstance(norm, LargestBlock):
        return _largest_block(operator, key, search)
    if not isinstance(norm, LargestPart):
        raise TypeError(
            f"norm is a {type(norm).__name__}, with a dual but no bound from above; expected a LargestPart or a "
            "LargestBlock. Give the class the methods of LargestPart."
        )
    return _largest_part(operator, norm, key, search, start)


@partial(jax.jit, static_argnames=("norm", "search"))
def _largest_part(
    operator: Operator, norm: LargestPart, key: PRNGKey, search: Search, start: Bracket | None
) -> Bracket:
    keys, count = jax.random.split(key, 3), search.restarts
    unravel = jax.vmap(operator.unravel)
    drawn = unravel(jax.random.normal(keys[0], (count, operator.dimension), operator.flat_dtype))
    first = norm.spread(drawn if start is None else start.stack)[0]
    relaxed = lambda slopes: norm.spread(slopes)[0]  # noqa: E731
    stack, images = _ascend(operator.linear, relaxed, first, search, jnp.sum)
    mixing = jax.random.normal(keys[1], (count, count), operator.flat_dtype)
    mixed = jax.tree.map(lambda leaf: jnp.tensordot(mixing.astype(leaf.dtype), leaf, 1), stack)
    starts = jax.vmap(norm.steepest)(mixed)
    if start is not None:
        starts = jax.tree.map(lambda leaf, known: leaf.at[0].set(known), starts, start.direction)
    ends, slopes = _ascend(operator.linear, jax.vmap(norm.steepest), starts, search, lambda values: values)
    values = _inner(ends, slopes)
    best = jnp.argmax(jnp.where(jnp.isfinite(values), values, -jnp.inf))
    direction = jax.tree.map(lambda leaf: leaf[best], ends)
    weights = norm.spread(images)[1]
    null = jax.tree.map(lambda leaf: leaf[0], stack)
    upper = _dual_bound(operator, norm, weights, null, keys[2], search)
    return Bracket(values[best], jnp.maximum(upper, values[best]), direction, stack)


def _ascend(
    linear: Partial, ahead: Callable[[PyTree], PyTree], start: PyTree, search: Search, joined: Callable[[Array], Array]
) -> tuple[PyTree, PyTree]:
    """d <- `ahead`(H d + shift d) over a stack, each by itself or `joined`: a step that falls is not taken, and a
    multiple of the identity, constant where all directions are as long as they can be, is added. Gives d and H d."""
    product = jax.vmap(linear)

    def once(carry: tuple) -> tuple:
        number, candidate, stack, images, values, shift, _ = carry
        slopes = product(candidate)
        reached = joined(_inner(candidate, slopes))
        rises = reached > values
        keep = lambda new, old: jnp.where(_along(rises, new), new, old)  # noqa: E731
        stack, images = jax.tree.map(keep, candidate, stack), jax.tree.map(keep, slopes, images)
        scale = jnp.abs(reached) / joined(_inner(candidate, candidate))
        shift = jnp.where(rises, shift, jnp.maximum(2 * shift, scale / 4))
        gain = jnp.where(rises, (reached - values) / jnp.where(reached != 0, jnp.abs(reached), 1), jnp.inf)
        settled = (gain < search.tolerance) | (shift > 64 * scale) | ~jnp.isfinite(reached)
        pushed = jax.tree.map(lambda image, d: image + _along(shift, d) * d, images, stack)
        return number + 1, ahead(pushed), stack, images, jnp.where(rises, reached, values), shift, jnp.all(settled)

    zeros = jax.tree.map(jnp.zeros_like, start)
    least = jnp.full_like(joined(_inner(start, zeros)), -jnp.inf)
    carry = (jnp.array(0), start, zeros, zeros, least, jnp.zeros_like(least), jnp.array(False))
    end = jax.lax.while_loop(lambda carry: (carry[0] <= search.rounds) & ~carry[-1], once, carry)
    return end[2], end[3]


def _along(numbers: Array, leaf: Array) -> Array:
    """One number for each of a stack, or one for all."""
    numbers = numbers if numbers.dtype == bool else numbers.astype(leaf.dtype)
    return jnp.broadcast_to(numbers, leaf.shape[:1]).reshape(-1, *[1] * (leaf.ndim - 1))


def _inner(first: PyTree, second: PyTree) -> Float[Array, " k"]:
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return jnp.sum(jnp.stack([jnp.sum((a * b).reshape(len(a), -1), axis=1) for a, b in pairs]), axis=0)


def _dual_bound(
    operator: Operator, norm: LargestPart, weights: PyTree, null: Params, key: PRNGKey, search: Search
) -> Scalar:
    """tr A + mu tr Q; `null` is a direction of the relaxed problem, for which (H - A) d is about 0."""
    blended = norm.blend(weights, BLEND, operator.point)

    def product(vector: Array) -> Array:
        inner = norm.weigh(blended, operator.unravel(vector), -0.5)
        held = norm.weigh(weights, inner)
        rest = jax.tree.map(jnp.subtract, operator.linear(inner), held)
        return operator.ravel(norm.weigh(blended, rest, -0.5))

    known = operator.ravel(norm.weigh(blended, null, 0.5))
    known = known / length(known)
    image = product(known)
    value = jnp.vdot(known, image)
    pairs = TopPairs(value[None], known[None], length(image - value * known)[None])
    steps = min(search.products, operator.dimension - 1)
    above = upper_bound(product, pairs, key, steps) if steps else value
    point = operator.point
    return norm.total(weights, point) + jnp.maximum(above, 0) * norm.total(blended, point)


@partial(jax.jit, static_argnames=("search",))
def _largest_block(operator: Operator, key: PRNGKey, search: Search) -> Bracket:
    places = list(block_slices(operator.point).values())
    keys = jax.random.split(key, len(places) + 1)

    def within(place: slice) -> Callable[[Array], Array]:
        whole = jnp.zeros(operator.dimension, operator.flat_dtype)
        return lambda vector: operator.flat_mv(whole.at[place].set(vector))[place]

    tops = [
        _top(within(place), place.stop - place.start, each, operator.flat_dtype, search)
        for place, each in zip(places, keys[:-1], strict=True)
    ]
    highest = jnp.stack([value for value, _, _ in tops])
    best = jnp.argmax(highest)
    alone = [jnp.where(best == number, vector, 0) for number, (_, vector, _) in enumerate(tops)]
    negative = lambda vector: -operator.flat_mv(vector)  # noqa: E731
    lowest = _top(negative, operator.dimension, keys[-1], operator.flat_dtype, search)[2]
    upper = jnp.maximum(jnp.max(jnp.stack([above for _, _, above in tops])), 0) + jnp.maximum(lowest, 0)
    direction = operator.unravel(jnp.concatenate(alone))
    return Bracket(highest[best], upper, direction, jax.tree.map(lambda leaf: leaf[None], direction))


def _top(
    product: Callable[[Array], Array], size: int, key: PRNGKey, dtype: Any, search: Search
) -> tuple[Array, Array, Array]:
    """The highest eigenvalue with its vector, and what it does not exceed."""
    pairs = cold_top_pairs(product, size, 1, key, dtype)
    steps = min(search.products, size - 1)
    above = upper_bound(product, pairs, key, steps) if steps else pairs.values[-1] + pairs.residuals[-1]
    return pairs.values[-1], pairs.vectors[-1], above


@dataclass(frozen=True)
class _Follow:
    rule: UpdateRule
    optimizer: optax.GradientTransformation
    search: Search

    def start(self, risk: Objective, state: TrainingState, key: PRNGKey) -> Bracket:
        """Nothing is searched yet: random directions, for the first measurement to start from."""
        drawn = jax.random.normal(key, (self.search.restarts + 1, dimension(state.params)), flat_dtype(state.params))
        stack = jax.vmap(Operator(Partial(jnp.zeros_like), state.params).unravel)(drawn)
        none = jnp.zeros((), drawn.dtype)
        direction = jax.tree.map(lambda leaf: leaf[0], stack)
        if isinstance(self.rule.norm, LargestBlock):
            return Bracket(none, none, direction, jax.tree.map(lambda leaf: leaf[:1], stack))
        direction = self.norm.steepest(direction)
        return Bracket(none, none, direction, self.norm.spread(jax.tree.map(lambda leaf: leaf[1:], stack))[0])

    @property
    def norm(self) -> LargestPart:
        assert isinstance(self.rule.norm, LargestPart)
        return self.rule.norm

    def __call__(
        self, risk: Objective, state: TrainingState, memory: Bracket, key: PRNGKey
    ) -> tuple[dict[str, Array], Bracket]:
        found = self._bracket(risk, state, key, memory)
        gradient = jax.grad(risk)(state.params)
        edge = edge_of_step(self.rule, self.optimizer, gradient, state.optimizer_state, state.params)
        values = {
            "lower": found.lower,
            "upper": found.upper,
            "width": found.width,
            "threshold": edge.threshold,
            "ratio": found.lower / edge.threshold,
            "rate": edge.rate,
            "mismatch": jnp.max(edge.mismatch),
        }
        return values, found

    def _bracket(self, risk: Objective, state: TrainingState, key: PRNGKey, start: Bracket) -> Bracket:
        assert self.rule.norm is not None
        return generalized_sharpness(hessian(risk, state.params), self.rule.norm, key, self.search, start)


def generalized_stability(
    rule: UpdateRule, search: Search = Search(), optimizer: optax.GradientTransformation | None = None
) -> Probe:
    """Probe: the sharpness in the rule's norm (`lower`, `upper`, and their distance as a share, `width`), the rule's
    `threshold` at the effective `rate` of the step from this point, and `ratio`, lower over threshold.

    For rules whose step is the steepest in a norm; `stability` is that of the others. The run trains with
    `rule.transformation`, or with an `optimizer` that is a chain around it (`edge_of_step`): where its step is none of
    the rule's, by `mismatch`, the threshold is NaN. Searches start where the last one ended. Raises `TypeError` for a
    rule without a norm.
    """
    if not isinstance(rule, UpdateRule) or rule.norm is None:
        what = rule.name if isinstance(rule, UpdateRule) else type(rule).__name__
        raise TypeError(
            f"rule is {what}, whose step is the steepest in no norm of `dynamics.norms`; expected one of sign, lion, "
            "muon, spectral and block_coordinate. The edge of the other rules is measured by the probe `stability`."
        )
    chain = rule.transformation if optimizer is None else optimizer
    check_optimizer(chain)
    follow = _Follow(rule, chain, search)
    return Probe(follow, follow.start)
