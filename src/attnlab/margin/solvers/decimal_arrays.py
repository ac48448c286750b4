"""Linear algebra in the digits of the decimal context, on small arrays of `Decimal`."""

from decimal import Decimal
from typing import Any

import numpy as np

from attnlab.margin.problems import Norm, dual_exponent, exponent

Decimals = Any
"""An array of `Decimal`, whose kind NumPy's types do not know."""

ZERO: Any = Decimal(0)
ONE: Any = Decimal(1)

to_decimal = np.vectorize(Decimal, otypes=[object])
to_float = np.vectorize(float, otypes=[float])

EQUAL = Decimal("1e-80")
"""Relative distance of singular values that are taken for equal; below it one is taken for zero."""

SWEEPS = 50
"""Of rotations, at most."""


def matrix_norm(matrix: Decimals, norm: Norm) -> Decimal:
    """||matrix|| in `norm`."""
    return singular_values(matrix)[1].sum() if norm == "nuclear" else decimal_norm(matrix, exponent(norm))


def dual_norm(matrix: Decimals, norm: Norm) -> Decimal:
    """The norm dual to `norm`."""
    return singular_values(matrix)[1].max() if norm == "nuclear" else decimal_norm(matrix, dual_exponent(norm))


def decimal_norm(array: Decimals, p: float) -> Decimal:
    """Entrywise l_p norm."""
    sizes = abs(array).ravel()
    largest = sizes.max()
    if p == np.inf or not largest:
        return largest
    if p in (1, 2):
        return sizes.sum() if p == 1 else (sizes @ sizes).sqrt()
    return largest * power(sizes / largest, Decimal(p)).sum() ** (1 / Decimal(p))


def power(array: Decimals, exponent: Decimal) -> Decimals:
    """sign(x) |x|^exponent, 0 at 0."""
    return np.vectorize(lambda x: (abs(x) ** exponent).copy_sign(x) if x else x, otypes=[object])(array)


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


def singular_values(matrix: Decimals) -> tuple[Decimals, Decimals, Decimals]:
    """(left (d, r), values (r,), right (e, r)) of those above zero: Hestenes' one-sided rotations, from the right
    singular vectors in double precision."""
    if matrix.shape[0] < matrix.shape[1]:
        right, values, left = singular_values(matrix.T)
        return left, values, right
    size = abs(matrix).max()
    turn = to_decimal(np.linalg.svd(to_float(matrix / size))[2].T)
    for _ in range(4):  # orthogonal to twice as many digits each time
        turn = turn @ (3 * to_decimal(np.eye(len(turn))) - turn.T @ turn) / 2
    columns, right = matrix @ turn, turn
    for _ in range(SWEEPS):
        if not _rotate(columns, right):
            break
    values = np.array([column.dot(column).sqrt() for column in columns.T])
    kept = values > EQUAL * values.max()
    values = values[kept]
    return columns[:, kept] / values, values, right[:, kept]


def _rotate(columns: Decimals, right: Decimals) -> bool:
    """One sweep over all pairs of columns; whether any was not yet orthogonal."""
    turned = False
    for i in range(columns.shape[1]):
        for j in range(i + 1, columns.shape[1]):
            first, second, product = (columns[:, a] @ columns[:, b] for a, b in ((i, i), (j, j), (i, j)))
            if abs(product) <= EQUAL * EQUAL * (first * second).sqrt():
                continue
            ratio = (second - first) / (2 * product)
            tangent = Decimal(1).copy_sign(ratio) / (abs(ratio) + (1 + ratio * ratio).sqrt())
            cosine = 1 / (1 + tangent * tangent).sqrt()
            for table in (columns, right):
                one, other = table[:, i].copy(), table[:, j].copy()
                table[:, i], table[:, j] = cosine * (one - tangent * other), cosine * (tangent * one + other)
            turned = True
    return turned
