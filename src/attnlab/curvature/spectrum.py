"""Extreme eigenpairs of operators, with residual bounds."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnlab.checks import (
    check_integer,
    check_number,
    check_range,
    check_same_structure,
    is_concrete,
    unknown_name,
)
from attnlab.curvature.density import SpectralDensity, spectral_density
from attnlab.curvature.guards import (
    check_memory,
    check_operator,
    check_operator_and_key,
    check_symmetric,
    identity_of,
    non_finite,
    share_of,
)
from attnlab.curvature.operator import Operator
from attnlab.curvature.self_checks import CurvatureWarning
from attnlab.display import brief, html_table, line, whatever_it_holds
from attnlab.krylov.restarts import (
    MISSED,
    Restarted,
    RitzPairs,
    first_state,
    restart_cycle,
    thick_restart,
    wanted_pairs,
)
from attnlab.krylov.ritz import FEWEST, RestartPlan, plan_restarts
from attnlab.runs.progress import Clock
from attnlab.runs.session import AT_ONCE, Session, fold
from attnlab.trees import length, power_of_two
from attnlab.types import Params, PRNGKey

__all__ = ["Eigenpairs", "SpectralDensity", "eigenpairs", "residuals", "spectral_density"]

REPORT_EVERY = 8
"""Products between two reports at least."""

BESIDE = 6
"""Vectors beside the basis while it grows: the next direction, a product, and what makes it orthogonal."""

DENSE_DIMENSION = 512
"""Up to this dimension eigenpairs come from the dense matrix: no more work, and exact."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Eigenpairs:
    """Some eigenpairs of an operator.

    Attributes:
        values: (k,), ascending; with `which="both"` the k lowest, then the k highest.
        vectors: pytree like the operator's point with a leading axis k; orthonormal as flat vectors.
        residuals: (k,), bounds on ||A v - value v||: within that distance of each value lies an eigenvalue of the
            matrix that the products are of. How far rounding takes that from A itself they do not see: in float32 up to
            a hundred times the rounding error of its norm was met at a trained network; `residuals` tells.
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

    @whatever_it_holds
    def __repr__(self) -> str:
        """The eigenvalues, how well they are known, and their price."""
        return line(
            "Eigenpairs", values=self.values, residuals=self.residuals, products=self.products, missed=self.missed
        )

    def _repr_html_(self) -> str:
        """A row an eigenvalue."""
        if not is_concrete(self.values):
            return escape(repr(self))
        rows = zip(range(1, len(self.values) + 1), self.values.tolist(), self.residuals.tolist(), strict=True)
        return html_table(("", "eigenvalue", "residual"), rows, f"{brief(self.products)} products")


def eigenpairs(
    operator: Operator,
    key: PRNGKey,
    count: int = 1,
    *,
    which: Literal["low", "high", "both"] = "high",
    tolerance: float | None = None,
    basis: int | None = None,
    session: Session = AT_ONCE,
) -> Eigenpairs:
    """The `count` algebraically lowest or highest eigenpairs, or that many at both ends.

    The dense matrix up to dimension 512; beyond it thick-restart Lanczos with locking, repeated eigenvalues included:
    after convergence random directions are tested until an eigenvalue further out than the wanted ones, by more than
    the tolerance and counted with multiplicity, is missing with a probability of at most 0.001 (see `restarts`).
    Memory: 2 * wanted + 26 vectors, and orthogonalisation reads half of them per product.

    Args:
        operator: the operator A; its symmetry is tested on the way, at no product's cost.
        key: of the random start.
        count: how many pairs at each end.
        which: end of the spectrum.
        tolerance: of the residuals relative to the largest eigenvalue in modulus; by default the square root of the
            machine epsilon.
        basis: how many vectors the iteration keeps, six more than these in all: at least four more than are wanted; by
            default twice the wanted plus twenty. Fewer take less memory and more products.
        session: where to save the basis, every second at most, after a cycle of some products, and what to call every
            some products with a `Progress`; `print_progress` is one. At the end the directory holds `result.npz`
            (values, flat vectors, residuals) and `manifest.json`. Without both it is one compiled program.

    Warns where the tolerance was not reached, as the residuals then say, or no certificate; and of products in bfloat16
    or float16, whose own errors the residuals do not see: `residuals` with an operator in float32 does. Raises
    `ValueError` for a count that does not fit the dimension, a negative tolerance, an operator that is not symmetric,
    or a directory of another computation; `NonFiniteProductError`, which has the pairs after the last finite cycle as
    its `partial`; `MemoryError` before the start, if the basis does not fit.

    Example:
        >>> import attnlab as al
        >>> import jax.numpy as jnp
        >>> inputs = jnp.diag(jnp.array([1.0, 2.0]))
        >>> risk = al.objective(lambda params, x: x @ params, al.square_loss, inputs, jnp.zeros(2))
        >>> import jax
        >>> pairs = al.eigenpairs(al.hessian(risk, jnp.ones(2)), jax.random.key(0), count=1)
        >>> pairs.values.round(6).tolist()
        [4.0]
    """
    check_operator_and_key(operator, key)
    session.check_one_by_one("eigenpairs")
    check_integer(count=count)
    if which not in ("low", "high", "both"):
        raise unknown_name("end of the spectrum", which, ("low", "high", "both"))
    ends = 2 if which == "both" else 1
    check_range("count", count, 1, operator.dimension // ends, "Ask for as many pairs as the operator has.")
    wanted = ends * count
    low, high = count if which != "high" else 0, count if which != "low" else 0
    tolerance = operator.epsilon**0.5 if tolerance is None else tolerance
    check_number("tolerance", tolerance, 0, math.inf, "It is relative to the largest eigenvalue in modulus.")
    small = operator.dimension <= max(DENSE_DIMENSION, 2 * wanted + 20)
    if small or (operator.layout is not None and operator.layout.filled):
        operator = operator.in_order()  # an entry that is no parameter would count as an eigenvalue of zero
    if small:
        pairs = _dense_eigenpairs(operator, low, high)
    else:
        plan = _plan(operator, low, high, basis)
        check_memory(
            f"{plan.size + BESIDE} vectors of {share_of(operator)} numbers, for a basis of {plan.size},",
            (plan.size + BESIDE) * share_of(operator) * operator.flat_dtype.itemsize,
            f"Ask for fewer eigenpairs, or for a smaller basis, of at least {wanted + FEWEST}.",
        )
        if session.in_chunks:
            pairs = _in_cycles(operator, key, tolerance, plan, session)
        else:
            pairs = _in_one_program(operator, key, tolerance, plan)
    if is_concrete(pairs):
        _check(operator, pairs, tolerance)
    return _like_point(operator, pairs)


def residuals(operator: Operator, pairs: Eigenpairs) -> Float[Array, " k"]:
    """||A v - value v|| / ||v|| of eigenpairs, by one product each: within that distance of each value lies an
    eigenvalue of A, however the pairs were found.

    Pairs found with products in bfloat16, or of a part of the data, are held to an operator in float32, or of all of
    it, at the same point. Raises `ValueError` where the vectors are not like the operator's point.
    """
    check_operator(operator)
    check_same_structure("pairs.vectors[0]", jax.tree.map(lambda leaf: leaf[0], pairs.vectors), operator.point)
    return _residuals(operator, pairs)


@jax.jit
def _residuals(operator: Operator, pairs: Eigenpairs) -> Float[Array, " k"]:
    def one(pair: tuple[Array, Params]) -> Array:
        value, vector = pair
        flat = operator.ravel(vector)
        flat = flat / length(flat)
        return length(operator.flat_mv(flat) - value.astype(flat.dtype) * flat)

    return jax.lax.map(one, (pairs.values, pairs.vectors))


def _plan(operator: Operator, low: int, high: int, basis: int | None) -> RestartPlan:
    if basis is not None:
        check_integer(basis=basis)
        remedy = "Leave it out for twice the wanted plus twenty."
        check_range("basis", basis, low + high + FEWEST, operator.dimension, remedy)
    # Where each device holds its share of every vector, a few columns at a time would be those of a few devices.
    slab = None if operator.layout is None else operator.dimension
    return plan_restarts(low, high, operator.dimension, basis=basis, slab=slab)


def _like_point(operator: Operator, pairs: RitzPairs) -> Eigenpairs:
    return Eigenpairs(
        pairs.sound_values(), jax.vmap(operator.unravel)(pairs.vectors), pairs.residuals, pairs.products, pairs.missed
    )


def _check(operator: Operator, pairs: RitzPairs, tolerance: float) -> None:
    if operator.epsilon > jnp.finfo(operator.flat_dtype).eps:
        warnings.warn(
            f"products are rounded to {operator.epsilon:.2g} on their way, and the residuals of the iteration do not "
            "see it: they may lie below the error of the eigenvalues. Hold the pairs to an operator in float32: "
            "residuals(operator, pairs).",
            CurvatureWarning,
            stacklevel=3,
        )
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
    return operator.sample(jax.random.normal, key)


@jax.jit(static_argnames=("plan",))
def _in_one_program(operator: Operator, key: PRNGKey, tolerance: float, plan: RestartPlan) -> RitzPairs:
    start_key, key = jax.random.split(key)
    return thick_restart(operator.flat_mv, _start(operator, start_key), plan, tolerance, key)


@jax.jit(static_argnames=("plan",))
def _first(operator: Operator, key: PRNGKey, plan: RestartPlan) -> Restarted:
    return first_state(_start(operator, key), plan)


@jax.jit(static_argnames=("plan",), donate_argnames=("state",))
def _cycle(operator: Operator, state: Restarted, key: PRNGKey, tolerance: float, plan: RestartPlan) -> Restarted:
    return restart_cycle(operator.flat_mv, state, plan, tolerance, key)


def _in_cycles(operator: Operator, key: PRNGKey, tolerance: float, plan: RestartPlan, session: Session) -> RitzPairs:
    """The same iteration, a call for every cycle."""
    start_key, cycle_key = jax.random.split(key)

    def cycles(state: Restarted) -> int | None:
        return None if state.done or state.cycle >= plan.cycles else int(state.cycle)

    def step(state: Restarted, number: int) -> tuple[Restarted, None]:
        state = _cycle(operator, state, cycle_key, tolerance, plan)
        if not np.isfinite(state.scale):
            partial = _before_failure(operator, wanted_pairs(state, plan))
            raise non_finite(operator, f"in cycle {number}, within {state.products} products", partial)
        return state, None

    def watch(state: Restarted) -> Callable[[Restarted], None]:
        assert session.report is not None
        told = int(state.products)
        clock = Clock(session.report, told, tolerance=tolerance)

        def tell(state: Restarted) -> None:
            nonlocal told
            if state.done or int(state.products) - told >= REPORT_EVERY:
                told, residual = int(state.products), float(jnp.max(state.residuals) / state.scale)
                clock.tell(told, residual, foreseeable=bool(state.done) or not int(state.locked))

        return tell

    with session.open(lambda: identity_of(operator, key, tolerance, plan)) as stretch:
        pairs = wanted_pairs(fold(step, lambda: _first(operator, start_key, plan), cycles, stretch, watch=watch), plan)
        choices = {"computation": "eigenpairs", "dimension": operator.dimension, "low": plan.low, "high": plan.high}
        choices |= {"tolerance": tolerance, "products": int(pairs.products), "missed": float(pairs.missed)}
        stretch.write_result(choices, values=pairs.values, vectors=pairs.vectors, residuals=pairs.residuals)
    return pairs
