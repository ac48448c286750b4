"""Exponents: a triangle of the predicted slope beside a curve, and fitted ones beside predicted in a forest plot."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes


def slope_triangle(axes: Axes, low: float, high: float, start: float, exponent: float) -> None:
    """The slope `exponent` over [low, high], below a curve that has the value `start` at `low`."""
    below, top = 0.3 * start, 0.3 * start * (high / low) ** exponent
    axes.plot([low, high, high, low], [below, top, below, below], ":", color="black", linewidth=0.9)
    axes.annotate(f"{exponent:g}", (high, np.sqrt(below * top)), (3, -3), textcoords="offset points", fontsize=8)


def forest(
    axes: Axes,
    differences: Sequence[float],
    half_widths: Sequence[float],
    names: Sequence[str],
    groups: Sequence[int],
) -> None:
    """A row for each difference from a prediction, top to bottom, with its interval (none where NaN) and its name;
    `groups` decide colour and marker."""
    for height, (difference, width, name, group) in enumerate(
        zip(differences, half_widths, names, groups, strict=True)
    ):
        axes.errorbar(difference, height, xerr=np.nan_to_num(width), fmt="os^D"[group % 4], color=f"C{group}",
                      markersize=3, capsize=1.5, elinewidth=0.8)  # fmt: skip
        axes.annotate(name, (0, height), (-4, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                      fontsize=7.5, ha="right", va="center")  # fmt: skip
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(yticks=[], ylim=(len(names) - 0.4, -0.6))
