"""Nuclear-norm max-margin problems: a primal-dual interior point whose linear algebra keeps the rows' structure.

The dual problem, maximise bound^T lambda over ||M||_op <= 1 with M = sum_k lambda_k a_k, lambda >= 0, is semidefinite:

    S = [[1, -M], [-M^T, 1]] >= 0.     Its multiplier X >= 0 satisfies 2 <a_k, X_12> = bound_k + slack_k,

so W = 2 X_12 is the primal solution, and ||W||_* <= tr X. The method is that of Helmberg, Kojima and Monteiro with
Mehrotra's predictor-corrector, from the solution of the Frobenius problem, where M is W. With a_k = Delta_k z_k^T its
Schur complement is made of products of small bilinear forms, and a working set keeps it to the rows that matter. Once
rank and active rows show, Newton's method on these alone ends it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.linalg.lapack import dgesv, dpotrf, dpotrs, dtrtri

from attnlab.margin.certificates import PrimalDual, Status, prove, verdict
from attnlab.margin.rows import Rows
from attnlab.margin.solvers import decimal_norms


@dataclass(frozen=True)
class _State:
    """lambda, the slacks of its rows (0 on equalities) and the semidefinite multiplier X."""

    multipliers: np.ndarray
    slacks: np.ndarray
    semidefinite: np.ndarray


class _Move(NamedTuple):
    """A step of the state, and of M = sum_k lambda_k a_k."""

    multipliers: np.ndarray
    slacks: np.ndarray
    semidefinite: np.ndarray
    combined: np.ndarray


BACK_OFF = 0.98
"""Steps stop at this part of the way to the boundary."""

SHRINK = 0.9
"""Factor between the step lengths that are tried."""

START_MU, START_RADIUS = 0.1, 0.9
"""The method starts at lambda_k slack_k = START_MU times its mean at the Frobenius solution's value, from multipliers
with ||M||_op = START_RADIUS."""

CLEAR = 2e-3
"""Error at which the rank of W and the active rows are tried first."""

FINISH_UP_TO = 900
"""Number of unknowns up to which Newton's method on them is cheaper than steps of the interior point."""

FINISHED = 1e-11
"""Gap and violation of what it must find."""

RIDGE = 1e-8
"""See `_finishing_step`."""

NEAR, ROUNDING = 1e-6, 1e-13
"""See `_mended`: of the largest bound."""

ENOUGH = 1e-8
"""Gap up to which an answer in double precision is taken."""

WORKING_SET_ABOVE = 400
"""Up to so many rows all of them are taken at once."""


def solve(rows: Rows, start: PrimalDual) -> PrimalDual:
    """W of least nuclear norm with scores(W) >= bound, from the Frobenius solution; by decimals where double precision
    does not prove it to `ENOUGH`."""
    matrix, multipliers = _working_set(rows, start.dual)
    found = prove("nuclear", rows, matrix, multipliers)
    mended = _mended(rows, matrix)
    if mended is not None:
        found = max(found, prove("nuclear", rows, mended, multipliers), key=lambda each: each.certificate.margin)
    if verdict(found.certificate, ENOUGH) == Status.SOLVED:
        return found
    return decimal_norms.solve(rows, start) or found


def _mended(rows: Rows, matrix: np.ndarray) -> np.ndarray | None:
    """W with the least change that gives every near row its bound, and ROUNDING of the largest bound beyond it; None
    where no bound is missed.

    The method's violations are a small part of the largest bound, and may be many times a small one, which a margin,
    the least score over its bound, does not forgive. The change costs as small a part of the norm.
    """
    short = rows.bound - rows.scores(matrix)
    if (short <= 1e-12 * rows.bound)[~rows.free].all() or not np.isfinite(short).all():
        return None
    near = np.flatnonzero((short >= -NEAR * rows.top) | rows.free)
    members = rows.members(near)
    queries = members.queries[members.owner]
    gram = (members.differences @ members.differences.T) * (queries @ queries.T)
    wanted = np.where(members.free, short[near], np.maximum(short[near], 0.0) + ROUNDING * rows.top)
    return matrix + members.combine(np.linalg.lstsq(gram, wanted)[0])


def _working_set(rows: Rows, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(W, lambda) from the multipliers of the Frobenius problem.

    Many rows: solve for those with the least scores, add the ones this leaves violated, and repeat.
    """
    if len(rows) <= WORKING_SET_ABOVE:
        return _interior_point(rows, start)
    scores = rows.scores(rows.combine(start))
    working = rows.free | (scores <= 1.3 * rows.bound)
    multipliers = start
    while True:
        members = rows.members(np.flatnonzero(working))
        matrix, inside = _interior_point(members, multipliers[working])
        multipliers = np.zeros(len(rows))
        multipliers[working] = inside
        scores = rows.scores(matrix)
        if not (~working & (scores < rows.bound * (1 - 1e-10))).any():
            return matrix, multipliers
        working |= scores <= 1.1 * rows.bound


def _interior_point(
    rows: Rows, start: np.ndarray, *, tolerance: float = 1e-9, steps: int = 60
) -> tuple[np.ndarray, np.ndarray]:
    """(W, lambda) of all the rows: the first iterate of duality gap and infeasibility `tolerance`, or the best."""
    queries = rows.queries[rows.owner]
    state = _warm_start(rows, start)
    best, stalled, clear = (np.inf, state), 0, CLEAR
    for _ in range(steps):
        moved = _step(rows, queries, state)
        if moved is None:
            break
        state = moved
        error = _error(rows, state)
        stalled = 0 if error < best[0] else stalled + 1
        best = min(best, (error, state), key=lambda entry: entry[0])
        if error <= tolerance or stalled > 3:
            break
        if error <= clear:
            finished = _finish(rows, _primal(rows, state.semidefinite), state.multipliers, state.slacks)
            if finished is not None:
                return finished
            clear = error / 10
    return _primal(rows, best[1].semidefinite), best[1].multipliers


def _finish(
    rows: Rows, matrix: np.ndarray, multipliers: np.ndarray, slacks: np.ndarray, *, steps: int = 8
) -> tuple[np.ndarray, np.ndarray] | None:
    """(W, lambda) by Newton's method, once rank and active rows S of a near solution are clear; None if they are not.

    M^T W = (W^T W)^(1/2) at the solution. With W = M Q Q^T (derived here) it reads

        Q = M^T M Q,    <a_k, M Q Q^T> = bound_k for k in S,    M = sum_{k in S} lambda_k a_k,

    a system in Q, of r columns, and lambda_S alone.
    """
    _, sizes, right = np.linalg.svd(matrix, full_matrices=False)
    bent = 1 - np.linalg.svd(rows.combine(multipliers), compute_uv=False)
    rank = int(np.count_nonzero(sizes / sizes[0] > bent))
    members = np.flatnonzero((multipliers / multipliers.max() > slacks / slacks.max()) | rows.free)
    if not len(members) or rank * right.shape[1] + len(members) > FINISH_UP_TO:
        return None
    factor = right[:rank].T * np.sqrt(sizes[:rank])
    active, inside, size = rows.members(members), multipliers[members], np.inf
    for _ in range(steps):
        before, (factor, inside, size) = size, _finishing_step(active, factor, inside)
        if not size < before:
            return None
        if size < 1e-7:  # before a step that squares it
            break
    multipliers = np.zeros(len(rows))
    multipliers[members] = inside
    combined = rows.combine(multipliers)
    matrix = combined @ factor @ factor.T
    return (matrix, multipliers) if _is_solution(rows, matrix, multipliers, combined, factor) else None


def _is_solution(
    rows: Rows, matrix: np.ndarray, multipliers: np.ndarray, combined: np.ndarray, factor: np.ndarray
) -> bool:
    """Weak duality with ||W||_* <= ||M||_op tr Q Q^T, and the signs."""
    slacks = rows.scores(matrix) - rows.bound
    violated = np.where(rows.free, np.abs(slacks), -slacks).max()
    size = np.linalg.svd(combined, compute_uv=False)[0]
    gap = 1 - rows.bound @ multipliers / (size**2 * np.vdot(factor, factor))
    wrong = (multipliers < 0) & ~rows.free
    return bool(gap <= FINISHED and violated <= FINISHED * rows.top and not wrong.any())


def _finishing_step(active: Rows, factor: np.ndarray, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Q and lambda_S after Newton's step, and the residual's relative size before it.

    The derivative of the system is symmetric up to a sign. Q may turn by any rotation from the right: RIDGE makes the
    derivative regular in these directions, in which the residual has no part.
    """
    (e, rank), queries = factor.shape, active.queries[active.owner]
    combined, turned = active.combine(inside), e * rank
    images, projected = active.differences @ (combined @ factor), queries @ factor  # (M Q)^T Delta_k and Q^T z_k
    bend = combined.T @ combined
    off_factor, off_bound = factor - bend @ factor, (images * projected).sum(1) - active.bound
    # <a_k, M Q Q^T> by Q: (M^T Delta_k) (Q^T z_k)^T + z_k (Q^T M^T Delta_k)^T
    slopes = (active.differences @ combined)[:, :, None] * projected[:, None] + queries[:, :, None] * images[:, None]
    system = np.zeros((turned + len(inside), turned + len(inside)))
    for column in range(rank):
        system[column:turned:rank, column:turned:rank] = np.eye(e) * (1 + RIDGE) - bend
    system[turned:, :turned] = slopes.reshape(len(inside), turned)
    system[:turned, turned:] = system[turned:, :turned].T
    system[turned:, turned:] = (active.differences @ active.differences.T) * -(projected @ projected.T)
    step = dgesv(system, np.concatenate([off_factor.ravel(), off_bound]))[2]
    size = max(abs(off_factor).max() / abs(factor).max(), abs(off_bound).max() / active.top)
    return factor - step[:turned].reshape(e, rank), inside + step[turned:], float(size)


def _error(rows: Rows, state: _State) -> float:
    """The larger of the relative duality gap and the violation of the rows, in their own scale."""
    value = rows.bound @ state.multipliers
    violated = rows.bound + state.slacks - rows.scores(_primal(rows, state.semidefinite))
    return float(max(state.semidefinite.trace() / value - 1, abs(violated).max() / rows.bound.max()))


def _primal(rows: Rows, semidefinite: np.ndarray) -> np.ndarray:
    d = rows.differences.shape[1]
    return 2 * semidefinite[:d, d:]


def _embed(matrix: np.ndarray) -> np.ndarray:
    """[[0, M], [M^T, 0]]."""
    d, e = matrix.shape
    embedded = np.zeros((d + e, d + e))
    embedded[:d, d:], embedded[d:, :d] = matrix, matrix.T
    return embedded


def _warm_start(rows: Rows, start: np.ndarray) -> _State:
    """The Frobenius solution W = sum_k lambda_k a_k = U diag(s) V^T, scaled to ||M||_op = START_RADIUS, made central.

    S has the eigenvectors (u, +-v) with eigenvalues 1 -+ START_RADIUS s / s_max; X is given the same ones, its
    eigenvalues s and 0 raised to mu / those of S: nearly feasible, nearly central.
    """
    matrix, free = rows.combine(start), rows.free
    left, sizes, right = np.linalg.svd(matrix, full_matrices=False)
    (d, e), m = matrix.shape, len(rows)
    mu = START_MU * sizes.sum() / (m + e)
    dual = START_RADIUS * sizes / sizes[0]
    plus, minus = np.maximum(sizes, mu / (1 - dual)), mu / (1 + dual)
    semidefinite = _embed((left * (plus - minus) / 2) @ right)
    semidefinite[:d, :d] = (left * ((plus + minus) / 2 - mu)) @ left.T
    semidefinite[d:, d:] = (right.T * ((plus + minus) / 2 - mu)) @ right
    semidefinite.flat[:: d + e + 1] += mu
    scaled = start * START_RADIUS / sizes[0]
    slacks = np.maximum(rows.scores(matrix) - rows.bound, mu / max(np.abs(scaled).mean(), 1e-300))
    inside = np.where(free, scaled, np.maximum(scaled, mu / slacks))
    inside /= max(np.linalg.norm(rows.combine(inside), 2) / 0.95, 1.0)
    slacks = np.maximum(rows.scores(matrix) - rows.bound, mu / np.where(free, 1.0, inside))
    return _State(inside, np.where(free, 0.0, slacks), semidefinite)


def _schur_complement(rows: Rows, right: np.ndarray, semidefinite: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    """tr(A_k X A_l S^-1) for A_k = [[0, a_k], [a_k^T, 0]]: four products of bilinear forms in Delta and z."""
    left = rows.differences
    d = left.shape[1]

    def forms(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        within = left @ matrix[:d, :d] @ left.T
        return within, left @ matrix[:d, d:] @ right.T, right @ matrix[d:, d:] @ right.T

    (x_left, x_across, x_right), (s_left, s_across, s_right) = forms(semidefinite), forms(inverse)
    mixed = x_across * s_across.T
    return x_left * s_right + s_left * x_right + mixed + mixed.T


def _step(rows: Rows, queries: np.ndarray, state: _State) -> _State | None:
    """One predictor-corrector step; None where the linear algebra breaks down."""
    multipliers, slacks, semidefinite = state.multipliers, state.slacks, state.semidefinite
    free = rows.free
    combined = rows.combine(multipliers)
    inverse = _inverse_dual_slack(combined)
    if inverse is None:
        return None
    degree = len(inverse) + len(rows) - np.count_nonzero(free)
    safe = np.where(free, 1.0, multipliers) if rows.any_free else multipliers
    schur = _schur_complement(rows, queries, semidefinite, inverse)
    schur.flat[:: len(rows) + 1] += slacks / safe + 1e-15 * np.abs(schur.diagonal())
    factor, failed = dpotrf(schur, lower=1, overwrite_a=1, clean=0)
    if failed:
        return None
    mu = (_complementarity(semidefinite, combined) + slacks @ multipliers) / degree

    def newton(target: float, cross: np.ndarray | float, cross_slacks: np.ndarray | float) -> _Move:
        # dX = target S^-1 - X + sym(X A(d lambda) S^-1) - cross
        # d slack = (target - cross_slacks - slack d lambda) / lambda - slack
        pull = _without(free, rows.any_free, (target - cross_slacks) / safe)
        pushed = target * inverse - cross
        dmultipliers = dpotrs(factor, rows.bound + pull - rows.scores(_primal(rows, pushed)), lower=1)[0]
        dcombined = rows.combine(dmultipliers)
        product = _sandwich(semidefinite, dcombined, inverse)
        dsemidefinite = pushed - semidefinite + (product + product.T) / 2
        dslacks = _without(free, rows.any_free, pull - slacks - slacks / safe * dmultipliers)
        return _Move(dmultipliers, dslacks, dsemidefinite, dcombined)

    positive = slacks + free  # 1 on equalities, whose slacks do not move

    def lengths(move: _Move) -> tuple[float, float]:
        primal = _definite_until(semidefinite, move.semidefinite, _to_zero(positive, move.slacks))
        inequalities = _without(free, rows.any_free, move.multipliers)
        return primal, _contraction_until(combined, move.combined, _to_zero(safe, inequalities))

    predictor = newton(0.0, 0.0, 0.0)
    primal, dual = lengths(predictor)
    gap = _complementarity(semidefinite + primal * predictor.semidefinite, combined + dual * predictor.combined)
    gap += float((slacks + primal * predictor.slacks) @ (multipliers + dual * predictor.multipliers))
    centering = min(max(gap / mu / degree, 1e-6), 1.0) ** 2
    cross = -_sandwich(predictor.semidefinite, predictor.combined, inverse)
    move = newton(centering * mu, (cross + cross.T) / 2, predictor.slacks * predictor.multipliers)
    if not np.isfinite(move.multipliers).all():
        return None
    primal, dual = (min(1.0, BACK_OFF * length) for length in lengths(move))
    if min(primal, dual) < 1e-8:
        return None
    return _State(
        multipliers + dual * move.multipliers,
        slacks + primal * move.slacks,
        semidefinite + primal * move.semidefinite,
    )


def _complementarity(semidefinite: np.ndarray, combined: np.ndarray) -> float:
    """tr(X S)."""
    d = len(combined)
    return float(semidefinite.trace() - 2 * np.vdot(semidefinite[:d, d:], combined))


def _sandwich(left: np.ndarray, matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    """left [[0, M], [M^T, 0]] right."""
    d = len(matrix)
    return (left[:, :d] @ matrix) @ right[d:] + left[:, d:] @ (matrix.T @ right[:d])


def _inverse_dual_slack(combined: np.ndarray) -> np.ndarray | None:
    """S^-1 = [[1 + M R M^T, M R], [R M^T, R]] with R = (1 - M^T M)^-1; None unless ||M||_op < 1.

    Symmetric to the last bit, as the Newton equations need.
    """
    d, e = combined.shape
    factor, failed = dpotrf(np.eye(e) - combined.T @ combined, lower=1)
    if failed:
        return None
    root = dtrtri(factor, lower=1, overwrite_c=1)[0]
    tall = np.empty((d + e, e))  # [M; 1] L^-T with R = L^-T L^-1
    tall[:d], tall[d:] = combined @ root.T, root.T
    inverse = tall @ tall.T
    inverse.flat[: d * (d + e) : d + e + 1] += 1.0
    return (inverse + inverse.T) / 2


def _definite_until(matrix: np.ndarray, move: np.ndarray, length: float) -> float:
    """The first of length, SHRINK length, ... that keeps matrix + length * move positive definite."""
    while length > 1e-8 and dpotrf((matrix + length * move).T, lower=1, overwrite_a=1, clean=0)[1]:
        length *= SHRINK
    return length


def _contraction_until(combined: np.ndarray, move: np.ndarray, length: float) -> float:
    """The first of length, SHRINK length, ... that keeps ||M + length * move||_op < 1."""
    eye = np.eye(combined.shape[1])
    while length > 1e-8:
        ahead = combined + length * move
        if not dpotrf((eye - ahead.T @ ahead).T, lower=1, overwrite_a=1, clean=0)[1]:
            break
        length *= SHRINK
    return length


def _to_zero(values: np.ndarray, move: np.ndarray) -> float:
    """The largest step up to 1 / BACK_OFF that keeps positive values non-negative."""
    return 1 / max(-(move / values).min(), BACK_OFF)


def _without(free: np.ndarray, any_free: bool, values: np.ndarray) -> np.ndarray:
    """`values`, 0 on equalities."""
    return np.where(free, 0.0, values) if any_free else values
