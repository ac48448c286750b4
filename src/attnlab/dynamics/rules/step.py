"""The edge of the step that an optax chain really takes, measured from the step itself.

A transformation of optax is a pair of closures: what it is made of cannot be read from it. But it can be run. One step
of a chain around a rule with the first moment m, the denominator P and the step D(m, g) / P at learning rate 1 has

    m' = what the rule makes of m and of kappa g,          w' = (1 - delta) w - rho D(m, kappa g) / P,

leaf by leaf, where kappa is what stands before the rule makes of the gradient (clipping), rho what stands behind it
makes of its step (learning rate, schedule, clipping), and delta the decay of the weights, masked or not. All three are
numbers that a step gives away: m' and m give kappa, the steps at w and at 0 give delta, the rest gives rho; and what is
left over says whether the chain is one of this form at all. With the factors held, H w = h P w flips its sign in a step
where (2 - delta) P w = rho kappa F H w, F the rule's own filter at alternating gradients, so that the edge is the
rule's at the effective rate rho kappa, in the metric P (1 - delta / 2). Leaves of other rates differ in their metric.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from attnlab.checks import check_same_structure, is_concrete
from attnlab.dynamics.preconditioners import Preconditioner, on_eigenvalues
from attnlab.dynamics.rules.base import Moments, UpdateRule
from attnlab.dynamics.states import filled
from attnlab.trees import ravel
from attnlab.types import Params, Scalar

EMISSION_LIMIT = 4096
"""Calls after which an `optax.MultiSteps` that has still not moved is taken to stand still."""


class StepEdge(NamedTuple):
    """The edge of one step of a chain.

    Attributes:
        metric: P as `preconditioners.whitened` takes it, with decay and differing rates in it, infinite where
            parameters do not move; None where the rule's norm is another one.
        threshold: the largest stable curvature in the metric, or in the rule's norm; NaN where the step is not one of
            the rule's (`mismatch`).
        rate: the effective learning rate: with schedule, clipping and, of rules in a norm, the length of the step.
        mismatch: (3,) what is left over of the gradient taken in, of the decay and of the step, each as a share.
    """

    metric: Preconditioner | None
    threshold: Scalar
    rate: Scalar
    mismatch: Float[Array, "3"]


def edge_of_step(
    rule: UpdateRule,
    optimizer: optax.GradientTransformation,
    gradient: Params,
    state: optax.OptState,
    params: Params,
) -> StepEdge:
    """The edge of the step that `optimizer`, a chain around `rule`, takes from `params` with `gradient`.

    The rule's learning rate and weight decay are not looked at: the step tells them. Of `optax.MultiSteps` it is that
    of its next step that moves, with this gradient until then. Pure; raises `ValueError` outside of `jit` for a step
    that is not one of the rule's, with the reason; under `jit` the threshold is NaN. Of parameters that are zero the
    decay is not seen.
    """
    zeros, ones = (jax.tree.map(like, params) for like in (jnp.zeros_like, jnp.ones_like))
    updates, after = _moving_step(optimizer, gradient, state, params)
    check_same_structure("the optimizer's update", updates, params)
    still, _ = _moving_step(optimizer, gradient, state, zeros)
    then, now = (rule.moments(each, params) for each in (state, after))
    then, now = (each._replace(first=filled(each.first, zeros)) for each in (then, now))  # others' parameters, or fixed
    gains, odd_gradient = _gains(rule, gradient, then, now)
    taken = jax.tree.map(jnp.multiply, gains, gradient)
    held = rule.preconditioner(after, params)
    denominator = ones if held is None else filled(held, ones)
    step = rule.read(then, taken, denominator)
    decays, odd_decay = _shares(jax.tree.map(jnp.subtract, still, updates), params, rule)
    outputs, odd_step = _outputs(rule, jax.tree.map(jnp.negative, still), step)
    mismatch = jnp.stack([odd_gradient, odd_decay * _relative(params, decays, updates), odd_step])
    rates = jax.tree.map(jnp.multiply, gains, outputs)
    weights = [jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(step)]
    rate = sum(r * w for r, w in zip(jax.tree.leaves(rates), weights, strict=True)) / sum(weights)
    threshold = jnp.asarray(rule.undecayed().edge_at(rate, now.steps))
    slower = lambda r: jnp.where(rate == 0, 1, rate / r)  # noqa: E731
    metric: Preconditioner | None = on_eigenvalues(
        lambda p, decay, r: p * ((1 - decay / 2) * slower(r)).astype(p.dtype), denominator, decays, rates
    )
    if rule.norm is not None:
        metric, threshold = None, threshold * (1 - jax.tree.leaves(decays)[0] / 2)
    fits = jnp.all(mismatch <= _tolerances(rule, mismatch)) & (rate >= 0)
    found = StepEdge(metric, jnp.where(fits, threshold, jnp.nan), rate, mismatch)
    _check_fit(rule, found)
    return found


def _moving_step(
    optimizer: optax.GradientTransformation, gradient: Params, state: optax.OptState, params: Params
) -> tuple[Params, optax.OptState]:
    """One update, or as many as `optax.MultiSteps` gathers before it moves."""

    def once(state: optax.OptState) -> tuple[Params, optax.OptState]:
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(gradient, state, params)

    first = once(state)
    before = _gathered(state)
    if not before:
        return first

    def waiting(carry: tuple) -> Array:
        calls, (_, after) = carry
        moved = jnp.stack([now != then for now, then in zip(_gathered(after), before, strict=True)])
        return (calls < EMISSION_LIMIT) & ~jnp.any(moved)

    return jax.lax.while_loop(waiting, lambda carry: (carry[0] + 1, once(carry[1][1])), (jnp.array(1), first))[1]


def _gathered(state: optax.OptState) -> list[Array]:
    kind = optax.MultiStepsState
    parts = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kind))
    return [part.gradient_step for part in parts if isinstance(part, kind)]


def _gains(rule: UpdateRule, gradient: Params, then: Moments, now: Moments) -> tuple[Params, Scalar]:
    """What the rule took in of each leaf of the gradient, from its first moment; 1 where it keeps none."""
    if rule.first_moment is None:
        ones = jax.tree.map(lambda leaf: jnp.ones((), leaf.dtype), gradient)
        return ones, jnp.zeros((), ravel(gradient).dtype)

    zeros = jax.tree.map(jnp.zeros_like, gradient)
    free, unit = rule.kept(then.first, zeros), rule.kept(zeros, gradient)
    grown = jax.tree.map(lambda after, before, decayed: after - before - decayed, now.first, then.first, free)
    return _shares(grown, unit, rule)


def _shares(found: Params, directions: Params, rule: UpdateRule) -> tuple[Params, Scalar]:
    """The multiple of each leaf of `directions` nearest to that of `found`, one for all of them where the rule has a
    norm over all leaves; and what is left, as a share. A leaf without direction has the multiple of all."""
    products = [
        (jnp.vdot(a, b), jnp.vdot(b, b))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(directions), strict=True)
    ]
    inner, squares = sum(a for a, _ in products), sum(b for _, b in products)
    common = jnp.where(squares > 0, inner / jnp.where(squares > 0, squares, 1), 0)
    shares = [
        common if rule.norm is not None else jnp.where(b > 0, a / jnp.where(b > 0, b, 1), common) for a, b in products
    ]
    tree = jax.tree.unflatten(jax.tree.structure(directions), shares)
    rest = jax.tree.map(lambda a, share, b: a - share * b, found, tree, directions)
    return tree, _ratio(jnp.linalg.norm(ravel(rest)), jnp.linalg.norm(ravel(found)))


def _outputs(rule: UpdateRule, moved: Params, step: Params) -> tuple[Params, Scalar]:
    """The rates of the leaves. Of the steepest step in a norm along c: <c, moved> / ||c||_*^2, and by how much it falls
    short of ||c||_* ||moved||, so that directions in which c vanishes, which are anyone's, do not matter."""
    if rule.norm is None:
        return _shares(moved, step, rule)
    slope, dual = jnp.vdot(ravel(step), ravel(moved)), rule.norm.dual(step)
    rate = _ratio(slope, dual**2)
    short = jnp.where(slope == 0, 0, 1 - _ratio(slope, dual * rule.norm.size(moved)))
    return jax.tree.map(lambda leaf: rate.astype(leaf.dtype), step), short


def _relative(params: Params, decays: Params, updates: Params) -> Scalar:
    """The size of the decay beside that of the update."""
    decayed = jax.tree.map(jnp.multiply, params, decays)
    return _ratio(jnp.linalg.norm(ravel(decayed)), jnp.linalg.norm(ravel(updates)))


def _ratio(part: Scalar, whole: Scalar) -> Scalar:
    return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1), 0)


def _tolerances(rule: UpdateRule, mismatch: Array) -> np.ndarray:
    rounding = 10 * float(jnp.finfo(mismatch.dtype).eps) ** 0.5
    return rounding + np.array([0.0, 0.0, rule.slack], mismatch.dtype)


REASONS = (
    "the gradient that reaches the rule is not along the one given: it is clipped entry by entry, decayed weights or "
    "noise are added to it, or another rule stands before this one",
    "the decay is not proportional to the weights of each leaf: the step depends on the weights in another way, as by "
    "a trust ratio, or the mask cuts through a leaf",
    "the step is not along the rule's own: it is clipped entry by entry, averaged, or made by another rule",
)


def _check_fit(rule: UpdateRule, found: StepEdge) -> None:
    if not is_concrete((found.mismatch, found.rate)):
        return
    beyond = np.asarray(found.mismatch) - _tolerances(rule, found.mismatch)
    worst = int(np.argmax(beyond))
    if beyond[worst] > 0:
        raise ValueError(
            f"the optimizer does not step as the rule {rule.name} does: {REASONS[worst]} ({found.mismatch[worst]:.2g} "
            "of it). No edge is known for that; expected a chain of the rule with clipping by norm, schedules, decay "
            "and groups around it."
        )
    if not found.rate >= 0:
        raise ValueError(
            f"the optimizer takes the rule {rule.name}'s step at the effective rate {found.rate:.3g}; expected one "
            "that is not negative. The chain lacks optax.scale_by_learning_rate."
        )
