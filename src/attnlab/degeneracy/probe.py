"""The local learning coefficient along training."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array

from attnlab.checks import check_number, check_whole
from attnlab.degeneracy.chains import BURN_IN, PIECES, Plan, first_state, localised, run_piece
from attnlab.degeneracy.estimate import plan_of
from attnlab.degeneracy.summary import summarise
from attnlab.objectives import Objective
from attnlab.training.probe import Probe, TrainingState
from attnlab.types import PRNGKey


@dataclass(frozen=True)
class _Coefficient:
    plan: Plan
    scale: float
    localization: float

    def __call__(
        self, risk: Objective, state: TrainingState, memory: tuple, key: PRNGKey
    ) -> tuple[dict[str, Array], tuple]:
        posterior = localised(risk, state.params, self.scale, self.localization)

        def piece(chains, _):
            return run_piece(posterior, chains, self.plan)

        _, pieces = jax.lax.scan(piece, first_state(posterior, self.plan, key), length=BURN_IN + PIECES)
        kept = jax.tree.map(lambda leaf: leaf[BURN_IN:], pieces)
        found = summarise(posterior, self.plan.sampler, kept, jnp.zeros(0, posterior.slope.dtype))
        error = jnp.hypot(found.sampling, jnp.hypot(found.baseline, found.discretisation / 2))
        values = {"value": found.value, "error": error, "rhat": found.rhat, "drift": found.drift}
        return values | {"baseline": found.baseline, "effective_size": found.effective_size}, memory


def learning_coefficient_probe(
    count: int,
    *,
    inverse_temperature: float | None = None,
    localization: float = 1.0,
    sampler: str = "hmc",
    chains: int = 4,
    steps: int = 512,
) -> Probe:
    """Probe: the local learning coefficient at the parameters of the moment, for n = `count` examples.

    Values: `value`, its `error` (of sampling, and what L(w*) lies above the minimum beside it, `baseline`), `rhat`,
    `drift`, `effective_size`, as in `learning_coefficient`. Away from a minimum it says how much lower the chains find
    it: a negative value is the mark of a saddle that they leave. Raises as `learning_coefficient` does.
    """
    check_whole(count=count)
    if count < 2:
        raise ValueError(f"count is {count}; expected n of at least 2 examples: beta is 1 / log n.")
    beta = 1 / math.log(count) if inverse_temperature is None else inverse_temperature
    check_number("inverse_temperature", beta, math.ulp(0.0), math.inf, "It is beta, 1 / log n by default.")
    check_number("localization", localization, math.ulp(0.0), math.inf, "It is gamma, of a proper prior.")
    return Probe(_Coefficient(plan_of(sampler, chains, steps), count * float(beta), float(localization)))
