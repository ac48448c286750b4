"""n beta E[L(w) - L(w*)] at finite n by quadrature, where the integral has few dimensions: what sampling is held to."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnlab.checks import check_range

LOW, HIGH = -30.0, 4.0
"""Logarithms of the coordinates at both ends: below, a volume of 1e-13; above, a localization of exp(-gamma e^8 /
2)."""

SPACING = {1: 0.01, 2: 0.03, 3: 0.15}
"""Of the trapezoidal rule in the logarithms, by their number; it converges faster than any power."""


def crossing_energy(exponents: Sequence[int], scale: float, localization: float = 1.0) -> float:
    """E[scale K(w)] under exp(-scale K - localization/2 ||w||^2), with K = prod_i w_i^(2 k_i) of up to three factors.

    Example:
        >>> from attnlab.degeneracy.quadrature import crossing_energy
        >>> round(crossing_energy((1,), 1e6), 4)  # half, of a regular direction
        0.5
    """
    check_range("len(exponents)", len(exponents), 1, 3, "The grid has an axis for each.")
    logs = _grid(len(exponents))
    power = scale * np.exp(sum(2 * k * log for k, log in zip(exponents, logs, strict=True)))
    squares = sum(np.exp(2 * log) for log in logs)
    return _mean(power, sum(logs) - power - localization / 2 * squares)


def two_layer_energy(inputs: int, outputs: int, hidden: int, scale: float, localization: float = 1.0) -> float:
    """E[scale ||B A||^2] under exp(-scale ||B A||^2 - localization/2 (||A||^2 + ||B||^2)), A (hidden, inputs).

    B is Gaussian given A: it is integrated out, which leaves the singular values s of A, of density prod |s_i^2 -
    s_j^2| prod s_i^|hidden - inputs|, and min(hidden, inputs) is at most 2.
    """
    fewer, more = sorted((hidden, inputs))
    check_range("min(hidden, inputs)", fewer, 1, 2, "The grid has an axis for each singular value.")
    logs = _grid(fewer)
    squares = [np.exp(2 * log) for log in logs]
    stiffness = [scale * square + localization / 2 for square in squares]
    energy = sum(outputs / 2 * scale * square / stiff for square, stiff in zip(squares, stiffness, strict=True))
    weight = sum(
        (more - fewer + 1) * log - localization / 2 * square - outputs / 2 * np.log(stiff)
        for log, square, stiff in zip(logs, squares, stiffness, strict=True)
    )
    if fewer == 2:
        with np.errstate(divide="ignore"):
            weight = weight + np.log(np.abs(squares[0] - squares[1]))
    return _mean(energy, weight)


def _grid(axes: int) -> list[NDArray[np.float64]]:
    """Logarithms of each coordinate, to be broadcast against one another."""
    line = np.arange(LOW, HIGH, SPACING[axes])
    return list(np.meshgrid(*[line] * axes, indexing="ij", sparse=True))


def _mean(values: Any, logs: Any) -> float:
    weights = np.exp(logs - np.max(logs))
    return float(np.sum(values * weights) / np.sum(weights))
