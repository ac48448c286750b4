"""The localised posterior that chains sample, and one step of a chain: Langevin or Hamiltonian, adjusted or not."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from attnlab.objectives import Objective, Risk
from attnlab.types import Params, PRNGKey, Scalar


@dataclass(frozen=True)
class Sampler:
    """One way to move a chain: `leapfrogs` steps of Hamilton's equations from a fresh momentum, accepted or not.

    One leapfrog step is the step of Langevin dynamics, w' = w - e^2/2 P grad U + e P^{1/2} noise.

    Attributes:
        leapfrogs: gradients between two momenta.
        adjusted: whether a Metropolis test makes the posterior exact.
        preconditioned: whether P = 1 / sqrt(mean squared gradient), learned in the burn-in and held from then on
            (with a P that goes on changing, Li et al., arXiv 1512.07666, the chain has another stationary law).
        controlled: whether the gradient of a minibatch is corrected by its gradient at w* (see `evaluate`): twice the
            cost, and less noise the nearer w*.
        target: acceptance that the burn-in tunes the step to; of a sampler that is not adjusted, the share of the
            kinetic energy that its finite step adds (see `Record.dissipation`).
    """

    leapfrogs: int = 1
    adjusted: bool = False
    preconditioned: bool = False
    controlled: bool = False
    target: float = 0.03


SAMPLERS: dict[str, Sampler] = {
    "sgld": Sampler(),
    "controlled_sgld": Sampler(controlled=True),
    "rmsprop_sgld": Sampler(preconditioned=True),
    "mala": Sampler(adjusted=True, target=0.6),
    "hmc": Sampler(leapfrogs=8, adjusted=True, target=0.8),
}
"""Samplers by name. The Langevin ones take minibatches; the last two, whose posterior is exact, need all data."""


SHORTEST = 0.03
"""Of the step: where moves are tested, each takes a step between this share of it and all of it, uniform in
logarithm."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Posterior:
    """p(w) ~ exp(-scale (L(w) - L(w*)) - localization/2 ||w - w*||^2), w a flat vector.

    Attributes:
        risk: L.
        params: w*.
        baseline: L(w*).
        slope: grad L(w*), flat.
        examples: l_i(w*), the losses of all examples there; empty where there are none.
        scale: n beta.
        localization: gamma.
    """

    risk: Risk
    params: Params
    baseline: Scalar
    slope: Float[Array, " d"]
    examples: Float[Array, " n"]
    scale: Scalar
    localization: Scalar


class Point(NamedTuple):
    """Where a chain is: `offset` w - w*, `excess` L(w) - L(w*), and `gradient` of the excess; of a minibatch both are
    unbiased estimates."""

    offset: Float[Array, " d"]
    excess: Scalar
    gradient: Float[Array, " d"]


class Record(NamedTuple):
    """What is kept of a point of a chain.

    Attributes:
        excess: L(w) - L(w*).
        distance: ||w - w*||^2.
        slope: <grad L(w*), w - w*>.
        virial: n beta <w - w*, grad L>.
        dissipation: e^2/4 <grad U, P n beta grad L>. For a stationary Langevin chain with unadjusted steps e, E<w - w*,
            P^{-1} (w' - w)> gives E<w - w*, grad U> = d + e^2/4 E<grad U, P grad U>: the last term is what the
            step, and the noise of minibatches, add to twice the energy.
        acceptance: probability that the move from here is accepted.
    """

    excess: Array
    distance: Array
    slope: Array
    virial: Array
    dissipation: Array
    acceptance: Array


def evaluate(
    posterior: Posterior, offset: Float[Array, " d"], key: PRNGKey, batch: int | None, controlled: bool = False
) -> Point:
    """The point at an offset; with `batch`, from that many examples drawn with replacement.

    The excess of a batch is the mean of l_i(w) - l_i(w*) over its own examples, so that most of the noise of L_B
    cancels. With `controlled` so does that of the gradient: the excess is then L_B(w) - L_B(w*) - <grad L_B(w*) -
    grad L(w*), w - w*>, also unbiased, whose gradient is that of control variates (Baker et al., arXiv 1706.05439).
    """
    center, unravel = ravel_pytree(posterior.params)
    risk = posterior.risk
    if batch is None:
        excess, gradient = jax.value_and_grad(lambda offset: risk(unravel(center + offset)) - posterior.baseline)(
            offset
        )
        return Point(offset, excess, gradient)
    assert isinstance(risk, Objective)  # checked by who asks for minibatches
    count = jax.tree.leaves(risk.inputs)[0].shape[0]
    rows = jax.random.randint(key, (batch,), 0, count)
    part = risk.on(lambda leaf: leaf[rows])
    gradients = jax.value_and_grad(lambda offset: part(unravel(center + offset)))
    here, gradient = gradients(offset)
    if not controlled:
        return Point(offset, here - jnp.mean(posterior.examples[rows]), gradient)
    there, slope = gradients(jnp.zeros_like(offset))
    correction = posterior.slope - slope
    return Point(offset, here - there + correction @ offset, gradient + correction)


def force(posterior: Posterior, point: Point) -> Float[Array, " d"]:
    """grad U = n beta grad L + gamma (w - w*)."""
    return posterior.scale * point.gradient + posterior.localization * point.offset


def potential(posterior: Posterior, point: Point) -> Scalar:
    """U = n beta (L(w) - L(w*)) + gamma/2 ||w - w*||^2."""
    return posterior.scale * point.excess + posterior.localization / 2 * (point.offset @ point.offset)


def move(
    posterior: Posterior,
    sampler: Sampler,
    batch: int | None,
    point: Point,
    step: Scalar,
    scaling: Float[Array, " d"],
    adjust: Array,
    key: PRNGKey,
) -> tuple[Point, Record]:
    """One step from `point`, and the record of `point`; `scaling` is the diagonal of P. With `adjust` the Metropolis
    test decides, which refuses what is not finite too."""
    momentum_key, jitter_key, batch_key, accept_key = jax.random.split(key, 4)
    root = jnp.sqrt(scaling)
    if sampler.adjusted:  # where the valley is narrow only short steps are accepted, and where it is wide long ones mix
        step = step * jnp.exp(jax.random.uniform(jitter_key, (), step.dtype, jnp.log(SHORTEST), 0))
    momentum = jax.random.normal(momentum_key, point.offset.shape, point.offset.dtype)

    def leapfrog(carry: tuple[Point, Array], key: PRNGKey) -> tuple[tuple[Point, Array], None]:
        point, momentum = carry
        half = momentum - step / 2 * root * force(posterior, point)
        moved = evaluate(posterior, point.offset + step * root * half, key, batch, sampler.controlled)
        return (moved, half - step / 2 * root * force(posterior, moved)), None

    keys = jax.random.split(batch_key, sampler.leapfrogs)
    (moved, last), _ = jax.lax.scan(leapfrog, (point, momentum), keys)
    energies = [potential(posterior, p) + q @ q / 2 for p, q in ((point, momentum), (moved, last))]
    acceptance = jnp.exp(jnp.minimum(0, energies[0] - energies[1]))
    acceptance = jnp.where(jnp.isnan(acceptance), 0, acceptance)
    accepted = jnp.logical_not(adjust) | (jax.random.uniform(accept_key, (), step.dtype) < acceptance)
    pull = posterior.scale * point.gradient
    record = Record(
        point.excess,
        point.offset @ point.offset,
        posterior.slope @ point.offset,
        pull @ point.offset,
        step**2 / 4 * jnp.vdot(force(posterior, point), scaling * pull),
        acceptance,
    )
    return jax.tree.map(lambda new, old: jnp.where(accepted, new, old), moved, point), record
