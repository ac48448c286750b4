"""The local learning coefficient of a minimum, with its error bar and what tells whether to trust it."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnlab.checks import check_key, check_number, check_whole, unknown_name
from attnlab.degeneracy.chains import PIECES, Plan
from attnlab.degeneracy.posterior import SAMPLERS
from attnlab.degeneracy.run import posteriors_at, run_chains, summaries_of
from attnlab.degeneracy.summary import Summary, joined
from attnlab.objectives import BatchedObjective, Objective, Risk, check_objective, example_losses, known_loss
from attnlab.runs.session import AT_ONCE, Session
from attnlab.statistics import Estimate
from attnlab.types import Params, PRNGKey, Real

FEWEST_STEPS = 2 * PIECES
LARGEST_RHAT, FEWEST_DRAWS, LOWEST_ACCEPTANCE, HIGHEST_ACCEPTANCE = 1.05, 50, 0.1, 0.995
LARGEST_STEP_SHARE = 0.3
"""Of the value, taken off for the finite step: beyond it the first order is not enough."""


class LearningCoefficientWarning(UserWarning):
    """The chains say that the value should not be trusted as it stands."""


@dataclass(frozen=True)
class LearningCoefficient:
    """What `learning_coefficient` found.

    Attributes:
        estimate: the coefficient with its standard error, and in `bound` what it may be off by beside chance.
        count: n.
        inverse_temperature: beta.
        localization: gamma.
        sampler: its name.
        rhat: split R-hat of the losses and of the distances from w* along the chains, the larger one; 1 where they
        agree. effective_size: independent draws that the chains are worth.
        acceptance: mean probability that a move is accepted (of a sampler that does not ask: would be; of minibatches,
            by their own noisy energies).
        drift: change of the value when gamma grows by a factor e, -gamma/2 Cov(n beta L, ||w - w*||^2).
        summary: the parts of the error, the step, and the losses of all draws.
    """

    estimate: Estimate
    count: int
    inverse_temperature: float
    localization: float
    sampler: str
    rhat: float
    effective_size: float
    acceptance: float
    drift: float
    summary: Summary = field(repr=False)

    @property
    def value(self) -> float:
        """The coefficient."""
        return float(self.estimate.value)

    @property
    def error(self) -> float:
        """Standard error and bound, joined as the sides of a right angle."""
        return float(self.estimate.error)

    def __repr__(self) -> str:
        return (
            f"LearningCoefficient({self.value:.4g} ± {self.error:.2g}, rhat {self.rhat:.3f}, "
            f"{self.effective_size:.0f} effective draws, acceptance {self.acceptance:.2f})"
        )


def learning_coefficient(
    risk: Risk,
    params: Params,
    key: PRNGKey,
    *,
    count: int | None = None,
    inverse_temperature: Real | None = None,
    localization: Real = 1.0,
    sampler: str = "hmc",
    batch: int | None = None,
    step: float | None = None,
    chains: int = 4,
    steps: int = 2048,
    session: Session = AT_ONCE,
) -> LearningCoefficient:
    """lambda = n beta (E_w[L(w)] - L(w*)), w ~ exp(-n beta L(w) - gamma/2 ||w - w*||^2), at w* = `params`.

    Lau, Furman, Wang, Murfet, Wei, arXiv 2308.12108, after Watanabe (2013), arXiv 1208.6338: half the number of
    parameters at a regular minimum, less where it is degenerate. L is the mean negative log-likelihood of an example
    up to a factor, which does not matter in the limit of large n.

    The error bar. The *standard error* joins two. One is that of the chains' mean, from the effective number of draws.
    The other is that of the data: L(w) and L(w*) are means over the same n examples, so what another sample would
    change is not the error of L(w*) alone, which is far larger, but that of the paired differences E_w[l_i(w)] -
    l_i(w*): n beta times their standard deviation over sqrt(n). It is of the order of sqrt(2 lambda beta) at most, and
    with a population risk (`count` given) zero. The *bound* joins two as well: n beta times what L(w*) lies above the
    minimum beside it, -<grad L(w*), E[w] - w*> / 2 to second order, which is about beta times a chi-squared half where
    w* is the truth rather than the minimiser of L; and half of what was taken off for the step of a sampler that is
    not adjusted. That is the share E<grad U, P grad L> e^2 / 4 over E<w - w*, grad L>, exact for quadratic and
    homogeneous losses.

    The chains start at w*. They run 1.5 times `steps`, the first third of which tunes the step and is left out.

    Args:
        risk: L. Without `count` a mean over examples, the first axis of inputs and targets.
        params: w*, a minimum of L.
        key: for the chains.
        count: n, for a risk that is no mean over examples in memory: a population risk, or one in batches.
        inverse_temperature: beta; 1 / log n if it is left out.
        localization: gamma.
        sampler: a row of `attnlab.degeneracy.posterior.SAMPLERS`.
        batch: examples of a minibatch, drawn with replacement; of the samplers without a test of acceptance.
        step: e, held; tuned if it is left out.
        chains: how many run side by side.
        steps: that are kept of each chain, rounded up to a multiple of 32.
        session: where the run saves and reports; a run that was killed goes on with the same numbers.

    Raises `DivergedChainError` where a chain is no longer finite; `ValueError` or `TypeError` for a temperature or a
    localization that is not positive, n < 2, no chains, too few steps, an unknown sampler, minibatches where there are
    none. Warns (`LearningCoefficientWarning`) where chains differ, mix slowly, reject nearly all or nothing, the value
    is negative, is made by gamma, or by the step.

    Example:
        >>> import attnlab as al
        >>> import jax, jax.numpy as jnp
        >>> inputs = jax.random.normal(jax.random.key(0), (500, 3))
        >>> risk = al.objective(lambda w, x: x @ w, al.square_loss, inputs, inputs @ jnp.ones(3))
        >>> found = al.learning_coefficient(risk, jnp.ones(3), jax.random.key(1))
        >>> abs(found.value - 1.5) < 3 * found.error  # half of three parameters
        True
    """
    betas = None if inverse_temperature is None else (inverse_temperature,)
    how: dict[str, Any] = {"sampler": sampler, "batch": batch, "step": step, "chains": chains, "steps": steps}
    how |= {"count": count, "localization": localization, "session": session}
    (found,) = _sampled(risk, params, key, betas, **how)
    return found


def at_temperatures(
    risk: Risk, params: Params, key: PRNGKey, inverse_temperatures: Sequence[Real], **options: Any
) -> list[LearningCoefficient]:
    """`learning_coefficient` at each of these beta, all chains of all of them side by side.

    Where beta is right for n the value does not depend on it: it falls at small beta, where the chains feel the
    localization, and keeps the logarithmic correction of degenerate minima. The `options` are those of
    `learning_coefficient`. Raises as it does, and `ValueError` for no temperature.
    """
    if not len(inverse_temperatures):
        raise ValueError("inverse_temperatures is empty; expected one or more numbers beta, about 1 / log n.")
    return _sampled(risk, params, key, tuple(inverse_temperatures), **options)


def _sampled(
    risk: Risk,
    params: Params,
    key: PRNGKey,
    betas: tuple[Real, ...] | None,
    *,
    count: int | None = None,
    localization: Real = 1.0,
    sampler: str = "hmc",
    batch: int | None = None,
    step: float | None = None,
    chains: int = 4,
    steps: int = 2048,
    session: Session = AT_ONCE,
) -> list[LearningCoefficient]:
    check_key(key)
    if not isinstance(risk, Objective | BatchedObjective):
        raise TypeError(f"risk is a {type(risk).__name__}; expected an Objective: objective(predict, loss, ...).")
    check_objective(risk, params)
    plan = plan_of(sampler, chains, steps, batch, step, by_example=count is None)
    number, shares = _examples(risk, params, count)
    betas = (1 / math.log(number),) if betas is None else betas
    for beta in betas:
        check_number("inverse_temperature", beta, np.nextafter(0, 1), np.inf, "It is beta, 1 / log n by default.")
    check_number("localization", localization, np.nextafter(0, 1), np.inf, "It is gamma, of a proper prior.")
    _check_batch(risk, plan, number)
    scales = jnp.asarray([number * float(beta) for beta in betas])
    posteriors = posteriors_at(risk, params, scales, localization, by_example=plan.by_example)
    summaries = summaries_of(posteriors, joined(run_chains(posteriors, plan, key, session)), shares, plan.sampler)
    found = []
    for place, beta in enumerate(betas):
        summary = jax.tree.map(lambda leaf, place=place: leaf[place], summaries)
        found.append(_result(summary, number, float(beta), float(localization), sampler))
        _warn(found[-1], plan)
    return found


def plan_of(
    sampler: str,
    chains: int,
    steps: int,
    batch: int | None = None,
    step: float | None = None,
    *,
    by_example: bool = False,
) -> Plan:
    """The plan of a run; raises for arguments that are none."""
    if sampler not in SAMPLERS:
        raise unknown_name("sampler", sampler, SAMPLERS)
    check_whole(chains=chains, steps=steps)
    if chains < 2:
        raise ValueError(f"chains is {chains}; expected at least 2, to see whether they agree.")
    if steps < FEWEST_STEPS:
        raise ValueError(f"steps is {steps}; expected at least {FEWEST_STEPS}, for an error. Hundreds are usual.")
    if step is not None:
        check_number("step", step, np.nextafter(0, 1), np.inf, "Leave it out, and the burn-in tunes it.")
    if batch is not None:
        check_whole(batch=batch)
        if SAMPLERS[sampler].adjusted:
            raise ValueError(
                f"batch is {batch} with the sampler '{sampler}', whose test of acceptance needs the risk of all data; "
                "expected None. Leave it out, or take 'sgld'."
            )
    return Plan(SAMPLERS[sampler], chains, -(-steps // PIECES), batch, step, by_example)


def _examples(risk: Risk, params: Params, count: int | None) -> tuple[int, Float[Array, " n"]]:
    """n, and the share of each example in the risk (none with `count`)."""
    if count is not None:
        check_whole(count=count)
        number, shares = count, jnp.zeros(0)
    elif isinstance(risk, BatchedObjective):
        raise ValueError(
            "count is None and the risk is a BatchedObjective, whose examples are not in memory; expected n, the "
            "number of examples. Pass count=n."
        )
    else:
        shares = _shares(risk, params)
        number = int(jnp.sum(shares > 0))
    if number < 2:
        raise ValueError(f"count is {number}; expected n of at least 2 examples: beta is 1 / log n.")
    return number, shares


def _shares(risk: Objective, params: Params) -> Float[Array, " n"]:
    try:
        return jax.jit(lambda risk, params: example_losses(risk, risk.outputs(params))[1])(risk, params)
    except ValueError as error:
        raise ValueError(
            f"count is None, and the risk is no mean over examples: {error} Of a population risk pass count=n."
        ) from error


def _check_batch(risk: Risk, plan: Plan, number: int) -> None:
    if plan.batch is None:
        return
    weighed = not isinstance(risk, Objective) or risk.weights is not None
    loss = None if weighed else known_loss(risk.loss)
    if not plan.by_example or weighed or (loss is not None and loss.ignored is not None):
        raise ValueError(
            f"batch is {plan.batch}, and the risk has weights, ignored labels or no examples: a batch's mean over "
            "its own positions is then no fair estimate of it. Expected None: leave batch out."
        )
    if plan.batch > number:
        raise ValueError(
            f"batch is {plan.batch}; expected at most the {number} examples. Leave it out for all of them."
        )


def _result(summary: Summary, count: int, beta: float, localization: float, sampler: str) -> LearningCoefficient:
    error = jnp.hypot(summary.sampling, summary.data)
    bound = jnp.hypot(summary.baseline, summary.discretisation / 2)
    size = float(summary.effective_size)
    estimate = Estimate(summary.value, error, max(int(size), 2), bound)
    return LearningCoefficient(
        estimate,
        count,
        beta,
        localization,
        sampler,
        rhat=float(summary.rhat),
        effective_size=size,
        acceptance=float(summary.acceptance),
        drift=float(summary.drift),
        summary=summary,
    )


def _warn(found: LearningCoefficient, plan: Plan) -> None:
    """A warning for each reason not to trust the value."""
    value, acceptance, adjusted = found.value, found.acceptance, plan.sampler.adjusted
    baseline, taken_off = float(found.summary.baseline), float(found.summary.discretisation)
    noise = 3 * max(found.error, 0.02 * abs(value))
    reasons = (
        (found.rhat > LARGEST_RHAT, f"R-hat is {found.rhat:.3f}: the chains differ. Run more steps"),
        (found.effective_size < FEWEST_DRAWS, f"of {found.effective_size:.0f} effective draws. Run more steps"),
        (value < 0, f"the value is {value:.3g}, negative: the chains found lower points than the parameters"),
        (abs(found.drift) > noise, f"a gamma larger by a factor e changes it by {found.drift:.2g}. Vary localization"),
        (
            taken_off > LARGEST_STEP_SHARE * abs(value),
            f"{taken_off:.2g} was taken off for the step. Shorten it",
        ),
        (baseline > 0.1 * abs(value), f"L(w*) is not the least beside it, which adds {baseline:.2g}. Train on"),
        (adjusted and acceptance < LOWEST_ACCEPTANCE, f"acceptance is {acceptance:.3f}: the step is too large"),
        (adjusted and acceptance > HIGHEST_ACCEPTANCE, f"acceptance is {acceptance:.3f}: the step is too small"),
    )
    for holds, reason in reasons:
        if holds:
            message = f"the learning coefficient {value:.4g} ± {found.error:.2g} is not to be trusted: {reason}."
            warnings.warn(message, LearningCoefficientWarning, stacklevel=4)
