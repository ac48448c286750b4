"""Proof of an answer: bounds on the maximal margin from both sides, or a Gordan certificate of infeasibility.

For any feasible W and any multipliers lambda (non-negative on inequalities), with gamma* the maximal margin,

    min_k <a_k, W> / ||W||  <=  gamma*  <=  ||sum_k lambda_k a_k||_dual / sum_{k: bound 1} lambda_k:

sum lambda_k <a_k, W> is at least gamma* ||W|| sum lambda for the optimal W and at most ||W|| ||sum lambda_k a_k||_dual.
The right side is 0 exactly if the constraints contradict each other (Gordan's alternative).
"""

from dataclasses import dataclass
from enum import IntEnum
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from attnlab.checks import check_finite, is_concrete
from attnlab.display import Words, line, whatever_it_holds
from attnlab.margin.checking import check_same_shape, host_array
from attnlab.margin.problems import AnyArray, MarginProblem, Norm, check_problem, dual_exponent, exponent
from attnlab.margin.rows import Rows

INFEASIBLE_BELOW = 1e-14
"""A cosine of at most this between W and the rows, proved by multipliers, counts as none: rounding the tokens to double
precision moves it by as much."""

PROVED = 1e-10
"""Gap up to which an answer in double precision is taken."""


class Status(IntEnum):
    """What is proved."""

    SOLVED = 0
    INFEASIBLE = 1
    INACCURATE = 2


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Certificate:
    """Bounds on the maximal margin (see the module).

    Attributes:
        margin: lower bound, from a direction.
        bound: upper bound, from multipliers.
        violation: largest violation of an equality or sign row, as a cosine; the lower bound holds up to it.
        residual: ||sum lambda_k a_k||_F over the sum of lambda_k ||a_k|| on rows with bound 1. A Gordan certificate of
            infeasibility has residual 0.
    """

    margin: Float[AnyArray, ""]
    bound: Float[AnyArray, ""]
    violation: Float[AnyArray, ""]
    residual: Float[AnyArray, ""]

    @whatever_it_holds
    def __repr__(self) -> str:
        """The bounds and their distance."""
        return line("Certificate", margin=self.margin, bound=self.bound, gap=self.gap, violation=self.violation)

    @property
    def gap(self) -> Float[AnyArray, ""]:
        """1 - margin / bound: the relative distance from optimality, at most; infinite where no margin is proved."""
        if isinstance(self.bound, jax.Array):
            return jnp.where(self.bound > 0, 1 - self.margin / jnp.where(self.bound > 0, self.bound, 1), jnp.inf)
        if isinstance(self.bound, float):  # an answer of `max_margin`, where calls cost more than numbers
            return 1 - self.margin / self.bound if self.bound > 0 else np.inf
        positive = np.asarray(self.bound) > 0
        return np.where(positive, 1 - self.margin / np.where(positive, self.bound, 1), np.inf)[()]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MaxMargin:
    """A maximal margin with its proof.

    Attributes:
        direction: the maximiser, of unit norm (the problem's norm); zeros if the problem is infeasible. Rounded to
            double precision, which moves its own margin by about 1e-16 of the rows' norms; the certificate is of what
            was rounded, where decimals were needed.
        multipliers: lambda, scaled so that sum_k lambda_k a_k is `solution` in the Frobenius norm, and of dual norm 1
            otherwise. Infeasible: Gordan's alternative, sum_k lambda_k a_k = 0 with bound^T lambda = 1.
        support: rows with a positive multiplier that hold with equality at the solution.
        status: a `Status`.
        certificate: bounds on the maximal margin.
    """

    direction: Float[AnyArray, "..."]
    multipliers: Float[AnyArray, " m"]
    support: Bool[AnyArray, " m"]
    status: Status | Int[AnyArray, ""]
    certificate: Certificate

    @whatever_it_holds
    def __repr__(self) -> str:
        """The margin, what is proved of it, and how many rows it stands on."""
        if np.ndim(self.margin) or not is_concrete(self.support):
            return line("MaxMargin", direction=self.direction, margin=self.margin, status=self.status)
        support = Words(f"{int(np.sum(self.support))} of {len(self.support)} rows")
        status = Words(Status(int(self.status)).name)
        return line("MaxMargin", margin=self.margin, gap=self.gap, status=status, support=support)

    @property
    def margin(self) -> Float[AnyArray, ""]:
        """The certified margin, min_k <a_k, direction>."""
        return self.certificate.margin

    @property
    def gap(self) -> Float[AnyArray, ""]:
        """See `Certificate.gap`."""
        return self.certificate.gap

    @property
    def solution(self) -> Float[AnyArray, "..."]:
        """The minimal W with margin 1: direction / margin."""
        return self.direction / self.margin


@dataclass(frozen=True)
class PrimalDual:
    """What every solver returns: W and lambda of some `Rows`, and what they prove.

    Attributes:
        primal: W, of the size that has scores(W) >= bound if the problem is feasible, (d, e).
        dual: lambda, one a row.
        support: rows on which W stands: of multiplier and slack, one of which is 0 at the solution, the multiplier,
            relative to the largest, is larger.
        certificate: see `Certificate`.
    """

    primal: Float[np.ndarray, "d e"]
    dual: Float[np.ndarray, " m"]
    support: Bool[np.ndarray, " m"]
    certificate: Certificate


def matrix_norm(matrix: Any, norm: Norm, xp: ModuleType = np) -> Any:
    """||matrix|| in `norm`."""
    if norm == "frobenius":
        return xp.sqrt(xp.vdot(matrix, matrix))
    if norm == "nuclear":
        return xp.sum(xp.linalg.svd(matrix, compute_uv=False))
    return xp.linalg.norm(xp.ravel(matrix), ord=exponent(norm))


def dual_norm(matrix: Any, norm: Norm, xp: ModuleType = np) -> Any:
    """The norm dual to `norm`: Frobenius, operator, or l_q with 1/p + 1/q = 1."""
    if norm == "frobenius":
        return matrix_norm(matrix, norm, xp)
    if norm == "nuclear":
        return xp.max(xp.linalg.svd(matrix, compute_uv=False))
    return xp.linalg.norm(xp.ravel(matrix), ord=dual_exponent(norm))


def bounds(
    norm: Norm,
    matrix: Any,
    scores: Any,
    multipliers: Any,
    combined: Any,
    bound: Any,
    free: Any,
    xp: ModuleType = np,
) -> Certificate:
    """The certificate of W = `matrix` with its `scores` and of `multipliers` with their combination sum lambda_k a_k.

    All of one problem whose rows have unit norm (so `bound` is 1 / ||a_k||, or 0).
    """
    strict = bound > 0
    broken = xp.where(strict, 0.0, xp.where(free, xp.abs(scores), -scores))
    violation = xp.max(xp.maximum(broken, 0.0)) / matrix_norm(matrix, "frobenius", xp)
    ratios = xp.where(strict, scores / xp.where(strict, bound, 1.0), xp.inf)
    weight = xp.sum(xp.where(strict, multipliers, 0.0))
    return _bounds(norm, matrix, ratios, xp.vdot(bound, multipliers), combined, weight, violation, xp)


def _bounds(
    norm: Norm, matrix: Any, ratios: Any, total: Any, combined: Any, weight: Any, violation: Any, xp: ModuleType = np
) -> Certificate:
    """From the ratios score / bound of the rows with bound 1, sum lambda_k, and the same weighed by the row's norm."""
    size = matrix_norm(combined, "frobenius", xp)
    upper = size if norm == "frobenius" else dual_norm(combined, norm, xp)
    own_size = size if matrix is combined and norm == "frobenius" else matrix_norm(matrix, norm, xp)
    return Certificate(xp.min(ratios) / own_size, upper / total, violation, size / weight)


def certify(
    problem: MarginProblem, direction: Float[AnyArray, "..."], multipliers: Float[AnyArray, " m"]
) -> Certificate:
    """The certificate of any direction and any multipliers of `problem` (negative ones of inequalities are set to 0).

    Both are judged apart, so a direction of gradient descent can be held against the multipliers of a solver. Computed
    in double precision: a margin of gamma relative to the rows is judged to about 1e-16 / gamma. Raises `ValueError`
    for shapes other than the problem's, for values that are not finite, and for a direction of 0.

    >>> import numpy as np
    >>> from attnlab.margin import certify, max_margin, vector_problem
    >>> problem = vector_problem(np.array([[[3.0, 4.0], [0.0, 0.0]]]), selection=np.array([0]))
    >>> judged = certify(problem, np.array([1.0, 0.0]), max_margin(problem).multipliers)
    >>> round(float(judged.margin), 6), round(float(judged.bound), 6)  # this direction's margin, and the largest one
    (3.0, 5.0)
    """
    check_problem(problem)
    shaped = (("direction", direction, problem.shape), ("multipliers", multipliers, np.shape(problem.bound)))
    for name, array, shape in shaped:
        host_array(name, array, f"of shape {shape}")
        check_same_shape(name, array, shape, "the problem's solution" if name == "direction" else "its rows")
        check_finite(name, array)
    if not np.any(direction):
        raise ValueError("direction is 0, which has no margin; expected any other. Train longer, or start elsewhere.")
    rows = Rows(problem)
    matrix = np.asarray(direction, float).reshape(rows.differences.shape[1], rows.queries.shape[1])
    dual = np.asarray(multipliers, float) * rows.scale
    return _certificate(problem.norm, rows, matrix, dual, rows.scores(matrix))


def prove(
    norm: Norm,
    rows: Rows,
    primal: np.ndarray,
    dual: np.ndarray,
    *,
    combined: np.ndarray | None = None,
    scores: np.ndarray | None = None,
) -> PrimalDual:
    """W and lambda with their certificate; `combined` is sum lambda_k a_k and `scores` are those of W, if known."""
    if scores is None:
        scores = rows.scores(primal)
    certificate = _certificate(norm, rows, primal, dual, scores, combined)
    return PrimalDual(primal, dual, support(dual, scores - rows.bound, rows.free), certificate)


def support(dual: np.ndarray, slacks: np.ndarray, free: np.ndarray) -> np.ndarray:
    """See `PrimalDual.support`."""
    return (dual > dual.max() * np.maximum(slacks, 0.0)) | free


def _certificate(
    norm: Norm,
    rows: Rows,
    matrix: np.ndarray,
    multipliers: np.ndarray,
    scores: np.ndarray,
    combined: np.ndarray | None = None,
) -> Certificate:
    negative = multipliers < 0
    if rows.any_free:
        negative &= ~rows.free
    if combined is None or negative.any():
        multipliers = np.where(negative, 0.0, multipliers)
        combined = rows.combine(multipliers)
    with np.errstate(divide="ignore", invalid="ignore"):
        if rows.all_strict:
            ratios, total, weight = scores / rows.bound, rows.bound @ multipliers, multipliers.sum()
            return _bounds(norm, matrix, ratios, total, combined, weight, np.float64(0.0))
        return bounds(norm, matrix, scores, multipliers, combined, rows.bound, rows.free)


def verdict(certificate: Certificate, tolerance: float) -> Status:
    """What a certificate proves: optimality to `tolerance`, infeasibility, or neither."""
    if certificate.residual <= INFEASIBLE_BELOW:
        return Status.INFEASIBLE
    return Status.SOLVED if certificate.gap <= tolerance and certificate.violation <= tolerance else Status.INACCURATE
