"""Chains side by side: a burn-in that tunes their common step, then pieces of equal length that are recorded."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from attnlab.degeneracy.posterior import Point, Posterior, Record, Sampler, evaluate, force, move
from attnlab.objectives import Objective, Risk, example_losses
from attnlab.trees import ravel
from attnlab.types import Params, PRNGKey, Real, Scalar

PIECES, BURN_IN = 32, 16
"""Pieces of the run that are kept, and pieces before them that tune the step and are left out."""

POWER_STEPS = 6
"""Hessian products for the scale of the first step."""


@dataclass(frozen=True)
class Plan:
    """What shapes a run: static, hashable.

    Attributes:
        sampler: how a chain moves.
        chains: how many.
        length: steps of a piece.
        batch: examples of a minibatch; None for all data.
        step: the step, held; None where the burn-in tunes it.
        by_example: whether each piece also measures the excess of every example.
    """

    sampler: Sampler
    chains: int
    length: int
    batch: int | None
    step: float | None
    by_example: bool


class ChainState(NamedTuple):
    """All that goes on from piece to piece: `points` have an axis of chains first, `squares` are mean squared
    forces."""

    time: Array
    points: Point
    log_step: Scalar
    squares: Float[Array, " d"]
    key: PRNGKey


class Piece(NamedTuple):
    """Of one piece: records (chains, length), the step, and the mean excess of every example over the chains at its end
    (empty if it was not asked for)."""

    records: Record
    step: Scalar
    examples: Float[Array, " n"]


def localised(risk: Risk, params: Params, scale: Real, localization: Real, *, by_example: bool = False) -> Posterior:
    """The posterior around `params` at n beta = `scale`; `by_example` with the loss of every example there."""
    baseline, gradient = jax.value_and_grad(risk)(params)
    slope = ravel(gradient)
    numbers = (jnp.asarray(number).astype(slope.dtype) for number in (scale, localization))
    examples = _losses(risk, params) if by_example else jnp.zeros(0, slope.dtype)
    return Posterior(risk, params, baseline, slope, examples, *numbers)


def _losses(risk: Risk, params: Params) -> Float[Array, " n"]:
    assert isinstance(risk, Objective)  # checked by who asks for them
    return example_losses(risk, risk.outputs(params))[0]


def first_state(posterior: Posterior, plan: Plan, key: PRNGKey) -> ChainState:
    """All chains at w*; a step of a tenth of the fastest oscillation there, where it is not given."""
    size = posterior.slope.shape[0]
    zero = jnp.zeros((plan.chains, size), posterior.slope.dtype)
    start = Point(zero, zero[:, 0], jnp.broadcast_to(posterior.slope, zero.shape))
    step_key, key = jax.random.split(key)
    step = 0.1 / jnp.sqrt(_stiffness(posterior, step_key)) if plan.step is None else jnp.asarray(plan.step, zero.dtype)
    return ChainState(jnp.array(0), start, jnp.log(step), jnp.ones_like(posterior.slope), key)


def _stiffness(posterior: Posterior, key: PRNGKey) -> Scalar:
    """About the largest eigenvalue of the Hessian of U at w*, by the power method; at least gamma."""

    def product(vector: Array) -> Array:
        gradient = lambda offset: force(posterior, evaluate(posterior, offset, key, None))  # noqa: E731
        return jax.jvp(gradient, (jnp.zeros_like(vector),), (vector,))[1]

    def power(_: Array, vector: Array) -> Array:
        image = product(vector / jnp.linalg.norm(vector))
        return jnp.where(jnp.linalg.norm(image) > 0, image, vector)

    start = jax.random.normal(key, posterior.slope.shape, posterior.slope.dtype)
    largest = jnp.linalg.norm(jax.lax.fori_loop(0, POWER_STEPS, power, start))
    least = jnp.maximum(posterior.localization, jnp.finfo(start.dtype).tiny)
    return jnp.maximum(largest, least)


def run_piece(posterior: Posterior, state: ChainState, plan: Plan) -> tuple[ChainState, Piece]:
    """`plan.length` steps of every chain."""
    state, records = jax.lax.scan(lambda state, _: _step(posterior, state, plan), state, length=plan.length)
    examples = _by_example(posterior, state.points.offset) if plan.by_example else jnp.zeros(0, state.squares.dtype)
    records = Record(*(jnp.swapaxes(series, 0, 1) for series in records))
    return state, Piece(records, jnp.exp(state.log_step), examples)


def _step(posterior: Posterior, state: ChainState, plan: Plan) -> tuple[ChainState, Record]:
    sampler, tuning = plan.sampler, state.time < BURN_IN * plan.length
    scaling = jnp.ones_like(state.squares)
    if sampler.preconditioned:
        scaling = 1 / jnp.sqrt(state.squares)
        scaling = scaling / jnp.mean(scaling)
    # Until the step is tuned an unadjusted chain could fly off: it is adjusted too, where that is exact.
    adjust = jnp.asarray(sampler.adjusted) | (tuning & (plan.batch is None))
    keys = jax.random.split(jax.random.fold_in(state.key, state.time), plan.chains)
    step = jnp.exp(state.log_step)
    moved = partial(move, posterior, sampler, plan.batch)
    points, records = jax.vmap(moved, (0, None, None, None, 0))(state.points, step, scaling, adjust, keys)
    log_step, newest = state.log_step, state.squares
    if plan.step is None or sampler.preconditioned:
        squares = jnp.mean(jax.vmap(partial(force, posterior))(state.points) ** 2, axis=0)
        pace = (state.time + 1).astype(step.dtype)
        newest = jnp.where(tuning, newest + (squares - newest) / jnp.minimum(pace + 1, 200), newest)
    if plan.step is None:
        error = _tuning_error(plan, records, step**2 / 4 * jnp.mean(scaling * squares))
        log_step = jnp.where(tuning, log_step + error / pace**0.6, log_step)
    return ChainState(state.time + 1, points, log_step, newest, state.key), records


def _tuning_error(plan: Plan, records: Record, share: Scalar) -> Scalar:
    """What the logarithm of the step moves by: above zero where the step may grow."""
    acceptance = jnp.mean(records.acceptance)
    if plan.sampler.adjusted:
        return acceptance - plan.sampler.target
    error = jnp.clip(1 - share / plan.sampler.target, -1, 1) / 2
    # Chains whose moves are all refused stay where the force is small, and their share says nothing.
    return error if plan.batch is not None else jnp.where(acceptance < 0.5, -0.5, error)


def _by_example(posterior: Posterior, offsets: Float[Array, "chains d"]) -> Float[Array, " n"]:
    """The mean over the chains of the excess of every example."""
    center, unravel = ravel_pytree(posterior.params)
    losses = jax.lax.map(lambda offset: _losses(posterior.risk, unravel(center + offset)), offsets)
    return jnp.mean(losses, axis=0) - posterior.examples
