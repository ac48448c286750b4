"""Frobenius-norm max-margin problems by an active set, with the Gram matrix of the active rows alone.

On the dual, minimise (1/2) ||sum_k lambda_k a_k||^2 - bound^T lambda over lambda >= 0 (free on equalities), with
the gradient scores(W) - bound at W = sum_k lambda_k a_k. All rows here are scaled to unit norm (see `Rows`).
"""

from collections.abc import Callable
from math import sqrt

import numpy as np
from scipy.linalg.lapack import dpotrf, dpotrs

from attnlab.margin.rows import Rows

Solver = Callable[[np.ndarray], np.ndarray]

RIDGE = 1e-13
"""Shift of the unit-diagonal Gram matrix that keeps dependent rows factorable; refinement removes it."""


def active_set(rows: Rows, *, burst: int = 16, steps: int = 480) -> tuple[np.ndarray, np.ndarray]:
    """(lambda, W) by accelerated projected gradient steps that guess the active rows, then a semismooth Newton method.

    Newton's step solves G_SS lambda_S = bound_S on S = {k: lambda_k - gradient_k > 0}, and stops where S repeats: that
    is the solution. It starts when a burst of gradient steps has changed few active rows. Returns the last iterate: the
    caller certifies it.
    """
    if len(rows) <= min(64, rows.dimension):  # so few that Newton's method can begin with all of them
        multipliers, matrix, solved = newton(rows, np.ones(len(rows), bool))
        if solved:
            return multipliers, matrix
    state = _Descent(rows)
    # Newton's method is cheap for few rows: it is tried early there.
    few_changes = (0.1 if len(rows) <= 512 else 0.02) * len(rows)
    while steps > 0:
        active = state.active
        state.run(burst)
        steps -= burst
        if np.count_nonzero(state.active != active) <= few_changes:
            multipliers, matrix, solved = newton(rows, state.active)
            if solved:
                return multipliers, matrix
            burst *= 2
    return state.multipliers, rows.combine(state.multipliers)


class _Descent:
    """Nesterov's projected gradient method on the dual, restarted where it points uphill (arXiv 1204.3982)."""

    def __init__(self, rows: Rows):
        self.rows = rows
        self.floor = np.where(rows.free, -np.inf, 0.0) if rows.any_free else 0.0
        self.step_size = 1 / _largest_eigenvalue(rows)
        self.multipliers = self.ahead = np.zeros(len(rows))
        self.pace = 1.0

    @property
    def active(self) -> np.ndarray:
        return (self.multipliers > 0) | self.rows.free

    def run(self, steps: int) -> None:
        for _ in range(steps):
            slope = self.rows.normal(self.ahead) - self.rows.bound
            new = np.maximum(self.ahead - self.step_size * slope, self.floor)
            change = new - self.multipliers
            if slope @ change > 0:
                self.pace = 1.0
            pace = (1 + sqrt(1 + 4 * self.pace * self.pace)) / 2
            self.ahead = new + ((self.pace - 1) / pace) * change
            self.multipliers, self.pace = new, pace


def _largest_eigenvalue(rows: Rows) -> float:
    """An upper estimate of the top eigenvalue of the Gram matrix: power iterations, and 5 per cent."""
    vector, size = rows.bound / np.linalg.norm(rows.bound), 1.0
    for _ in range(6):
        vector = rows.normal(vector)
        size = float(np.linalg.norm(vector))
        vector /= size
    return 1.05 * size


def newton(rows: Rows, active: np.ndarray, *, steps: int = 12) -> tuple[np.ndarray, np.ndarray, bool]:
    """Semismooth Newton steps on the dual from a guess of the active rows: lambda, W, and whether they solve it."""
    multipliers, changes = np.zeros(len(rows)), len(rows) + 1
    for _ in range(steps):
        members = active.nonzero()[0]
        if len(members) > 2 * rows.dimension + 8:  # far more rows than can be independent: no guess at all
            break
        gram = rows.gram(members)
        solve = shifted_solver(gram)
        multipliers = np.zeros(len(rows))
        multipliers[members] = solve(rows.bound[members])
        following = _next_active(rows, active, multipliers, rows.normal(multipliers))
        changes, before = int(np.count_nonzero(following != active)), changes
        if not changes:
            return _refined(rows, active, members, multipliers, solve)
        if changes > before:
            break
        active = following
    return multipliers, rows.combine(multipliers), False


def _refined(
    rows: Rows, active: np.ndarray, members: np.ndarray, multipliers: np.ndarray, solve: Solver
) -> tuple[np.ndarray, np.ndarray, bool]:
    """The solution on the active rows without the shift, and whether it is the solution of all.

    W gathers its own corrections: its scores are then exact to the rounding of W, not of the larger lambda.
    """
    matrix = rows.combine(multipliers)
    for _ in range(4):
        scores = rows.scores(matrix)
        residual = (rows.bound - scores)[members]
        error = abs(residual).max(initial=0.0)
        if error <= 1e-15 * rows.bound.max():
            break
        change = np.zeros(len(rows))
        change[members] = solve(residual)
        multipliers, matrix = multipliers + change, matrix + rows.combine(change)
    solved = error <= 1e-9 * rows.bound.max() and (_next_active(rows, active, multipliers, scores) == active).all()
    return multipliers, matrix, bool(solved)


def _next_active(rows: Rows, active: np.ndarray, multipliers: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """{k: lambda_k - gradient_k > 0}, where one of the two is zero."""
    noise = 1e-14 * (1 + abs(multipliers).max())
    return np.where(active, (multipliers > 0) | rows.free, scores < rows.bound - noise)


def shifted_solver(matrix: np.ndarray) -> Solver:
    """Solve a positive semidefinite system of unit diagonal, shifted just enough for Cholesky to succeed.

    Refining its answers takes the shift away: that is the proximal-point method, which converges for singular systems
    too if they are consistent.
    """
    shift = RIDGE * max(len(matrix), 1)
    while True:
        shifted = matrix.copy()
        shifted.flat[:: len(matrix) + 1] += shift
        factor, failed = dpotrf(shifted, lower=1, overwrite_a=1, clean=0)
        if not failed:
            return lambda right: dpotrs(factor, right, lower=1)[0]
        shift *= 100
