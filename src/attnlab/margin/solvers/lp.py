"""l_p-norm max-margin problems (entrywise): an interior point for 1 < p < infinity.

minimise (1/p) ||W||_p^p : scores(W) >= bound is solved where, with M = sum_k lambda_k a_k and 1/p + 1/q = 1,

    sign(W) |W|^(p-1) = M,  equivalently  W = sign(M) |M|^(q-1).

The map is smooth in W for p >= 2 and in M for p <= 2 (where q >= 2): the method works on the smooth side.
"""

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from attnlab.margin.certificates import PROVED, PrimalDual, Status, prove, verdict
from attnlab.margin.problems import exponent
from attnlab.margin.rows import Rows
from attnlab.margin.solvers import decimal_norms
from attnlab.margin.solvers.decimal_norms import exponents

EQUALITY_SHIFT = 1e-12
"""Proximal weight on the multipliers of equalities, in place of slack / lambda of an inequality."""

FLAT = 1e-14
"""Least curvature of the norm's power at an entry, relative to its largest: entries of W near 0 have none."""

LONGEST_STAGE = 3.0
"""Factor by which p - 1 changes at once."""


def power_map(array: np.ndarray, exponent: float) -> np.ndarray:
    """sign(x) |x|^exponent."""
    return np.sign(array) * np.abs(array) ** exponent


def solve(rows: Rows, start: PrimalDual) -> PrimalDual:
    """W of least l_p norm with scores(W) >= bound, from the Frobenius solution.

    p goes from 2 to where it is wanted in steps, each from the solution before: far from 2 the map between M and W is
    so steep, or so flat, that Newton's method needs a near start. Where double precision proves nothing, decimals do.
    """
    norm = rows.problem.norm
    matrix, multipliers = rows.combine(start.dual), start.dual
    for p in exponents(exponent(norm), LONGEST_STAGE):
        size = abs(matrix).max()  # W / size: its powers neither overflow nor vanish all together
        if not 0 < size < np.inf:
            break
        inside, multipliers = _interior_point(rows.demanding(1 / size), p, matrix / size, multipliers)
        matrix = inside * size
    found = prove(norm, rows, matrix, multipliers)
    if verdict(found.certificate, PROVED) == Status.SOLVED:
        return found
    return decimal_norms.solve(rows, start) or found


def _interior_point(
    rows: Rows, p: float, matrix: np.ndarray, multipliers: np.ndarray, *, steps: int = 60, tolerance: float = 1e-13
) -> tuple[np.ndarray, np.ndarray]:
    """Newton's method on the perturbed conditions, the perturbation lambda_k slack_k = mu reduced as steps succeed."""
    free = rows.free
    # bound^T lambda = ||W||_p^p at the solution
    multipliers = multipliers * (np.sum(abs(matrix) ** p) / (rows.bound @ multipliers))
    multipliers = np.where(free, multipliers, np.maximum(multipliers, 0.01 * abs(multipliers).mean()))
    slacks = np.where(free, 0.0, np.maximum(rows.scores(matrix) - rows.bound, 0.01 * rows.bound.max()))
    best, stalled = (np.inf, matrix, multipliers), 0
    for _ in range(steps):
        mu = 0.1 * float(slacks @ multipliers) / np.count_nonzero(~free)
        state = matrix, multipliers, slacks
        try:
            move = _newton(rows, p, *state, mu)
        except np.linalg.LinAlgError:
            break
        length = min(_to_zero(multipliers, move[1], free), _to_zero(slacks, move[2], free))
        length = _decreasing(rows, p, state, move, mu, length)
        matrix, multipliers, slacks = (old + length * change for old, change in zip(state, move, strict=True))
        error = _conditions(rows, p, (matrix, multipliers, slacks), 0.0)
        stalled = 0 if error < best[0] else stalled + 1
        best = min(best, (error, matrix, multipliers), key=lambda entry: entry[0])
        if error <= tolerance or stalled > 4 or not np.isfinite(error):
            break
    return best[1], best[2]


def _conditions(rows: Rows, p: float, state: tuple[np.ndarray, ...], mu: float) -> float:
    """How far a state is from lambda slack = mu and the two linear conditions: their norm, relative."""
    matrix, multipliers, slacks = state
    combined = rows.combine(multipliers)
    if p >= 2:
        stationarity = (power_map(matrix, p - 1) - combined) / np.linalg.norm(combined)
    else:
        image = power_map(combined, 1 / (p - 1))
        stationarity = (matrix - image) / np.linalg.norm(image)
    feasibility = (rows.scores(matrix) - rows.bound - slacks) / np.linalg.norm(rows.bound)
    complementarity = np.where(rows.free, 0.0, multipliers * slacks - mu) / (rows.bound @ np.abs(multipliers))
    return float(np.sqrt(sum(np.vdot(part, part) for part in (stationarity, feasibility, complementarity))))


def _newton(
    rows: Rows, p: float, matrix: np.ndarray, multipliers: np.ndarray, slacks: np.ndarray, mu: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The Newton step in (W, lambda, slack) towards lambda slack = mu."""
    free = rows.free
    safe = np.where(free, 1.0, multipliers)
    pull = np.where(free, 0.0, mu / safe)  # the slack that a row should have
    ratio = np.where(free, EQUALITY_SHIFT, slacks / safe)
    missing = rows.bound + pull - rows.scores(matrix)
    # dW = offset + compliance * sum d lambda_k a_k,   <a_k, dW> + ratio_k d lambda_k = missing_k
    offset, compliance = _linearized(p, matrix, rows.combine(multipliers))
    if len(rows) <= matrix.size:
        system = rows.weighted_gram(compliance)
        dmultipliers = _solve(system, ratio, missing - rows.scores(offset))
        dmatrix = offset + compliance * rows.combine(dmultipliers)
    else:
        right = offset / compliance + rows.combine(missing / ratio)
        dmatrix = _solve(rows.normal_matrix(1 / ratio), 1 / compliance.ravel(), right.ravel()).reshape(matrix.shape)
        dmultipliers = (missing - rows.scores(dmatrix)) / ratio
    dslacks = np.where(free, 0.0, pull - slacks - slacks / safe * dmultipliers)
    return dmatrix, dmultipliers, dslacks


def _linearized(p: float, matrix: np.ndarray, combined: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(offset, compliance) of the linearised map between M and W: dW = offset + compliance * dM."""
    if p >= 2:
        stiffness = (p - 1) * np.abs(matrix) ** (p - 2)
        stiffness = np.maximum(stiffness, FLAT * stiffness.max())
        return (combined - power_map(matrix, p - 1)) / stiffness, 1 / stiffness
    q = p / (p - 1)
    compliance = (q - 1) * np.abs(combined) ** (q - 2)
    return power_map(combined, q - 1) - matrix, np.maximum(compliance, FLAT * compliance.max())


def _solve(system: np.ndarray, diagonal: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(system + diag(diagonal))^-1 right, for a positive definite matrix that may be overwritten."""
    system.flat[:: len(system) + 1] += diagonal
    return cho_solve(cho_factor(system, lower=True, overwrite_a=True, check_finite=False), right, check_finite=False)


def _to_zero(values: np.ndarray, move: np.ndarray, free: np.ndarray) -> float:
    """The largest step up to 1 that leaves the values of inequalities at least one per cent of themselves."""
    ratio = np.where(free, 0.0, -move / np.where(free, 1.0, values))
    return 1 / max(ratio.max() / 0.99, 1.0)


def _decreasing(
    rows: Rows, p: float, state: tuple[np.ndarray, ...], move: tuple[np.ndarray, ...], mu: float, length: float
) -> float:
    """Halve the step until the conditions' error falls."""
    before = _conditions(rows, p, state, mu)
    for _ in range(30):
        after = tuple(old + length * change for old, change in zip(state, move, strict=True))
        if _conditions(rows, p, after, mu) <= (1 - 1e-4 * length) * before:
            return length
        length /= 2
    return length
