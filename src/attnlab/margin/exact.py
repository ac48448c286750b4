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
from dataclasses import dataclass
from decimal import Decimal

import numpy as np

from attnlab.margin.certificates import Certificate
from attnlab.margin.problems import MarginProblem
from attnlab.margin.rows import Rows

DIGITS = 200
"""Rows that agree to double precision have Gram matrices of condition 1e32, bent by the margin to 1e64; so many digits
are lost, twice that where rows come and go, and scales over forty decades take the rest."""

NO_MARGIN = Decimal("1e-40")
"""rho of a margin of 1e-20 relative to the rows: far below what rounded tokens can tell from none."""

DEPENDENT = Decimal("1e-80")
"""Squared distance of a unit row from the span of the active ones at which it belongs to them."""

SLACK = Decimal("1e-15")
"""Violation of a row, relative to its bound, that is none."""

GUESSED = 1e-4
"""Multipliers of a guess that count, relative to the largest."""

to_decimal = np.vectorize(Decimal, otypes=[object])
to_float = np.vectorize(float, otypes=[float])


@dataclass(frozen=True)
class ExactAnswer:
    """lambda, W and its scores in the unit rows of `Rows`, rounded to double; the proof is of what was rounded."""

    multipliers: np.ndarray
    matrix: np.ndarray
    scores: np.ndarray
    proof: Certificate


class ExactRows:
    """The unit rows a_k = Delta_k z_{o(k)}^T of a problem, and its bounds for them, as decimals."""

    def __init__(self, problem: MarginProblem):
        differences, self.queries = to_decimal(problem.differences), to_decimal(problem.queries)
        self.owner, self.free = np.asarray(problem.owner), np.asarray(problem.equality)
        squared = (differences * differences).sum(1) * (self.queries * self.queries).sum(1)[self.owner]
        scale = np.array([value.sqrt() if value else Decimal(1) for value in squared])
        self.differences = differences / scale[:, None]
        self.bound = to_decimal(problem.bound) / scale
        self.strict = np.asarray(problem.bound) > 0

    def gram(self, members: list[int], k: int) -> np.ndarray:
        """<a_l, a_k> of the members l."""
        queries = self.queries[self.owner[members]] @ self.queries[self.owner[k]]
        return (self.differences[members] @ self.differences[k]) * queries

    def combine(self, members: list[int], multipliers: np.ndarray) -> np.ndarray:
        """sum_k lambda_k a_k."""
        return (multipliers[:, None] * self.differences[members]).T @ self.queries[self.owner[members]]

    def scores(self, matrix: np.ndarray) -> np.ndarray:
        """<a_k, W>."""
        return (self.differences * (self.queries @ matrix.T)[self.owner]).sum(1)


class ActiveRows:
    """The active rows with the inverse of H = G + bound bound^T on them, bordered as rows come and go."""

    def __init__(self, rows: ExactRows, bound: np.ndarray):
        self.rows, self.bound = rows, bound
        self.members: list[int] = []
        self.multipliers = np.zeros(0, object)
        self.inverse = np.zeros((0, 0), object)

    def enter(self, k: int, multiplier: Decimal) -> bool:
        """Add row k; not if it depends on the active ones."""
        column = self.rows.gram([*self.members, k], k) + self.bound[[*self.members, k]] * self.bound[k]
        towards = self.inverse @ column[:-1]
        pivot = column[-1] - column[:-1] @ towards
        if pivot <= DEPENDENT:
            return False
        border = np.append(-towards, Decimal(1))
        padded = np.full((len(border), len(border)), Decimal(0))
        padded[:-1, :-1] = self.inverse
        self.inverse = padded + np.multiply.outer(border, border / pivot)
        self.members.append(k)
        self.multipliers = np.append(self.multipliers, multiplier)
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


def exact_margin(problem: MarginProblem, rows: Rows, guess: np.ndarray) -> ExactAnswer:
    """The max-margin W or Gordan's multipliers of a problem, from a guess of its multipliers (see the module)."""
    with decimal.localcontext(prec=DIGITS):
        exact = ExactRows(problem)
        top = exact.bound.max()
        active = _least_hull(exact, exact.bound / top, guess)
        members, inside = active.members, active.multipliers
        level = 1 - active.bound[members] @ inside
        combined = exact.combine(members, inside)
        if level > NO_MARGIN:
            inside, matrix = inside * (top / level), combined * (top / level)
            combined = matrix
        else:
            matrix = _any_direction(exact)
        scores = exact.scores(matrix)
        multipliers = np.zeros(len(rows))
        multipliers[members] = to_float(inside)
        found = to_float(scores)
        if level > NO_MARGIN:
            found[members] = rows.bound[members]
        return ExactAnswer(multipliers, to_float(matrix), found, _proof(exact, active, inside, matrix, combined, scores))


def _least_hull(exact: ExactRows, bound: np.ndarray, guess: np.ndarray) -> ActiveRows:
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
        allowed = np.where(exact.strict, SLACK * level * bound, Decimal("1e-30") * _norm(matrix))
        candidates = np.flatnonzero((slacks < -allowed) & ~exact.free)
        candidates = candidates[~np.isin(candidates, members)]
        order = candidates[np.argsort(to_float(slacks[candidates]), kind="stable")]
        if not any(active.enter(int(k), Decimal(0)) for k in order):
            break
    return active


def _any_direction(exact: ExactRows) -> np.ndarray:
    """The first row of the problem that is not 0."""
    for k in range(len(exact.owner)):
        row = np.multiply.outer(exact.differences[k], exact.queries[exact.owner[k]])
        if row.any():
            return row
    return row + Decimal(1)


def _norm(matrix: np.ndarray) -> Decimal:
    return (matrix * matrix).sum().sqrt()


def _proof(
    exact: ExactRows,
    active: ActiveRows,
    inside: np.ndarray,
    matrix: np.ndarray,
    combined: np.ndarray,
    scores: np.ndarray,
) -> Certificate:
    """`certificates.bounds` before rounding."""
    size, upper, strict = _norm(matrix), _norm(combined), exact.strict
    broken = np.where(exact.free, abs(scores), -scores)[~strict].max(initial=Decimal(0)) / size
    weight = inside[strict[active.members]].sum()
    margin = (scores[strict] / exact.bound[strict]).min() / size
    parts = margin, upper / (exact.bound[active.members] @ inside), broken, upper / weight
    return Certificate(*(np.float64(part) for part in parts))
