"""l_1 and l_infinity max-margin problems: linear programs by HiGHS, refined until they are proved.

maximise t : scores(W) >= t bound, ||W|| <= 1 has a solution whether or not a margin exists, and variables of order 1.
As K x = k, l <= x <= u with x = (W, t, slacks), its solution (x, y) is corrected by programs of the same matrix; their
data are the residuals k - K x, l - x, u - x and the reduced costs c - K^T y, in decimals, magnified to order 1: every
round of HiGHS in double precision then adds its digits (Gleixner, Steffy and Wolter, 2016).
"""

import decimal
from decimal import Decimal
from typing import Any

import numpy as np
import scipy.optimize
import scipy.sparse

from attnlab.margin.certificates import PROVED, PrimalDual, Status, prove, verdict
from attnlab.margin.problems import exponent
from attnlab.margin.rows import Rows
from attnlab.margin.solvers.decimal_arrays import ZERO, Decimals, to_decimal, to_float
from attnlab.margin.solvers.decimals import DIGITS, ExactRows

ROUNDS = 20
"""Of refinement; three to eight are needed."""

MAGNIFIED = Decimal("1e8")
"""Most that a round magnifies more than the one before."""

FAR = 1e10
"""Magnified costs beyond this are cut to it, and magnified bounds are none."""

HIGHS = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10, "time_limit": 2.0}


def solve(rows: Rows, start: PrimalDual) -> PrimalDual:
    """W of least l_1 or l_infinity norm: in double precision, or in decimals where that proves nothing.

    Where HiGHS breaks down in both, the Frobenius solution, judged in this norm.
    """
    program = Program(rows)
    found = _in_double_precision(rows, program)
    if found is not None and verdict(found.certificate, PROVED) == Status.SOLVED:
        return found
    return _in_decimals(rows, program) or found or prove(rows.problem.norm, rows, start.primal, start.dual)


class Program:
    """The program of a problem's unit rows, for W = U - V with U, V >= 0 and sum U + V + rest = 1, or -1 <= W <= 1."""

    def __init__(self, rows: Rows):
        p = exponent(rows.problem.norm)
        dense = (rows.differences[:, :, None] * rows.queries[rows.owner][:, None, :]).reshape(len(rows), -1)
        size, self.inequalities = dense.shape[1], np.flatnonzero(~rows.free)
        self.p, self.shape, self.top = p, (rows.differences.shape[1], rows.queries.shape[1]), rows.top
        slacks = -np.eye(len(rows))[:, self.inequalities]
        count = slacks.shape[1]
        level = -(rows.bound / rows.top)[:, None]
        if p == 1:
            above = np.hstack([dense, -dense, level, slacks, np.zeros((len(rows), 1))])
            below = np.concatenate([np.ones(2 * size), np.zeros(1 + count), np.ones(1)])
            self.matrix, self.right = np.vstack([above, below]), np.append(np.zeros(len(rows)), 1.0)
            self.low, self.high = np.zeros(2 * size + 2 + count), np.full(2 * size + 2 + count, np.inf)
        else:
            self.matrix, self.right = np.hstack([dense, level, slacks]), np.zeros(len(rows))
            self.low, self.high = (
                np.r_[-np.ones(size), np.zeros(1 + count)],
                np.r_[np.ones(size), [np.inf] * (1 + count)],
            )
        self.level = (2 if p == 1 else 1) * size
        self.low[self.level] = -np.inf
        self.cost = np.zeros(len(self.low))
        self.cost[self.level] = -1.0
        self.sparse = scipy.sparse.csc_matrix(self.matrix)

    def direction(self, x: np.ndarray) -> np.ndarray:
        """W of x."""
        if self.p != 1:
            return x[: self.level].reshape(self.shape)
        return (x[: self.level // 2] - x[self.level // 2 : self.level]).reshape(self.shape)

    def primal(self, x: np.ndarray, top: Any) -> np.ndarray:
        """W of x made so large that scores(W) >= bound, the largest of which is `top`; x has a margin."""
        return self.direction(x) * (top / x[self.level])

    def optimum(
        self, cost: np.ndarray, right: np.ndarray, low: np.ndarray, high: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """(x, y) by HiGHS: its simplex, else its interior point, also where they stop early; None where both fail.

        What they are worth is not HiGHS's to say: the certificate judges it.
        """
        for method in ("highs-ds", "highs-ipm"):
            found = scipy.optimize.linprog(
                cost, A_eq=self.sparse, b_eq=right, bounds=np.stack([low, high], 1), method=method, options=HIGHS
            )
            if found.x is not None and found.eqlin.marginals is not None:
                return found.x, found.eqlin.marginals
        return None


def _in_double_precision(rows: Rows, program: Program) -> PrimalDual | None:
    """None where HiGHS breaks down, or finds no margin."""
    found = program.optimum(program.cost, program.right, program.low, program.high)
    if found is None or not found[0][program.level] > 0:
        return None
    inside = found[1][: len(rows)]
    dual = np.where(rows.free, inside, np.maximum(inside, 0))
    return prove(rows.problem.norm, rows, program.primal(found[0], rows.top), dual)


def _in_decimals(rows: Rows, program: Program) -> PrimalDual | None:
    """The same by rounds of refinement, until the gap is proved in decimals; None where HiGHS breaks down."""
    with decimal.localcontext(prec=DIGITS):
        exact = ExactRows(rows.problem)
        right, cost = to_decimal(program.right), to_decimal(program.cost)
        low, high = to_decimal(program.low), to_decimal(program.high)
        x, y = np.full(len(cost), ZERO), np.full(len(right), ZERO)
        scale_x, scale_y, answer = Decimal(1), Decimal(1), None
        for _ in range(ROUNDS):
            missing, reduced = right - _times(program, exact, x), cost - _adjoint(program, exact, y)
            found = program.optimum(
                np.clip(to_float(reduced * scale_y), -FAR, FAR),
                to_float(missing * scale_x),
                _within_reach(to_float((low - x) * scale_x)),
                _within_reach(to_float((high - x) * scale_x)),
            )
            if found is None:
                scale_x, scale_y = max(scale_x / 1000, Decimal(1)), max(scale_y / 1000, Decimal(1))
                continue
            x, y = x + to_decimal(found[0]) / scale_x, y + to_decimal(found[1]) / scale_y
            answer = _answer(rows, program, exact, x, y) or answer
            if answer is not None and verdict(answer.certificate, 1e-14) == Status.SOLVED:
                break
            scale_x = _magnified(scale_x, np.concatenate([low - x, x - high, abs(right - _times(program, exact, x))]))
            scale_y = _magnified(scale_y, _dual_violation(cost - _adjoint(program, exact, y), x, low, high))
        return answer


def _times(program: Program, exact: ExactRows, x: Decimals) -> Decimals:
    """K x."""
    scores = exact.scores(program.direction(x)) - x[program.level] * exact.bound / exact.bound.max()
    slacks = x[program.level + 1 :]
    scores[program.inequalities] -= slacks[: len(program.inequalities)]
    return scores if program.p != 1 else np.append(scores, x[: program.level].sum() + x[-1])


def _adjoint(program: Program, exact: ExactRows, y: Decimals) -> Decimals:
    """K^T y."""
    inside = y[: len(exact.owner)]
    combined = exact.combine(list(range(len(inside))), inside).ravel()
    rest = [-(exact.bound @ inside) / exact.bound.max(), *-inside[program.inequalities]]
    if program.p != 1:
        return np.concatenate([combined, rest])
    return np.concatenate([combined + y[-1], y[-1] - combined, rest, [y[-1]]])


def _within_reach(bounds: np.ndarray) -> np.ndarray:
    return np.where(abs(bounds) > FAR, np.copysign(np.inf, bounds), bounds)


def _magnified(before: Decimal, violations: Decimals) -> Decimal:
    worst = max(violations.max(), Decimal("1e-150"))
    return max(Decimal(1), min(1 / worst, before * MAGNIFIED))


def _dual_violation(reduced: Decimals, x: Decimals, low: Decimals, high: Decimals) -> Decimals:
    """Positive reduced costs stand on lower bounds, negative ones on upper bounds: the smaller of cost and distance."""
    return np.maximum(np.minimum(reduced, x - low), np.minimum(-reduced, high - x))


def _answer(rows: Rows, program: Program, exact: ExactRows, x: Decimals, y: Decimals) -> PrimalDual | None:
    """Of (x, y); None while they prove no margin."""
    inside = np.where(exact.free, y[: len(exact.owner)], np.maximum(y[: len(exact.owner)], ZERO))
    if not (x[program.level] > 0 and exact.bound @ inside > 0):
        return None
    return exact.prove(rows.problem.norm, list(range(len(inside))), inside, program.primal(x, exact.bound.max()))
