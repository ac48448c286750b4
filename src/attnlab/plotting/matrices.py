"""Pictures of matrices and spectra, from arrays alone."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage


def block_grid(
    axes: Axes, matrix: np.ndarray, sizes: Mapping[str, int], limits: tuple[float, float], labels: Mapping[str, str]
) -> AxesImage:
    """log10 |entries| of a square matrix with lines between parameter blocks.

    `sizes` are the numbers of parameters by block name, in order; `labels` their captions; `limits` those of the
    colours, in decades. Zeros take the lowest colour.
    """
    with np.errstate(divide="ignore"):
        decades = np.log10(np.abs(matrix))
    image = axes.imshow(np.maximum(decades, limits[0]), vmin=limits[0], vmax=limits[1], cmap="magma")
    ends = np.cumsum(list(sizes.values()))
    for end in ends[:-1]:
        axes.axhline(end - 0.5, color="white", linewidth=0.8)
        axes.axvline(end - 0.5, color="white", linewidth=0.8)
    middles = ends - np.array(list(sizes.values())) / 2 - 0.5
    names = [labels[name] for name in sizes]
    axes.set_xticks(middles, names)
    axes.set_yticks(middles, names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def signed_spectrum(axes: Axes, eigenvalues: np.ndarray, color: str, label: str) -> None:
    """|eigenvalues| by rank on a logarithmic axis: positive ones as dots, negative ones as open triangles."""
    order = np.argsort(-np.abs(eigenvalues))
    rank, ordered = np.arange(1, len(order) + 1), eigenvalues[order]
    positive = ordered >= 0
    axes.semilogy(rank[positive], ordered[positive], ".", color=color, markersize=3, label=label)
    axes.semilogy(
        rank[~positive],
        -ordered[~positive],
        "v",
        color=color,
        markersize=3,
        markerfacecolor="none",
        markeredgewidth=0.6,
    )


def before_and_after(
    axes: Axes, labels: Sequence[str], before: np.ndarray, after: np.ndarray, color: str, label: str, offset: float
) -> None:
    """One row a label: an open circle for the value before, a filled one after, an arrow between; logarithmic axis."""
    rows = np.arange(len(labels)) + offset
    shown = (before > 0) & (after > 0)
    axes.hlines(rows[shown], before[shown], after[shown], color=color, linewidth=1, alpha=0.5)
    axes.plot(before[shown], rows[shown], "o", color=color, markerfacecolor="white")
    axes.plot(after[shown], rows[shown], "o", color=color, label=label)
    axes.set_xscale("log")
    axes.set_yticks(np.arange(len(labels)), labels)
