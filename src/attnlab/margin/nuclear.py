"""Nuclear-norm max-margin problems: a primal-dual interior point whose linear algebra keeps the rows' structure.

The dual problem, maximise bound^T lambda over ||M||_op <= 1 with M = sum_k lambda_k a_k, lambda >= 0, is semidefinite:

    S = [[1, -M], [-M^T, 1]] >= 0.     Its multiplier X >= 0 satisfies 2 <a_k, X_12> = bound_k + slack_k,

so W = 2 X_12 is the primal solution, and ||W||_* <= tr X. The method is that of Helmberg, Kojima and Monteiro with
Mehrotra's predictor-corrector; with a_k = Delta_k z_k^T its Schur complement is made of products of small bilinear
forms, and a working set keeps it to the rows that matter.
"""

from dataclasses import dataclass

import numpy as np
from scipy.linalg.lapack import dpotrf, dpotrs, dtrtri

from attnlab.margin.rows import Rows


@dataclass
class _State:
    """lambda, the slacks of its rows (0 on equalities) and the semidefinite multiplier X."""

    multipliers: np.ndarray
    slacks: np.ndarray
    semidefinite: np.ndarray


BACK_OFF = 0.97
"""Steps stop at this part of the way to the boundary."""

WORKING_SET_ABOVE = 400
"""Up to so many rows all of them are taken at once."""


def nuclear_margin(rows: Rows, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(W, lambda) of least nuclear norm with scores(W) >= bound, from the multipliers of the Frobenius problem.

    Many rows: solve for those with the least scores, add the ones this leaves violated, and repeat.
    """
    if len(rows) <= WORKING_SET_ABOVE:
        return interior_point(rows, start)
    scores = rows.scores(rows.combine(start))
    working = rows.free | (scores <= 1.3 * rows.bound)
    multipliers = start
    while True:
        members = rows.members(np.flatnonzero(working))
        matrix, inside = interior_point(members, multipliers[working])
        multipliers = np.zeros(len(rows))
        multipliers[working] = inside
        scores = rows.scores(matrix)
        if not (~working & (scores < rows.bound * (1 - 1e-10))).any():
            return matrix, multipliers
        working |= scores <= 1.1 * rows.bound


def interior_point(
    rows: Rows, start: np.ndarray, *, tolerance: float = 1e-9, steps: int = 60
) -> tuple[np.ndarray, np.ndarray]:
    """(W, lambda) of all the rows: the first iterate of duality gap and infeasibility `tolerance`, or the best."""
    state = _centered_start(rows, start)
    best, stalled = (np.inf, state), 0
    for _ in range(steps):
        with np.errstate(all="ignore"):
            moved = _step(rows, state)
        if moved is None:
            break
        state = moved
        error = _error(rows, state)
        stalled = 0 if error < best[0] else stalled + 1
        best = min(best, (error, state), key=lambda entry: entry[0])
        if error <= tolerance or stalled > 3:
            break
    return _primal(rows, best[1].semidefinite), best[1].multipliers


def _error(rows: Rows, state: _State) -> float:
    """The larger of the relative duality gap and the violation of the rows, in their own scale."""
    value = rows.bound @ state.multipliers
    violated = rows.bound + state.slacks - rows.scores(_primal(rows, state.semidefinite))
    return float(max(np.trace(state.semidefinite) / value - 1, abs(violated).max() / rows.bound.max()))


def _primal(rows: Rows, semidefinite: np.ndarray) -> np.ndarray:
    d = rows.differences.shape[1]
    return 2 * semidefinite[:d, d:]


def _embed(matrix: np.ndarray) -> np.ndarray:
    """[[0, M], [M^T, 0]]."""
    d, e = matrix.shape
    embedded = np.zeros((d + e, d + e))
    embedded[:d, d:], embedded[d:, :d] = matrix, matrix.T
    return embedded


def _centered_start(rows: Rows, start: np.ndarray) -> _State:
    """lambda inside the dual feasible set; X = mu S^-1 and slack = mu / lambda, central but infeasible."""
    inside = np.where(rows.free, start, np.maximum(start, 0.1 * np.abs(start).mean()))
    inside *= 0.7 / np.linalg.norm(rows.combine(inside), 2)
    inverse = np.linalg.inv(np.eye(sum(_shape(rows))) - _embed(rows.combine(inside)))
    mu = 1 / max(np.median(rows.scores(_primal(rows, inverse)) / np.maximum(rows.bound, 1e-3)), 1e-3)
    return _State(inside, np.where(rows.free, 0.0, mu / np.where(rows.free, 1.0, inside)), mu * inverse)


def _shape(rows: Rows) -> tuple[int, int]:
    return rows.differences.shape[1], rows.queries.shape[1]


def _schur_complement(rows: Rows, semidefinite: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    """tr(A_k X A_l S^-1) for A_k = [[0, a_k], [a_k^T, 0]]: four products of bilinear forms in Delta and z."""
    d = rows.differences.shape[1]
    left, right, owner = rows.differences, rows.queries, rows.owner
    spread = np.ix_(owner, owner)

    def forms(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        within = left @ matrix[:d, :d] @ left.T
        across = (left @ matrix[:d, d:] @ right.T)[:, owner]
        return within, across, (right @ matrix[d:, d:] @ right.T)[spread]

    (x_left, x_across, x_right), (s_left, s_across, s_right) = forms(semidefinite), forms(inverse)
    mixed = x_across * s_across.T
    return x_left * s_right + s_left * x_right + mixed + mixed.T


def _step(rows: Rows, state: _State) -> _State | None:
    """One predictor-corrector step; None where the linear algebra breaks down."""
    multipliers, slacks, semidefinite = state.multipliers, state.slacks, state.semidefinite
    free, size = rows.free, sum(_shape(rows))
    dual_slack = np.eye(size) - _embed(rows.combine(multipliers))
    safe = np.where(free, 1.0, multipliers)
    try:
        primal_root, dual_root = _inverse_root(semidefinite), _inverse_root(dual_slack)
        # The Newton equations hold for any matrix in the place of S^-1, as long as it is symmetric to the last bit.
        inverse = dual_root.T @ dual_root
        inverse = (inverse + inverse.T) / 2
        schur = _schur_complement(rows, semidefinite, inverse)
        schur.flat[:: len(rows) + 1] += slacks / safe + 1e-15 * np.abs(schur.diagonal())
        factor, failed = dpotrf(schur, lower=1, overwrite_a=1, clean=0)
        if failed:
            return None
    except np.linalg.LinAlgError:
        return None
    mu = (np.vdot(semidefinite, dual_slack) + slacks @ multipliers) / (size + np.count_nonzero(~free))

    def newton(target: float, cross: np.ndarray, cross_slacks: np.ndarray) -> _State:
        # dX = target S^-1 - X + sym(X A(d lambda) S^-1) - cross
        # d slack = (target - cross_slacks - slack d lambda) / lambda - slack
        pull = np.where(free, 0.0, (target - cross_slacks) / safe)
        right = rows.bound + pull - rows.scores(_primal(rows, target * inverse - cross))
        dmultipliers = dpotrs(factor, right, lower=1)[0]
        product = semidefinite @ _embed(rows.combine(dmultipliers)) @ inverse
        dsemidefinite = target * inverse - semidefinite + (product + product.T) / 2 - cross
        return _State(dmultipliers, np.where(free, 0.0, pull - slacks - slacks / safe * dmultipliers), dsemidefinite)

    def lengths(move: _State) -> tuple[float, float, np.ndarray]:
        primal = min(_to_boundary(primal_root, move.semidefinite), _to_zero(slacks, move.slacks, free))
        moved = -_embed(rows.combine(move.multipliers))
        return primal, min(_to_boundary(dual_root, moved), _to_zero(multipliers, move.multipliers, free)), moved

    predictor = newton(0.0, np.zeros_like(inverse), np.zeros(len(rows)))
    primal, dual, moved = lengths(predictor)
    gap = np.vdot(semidefinite + primal * predictor.semidefinite, dual_slack + dual * moved)
    gap += (slacks + primal * predictor.slacks) @ (multipliers + dual * predictor.multipliers)
    centering = min(max(gap / mu / (size + np.count_nonzero(~free)), 1e-6), 1.0) ** 2
    cross = predictor.semidefinite @ moved @ inverse
    move = newton(centering * mu, (cross + cross.T) / 2, predictor.slacks * predictor.multipliers)
    primal, dual = (min(1.0, BACK_OFF * length) for length in lengths(move)[:2])
    if not np.isfinite(move.multipliers).all() or min(primal, dual) < 1e-8:
        return None
    return _State(
        multipliers + dual * move.multipliers,
        slacks + primal * move.slacks,
        semidefinite + primal * move.semidefinite,
    )


def _inverse_root(matrix: np.ndarray) -> np.ndarray:
    """L^-1 of the Cholesky factor L; raises `LinAlgError` for a matrix that is not positive definite."""
    root, failed = dtrtri(np.linalg.cholesky(matrix), lower=1)
    if failed:
        raise np.linalg.LinAlgError
    return root


def _to_boundary(inverse_root: np.ndarray, move: np.ndarray) -> float:
    """The largest step up to 1 / BACK_OFF that keeps matrix + step * move positive semidefinite."""
    lowest = np.linalg.eigvalsh(inverse_root @ move @ inverse_root.T)[0]
    return 1 / max(-lowest, BACK_OFF)


def _to_zero(values: np.ndarray, move: np.ndarray, free: np.ndarray) -> float:
    """The largest step up to 1 / BACK_OFF that keeps the values of inequalities non-negative."""
    ratio = np.where(free, 0.0, -move / np.where(free, 1.0, values))
    return 1 / max(ratio.max(), BACK_OFF)
