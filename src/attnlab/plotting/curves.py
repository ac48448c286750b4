"""Curves: means or medians over seeds with a band, and lines of a given slope in log-log axes."""

from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes


def geometric_band(
    axes: Axes,
    abscissae: Float[np.ndarray, "points"],
    values: Float[np.ndarray, "seeds points"],
    color: str,
    linestyle: str = "-",
    label: str | None = None,
) -> None:
    """Geometric mean over the seeds, and one standard deviation of the logarithm to either side.

    Points where a seed's value is zero or less are left out.
    """
    positive = np.all(values > 0, axis=0)
    if not positive.any():
        return
    logs, abscissae = np.log(values[:, positive]), abscissae[positive]
    middle, spread = np.mean(logs, axis=0), np.std(logs, axis=0)
    axes.plot(abscissae, np.exp(middle), color=color, linestyle=linestyle, label=label)
    axes.fill_between(abscissae, np.exp(middle - spread), np.exp(middle + spread), color=color, alpha=0.2, linewidth=0)


def range_band(
    axes: Axes,
    abscissae: Float[np.ndarray, "points"],
    values: Float[np.ndarray, "points seeds"],
    color: str,
    label: str | None = None,
    linestyle: str = "-",
) -> None:
    """The median over the seeds, and the range of all of them."""
    axes.fill_between(abscissae, values.min(axis=1), values.max(axis=1), color=color, alpha=0.2, linewidth=0)
    axes.plot(abscissae, np.median(values, axis=1), linestyle, color=color, label=label)


def power_guide(axes: Axes, line: Float[np.ndarray, "points"], start: float, exponent: float, symbol: str) -> None:
    """A dotted line of slope `exponent` over the abscissae `line`, from the value `start`, labelled with the power."""
    values = start * (line / line[0]) ** exponent
    axes.plot(line, values, ":", color="black", linewidth=1, zorder=0)
    axes.annotate(
        f"${symbol}^{{{exponent:g}}}$", (line[-1], values[-1]), (3, -9), textcoords="offset points", fontsize=8
    )


def points_with_bars(
    axes: Axes,
    places: np.ndarray,
    values: Float[np.ndarray, "points"],
    errors: Float[np.ndarray, "points"],
    style: str,
    **options: Any,
) -> None:
    """Positive values with bars of two standard errors; `options` are those of `errorbar`.

    A bar that reaches zero stops at a tenth of the value: on a logarithmic axis it cannot be drawn to its end.
    """
    below = np.minimum(2 * errors, 0.9 * values)
    axes.errorbar(places, values, (below, 2 * errors), fmt=style, capsize=2, **options)


def density_on_logarithm(
    axes: Axes,
    grid: Float[np.ndarray, "points"],
    mean: Float[np.ndarray, "points"],
    error: Float[np.ndarray, "points"],
    **options: Any,
) -> None:
    """A density with a band of two standard errors on a logarithmic axis of five decades below its peak."""
    floor = max(float(mean.max()), np.finfo(float).tiny) * 1e-5
    (drawn,) = axes.semilogy(grid, np.maximum(mean, floor / 10), **options)
    low, high = (np.maximum(mean + sign * 2 * error, floor / 10) for sign in (-1, 1))
    axes.fill_between(grid, low, high, color=drawn.get_color(), alpha=0.25, linewidth=0)
    axes.set_ylim(bottom=min(floor, axes.get_ylim()[0]) if len(axes.lines) > 1 else floor)
