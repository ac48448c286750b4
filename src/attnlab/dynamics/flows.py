"""Continuous-time limits of training: gradient flow, and the central flow through the edge of stability."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.ode import odeint
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from attnlab.checks import check_finite, check_intervals, check_positive, check_same_structure, is_concrete, lowest
from attnlab.curvature.operators import hessian
from attnlab.curvature.transforms import precondition
from attnlab.display import line, parameters, whatever_it_holds
from attnlab.dynamics.complementarity import basis, solve_complementarity
from attnlab.dynamics.rules import RULES, UpdateRule, constant_rate
from attnlab.krylov.tracking import TopPairs, cold_top_pairs, warm_top_pairs
from attnlab.objectives import Objective, check_objective
from attnlab.trees import ravel
from attnlab.types import Params, PRNGKey, PyTree


def gradient_flow(risk: Objective, params: Params, times: Float[Array, " t"], *, tolerance: float = 1e-8) -> Params:
    """dw/dt = -grad risk(w), at increasing `times` of which the first is that of `params`.

    Returns the parameters with a leading axis (t,). Dormand-Prince with adaptive steps, `tolerance` relative and
    absolute to each. Gradient descent with learning rate eta takes one step per time eta. Explicit: it takes about
    (time x sharpness) / 3 steps.

    Raises `ValueError` for times that do not increase or a tolerance that is not positive, `ArithmeticError` where the
    flow leaves the finite numbers before the last time, as it can in finite time.
    """
    check_objective(risk, params)
    if not 0 < tolerance < np.inf:
        raise ValueError(f"tolerance is {tolerance}; expected a finite number above 0.")
    _check_increasing(times)
    path = _gradient_flow(risk, params, jnp.asarray(times, ravel(params).dtype), tolerance)
    check_finite_flow("gradient flow", risk, path, path, np.asarray(times) if is_concrete(times) else (), "time")
    return path


def _check_increasing(times: Float[Array, " t"]) -> None:
    if jnp.ndim(times) != 1 or jnp.size(times) == 0:
        raise ValueError(f"times has shape {jnp.shape(times)}; expected a vector of at least one time.")
    if not is_concrete(times):
        return
    check_finite("times", times)
    falls = np.flatnonzero(np.diff(times) <= 0)
    if falls.size:
        first, second = np.asarray(times)[falls[0] : falls[0] + 2]
        raise ValueError(f"times goes from {first:g} to {second:g}; expected increasing times. Sort them.")


def check_finite_flow(
    name: str, risk: Objective, params: Params, path: PyTree, moments: Sequence[float] | np.ndarray, unit: str
) -> None:
    """Raise `ArithmeticError` where a record of a flow, a row of the leaves of `path`, is not finite: with its moment
    and the last finite loss, that of `params` a row before. Skipped while tracing."""
    if not is_concrete(path):
        return
    finite = np.all([np.isfinite(leaf).reshape(len(leaf), -1).all(axis=1) for leaf in jax.tree.leaves(path)], axis=0)
    if finite.all():
        return
    first = int(np.argmin(finite))
    before = ""
    if first:
        point = jax.tree.map(lambda leaf: leaf[first - 1], params)
        before = f"; the last finite loss was {float(risk(point)):.6g}, at {unit} {moments[first - 1]:g}"
    raise ArithmeticError(
        f"the {name} is not finite at {unit} {moments[first]:g}{before}. End it before, lower the "
        "learning rate or take more substeps, where there are any, or take a loss that is bounded from below."
    )


@partial(jax.jit, static_argnames=("tolerance",))
def _gradient_flow(risk: Objective, params: Params, times: Float[Array, " t"], tolerance: float) -> Params:
    def velocity(point: Params, time: Array, risk: Objective) -> Params:
        return jax.tree.map(jnp.negative, jax.grad(risk)(point))

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return odeint(velocity, params, times, risk, rtol=tolerance, atol=tolerance)


def smoothed(iterates: Params) -> Params:
    """(w_t + 2 w_t+1 + w_t+2) / 4 of iterates with a leading axis (t,), two shorter: w_t + (-1)^t d without its d."""
    return jax.tree.map(lambda w: (w[:-2] + 2 * w[1:-1] + w[2:]) / 4, iterates)


def hessian_gradients(risk: Objective, params: Params, vectors: Float[Array, "k n"]) -> Float[Array, "m n"]:
    """Gradients in the parameters of <U E U^T, H(w)>, U the columns `vectors` held fixed, for each E of the basis of
    symmetric k x k matrices (`complementarity.basis`): third derivatives of the risk. Pure; for jitted code."""
    flat, unravel = ravel_pytree(params)
    scalar = lambda point: risk(unravel(point))  # noqa: E731

    def curvature(point: Array, left: Array, right: Array) -> Array:
        slope = lambda point: jax.jvp(scalar, (point,), (left,))[1]  # noqa: E731
        return jax.jvp(slope, (point,), (right,))[1]

    count = vectors.shape[0]
    pairs = [(i, j) for i in range(count) for j in range(i, count)]
    left, right = (vectors[jnp.array(side)] for side in zip(*pairs, strict=True))
    # <E, M> = sqrt 2 M_ij for the symmetrised off-diagonal element E of norm 1
    weights = jnp.array([1.0 if i == j else 2**0.5 for i, j in pairs], flat.dtype)
    gradients = jax.lax.map(lambda pair: jax.grad(curvature)(flat, *pair), (left, right))
    return weights[:, None] * gradients


class FlowState(NamedTuple):
    """Where a central flow stands: parameters, second moment (ones without preconditioning), and the highest
    eigenvectors (k, n) of the preconditioned Hessian, for a warm start."""

    params: Params
    second_moment: Params
    vectors: Float[Array, "k n"]


class CentralFlow(NamedTuple):
    """A central flow at steps 0, every, 2 every, ...: leading axis (r,) in all.

    Attributes:
        params: the time-averaged iterate w.
        second_moment: nu of RMSProp at the same times (ones for gradient descent).
        loss: risk(w).
        predicted_loss: risk(w) + <Sigma, H> / 2, the mean loss of the oscillating optimizer.
        sharpness: (r, k) highest eigenvalues of P^-1/2 H P^-1/2, ascending; the edge is 2 / learning rate.
        variance: (r, k) eigenvalues of X, the covariance of the oscillation among those eigenvectors.
        residual: of the complementarity problem, the largest since the last record.
    """

    params: Params
    second_moment: Params
    loss: Float[Array, " r"]
    predicted_loss: Float[Array, " r"]
    sharpness: Float[Array, "r k"]
    variance: Float[Array, "r k"]
    residual: Float[Array, " r"]

    @whatever_it_holds
    def __repr__(self) -> str:
        """How many times, with what at its end."""
        return line("CentralFlow", times=len(self.loss), last_loss=self.loss[-1], params=parameters(self.params))


def central_flow(
    risk: Objective,
    params: Params,
    rule: UpdateRule,
    key: PRNGKey,
    *,
    steps: int,
    every: int = 1,
    second_moment: Params | None = None,
    count: int = 2,
    substeps: int = 4,
) -> CentralFlow:
    """The flow that gradient descent or RMSProp follows on average, through the edge of stability.

    Cohen, Damian, Talwalkar, Kolter, Lee (arXiv 2410.24206). At the edge the optimizer oscillates along the highest
    eigenvectors U of P^-1 H with covariance Sigma = U X U^T, which acts on the mean through the third derivative:

        dw/dt = -eta P^-1 [grad L + grad <Sigma, H> / 2]
        dnu/dt = (1 - b2) / b2 [grad L^2 + diag(H Sigma H) - nu],   P = sqrt(nu) + eps     (RMSProp; else P = 1)

    with X the one positive semidefinite matrix that keeps P^-1/2 H P^-1/2 <= 2 / eta and acts only there: a
    complementarity problem (`complementarity`). Euler steps of 1 / `substeps` of an optimizer step; the constraint is
    imposed at the end of each, so that errors do not add up.

    Args:
        risk: the objective, full batch.
        params: where to start.
        rule: of gradient descent or RMSProp (`rules.update_rule`), with a number for its learning rate eta.
        key: for the first eigenvectors.
        steps: optimizer steps to follow, a multiple of `every`.
        every: record the flow so often.
        second_moment: nu of RMSProp to start from, after the step as its state holds it (`rule.moments`).
        count: how many eigenvalues k may reach the edge; the lowest recorded should stay below it.
        substeps: at least 2: a whole Euler step would itself oscillate at the edge.

    Raises `ValueError` for steps that `every` does not divide, fewer than two substeps, a rule whose central flow is
    not known, or a second moment that is missing, negative or of another structure; `ArithmeticError` where the flow
    leaves the finite numbers.
    """
    check_intervals(steps, every)
    check_positive(count=count, substeps=substeps)
    check_objective(risk, params)
    if substeps < 2:
        raise ValueError(f"substeps is {substeps}; expected at least 2, for a stable integration at the edge.")
    _check_averaged(rule)
    _check_second_moment(rule, second_moment, params)
    moment = jax.tree.map(jnp.ones_like, params) if second_moment is None else second_moment
    flow = _central_flow(risk, params, moment, key, rule, count, steps, every, substeps)
    check_finite_flow("central flow", risk, flow.params, flow, range(0, steps + 1, every), "step")
    return flow


def _check_averaged(rule: UpdateRule) -> None:
    if not rule.averaged:
        known = ", ".join(name for name, row in RULES.items() if row.averaged)
        raise ValueError(
            f"rule is {rule.name}, whose central flow is not known, as of no rule with momentum or decay; expected one "
            f"of {known}. Follow Adam by rods.rod_flow."
        )
    constant_rate(rule)
    if getattr(rule, "eps_in_sqrt", False):
        raise ValueError("eps_in_sqrt is True; the central flow is derived for P = sqrt(nu) + eps: expected False.")
    if rule.second_decay == 0:
        raise ValueError("b2 is 0; expected a number above 0: the central flow has the rate (1 - b2) / b2.")


def _check_second_moment(rule: UpdateRule, second_moment: Params | None, params: Params) -> None:
    if (rule.second_moment is None) != (second_moment is None):
        given = "given" if second_moment is not None else "missing"
        raise ValueError(
            f"second_moment is {given} and rule is {rule.name}; expected one with rmsprop, where the flow starts from "
            "it, and none with gd."
        )
    if second_moment is None:
        return
    check_same_structure("second_moment", second_moment, params)
    check_finite("second_moment", second_moment)
    if is_concrete(second_moment) and lowest(second_moment) < 0:
        raise ValueError("second_moment has a negative entry; expected the mean square of gradients.")


@partial(jax.jit, static_argnames=("rule", "count", "steps", "every", "substeps"))
def _central_flow(
    risk: Objective,
    params: Params,
    moment: Params,
    key: PRNGKey,
    rule: UpdateRule,
    count: int,
    steps: int,
    every: int,
    substeps: int,
) -> CentralFlow:
    operator = precondition(hessian(risk, params), rule.denominator(moment, jnp.array(0)))
    pairs = cold_top_pairs(operator.flat_mv, operator.dimension, count, key, ravel(params).dtype)
    # twice more, to the accuracy that a warm start has everywhere else
    state = FlowState(params, moment, warm_top_pairs(operator.flat_mv, pairs.vectors, 2).vectors)

    return _follow(partial(_substep, risk, rule, 1 / substeps), state, every * substeps, steps // every)


def _follow(
    substep: Callable[[FlowState], tuple[FlowState, CentralFlow]], state: FlowState, substeps: int, intervals: int
) -> CentralFlow:
    """Intervals of so many substeps, and one substep more, which measures the end: so the edge, by far the most of the
    program, is compiled once."""
    shape = jax.eval_shape(substep, state)[1]

    def interval(state: FlowState, length: Array) -> tuple[FlowState, tuple[CentralFlow, Array]]:
        def body(number: Array, carry: tuple) -> tuple:
            state, first, worst = carry
            state, now = substep(state)
            first = jax.tree.map(lambda old, new: jnp.where(number == 0, new, old), first, now)
            return state, first, jnp.maximum(worst, now.residual)

        empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shape)
        state, first, worst = jax.lax.fori_loop(0, length, body, (state, empty, empty.residual))
        return state, (first, worst)

    lengths = jnp.append(jnp.full(intervals, substeps), 1)
    _, (path, worst) = jax.lax.scan(interval, state, lengths)
    return path._replace(residual=jnp.append(jnp.zeros_like(worst[:1]), worst[:-1]))  # of the interval before


class _Edge(NamedTuple):
    """All that a substep needs at one point, flat: gradient, P, nu, eigenpairs, third derivatives, and X."""

    gradient: Float[Array, " n"]
    diagonal: Float[Array, " n"]
    moment: Float[Array, " n"]
    pairs: TopPairs
    directions: Float[Array, "k n"]
    slopes: Float[Array, "m n"]
    matrix: Float[Array, "k k"]
    residual: Float[Array, ""]


def _edge(risk: Objective, rule: UpdateRule, duration: float, state: FlowState) -> _Edge:
    eta = constant_rate(rule)
    preconditioner = rule.denominator(state.second_moment, jnp.array(0))
    operator = precondition(hessian(risk, state.params), preconditioner)
    pairs = warm_top_pairs(operator.flat_mv, state.vectors)
    diagonal, moment = ravel(preconditioner), ravel(state.second_moment)
    directions = pairs.vectors * jax.lax.rsqrt(diagonal)[None, :]  # U, with U^T P U = 1
    gradient = ravel(jax.grad(risk)(state.params))
    slopes = hessian_gradients(risk, state.params, directions)
    # d/dt (U^T (2/eta P - H) U) = eta (A + B[X]), from dw/dt and (RMSProp) dnu/dt
    offset = slopes @ (gradient / diagonal)
    strength = slopes @ (slopes / diagonal[None, :]).T / 2
    matrices = jnp.asarray(basis(pairs.values.size), gradient.dtype)
    if rule.second_decay is not None:
        speed = (1 - rule.second_decay) / rule.second_decay
        squares = jnp.einsum("aij,ip,jp->ap", matrices, directions, directions)
        # 2/eta dP/dt = (1/eta) nu^-1/2 dnu/dt; at the edge H U = 2/eta P U: diag(H Sigma H) = (4/eta^2) P^2 diag(Sigma)
        # where nu is zero so are all gradients until now, and P stands still
        weights = jnp.where(moment > 0, speed / (eta**2 * jnp.sqrt(jnp.where(moment > 0, moment, 1))), 0)
        offset = offset + squares @ (weights * (gradient**2 - moment))
        strength = strength + 4 / eta**2 * (squares * (weights * diagonal**2)[None, :]) @ squares.T
    # at the end of the substep: (2/eta - values) + duration eta (A + B[X]) >= 0
    room = jnp.einsum("aii,i->a", matrices, rule.edge(eta) - pairs.values)
    solution = solve_complementarity(offset + room / (eta * duration), strength)
    return _Edge(gradient, diagonal, moment, pairs, directions, slopes, solution.matrix, solution.residual)


def _substep(risk: Objective, rule: UpdateRule, duration: float, state: FlowState) -> tuple[FlowState, CentralFlow]:
    """One Euler step, and what there is to record where it starts."""
    eta = constant_rate(rule)
    edge = _edge(risk, rule, duration, state)
    unravel = ravel_pytree(state.params)[1]
    matrices = jnp.asarray(basis(edge.pairs.values.size), edge.gradient.dtype)
    push = jnp.einsum("aij,ij->a", matrices, edge.matrix) @ edge.slopes / 2
    point, none = ravel(state.params), jnp.zeros_like(push)
    velocity, _ = rule.drift(eta, point, none, edge.gradient + push, edge.diagonal)
    moment = edge.moment
    if rule.second_decay is not None:
        spread = jnp.einsum("ip,ij,jp->p", edge.directions, edge.matrix, edge.directions)  # diag(Sigma)
        target = edge.gradient**2 + 4 / eta**2 * edge.diagonal**2 * spread
        b2 = rule.second_decay  # exact over the substep for a constant target
        moment = target + (moment - target) * jnp.exp(jnp.asarray(-duration * (1 - b2) / b2, moment.dtype))
    params = unravel(point + duration * velocity)
    return FlowState(params, unravel(moment), edge.pairs.vectors), _record(risk, state, edge)


def _record(risk: Objective, state: FlowState, edge: _Edge) -> CentralFlow:
    loss, oscillation = risk(state.params), jnp.sum(edge.pairs.values * jnp.diag(edge.matrix)) / 2  # <Sigma, H> / 2
    variance = jnp.linalg.eigvalsh(edge.matrix)
    return CentralFlow(
        state.params, state.second_moment, loss, loss + oscillation, edge.pairs.values, variance, edge.residual
    )
