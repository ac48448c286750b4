"""Other norms near the edge of feasibility, in two hundred decimal digits.

With 1/p + 1/q = 1, M = sum_k lambda_k a_k and W = M^(q-1), entry by entry in an l_p norm, singular value by singular
value in a Schatten norm, the multipliers of the least W with scores(W) >= bound are those of

    minimise f(lambda) = (1/q) ||M||_q^q - bound^T lambda  over  lambda >= 0 (free on equalities),

whose gradient is scores(W) - bound. Newton's method on the rows that hold, one after the other as they are violated; p
goes from 2, which `decimals` solves, to where it is wanted. The nuclear norm is Schatten's for p = 1: at p = 1 + h the
gap is at most h times the logarithm of the rank.
"""

import decimal
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, NamedTuple, Protocol

import numpy as np

from attnlab.margin.certificates import PrimalDual
from attnlab.margin.problems import Norm, exponent
from attnlab.margin.rows import Rows
from attnlab.margin.solvers.decimal_arrays import EQUAL, ONE, ZERO, Decimals, power, singular_values, solve_positive
from attnlab.margin.solvers.decimals import DIGITS, SLACK, ExactRows, frobenius_multipliers

LONGEST_STAGE = 2.5
"""Factor by which p - 1 changes at once."""

NEARLY_NUCLEAR = 2e-11
"""p - 1 of the Schatten norm that stands for the nuclear one."""

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
"""Least compliance of an entry, relative to the largest."""


class _Power(Protocol):
    """How powers of a matrix are taken; `parts` is what the Hessian needs of M again."""

    def image(self, combined: Decimals, q: Decimal) -> tuple[Decimals, Decimal, Any]:
        """W = M^(q-1), ||M||_q^q, and the parts."""

    def hessian(self, parts: Any, q: Decimal, rows: Decimals) -> Decimals:
        """Of (1/q) ||M||_q^q along rows (k, d, e): (k, k)."""


class _Entrywise:
    """The parts are |M|."""

    def image(self, combined: Decimals, q: Decimal) -> tuple[Decimals, Decimal, Decimals]:
        matrix = power(combined, q - 1)
        return matrix, (combined * matrix).sum(), abs(combined)

    def hessian(self, parts: Decimals, q: Decimal, rows: Decimals) -> Decimals:
        sizes = np.where(parts > 0, parts, FLAT * parts.max())
        compliance = (q - 1) * power(sizes, q - 2)
        compliance = np.maximum(compliance, FLAT * compliance.max()).ravel()
        entries = rows.reshape(len(rows), -1)
        return (entries * compliance) @ entries.T


class _Spectral:
    """The parts are the singular vectors and values (left (d, r), (r,), right (e, r))."""

    def image(self, combined: Decimals, q: Decimal) -> tuple[Decimals, Decimal, Any]:
        left, values, right = singular_values(combined)
        powers = power(values, q - 1)
        return (left * powers) @ right.T, values @ powers, (left, values, right)

    def hessian(self, parts: Any, q: Decimal, rows: Decimals) -> Decimals:
        # Daleckii and Krein's formula for x -> sign(x) |x|^(q-1) on the eigenvalues +-sigma of [[0, M], [M^T, 0]].
        left, values, right = parts
        powers = power(values, q - 1)
        apart = values[:, None] - values[None, :]
        equal = abs(apart) <= EQUAL * values.max()
        slopes = (q - 1) * power(values, q - 2)
        differences = (powers[:, None] - powers[None, :]) / np.where(equal, ONE, apart)
        differences = np.where(equal, slopes[:, None], differences)
        sums = (powers[:, None] + powers[None, :]) / (values[:, None] + values[None, :])
        same, turned, outside = (differences + sums) / 2, (differences - sums) / 2, powers / values
        images = []
        for row in rows:
            inner = left.T @ row @ right
            moved = left @ (same * inner + turned * inner.T) @ right.T
            beside = (row @ right - left @ inner) * outside @ right.T
            below = left @ ((left.T @ row - inner @ right.T) * outside[:, None])
            images.append((moved + beside + below).ravel())
        return rows.reshape(len(rows), -1) @ np.array(images).T


class _Point(NamedTuple):
    """Multipliers of all rows, W, f, and the parts of M."""

    multipliers: Decimals
    matrix: Decimals
    value: Decimal
    parts: Any


def solve(rows: Rows, start: PrimalDual) -> PrimalDual | None:
    """The answer in the norm of the problem, nuclear or l_p with 1 < p < infinity, from that in Frobenius'; None where
    there are more than `LARGEST` entries, or no answer."""
    norm: Norm = rows.problem.norm
    if start.primal.size > LARGEST:
        return None
    powers, p = (_Spectral(), 1 + NEARLY_NUCLEAR) if norm == "nuclear" else (_Entrywise(), exponent(norm))
    with decimal.localcontext(prec=DIGITS, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN):
        exact = ExactRows(rows.problem)
        multipliers = frobenius_multipliers(exact, start.dual)
        if multipliers is None:
            return None
        *between, last = exponents(p, LONGEST_STAGE)
        for stage in between:
            multipliers = _minimum(exact, powers, stage, multipliers, ROUGHLY).multipliers
        point = _minimum(exact, powers, last, multipliers, SLACK)
        return exact.prove(norm, list(range(len(multipliers))), point.multipliers, point.matrix)


def exponents(p: float, longest: float) -> Sequence[float]:
    """From 2, left out, to p: p - 1 changes by equal factors, of `longest` at most."""
    stages = max(1, int(np.ceil(abs(np.log(p - 1)) / np.log(longest))))
    return list(1 + (p - 1) ** (np.arange(1, stages + 1) / stages))


def _point(exact: ExactRows, powers: _Power, q: Decimal, multipliers: Decimals) -> _Point:
    combined = exact.combine(list(range(len(multipliers))), multipliers)
    matrix, norm, parts = powers.image(combined, q)
    return _Point(multipliers, matrix, norm / q - exact.bound @ multipliers, parts)


def _minimum(exact: ExactRows, powers: _Power, p: float, multipliers: Decimals, tolerance: Decimal) -> _Point:
    """Of f, from near it, up to violations of `tolerance`."""
    q = Decimal(p) / (Decimal(p) - 1)
    point = _point(exact, powers, q, multipliers)
    total = exact.bound @ multipliers
    size = (total / (q * (point.value + total))) ** (1 / (q - 1))  # the least f along the ray
    point = _point(exact, powers, q, multipliers * size)
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
        move[moving] = _newton(exact, powers, q, point, moving, slacks[moving])
        lower, emptied = _lower(exact, powers, q, point, move, slacks)
        if lower is None:
            break
        point = lower
        active[emptied] = False
    return point


def _newton(
    exact: ExactRows, powers: _Power, q: Decimal, point: _Point, moving: np.ndarray, slacks: Decimals
) -> Decimals:
    """The step of the moving multipliers."""
    rows = exact.differences[moving][:, :, None] * exact.queries[exact.owner[moving]][:, None, :]
    hessian = powers.hessian(point.parts, q, rows)
    ridge = RIDGE * max(hessian.diagonal())
    return -solve_positive(hessian + np.where(np.eye(len(moving), dtype=bool), ridge, ZERO), slacks)


def _lower(
    exact: ExactRows, powers: _Power, q: Decimal, point: _Point, move: Decimals, slacks: Decimals
) -> tuple[_Point | None, list[int]]:
    """A point along the move at which f is lower, or None; and the multiplier of an inequality that it empties.

    For q < 2 an entry of M near zero has a curvature that falls so fast that Newton's step goes beyond its place as far
    as it was before it; q - 1 of the step, which minimises the quadratic above f, does not.
    """
    falling = np.flatnonzero((move < 0) & ~exact.free)
    reach = -point.multipliers[falling] / move[falling]
    length = min(ONE, *reach) if len(falling) else ONE
    first = [int(falling[reach.argmin()])] if length < 1 else []
    slope = slacks @ move
    for _ in range(HALVINGS):
        moved = point.multipliers + length * move
        moved[first] = ZERO
        found = _point(exact, powers, q, moved)
        if found.value <= point.value + Decimal("1e-4") * length * slope:
            shorter = _point(exact, powers, q, point.multipliers + (q - 1) * length * move) if q < 2 else found
            return (found, first) if found.value <= shorter.value else (shorter, [])
        length, first = length / 2, []
    return None, []
