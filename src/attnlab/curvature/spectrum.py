"""Extreme eigenpairs of operators, with residual bounds."""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnlab.checks import check_integer, check_number, check_range, is_concrete, unknown_name
from attnlab.curvature.density import SpectralDensity, spectral_density
from attnlab.curvature.long_runs import (
    Clock,
    Report,
    begin_session,
    check_memory,
    check_operator_and_key,
    check_symmetric,
    non_finite,
    open_checkpoint,
    owning_directory,
    write_result,
)
from attnlab.curvature.operators import Operator
from attnlab.curvature.restarts import (
    MISSED,
    Restarted,
    RestartPlan,
    RitzPairs,
    first_state,
    plan_restarts,
    restart_cycle,
    thick_restart,
    wanted_pairs,
)
from attnlab.trees import power_of_two
from attnlab.types import Params, PRNGKey

__all__ = ["Eigenpairs", "SpectralDensity", "eigenpairs", "spectral_density"]

REPORT_EVERY = 8
"""Products between two reports at least."""

DENSE_DIMENSION = 512
"""Up to this dimension eigenpairs come from the dense matrix: no more work, and exact."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Eigenpairs:
    """Some eigenpairs of an operator.

    Attributes:
        values: (k,), ascending; with `which="both"` the k lowest, then the k highest.
        vectors: pytree like the operator's point with a leading axis k; orthonormal as flat vectors.
        residuals: (k,), bounds on ||A v - value v||: within that distance of each value lies an eigenvalue.
        products: how many products with the operator were taken.
        missed: bound on the probability that an eigenvalue is missing, by which `values` would differ from the
            eigenvalues by more than twice the tolerance: 0 from the dense matrix, 0.001 from the iteration, 1 where it
            was cut short. The probability is over the random `key`, for any operator.
    """

    values: Float[Array, " k"]
    vectors: Params
    residuals: Float[Array, " k"]
    products: Array
    missed: Float[Array, ""]


def eigenpairs(
    operator: Operator,
    key: PRNGKey,
    count: int = 1,
    *,
    which: Literal["low", "high", "both"] = "high",
    tolerance: float | None = None,
    directory: Path | None = None,
    report: Report | None = None,
) -> Eigenpairs:
    """The `count` algebraically lowest or highest eigenpairs, or that many at both ends.

    The dense matrix up to dimension 512; beyond it thick-restart Lanczos with locking, repeated eigenvalues included:
    after convergence random directions are tested until an eigenvalue further out than the wanted ones, by more than
    the tolerance and counted with multiplicity, is missing with a probability of at most 0.001 (see `restarts`).
    Memory: twice 2 * wanted + 21 vectors, and orthogonalisation reads half of them per product.

    Args:
        operator: the operator A; its symmetry is tested on the way, at no product's cost.
        key: of the random start.
        count: how many pairs at each end.
        which: end of the spectrum.
        tolerance: of the residuals relative to the largest eigenvalue in modulus; by default the square root of the
            machine epsilon.
        directory: where to save the basis, every second at most, after a cycle of some products; a run that was killed
            resumes there and gives the same numbers on the same machine. At the end it holds
            `result.npz` (values, flat vectors, residuals) and `manifest.json`.
        report: called every some products with a `Progress`; `print_progress` is one.

    Warns where the tolerance was not reached, as the residuals then say, or no certificate. Raises `ValueError` for a
    count that does not fit the dimension, a negative tolerance, an operator that is not symmetric, or a directory of
    another computation; `NonFiniteProductError`, which has the pairs after the last finite cycle as its `partial`;
    `MemoryError` before the start, if the basis does not fit.
    """
    check_operator_and_key(operator, key)
    check_integer(count=count)
    if which not in ("low", "high", "both"):
        raise unknown_name("end of the spectrum", which, ("low", "high", "both"))
    ends = 2 if which == "both" else 1
    check_range("count", count, 1, operator.dimension // ends, "Ask for as many pairs as the operator has.")
    wanted = ends * count
    low, high = count if which != "high" else 0, count if which != "low" else 0
    tolerance = operator.epsilon**0.5 if tolerance is None else tolerance
    check_number("tolerance", tolerance, 0, math.inf, "It is relative to the largest eigenvalue in modulus.")
    if operator.dimension <= max(DENSE_DIMENSION, 2 * wanted + 20):
        pairs = _dense_eigenpairs(operator, low, high)
    else:
        plan = plan_restarts(low, high, operator.dimension)
        check_memory(
            f"a basis of {plan.size + 1} vectors of {operator.dimension} numbers, twice at a restart,",
            2 * (plan.size + 1) * operator.dimension * operator.flat_dtype.itemsize,
            "Ask for fewer eigenpairs.",
        )
        if directory is None and report is None:
            pairs = _lanczos_eigenpairs(operator, key, tolerance, plan)
        else:
            pairs = _long_eigenpairs(operator, key, tolerance, plan, directory, report)
    if is_concrete(pairs):
        _check(operator, pairs, tolerance)
    return _like_point(operator, pairs)


def _like_point(operator: Operator, pairs: RitzPairs) -> Eigenpairs:
    return Eigenpairs(
        pairs.sound_values(), jax.vmap(operator.unravel)(pairs.vectors), pairs.residuals, pairs.products, pairs.missed
    )


def _check(operator: Operator, pairs: RitzPairs, tolerance: float) -> None:
    if not np.isfinite(pairs.scale):
        raise non_finite(operator, f"within {pairs.products} products", _before_failure(operator, pairs))
    check_symmetric(pairs.asymmetry, operator.epsilon)
    limit = tolerance * pairs.scale
    if jnp.any(pairs.residuals > limit):
        warnings.warn(
            f"{int(jnp.sum(pairs.residuals > limit))} of {len(pairs.values)} eigenpairs have residuals above "
            f"{limit:.3g} after {pairs.products} products; the largest is {jnp.max(pairs.residuals):.3g}. "
            "Raise the tolerance.",
            stacklevel=3,
        )
    elif pairs.missed > MISSED:
        warnings.warn(
            f"{pairs.products} products did not make sure that no eigenvalue is missing: copies of repeated ones may "
            "be. Raise the tolerance, or ask for fewer pairs.",
            stacklevel=3,
        )


def _before_failure(operator: Operator, pairs: RitzPairs) -> Eigenpairs | None:
    if not np.isfinite(pairs.residuals).all():
        return None
    return _like_point(operator, pairs._replace(scale=jnp.ones_like(pairs.scale)))


@jax.jit(static_argnames=("low", "high"))
def _dense_eigenpairs(operator: Operator, low: int, high: int) -> RitzPairs:
    n = operator.dimension
    matrix = jax.lax.map(operator.flat_mv, jnp.eye(n, dtype=operator.flat_dtype))
    unit = power_of_two(jnp.max(jnp.abs(matrix)))
    matrix = matrix / unit
    values, vectors = jnp.linalg.eigh(matrix)
    scale = jnp.max(jnp.abs(values))
    asymmetry = jnp.max(jnp.abs(matrix - matrix.T)) / jnp.where(scale > 0, scale, 1)
    picked = jnp.array([*range(low), *range(n - high, n)])
    values, vectors = values[picked], vectors[:, picked].T
    residuals = jnp.linalg.norm(vectors @ matrix - values[:, None] * vectors, axis=1)
    return RitzPairs(unit * values, vectors, unit * residuals, unit * scale, asymmetry, jnp.array(n), 0 * scale)


def _start(operator: Operator, key: PRNGKey) -> Float[Array, " n"]:
    return jax.random.normal(key, (operator.dimension,), operator.flat_dtype)


@jax.jit(static_argnames=("plan",))
def _lanczos_eigenpairs(operator: Operator, key: PRNGKey, tolerance: float, plan: RestartPlan) -> RitzPairs:
    start_key, key = jax.random.split(key)
    return thick_restart(operator.flat_mv, _start(operator, start_key), plan, tolerance, key)


@jax.jit(static_argnames=("plan",))
def _cycle(operator: Operator, state: Restarted, key: PRNGKey, tolerance: float, plan: RestartPlan) -> Restarted:
    return restart_cycle(operator.flat_mv, state, plan, tolerance, key)


@owning_directory
def _long_eigenpairs(
    operator: Operator,
    key: PRNGKey,
    tolerance: float,
    plan: RestartPlan,
    directory: Path | None,
    report: Report | None,
) -> RitzPairs:
    """The same iteration, one jitted call a cycle, with its state on disk in between."""
    session = begin_session(directory)
    checkpoint = open_checkpoint(directory, operator, key, tolerance, plan)
    start_key, key = jax.random.split(key)
    state = first_state(_start(operator, start_key), plan)
    if checkpoint is not None:
        state = checkpoint.restore(state)
    clock, told = Clock(report, int(state.products), tolerance=tolerance), int(state.products)
    while not state.done and state.cycle < plan.cycles:
        number, state = int(state.cycle), _cycle(operator, state, key, tolerance, plan)
        if not np.isfinite(state.scale):
            partial = _before_failure(operator, wanted_pairs(state, plan))
            raise non_finite(operator, f"in cycle {number}, within {state.products} products", partial)
        if checkpoint is not None:
            checkpoint.save(state, last=bool(state.done))
        if state.done or int(state.products) - told >= REPORT_EVERY:
            told, residual = int(state.products), float(jnp.max(state.residuals) / state.scale)
            clock.tell(told, residual, foreseeable=bool(state.done) or not int(state.locked))
    pairs = wanted_pairs(state, plan)
    choices = {"computation": "eigenpairs", "dimension": operator.dimension, "low": plan.low, "high": plan.high}
    choices |= {"tolerance": tolerance, "products": int(pairs.products), "missed": float(pairs.missed)}
    numbers = {"values": pairs.values, "vectors": pairs.vectors, "residuals": pairs.residuals}
    write_result(directory, choices, session, **numbers)
    return pairs
