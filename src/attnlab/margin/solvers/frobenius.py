"""Frobenius-norm max-margin problems by an active set, with the Gram matrix of the active rows alone.

On the dual, minimise (1/2) ||sum_k lambda_k a_k||^2 - bound^T lambda over lambda >= 0 (free on equalities), with
the gradient scores(W) - bound at W = sum_k lambda_k a_k. Rows are scaled to unit norm (see `Rows`); for `few_rows`
they need not be.
"""

from collections.abc import Callable, Iterator

import numpy as np
from scipy.linalg.lapack import dposv, dpotrf, dpotrs

from attnlab.margin.certificates import Certificate, PrimalDual, prove
from attnlab.margin.rows import Rows

LinearMap = Callable[[np.ndarray], np.ndarray]

RIDGE = 1e-13
"""Shift of the unit-diagonal Gram matrix that keeps dependent rows factorable; refinement removes it."""

FEW, VERY_FEW = 300, 64
"""Up to so many rows `few_rows` is worth while; up to so many, the first guess of the active ones is the cheapest."""

WELL_CONDITIONED = 1e-12
"""Gap up to which an answer without shifts and with one refinement is taken."""


def combination(rows: Rows, dual: np.ndarray) -> PrimalDual:
    """Of any lambda, with W = sum_k lambda_k a_k."""
    primal = rows.combine(dual)
    return prove("frobenius", rows, primal, dual, combined=primal)


def active_set(rows: Rows, *, steps: int = 480) -> PrimalDual:
    """Projected gradient steps that guess the active rows, then a semismooth Newton method.

    Newton's step solves G_SS lambda_S = bound_S on S = {k: lambda_k - gradient_k > 0}, and stops where S repeats: that
    is the solution. It starts when a burst of gradient steps has changed few active rows. Where that never comes, the
    last iterate.
    """
    state = Descent(rows.normal, rows.bound, np.where(rows.free, -np.inf, 0.0) if rows.any_free else 0.0)
    burst = 16 if 2 * len(rows) <= rows.dimension else 32  # few rows in many dimensions are nearly orthogonal
    while steps > 0:
        active = state.multipliers > 0
        state.run(burst)
        steps -= burst
        if np.count_nonzero((state.multipliers > 0) != active) <= 0.1 * len(rows):
            found, solved = newton(rows, (state.multipliers > 0) | rows.free)
            if solved:
                return found
            burst *= 2
    return combination(rows, state.multipliers)


class Descent:
    """Projected gradient steps on the dual with the two step sizes of Barzilai and Borwein in turn.

    Along the last change s of lambda the Gram matrix has the inverse curvatures s.s / s.Gs and s.Gs / Gs.Gs.
    """

    def __init__(self, normal: LinearMap, bound: np.ndarray, floor: np.ndarray | float = 0.0):
        self.normal, self.floor = normal, floor
        self.multipliers = np.zeros(len(bound))
        self.slope, self.step_size = -bound, 1.0

    def run(self, steps: int) -> None:
        """So many steps, fewer where they come to rest."""
        multipliers, slope, step_size = self.multipliers, self.slope, self.step_size
        for step in range(steps):
            following = np.maximum(multipliers - step_size * slope, self.floor)
            change = following - multipliers
            image = self.normal(change)
            curvature = change.dot(image)
            if not curvature > 0:  # nothing moved, or along a null vector of the Gram matrix
                break
            step_size = curvature / image.dot(image) if step % 2 else change.dot(change) / curvature
            multipliers, slope = following, slope + image
        self.multipliers, self.slope, self.step_size = multipliers, slope, step_size


def newton(rows: Rows, active: np.ndarray, *, steps: int = 12) -> tuple[PrimalDual, bool]:
    """Semismooth Newton steps on the dual from a guess of the active rows, and whether they end at the solution's."""
    multipliers, changes = np.zeros(len(rows)), len(rows) + 1
    too_many = 2 * rows.dimension + 8  # far more rows than can be independent: no guess at all
    for _ in range(steps):
        members = active.nonzero()[0]
        if not 0 < len(members) <= too_many:
            break
        solve = shifted_solver(rows.gram(members))
        multipliers = np.zeros(len(rows))
        multipliers[members] = solve(rows.bound[members])
        scores = rows.normal(multipliers)
        following = _next_active(rows, multipliers, scores)
        changes, before = int(np.count_nonzero(following != active)), changes
        if not changes:
            multipliers[members] += solve((rows.bound - scores)[members])
            return _refined(rows, members, multipliers, solve)
        if changes > before:
            break
        active = following
    return combination(rows, multipliers), False


def _refined(rows: Rows, members: np.ndarray, multipliers: np.ndarray, solve: LinearMap) -> tuple[PrimalDual, bool]:
    """The solution on the active rows without the shift, and whether there is one.

    W gathers its own corrections: its scores are then exact to the rounding of W, not of the larger lambda.
    """
    matrix = rows.combine(multipliers)
    for _ in range(4):
        scores = rows.scores(matrix)
        residual = (rows.bound - scores)[members]
        error = abs(residual).max(initial=0.0)
        if error <= 1e-14 * rows.top:
            break
        change = np.zeros(len(rows))
        change[members] = solve(residual)
        multipliers, matrix = multipliers + change, matrix + rows.combine(change)
    found = prove("frobenius", rows, matrix, multipliers, combined=matrix, scores=scores)
    return found, bool(error <= 1e-9 * rows.top)


def _next_active(rows: Rows, multipliers: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """{k: lambda_k - gradient_k > 0}, where one of the two is zero."""
    noise = 1e-14 * (multipliers.max() + rows.top)
    following = multipliers + (rows.bound - scores) > noise
    return following | rows.free if rows.any_free else following


def shifted_solver(matrix: np.ndarray) -> LinearMap:
    """Solve a positive semidefinite system of unit diagonal, shifted in place just enough for Cholesky to succeed.

    Refining its answers takes the shift away: that is the proximal-point method, which converges for singular systems
    too if they are consistent.
    """
    shift = RIDGE * max(len(matrix), 1)
    while True:
        matrix.flat[:: len(matrix) + 1] += shift
        factor, failed = dpotrf(matrix.T, lower=1, clean=0)  # symmetric: its transpose is LAPACK's order
        if not failed:
            return lambda right: dpotrs(factor, right, lower=1)[0]
        shift *= 100


def few_rows(rows: Rows) -> PrimalDual | None:
    """The max-margin W of inequalities that all demand a margin, for which the rows need not be of norm 1.

    None where the short way does not prove itself.
    """
    if len(rows) > FEW or not rows.all_strict:
        return None
    differences, queries, gram = rows.differences, rows.own_queries, rows.dense_gram
    for guess in _guesses(gram):
        multipliers = _settled(gram, guess)
        if multipliers is not None:
            break
    else:
        return None
    matrix = (multipliers[:, None] * differences).T @ queries
    size, total = np.sqrt(np.vdot(matrix, matrix)), multipliers.sum()
    direction = matrix / size
    margin, bound = ((differences @ direction) * queries).sum(1).min(), size / total
    if multipliers.min() < 0 or not 1 - margin / bound <= WELL_CONDITIONED:
        return None
    certificate = Certificate(margin, bound, np.zeros(()), size / (multipliers @ np.sqrt(gram.diagonal())))
    return PrimalDual(matrix, multipliers, multipliers > 0, certificate)


def _guesses(gram: np.ndarray) -> Iterator[np.ndarray]:
    """Active rows, better and better guessed."""
    if len(gram) <= VERY_FEW:  # one step from equal multipliers, then the rows of less than the mean score
        m, scores = len(gram), gram.sum(0)
        scores = gram @ np.maximum(2 - scores / (scores.sum() / m), 0.0)
        yield scores < scores.sum() / m
    descent = Descent(gram.dot, np.ones(len(gram)))
    descent.step_size = 1 / gram[0, 0]
    for _ in range(4):
        descent.run(20)
        yield descent.multipliers > 0


def _settled(gram: np.ndarray, active: np.ndarray, *, steps: int = 12) -> np.ndarray | None:
    """minimise lambda^T G lambda / 2 - sum lambda over lambda >= 0 by a semismooth Newton method on the active rows.

    None if it does not settle, or meets rows that depend on each other.
    """
    m, ones, changes = len(gram), np.ones(len(gram)), len(gram)
    for _ in range(steps):
        members = active.nonzero()[0]
        if not len(members):
            return None
        factor, part, failed = dposv(gram[members[:, None], members], ones[members], lower=1)
        if failed:
            return None
        multipliers = np.zeros(m)
        multipliers[members] = part
        slopes = gram.dot(multipliers) - 1
        following = multipliers - slopes > WELL_CONDITIONED  # one of the two is 0
        changes, before = int(np.count_nonzero(following != active)), changes
        if not changes:
            multipliers[members] -= dpotrs(factor, slopes[members], lower=1)[0]
            return multipliers
        if changes > before:
            return None
        active = following
    return None
