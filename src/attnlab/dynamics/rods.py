"""Rod flow: an optimizer at the edge of stability in continuous time, two consecutive iterates as two ends of a rod.

Regis, Chewi (arXiv 2602.01480; for Adam 2605.06821), in the form derived here. Let z = (w, m), parameters and first
moment, and z' = z + G(z) a step with its denominator P held (`UpdateRule.drift`), of Adam

    G(z) = (-eta / P (b1 m + (1 - b1) grad L(w)), (1 - b1) (grad L(w) - m)).

With c = (z + z') / 2 and d = (z - z') / 2, z = c + d and z' = c - d, so that for the next pair

    c' - c = (G(c + d) + G(c - d)) / 2                              the part of G that is even in d,
    -d' = (z'' - z') / 2 = G(c - d) / 2 = -d - (G(c + d) - G(c - d)) / 2       as d = -G(c + d) / 2.

Both sides depend on d up to its sign only, so that D = (-1)^t d moves as slowly as c does, and the flow is

    dc/dt = (G(c + D) + G(c - D)) / 2,      dD/dt = -2 D - (G(c + D) - G(c - D)) / 2,

whose Euler step of length 1 is the optimizer itself. D grows where the Jacobian of a step, 1 + dG, has an eigenvalue
below -1: beyond the edge, of Adam (2 + 2 b1) / ((1 - b1) eta). The second moment, where there is one, sees both ends,
dnu/dt = (1 - b2) (mean of both grad L^2 - nu). With D = 0 it is the stable flow, blind to the edge.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from attnlab.checks import check_finite, check_intervals, check_positive
from attnlab.display import line, parameters, whatever_it_holds
from attnlab.dynamics.flows import check_finite_flow
from attnlab.dynamics.rules import UpdateRule, constant_rate
from attnlab.objectives import Objective, check_objective
from attnlab.trees import ravel
from attnlab.types import Params


class Rod(NamedTuple):
    """Two consecutive states of an optimizer, flat: `centre` and `half` difference (2, n) of parameters and first
    moment, the second moment `nu` (n,) after a step from the first, and the number of `steps` by then (as
    `rules.Moments`)."""

    centre: Float[Array, "2 n"]
    half: Float[Array, "2 n"]
    nu: Float[Array, " n"]
    steps: Float[Array, ""]


class RodFlow(NamedTuple):
    """A rod flow at steps 0, every, 2 every, ...: leading axis (r,) in all.

    Attributes:
        params: the mean of two consecutive iterates.
        half: half their difference, flat (r, n).
        loss: mean loss of the two.
    """

    params: Params
    half: Float[Array, "r n"]
    loss: Float[Array, " r"]

    @whatever_it_holds
    def __repr__(self) -> str:
        """Its fields, by their shapes."""
        return line("RodFlow", **{name: parameters(value) for name, value in self._asdict().items()})


def rod_between(rule: UpdateRule, first: tuple[Params, optax.OptState], second: tuple[Params, optax.OptState]) -> Rod:
    """The rod of two consecutive points of a run, each with its optimizer state, in which the moments of `rule` may be
    anywhere (`UpdateRule.moments`, whose errors it raises)."""
    moments = [rule.moments(state, params) for params, state in (first, second)]
    ends = [jnp.stack([ravel(pair[0]), ravel(held.first)]) for pair, held in zip((first, second), moments, strict=True)]
    nu = ravel(moments[1].second)
    return Rod((ends[0] + ends[1]) / 2, (ends[0] - ends[1]) / 2, nu, jnp.asarray(moments[1].steps, nu.dtype))


def rod_velocity(risk: Objective, like: Params, rod: Rod, rule: UpdateRule) -> Rod:
    """The time derivative of a rod, per step of the optimizer; `like` gives the structure of the parameters. Pure."""
    unravel = ravel_pytree(like)[1]
    ends = (rod.centre + rod.half, rod.centre - rod.half)
    gradients = [ravel(jax.grad(risk)(unravel(end[0]))) for end in ends]
    rate, denominator = constant_rate(rule), rule.denominator(rod.nu, rod.steps)

    def step(end: Float[Array, "2 n"], gradient: Float[Array, " n"]) -> Float[Array, "2 n"]:
        return jnp.stack(rule.drift(rate, end[0], end[1], gradient, denominator))

    ahead, behind = (step(end, gradient) for end, gradient in zip(ends, gradients, strict=True))
    square = (gradients[0] ** 2 + gradients[1] ** 2) / 2
    decay = 1.0 if rule.second_decay is None else rule.second_decay
    return Rod(
        (ahead + behind) / 2,
        -2 * rod.half - (ahead - behind) / 2,
        (1 - decay) * (square - rod.nu),
        jnp.ones_like(rod.steps),
    )


def rod_flow(
    risk: Objective,
    like: Params,
    start: Rod,
    rule: UpdateRule,
    *,
    steps: int,
    every: int = 1,
    substeps: int = 4,
) -> RodFlow:
    """The rod flow from `start` (`rod_between`), for the time of `steps` steps, by Runge-Kutta of fourth order.

    Args:
        risk: the objective, full batch.
        like: parameters, for their structure.
        start: the rod; with `half` zero the flow is the stable one.
        rule: the optimizer (`rules.update_rule`), with a number for its learning rate.
        steps: a multiple of `every`.
        every: record the flow so often.
        substeps: Runge-Kutta steps, of eight gradients each, in the time of one of the optimizer.

    Raises `ValueError` for steps that `every` does not divide, a learning rate that is a schedule, a rule whose step is
    the steepest in a norm or whose second moment is not the mean square of gradients entry by entry, or a start that is
    not finite or of another size than `like`; `ArithmeticError` where the flow leaves the finite numbers.
    """
    check_intervals(steps, every)
    check_positive(substeps=substeps)
    constant_rate(rule)
    if rule.norm is not None:
        raise ValueError(
            f"rule is {rule.name}, whose step is the steepest in a norm and not linear in its moments; expected a rule "
            "of linear steps over a diagonal P. Measure its edge along training instead (generalized_stability)."
        )
    if rule.second_moment is not None and rule.second_decay is None:
        raise ValueError(
            f"rule is {rule.name}, whose second moment is no average of squared gradients entry by entry; expected a "
            "rule with one, such as adam, or with none. Measure its edge along training instead (stability)."
        )
    check_objective(risk, like)
    _check_start(start, ravel(like).size)
    flow = _rod_flow(risk, like, start, rule, steps, every, substeps)
    check_finite_flow("rod flow", risk, flow.params, flow, range(0, steps + 1, every), "step")
    return flow


def _check_start(start: Rod, size: int) -> None:
    shapes = tuple(jnp.shape(leaf) for leaf in start)
    if shapes != ((2, size), (2, size), (size,), ()):
        raise ValueError(
            f"start has leaves of shapes {shapes}; expected a centre and half of (2, {size}), nu of ({size},) and a "
            "number of steps. Build it with rod_between."
        )
    check_finite("start", start._asdict())


@partial(jax.jit, static_argnames=("rule", "steps", "every", "substeps"))
def _rod_flow(
    risk: Objective, like: Params, start: Rod, rule: UpdateRule, steps: int, every: int, substeps: int
) -> RodFlow:
    unravel = ravel_pytree(like)[1]

    def moved(rod: Rod, velocity: Rod, time: float) -> Rod:
        return jax.tree.map(lambda x, v: x + time * v, rod, velocity)

    def substep(rod: Rod, _: None) -> tuple[Rod, None]:
        time, velocity = 1 / substeps, lambda rod: rod_velocity(risk, like, rod, rule)
        one = velocity(rod)
        two = velocity(moved(rod, one, time / 2))
        three = velocity(moved(rod, two, time / 2))
        four = velocity(moved(rod, three, time))
        mean = jax.tree.map(lambda a, b, c, d: (a + 2 * b + 2 * c + d) / 6, one, two, three, four)
        return moved(rod, mean, time), None

    def record(rod: Rod) -> RodFlow:
        ends = [risk(unravel(rod.centre[0] + sign * rod.half[0])) for sign in (1, -1)]
        return RodFlow(unravel(rod.centre[0]), rod.half[0], (ends[0] + ends[1]) / 2)

    def interval(rod: Rod, _: None) -> tuple[Rod, RodFlow]:
        return jax.lax.scan(substep, rod, length=every * substeps)[0], record(rod)

    end, path = jax.lax.scan(interval, start, length=steps // every)
    return jax.tree.map(lambda many, last: jnp.concatenate([many, last[None]]), path, record(end))
