"""Other norms near the edge of feasibility, in two hundred decimal digits.

With 1/p + 1/q = 1, M = sum_k lambda_k a_k and W = M^(q-1), entry by entry in an l_p norm, singular value by singular
value in a Schatten norm, the multipliers of the least W with scores(W) >= bound are those of

    minimise f(lambda) = (1/q) ||M||_q^q - bound^T lambda  over  lambda >= 0 (free on equalities),

whose gradient is scores(W) - bound. Newton's method on the rows that hold, one after the other as they are violated, in
lambda for q >= 2 and in (W, lambda) for q < 2; p goes from 2, which `decimals` solves, to where it is wanted. The
nuclear norm is Schatten's for p = 1: at p = 1 + h the gap is at most h times the logarithm of the rank.
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

LONGEST_STAGE = 2.0
"""Factor by which p - 1 changes at once."""

NEARLY_NUCLEAR = 2e-11
"""p - 1 of the Schatten norm that stands for the nuclear one."""

ROUGHLY = Decimal("0.1")
"""Violation of a row, relative to the largest bound, at which p moves on."""

LARGEST = 256
"""Entries of W up to which this is tried: each takes a millisecond or two a step, for its power."""

STEPS = 60
"""Newton steps of a stage, at most; five to fifteen are needed."""

HALVINGS = 30

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
        try:
            *between, last = exponents(p, LONGEST_STAGE)
            for stage in between:
                multipliers = _minimum(exact, powers, stage, multipliers, ROUGHLY).multipliers
            point = _minimum(exact, powers, last, multipliers, SLACK)
            return exact.prove(norm, list(range(len(multipliers))), point.multipliers, point.matrix)
        except decimal.DecimalException:  # a division by zero or an overflow on the way: nothing is proved
            return None


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
    if q < 2:
        return _primal_minimum(exact, q, point, tolerance)
    active = exact.free | (point.multipliers > 0)
    for _ in range(STEPS):
        slacks = exact.scores(point.matrix) - exact.bound
        if max(abs(slacks[active]), default=ZERO) <= tolerance * exact.top:
            if (entering := _violated(exact, active, slacks, tolerance)) is None:
                break
            active[entering] = True
        moving = np.flatnonzero(active)
        move = np.full(len(slacks), ZERO)
        move[moving] = _newton(exact, powers, q, point, moving, slacks[moving])
        lower, emptied = _lower(exact, powers, q, point, move, slacks)
        if lower is None:
            break
        point = lower
        active[emptied] = False
    return point


def _primal_minimum(exact: ExactRows, q: Decimal, point: _Point, tolerance: Decimal) -> _Point:
    """The same for q < 2, where the curvature of f has no bound near an entry 0 of M: Newton's method on W, too.

    W^(p-1) = M and scores(W) = bound on the rows that hold are linearised in (W, lambda), the smooth side of the map.
    """
    p = q / (q - 1)
    multipliers, matrix = point.multipliers, point.matrix
    active = exact.free | (multipliers > 0)
    for _ in range(STEPS):
        combined = exact.combine(list(range(len(multipliers))), multipliers)
        slacks = exact.scores(matrix) - exact.bound
        error = _distance(exact, active, combined, matrix, slacks, p)
        if error <= tolerance:
            if (entering := _violated(exact, active, slacks, tolerance)) is None:
                break
            active[entering] = True
            error = _distance(exact, active, combined, matrix, slacks, p)
        move, turn = _primal_dual_step(exact, active, combined, matrix, slacks, p)
        length, emptied = _until_empty(exact, multipliers, move)
        for _ in range(HALVINGS):
            new = multipliers + length * move
            new[emptied] = ZERO
            turned = matrix + length * turn
            ahead = exact.combine(list(range(len(new))), new)
            after = _distance(exact, active, ahead, turned, exact.scores(turned) - exact.bound, p)
            if after <= (1 - Decimal("1e-4") * length) * error:
                break
            length, emptied = length / 2, []
        else:
            break
        multipliers, matrix = new, turned
        active[emptied] = False
    return _Point(multipliers, matrix, ZERO, None)


def _violated(exact: ExactRows, active: np.ndarray, slacks: Decimals, tolerance: Decimal) -> int | None:
    """Of the rows that are not active the one that is violated most; None where none is."""
    outside = np.where(active, ZERO, slacks)
    worst = int(outside.argmin())
    return worst if outside[worst] < -tolerance * exact.top else None


def _distance(
    exact: ExactRows, active: np.ndarray, combined: Decimals, matrix: Decimals, slacks: Decimals, p: Decimal
) -> Decimal:
    """How far the two conditions are from holding, each relative to its largest term."""
    powers = power(matrix, p - 1)
    stationary = abs(powers - combined).max() / max(abs(powers).max(), abs(combined).max())
    return stationary + max(abs(slacks[active])) / exact.top


def _primal_dual_step(
    exact: ExactRows, active: np.ndarray, combined: Decimals, matrix: Decimals, slacks: Decimals, p: Decimal
) -> tuple[Decimals, Decimals]:
    """dlambda and dW: dW = C (M + dM - W^(p-1)) with C = 1 / ((p-1) |W|^(p-2)), and <a_k, W + dW> = bound_k."""
    sizes = np.maximum(abs(matrix), FLAT * abs(matrix).max())
    compliance = power(sizes, 2 - p) / (p - 1)
    offset = compliance * (combined - power(matrix, p - 1))
    moving = np.flatnonzero(active)
    entries = _dense(exact, moving).reshape(len(moving), -1)
    system = (entries * compliance.ravel()) @ entries.T
    inside = _solved(system, -slacks[moving] - entries @ offset.ravel())
    move = np.full(len(slacks), ZERO)
    move[moving] = inside
    return move, offset + compliance * (inside @ entries).reshape(matrix.shape)


def _until_empty(exact: ExactRows, multipliers: Decimals, move: Decimals) -> tuple[Decimal, list[int]]:
    """The step up to 1 that leaves no multiplier of an inequality below zero, and the row that it empties."""
    falling = np.flatnonzero((move < 0) & ~exact.free)
    if not len(falling):
        return ONE, []
    reach = -multipliers[falling] / move[falling]
    length = min(ONE, *reach)
    return length, [int(falling[reach.argmin()])] if length < 1 else []


def _newton(
    exact: ExactRows, powers: _Power, q: Decimal, point: _Point, moving: np.ndarray, slacks: Decimals
) -> Decimals:
    """The step of the moving multipliers."""
    return -_solved(powers.hessian(point.parts, q, _dense(exact, moving)), slacks)


def _dense(exact: ExactRows, moving: np.ndarray) -> Decimals:
    """The rows a_k themselves, (k, d, e)."""
    return exact.differences[moving][:, :, None] * exact.queries[exact.owner[moving]][:, None, :]


def _solved(matrix: Decimals, right: Decimals) -> Decimals:
    ridge = RIDGE * max(matrix.diagonal())
    return solve_positive(matrix + np.where(np.eye(len(right), dtype=bool), ridge, ZERO), right)


def _lower(
    exact: ExactRows, powers: _Power, q: Decimal, point: _Point, move: Decimals, slacks: Decimals
) -> tuple[_Point | None, list[int]]:
    """A point along the move at which f is lower, or None; and the multiplier of an inequality that it empties."""
    length, first = _until_empty(exact, point.multipliers, move)
    slope = slacks @ move
    for _ in range(HALVINGS):
        moved = point.multipliers + length * move
        moved[first] = ZERO
        found = _point(exact, powers, q, moved)
        if found.value <= point.value + Decimal("1e-4") * length * slope:
            return found, first
        length, first = length / 2, []
    return None, []
