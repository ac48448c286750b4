"""Frobenius problems near the edge of feasibility, in two hundred decimal digits.

The scores of a maximal margin gamma relative to the rows' norms are differences that cancel to gamma, and the Gram
matrix of the active rows has the condition number gamma^-2: double precision ends at gamma = 1e-7. Here the numbers
of the problem are taken as they are, exactly, and the method of Lawson and Hanson solves

    minimise (1/2) ||sum_k lambda_k a_k||^2 + (1/2) (1 - bound^T lambda)^2  over  lambda >= 0 (free on equalities),

which always has a solution: with rho = 1 - bound^T lambda the max-margin multipliers are lambda / rho if rho > 0, and
rho = gamma^2 / (1 + gamma^2); otherwise lambda is Gordan's certificate. It starts from what double precision guessed,
so that few rows have to be exchanged.
"""

import decimal
from decimal import Decimal
from typing import Any

import numpy as np

from attnlab.margin.certificates import Certificate, PrimalDual, support
from attnlab.margin.problems import MarginProblem, Norm
from attnlab.margin.rows import Rows
from attnlab.margin.solvers.decimal_arrays import (
    ONE,
    ZERO,
    Decimals,
    decimal_norm,
    dual_norm,
    matrix_norm,
    to_decimal,
    to_float,
)

DIGITS = 200
"""Rows that agree to double precision have Gram matrices of condition 1e32, bent by the margin to 1e64; so many digits
are lost, twice that where rows come and go, and scales over forty decades take the rest."""

NO_MARGIN = Decimal("1e-40")
"""rho of a margin of 1e-20 relative to the rows: far below what rounded tokens can tell from none."""

DEPENDENT = Decimal("1e-80")
"""Squared distance of a unit row from the span of the active ones at which it belongs to them."""

SLACK = Decimal("1e-15")
"""Violation of a row, relative to its bound, that is none."""

SIGN_SLACK: Any = Decimal("1e-30")
"""The same of a row that demands a sign only, as a cosine."""

GUESSED = 1e-4
"""Multipliers of a guess that count, relative to the largest."""


class ExactRows:
    """The unit rows a_k = Delta_k z_{o(k)}^T of a problem, and its bounds for them, as decimals."""

    def __init__(self, problem: MarginProblem):
        differences, self.queries = to_decimal(problem.differences), to_decimal(problem.queries)
        self.owner, self.free = np.asarray(problem.owner), np.asarray(problem.equality)
        squared = (differences * differences).sum(1) * (self.queries * self.queries).sum(1)[self.owner]
        scale = np.array([value.sqrt() if value else ONE for value in squared])
        self.differences = differences / scale[:, None]
        self.bound = to_decimal(problem.bound) / scale
        self.top = self.bound.max()
        self.strict = np.asarray(problem.bound) > 0

    def gram(self, members: list[int], k: int) -> Decimals:
        """<a_l, a_k> of the members l."""
        queries = self.queries[self.owner[members]] @ self.queries[self.owner[k]]
        return (self.differences[members] @ self.differences[k]) * queries

    def combine(self, members: list[int], multipliers: Decimals) -> Decimals:
        """sum_k lambda_k a_k."""
        return (multipliers[:, None] * self.differences[members]).T @ self.queries[self.owner[members]]

    def scores(self, matrix: Decimals) -> Decimals:
        """<a_k, W>."""
        return (self.differences * (self.queries @ matrix.T)[self.owner]).sum(1)

    def prove(self, norm: Norm, members: list[int], inside: Decimals, matrix: Decimals) -> PrimalDual:
        """W with the multipliers of some rows, rounded to double precision, and what they prove before that."""
        scores, strict = self.scores(matrix), self.strict
        combined = self.combine(members, inside)
        broken: Any = np.where(self.free, abs(scores), -scores)[~strict]
        broken = max(broken, default=ZERO) / decimal_norm(matrix, 2)
        weight, total = inside[strict[members]].sum(), self.bound[members] @ inside
        margin = (scores[strict] / self.bound[strict]).min() / matrix_norm(matrix, norm)
        upper = dual_norm(combined, norm)
        parts: Any = margin, upper / total, broken, decimal_norm(combined, 2) / weight
        certificate = Certificate(*to_float(np.array(parts)))
        dual = np.zeros(len(self.owner))
        dual[members] = to_float(inside)
        return PrimalDual(to_float(matrix), dual, support(dual, to_float(scores - self.bound), self.free), certificate)


class ActiveRows:
    """The active rows with the inverse of H = G + bound bound^T on them, bordered as rows come and go."""

    def __init__(self, rows: ExactRows, bound: Decimals):
        self.rows, self.bound = rows, bound
        self.members: list[int] = []
        self.multipliers: Decimals = np.zeros(0, object)
        self.inverse: Decimals = np.zeros((0, 0), object)

    def enter(self, k: int, multiplier: Decimal) -> bool:
        """Add row k; not if it depends on the active ones."""
        column = self.rows.gram([*self.members, k], k) + self.bound[[*self.members, k]] * self.bound[k]
        towards = self.inverse @ column[:-1]
        pivot = column[-1] - column[:-1] @ towards
        if pivot <= DEPENDENT:
            return False
        border = np.append(-towards, ONE)
        padded = np.full((len(border), len(border)), ZERO)
        padded[:-1, :-1] = self.inverse
        self.inverse = padded + np.multiply.outer(border, border / pivot)
        self.members.append(k)
        self.multipliers = np.append(self.multipliers, [multiplier])
        return True

    def leave(self, position: int) -> None:
        """Drop the row at a position."""
        column = np.delete(self.inverse[position], position)
        rest = np.delete(np.delete(self.inverse, position, 0), position, 1)
        self.inverse = rest - np.multiply.outer(column, column / self.inverse[position, position])
        self.multipliers = np.delete(self.multipliers, position)
        del self.members[position]

    def settle(self) -> None:
        """Move lambda to the minimum over the active rows; rows whose multiplier reaches 0 on the way leave."""
        while self.members:
            target = self.inverse @ self.bound[self.members]
            free = self.rows.free[self.members]
            falling = np.flatnonzero((target < 0) & ~free)
            if not len(falling):
                self.multipliers = target
                return
            ratios = self.multipliers[falling] / (self.multipliers[falling] - target[falling])
            self.multipliers = self.multipliers + ratios.min() * (target - self.multipliers)
            self.leave(int(falling[ratios.argmin()]))


def solve(rows: Rows, start: PrimalDual) -> PrimalDual:
    """The max-margin W or Gordan's multipliers of a problem, from a guess of the latter (see the module)."""
    with decimal.localcontext(prec=DIGITS):
        exact = ExactRows(rows.problem)
        members, inside, feasible = _multipliers(exact, start.dual)
        matrix = exact.combine(members, inside) if feasible else _any_direction(exact)
        return exact.prove("frobenius", members, inside, matrix)


def frobenius_multipliers(exact: ExactRows, guess: np.ndarray) -> Decimals | None:
    """lambda of all rows from a guess, in the digits of the context; None where the problem is infeasible."""
    members, inside, feasible = _multipliers(exact, guess)
    multipliers = np.full(len(guess), ZERO)
    multipliers[members] = inside
    return multipliers if feasible else None


def _multipliers(exact: ExactRows, guess: np.ndarray) -> tuple[list[int], Decimals, bool]:
    """The rows that hold and their multipliers; Gordan's, and False, where there is no margin."""
    active = _least_hull(exact, exact.bound / exact.top, guess)
    members, inside = active.members, active.multipliers
    level = 1 - (exact.bound[members] @ inside) / exact.top
    return (members, inside * (exact.top / level), True) if level > NO_MARGIN else (members, inside, False)


def _least_hull(exact: ExactRows, bound: Decimals, guess: np.ndarray) -> ActiveRows:
    active, weight = ActiveRows(exact, bound), abs(guess).max(initial=0.0)
    relative = guess / weight if 0 < weight < np.inf else np.zeros(len(guess))
    for k in np.flatnonzero(exact.free | (relative > GUESSED)):
        active.enter(int(k), Decimal(float(relative[k])))
    for _ in range(10 * len(bound)):
        active.settle()
        members = active.members
        level = 1 - bound[members] @ active.multipliers
        if level <= NO_MARGIN:
            break
        matrix = exact.combine(members, active.multipliers)
        slacks = exact.scores(matrix) - level * bound
        allowed = np.where(exact.strict, SLACK * level * bound, SIGN_SLACK * decimal_norm(matrix, 2))
        candidates = np.flatnonzero((slacks < -allowed) & ~exact.free)
        candidates = candidates[~np.isin(candidates, members)]
        order = candidates[np.argsort(to_float(slacks[candidates]), kind="stable")]
        if not any(active.enter(int(k), ZERO) for k in order):
            break
    return active


def _any_direction(exact: ExactRows) -> Decimals:
    """The first row of the problem that is not 0."""
    for k in range(len(exact.owner)):
        row = np.multiply.outer(exact.differences[k], exact.queries[exact.owner[k]])
        if row.any():
            return row
    return row + ONE
