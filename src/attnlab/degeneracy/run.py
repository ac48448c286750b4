"""Chains at one temperature or several, run in pieces: between two they save, report and look for divergence."""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Key

from attnlab.degeneracy.chains import BURN_IN, PIECES, ChainState, Piece, Plan, first_state, localised, run_piece
from attnlab.degeneracy.posterior import Posterior, Sampler
from attnlab.degeneracy.summary import Summary, summarise
from attnlab.local_devices import everywhere, local_sharding, together_again
from attnlab.runs.checkpoint import fingerprint
from attnlab.runs.progress import Clock
from attnlab.runs.session import Session, fold
from attnlab.types import PRNGKey


class DivergedChainError(ArithmeticError):
    """A chain left all finite numbers."""


posteriors_at = jax.jit(localised, static_argnames=("by_example",))
_BY_SCALE = Posterior(None, None, None, None, None, 0, None)  # type: ignore[arg-type]
"""What is mapped over: posteriors differ in their temperature alone."""


@jax.jit(static_argnames=("plan",))
def _first(posteriors: Posterior, keys: Key[Array, " T"], plan: Plan) -> ChainState:
    return jax.vmap(lambda posterior, key: first_state(posterior, plan, key), (_BY_SCALE, 0))(posteriors, keys)


@jax.jit(static_argnames=("plan",))
def _run(posteriors: Posterior, state: ChainState, plan: Plan) -> tuple[ChainState, Piece]:
    return jax.vmap(lambda posterior, state: run_piece(posterior, state, plan), (_BY_SCALE, 0))(posteriors, state)


@jax.jit(static_argnames=("sampler",))
def summaries_of(posteriors: Posterior, kept: Piece, shares: Float[Array, " n"], sampler: Sampler) -> Summary:
    """The summary of each temperature."""
    one = lambda posterior, kept: summarise(posterior, sampler, kept, shares)  # noqa: E731
    return jax.vmap(one, (_BY_SCALE, 1))(posteriors, kept)  # the pieces come first


def run_chains(posterior: Posterior, plan: Plan, key: PRNGKey, session: Session) -> list[Piece]:
    """All pieces, those of the burn-in first; saved and reported one by one."""
    session.check_one_by_one("chains, which run side by side anyway")
    total, temperatures = BURN_IN + PIECES, posterior.scale.shape[0]
    local = local_sharding(posterior, plan.chains)
    spread = posterior if local is None else everywhere(posterior, local)

    def chunks(state: ChainState) -> int | None:
        done = int(state.time[0]) // plan.length
        return done if done < total else None

    def advance(state: ChainState, number: int) -> tuple[ChainState, Piece]:
        state, piece = _run(spread, state if local is None else _by_chains(state, local), plan)
        _check_finite(state, piece, number, plan)
        return state, piece

    def watch(state: ChainState) -> Any:
        assert session.report is not None
        gradients = temperatures * plan.chains * plan.sampler.leapfrogs
        clock = Clock(session.report, int(state.time[0]) * gradients, total * plan.length * gradients)
        return lambda state: clock.tell(int(state.time[0]) * gradients)

    part = lambda state: _run(posterior, state, plan)[1]  # noqa: E731
    choices = np.frombuffer(repr(plan).encode(), np.uint8)
    with session.open(lambda: fingerprint((posterior, key, choices))) as running:
        fold(
            advance,
            lambda: _first(posterior, jax.random.split(key, temperatures), plan),
            chunks,
            running,
            part=part,
            watch=watch,
        )
        return list(running.parts) if local is None else together_again(list(running.parts), posterior)


def _by_chains(state: ChainState, sharding: NamedSharding) -> ChainState:
    """Each device has chains of its own; what tunes them all it has whole."""
    chains = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
    points = jax.device_put(state.points, chains)
    return ChainState(**{**everywhere(state._asdict(), sharding), "points": points})


def _check_finite(state: ChainState, piece: Piece, number: int, plan: Plan) -> None:
    finite = np.isfinite(np.asarray(piece.records.excess)).all(axis=2) & np.isfinite(state.points.offset).all(axis=2)
    if not finite.all():
        bad = ", ".join(str(chain) for _, chain in np.argwhere(~finite))
        raise DivergedChainError(
            f"chain {bad} of {plan.chains} is not finite within steps {number * plan.length} to "
            f"{(number + 1) * plan.length}, at the step {float(np.max(piece.step)):.3g}. Take a smaller step, a larger "
            "localization, or sampler='hmc', which refuses such moves."
        )
