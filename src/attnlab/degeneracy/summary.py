"""From the records of chains to a number and its error."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.degeneracy.chains import BURN_IN, Piece
from attnlab.degeneracy.diagnostics import effective_size, error_of_mean, split_rhat
from attnlab.degeneracy.posterior import Posterior, Record, Sampler
from attnlab.types import Scalar


class Summary(NamedTuple):
    """The coefficient and all that its error and its diagnostics are made of.

    Attributes:
        value: n beta E[L(w) - L(w*)], less what the finite step adds.
        sampling: standard error of the chains' mean.
        data: standard error because L(w) and L(w*) are means over the same n examples.
        baseline: n beta times what L(w*) lies above the minimum beside it.
        discretisation: what was taken off for the finite step.
        drift: change of the value when gamma grows by a factor e.
        rhat: split R-hat of the losses and of the distances, the larger one.
        effective_size: independent draws that the mean is worth.
        acceptance: mean probability of acceptance.
        step: of the sampler.
        losses: n beta (L(w) - L(w*)) of every draw, (chains, steps).
    """

    value: Scalar
    sampling: Scalar
    data: Scalar
    baseline: Scalar
    discretisation: Scalar
    drift: Scalar
    rhat: Scalar
    effective_size: Scalar
    acceptance: Scalar
    step: Scalar
    losses: Float[Array, "chains steps"]


def joined(pieces: list[Piece]) -> Piece:
    """The pieces that are kept, stacked along a first axis."""
    return jax.tree.map(lambda *parts: jnp.stack(parts), *pieces[BURN_IN:])


def summarise(posterior: Posterior, sampler: Sampler, kept: Piece, shares: Float[Array, " n"]) -> Summary:
    """The number and its errors, of pieces along the first axis; `shares` are those of the examples in the risk.

    The error has three parts, derived in `learning_coefficient`.
    """
    records = Record(*(jnp.concatenate(list(series), axis=1) for series in kept.records))
    energies = posterior.scale * records.excess
    added = jnp.zeros_like(posterior.scale)
    if not sampler.adjusted:
        added = jnp.mean(records.dissipation) / jnp.mean(records.virial)
    discretisation = added * jnp.mean(energies)
    centred = [series - jnp.mean(series) for series in (energies, records.distance)]
    drift = -posterior.localization / 2 * jnp.mean(centred[0] * centred[1])
    # To second order grad L(w*) = H (w* - minimum), and E[w] is the minimum: L(w*) is above it by half of that product.
    baseline = posterior.scale * jnp.abs(jnp.mean(records.slope)) / 2
    return Summary(
        jnp.mean(energies) - discretisation,
        error_of_mean(energies) * jnp.abs(1 - added),
        posterior.scale * _error_over_examples(kept.examples, shares),
        baseline,
        discretisation,
        drift,
        jnp.maximum(split_rhat(energies), split_rhat(records.distance)),
        effective_size(energies),
        jnp.mean(records.acceptance),
        jnp.mean(kept.step),
        energies,
    )


def _error_over_examples(excess: Float[Array, "pieces n"], shares: Float[Array, " n"]) -> Scalar:
    """Standard error of sum_i shares_i E[l_i(w) - l_i(w*)] over examples; zero where there are none."""
    if excess.shape[1] < 2:
        return jnp.zeros((), excess.dtype)
    means = jnp.mean(excess, axis=0)
    apart = means - jnp.vdot(shares, means)
    count = jnp.sum(shares > 0).astype(excess.dtype)
    return jnp.sqrt(jnp.sum((shares * apart) ** 2) * count / (count - 1))
