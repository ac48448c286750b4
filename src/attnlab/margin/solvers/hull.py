"""Frobenius problems by an interior point for the least-norm point of the rows' hull: well posed, feasible or not.

    minimise (1/2) ||sum_k lambda_k a_k||^2  :  bound^T lambda = 1, lambda >= 0 (free on equalities),

whose dual is: maximise t - ||W||^2 / 2 over scores(W) >= t bound. Both always have interior points. At the solution
W = sum lambda_k a_k and t = ||W||^2, so that W / t solves the max-margin problem if t > 0; if t = 0, lambda is Gordan's
certificate that no W does.
"""

from dataclasses import dataclass

import numpy as np
from scipy.linalg.lapack import dpotrf, dpotrs

from attnlab.margin.certificates import PROVED, PrimalDual, Status, verdict
from attnlab.margin.rows import Rows
from attnlab.margin.solvers.frobenius import LinearMap, combination, newton

EARLY = 1e-9
"""Complementarity at which the active rows are tried first."""

EQUALITY_SHIFT = 1e-10
"""Proximal weight on the multipliers of equalities, in place of lambda / slack of an inequality."""


@dataclass(frozen=True)
class HullPoint:
    """A state of the method: multipliers, level t, slacks scores - t bound (0 on equalities)."""

    multipliers: np.ndarray
    level: float
    slacks: np.ndarray


def interior_point(rows: Rows) -> PrimalDual:
    """Interior point, then the best of its own answer, Newton's method on its active rows, and Gordan's multipliers."""
    point = nearest_hull_point(rows, tolerance=EARLY)
    for tolerance in (EARLY, 1e-15):  # the active rows are often clear long before the end
        point = nearest_hull_point(rows, point, tolerance=tolerance)
        multipliers, slacks = point.multipliers, point.slacks
        active = (multipliers / multipliers.max() > slacks / slacks.max()) | rows.free
        polished, solved = newton(rows, active)
        if solved and verdict(polished.certificate, PROVED) == Status.SOLVED:
            return polished
    if point.level < 1e-10:
        contradiction = combination(rows, gordan_multipliers(rows, multipliers))
        if verdict(contradiction.certificate, 0.0) == Status.INFEASIBLE:
            return contradiction
    plain = combination(rows, multipliers / max(point.level, 1e-300))
    gap = polished.certificate.gap
    return plain if plain.certificate.gap <= gap or not np.isfinite(gap) else polished


def nearest_hull_point(
    rows: Rows, start: HullPoint | None = None, *, tolerance: float = 1e-15, steps: int = 60
) -> HullPoint:
    """Mehrotra's predictor-corrector method, until the mean of lambda_k slack_k is below `tolerance`, or stalls."""
    point = _start(rows) if start is None else start
    inequalities = ~rows.free
    for _ in range(steps):
        if _complementarity(point, inequalities) <= tolerance:
            break
        moved = _step(rows, point, inequalities)
        if moved is None:
            break
        point = moved
    return point


def _start(rows: Rows) -> HullPoint:
    multipliers = np.where(rows.free, 0.0, 1.0 / rows.bound.sum())
    scores = rows.normal(multipliers)
    slacks = np.where(rows.free, 0.0, np.maximum(scores + rows.bound, 1.0))
    return HullPoint(multipliers, -1.0, slacks)


def _complementarity(point: HullPoint, inequalities: np.ndarray) -> float:
    return float(point.multipliers[inequalities] @ point.slacks[inequalities]) / inequalities.sum()


def _step(rows: Rows, point: HullPoint, inequalities: np.ndarray) -> HullPoint | None:
    """One predictor-corrector step, or None if the linear algebra broke down (at the end of the road)."""
    multipliers, slacks, mu = point.multipliers, point.slacks, _complementarity(point, inequalities)
    weights = np.where(rows.free, 1 / EQUALITY_SHIFT, multipliers / np.where(rows.free, 1.0, slacks))
    solve = weighted_solver(rows, weights)
    if solve is None:
        return None
    # Newton: (G + diag(1 / weights)) d lambda - bound dt = residual + pull,   bound^T d lambda = missing
    residual = point.level * rows.bound + slacks - rows.normal(multipliers)
    missing = 1.0 - rows.bound @ multipliers
    towards_level = solve(rows.bound)

    def newton_step(target: np.ndarray) -> tuple[np.ndarray, float, np.ndarray]:
        pull = np.where(rows.free, 0.0, target / np.where(rows.free, 1.0, multipliers))
        plain = solve(residual + pull)
        dlevel = (missing - rows.bound @ plain) / (rows.bound @ towards_level)
        dmultipliers = plain + dlevel * towards_level
        dslacks = np.where(rows.free, 0.0, pull - dmultipliers / weights)
        return dmultipliers, dlevel, dslacks

    dmultipliers, _, dslacks = newton_step(-multipliers * slacks)
    length = _longest(multipliers, dmultipliers, slacks, dslacks, inequalities)
    after = (multipliers + length * dmultipliers) * (slacks + length * dslacks)
    centering = max(after[inequalities].mean() / mu, 0.0) ** 3
    dmultipliers, dlevel, dslacks = newton_step(centering * mu - multipliers * slacks - dmultipliers * dslacks)
    length = 0.995 * _longest(multipliers, dmultipliers, slacks, dslacks, inequalities)
    if not (np.isfinite(dmultipliers).all() and length > 1e-6):
        return None
    return HullPoint(multipliers + length * dmultipliers, point.level + length * dlevel, slacks + length * dslacks)


def _longest(
    multipliers: np.ndarray, dmultipliers: np.ndarray, slacks: np.ndarray, dslacks: np.ndarray, inequalities: np.ndarray
) -> float:
    """The longest step up to 1 that keeps multipliers and slacks of inequalities non-negative."""
    shrink = max(
        (-dmultipliers[inequalities] / multipliers[inequalities]).max(),
        (-dslacks[inequalities] / slacks[inequalities]).max(),
    )
    return 1.0 / max(shrink, 1.0)


def weighted_solver(rows: Rows, weights: np.ndarray) -> LinearMap | None:
    """v -> (G + diag(1 / weights))^-1 v, factored in the smaller of the rows' number and dimension; None if singular.

    With A the matrix of rows, Woodbury: (A A^T + D^-1)^-1 v = D (v - A (1 + A^T D A)^-1 A^T D v).
    """
    small = len(rows) <= rows.dimension
    matrix = rows.gram(np.arange(len(rows))) if small else rows.normal_matrix(weights)
    matrix.flat[:: len(matrix) + 1] += 1 / weights if small else 1.0
    factor, failed = dpotrf(matrix.T, lower=1, overwrite_a=1, clean=0)  # symmetric: its transpose is LAPACK's order
    if failed or not np.isfinite(factor[-1, -1]):
        return None
    if small:
        return lambda v: dpotrs(factor, v, lower=1)[0]
    shape = (rows.differences.shape[1], rows.queries.shape[1])

    def solve(v: np.ndarray) -> np.ndarray:
        inner = dpotrs(factor, rows.combine(weights * v).ravel(), lower=1)[0]
        return weights * (v - rows.scores(inner.reshape(shape)))

    return solve


def gordan_multipliers(rows: Rows, multipliers: np.ndarray, *, steps: int = 4) -> np.ndarray:
    """Drive sum_k lambda_k a_k to zero: each step is the least change of lambda, relative to lambda, that does so.

    First with the large multipliers alone, where contradicting rows are few (the tokens of one sequence, say).
    """
    large = rows.free | (multipliers > 1e-4 * multipliers.max())
    if 0 < np.count_nonzero(large & ~rows.free) < len(rows):
        few = np.zeros_like(multipliers)
        few[large] = _to_null_space(rows.members(large), multipliers[large], steps)
        if np.linalg.norm(rows.combine(few)) <= 1e-13 * few[~rows.free].sum():
            return few
    return _to_null_space(rows, multipliers, steps)


def _to_null_space(rows: Rows, multipliers: np.ndarray, steps: int) -> np.ndarray:
    for _ in range(steps):
        solve = weighted_solver(rows, np.where(rows.free, 1.0, multipliers**2) * (1e14 / np.max(multipliers**2)))
        if solve is None:
            break
        change = solve(rows.normal(multipliers))
        if (multipliers - change)[~rows.free].min() < 0 or not np.isfinite(change).all():
            break
        multipliers = multipliers - change
    return multipliers / (rows.bound @ multipliers)
