"""l_p-norm problems near the edge of feasibility, 1 < p < infinity, in two hundred decimal digits.

With 1/p + 1/q = 1, M = sum_k lambda_k a_k and W = sign(M) |M|^(q-1), the multipliers of the least W with
scores(W) >= bound are those of

    minimise f(lambda) = (1/q) ||M||_q^q - bound^T lambda  over  lambda >= 0 (free on equalities),

whose gradient is scores(W) - bound and whose Hessian sum_ij a_k a_l (q-1) |M|^(q-2). Newton's method on the rows that
hold, one after the other as they are violated; p goes from 2, which `decimals` solves, to where it is wanted.
"""

import decimal
from decimal import Decimal
from typing import NamedTuple

import numpy as np

from attnlab.margin.certificates import PrimalDual
from attnlab.margin.problems import exponent
from attnlab.margin.rows import Rows
from attnlab.margin.solvers.decimals import DIGITS, SLACK, ZERO, Decimals, ExactRows, frobenius_multipliers, power

LONGEST_STAGE = 1.5
"""Factor by which p - 1 changes at once."""

ROUGHLY = Decimal("0.1")
"""Violation of a row, relative to the largest bound, at which p moves on."""

LARGEST = 256
"""Entries of W up to which this is tried: each takes a millisecond or two a step, for its power."""

STEPS = 200
"""Newton steps of a stage, at most."""

HALVINGS = 40

RIDGE = Decimal("1e-100")
"""Added to the Hessian, relative to its diagonal: rows that depend on one another."""

FLAT = Decimal("1e-60")
"""Least compliance, or stiffness, of an entry, relative to the largest."""


class _Point(NamedTuple):
    """Multipliers of all rows, what they combine to, W, and f."""

    multipliers: Decimals
    matrix: Decimals
    value: Decimal


def solve(rows: Rows, start: PrimalDual) -> PrimalDual | None:
    """The answer in the norm of the problem from that in Frobenius'; None where the rows allow none."""
    norm = rows.problem.norm
    with decimal.localcontext(prec=DIGITS):
        exact = ExactRows(rows.problem)
        found = frobenius_multipliers(exact, start.dual)
        if found is None:
            return None
        point = _Point(found, exact.combine(list(range(len(found))), found), ZERO)
        *between, last = exponents(exponent(norm), LONGEST_STAGE)
        for p in between:
            point = _minimum(exact, _conjugate(p), point.multipliers, ROUGHLY)
        point = _minimum(exact, _conjugate(last), point.multipliers, SLACK)
        return exact.prove(norm, list(range(len(found))), point.multipliers, point.matrix)


def exponents(p: float, longest: float) -> np.ndarray:
    """From 2, left out, to p: p - 1 changes by equal factors, of `longest` at most."""
    stages = max(1, int(np.ceil(abs(np.log(p - 1)) / np.log(longest))))
    return 1 + (p - 1) ** (np.arange(1, stages + 1) / stages)


def _conjugate(p: float) -> Decimal:
    return Decimal(p) / (Decimal(p) - 1)


def _point(exact: ExactRows, q: Decimal, multipliers: Decimals) -> _Point:
    combined = exact.combine(list(range(len(multipliers))), multipliers)
    matrix = power(combined, q - 1)
    return _Point(multipliers, matrix, (combined * matrix).sum() / q - exact.bound @ multipliers)


def _minimum(exact: ExactRows, q: Decimal, multipliers: Decimals, tolerance: Decimal) -> _Point:
    """Of f, from near it, up to violations of `tolerance`."""
    point = _point(exact, q, multipliers)
    total = exact.bound @ multipliers
    size = (total / (q * (point.value + total))) ** (1 / (q - 1))  # the least f along the ray
    point = _point(exact, q, multipliers * size)
    active = exact.free | (point.multipliers > 0)
    for _ in range(STEPS):
        slacks = exact.scores(point.matrix) - exact.bound
        if max(abs(slacks[active]), default=ZERO) <= tolerance * exact.top:
            outside = np.where(active, ZERO, slacks)
            worst = int(outside.argmin())
            if outside[worst] >= -tolerance * exact.top:
                break
            active[worst] = True
        moving = np.flatnonzero(active)
        move = np.full(len(slacks), ZERO)
        move[moving] = _newton(exact, q, point, moving, slacks[moving])
        lower, emptied = _lower(exact, q, point, move, slacks)
        if lower is None:
            break
        point = lower
        active[emptied] = False
    return point


def _newton(exact: ExactRows, q: Decimal, point: _Point, moving: np.ndarray, slacks: Decimals) -> Decimals:
    """The step of the moving multipliers."""
    sizes = abs(point.matrix)
    # (q - 1) |M|^(q - 2), of W = |M|^(q - 1)
    compliance = (q - 1) * power(np.where(sizes > 0, sizes, FLAT * sizes.max()), (q - 2) / (q - 1))
    compliance = np.maximum(compliance, FLAT * compliance.max())
    differences, queries = exact.differences[moving], exact.queries[exact.owner[moving]]
    entries = (differences[:, :, None] * queries[:, None, :]).reshape(len(moving), -1)
    hessian = (entries * compliance.ravel()) @ entries.T
    ridge = RIDGE * max(hessian.diagonal())
    return -solve_positive(hessian + np.where(np.eye(len(moving), dtype=bool), ridge, ZERO), slacks)


def _lower(
    exact: ExactRows, q: Decimal, point: _Point, move: Decimals, slacks: Decimals
) -> tuple[_Point | None, list[int]]:
    """A point along the move at which f is lower, or None; and the multiplier of an inequality that it empties."""
    falling = np.flatnonzero((move < 0) & ~exact.free)
    reach = -point.multipliers[falling] / move[falling]
    first = int(falling[reach.argmin()]) if len(falling) else -1
    length = min(Decimal(1), *reach) if len(falling) else Decimal(1)
    empties = length < 1
    slope = slacks @ move
    for _ in range(HALVINGS):
        moved = point.multipliers + length * move
        if empties:
            moved[first] = ZERO
        found = _point(exact, q, moved)
        if found.value <= point.value + Decimal("1e-4") * length * slope:
            return found, [first] * empties
        length, empties = length / 2, False
    return None, []


def solve_positive(matrix: Decimals, right: Decimals) -> Decimals:
    """matrix^-1 right of a positive definite matrix, by elimination."""
    matrix, right = matrix.copy(), right.copy()
    for k in range(len(right)):
        factors = matrix[k + 1 :, k] / matrix[k, k]
        matrix[k + 1 :, k:] -= np.multiply.outer(factors, matrix[k, k:])
        right[k + 1 :] -= factors * right[k]
    for k in reversed(range(len(right))):
        right[k] = (right[k] - matrix[k, k + 1 :] @ right[k + 1 :]) / matrix[k, k]
    return right
