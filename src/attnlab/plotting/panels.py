"""The frame of a figure: one message above, a letter and a title on every panel, what bands mean below."""

import string
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter

WIDTH = 7.2
"""Of every figure, in inches: text is read at the size at which it is set."""

SMALL = 7.5
"""Size in points of the least text."""


def panels(
    message: str,
    titles: Sequence[str],
    *,
    note: str = "",
    columns: int = 2,
    height: float = 2.7,
    **options: Any,
) -> tuple[Figure, list[Axes]]:
    """A figure with one panel for each of `titles`, and its panels in reading order.

    `message` is the one thing that the figure says, with its number; `note`, below, tells what bands and bars are.
    Rows are `height` inches tall; `options` are those of `matplotlib.pyplot.subplots`. A last row that is not full
    keeps its place free: for a legend, say.
    """
    import matplotlib.pyplot as plt

    rows = -(-len(titles) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(WIDTH, rows * height + 0.5), squeeze=False, **options)
    axes = list(grid.flat)
    for unused in axes[len(titles) :]:
        unused.remove()
    shown = axes[: len(titles)]
    name_panels(shown, titles)
    say(figure, message, note)
    return figure, shown


def say(figure: Figure, message: str, note: str = "") -> None:
    """Set the message of a figure above it, and its note below."""
    figure.suptitle(message, fontsize=10.5)
    if note:
        figure.supxlabel(note, fontsize=SMALL, color="0.3")


def name_panels(axes: Iterable[Axes], titles: Iterable[str]) -> None:
    """Put a letter before the title of every panel."""
    for letter, each, title in zip(string.ascii_lowercase, axes, titles, strict=False):
        each.set_title(f"({letter}) {title}", loc="left", fontsize=9)


def legend_below(figure: Figure, axes: Axes | Sequence[Axes], columns: int = 4) -> None:
    """One legend under all panels, of what the given ones show; a name that several show stands there once.

    The note of the figure, which would lie under it, becomes its title.
    """
    named: dict[str, Artist] = {}
    for each in [axes] if isinstance(axes, Axes) else axes:
        for handle, label in zip(*each.get_legend_handles_labels(), strict=True):
            named.setdefault(str(label), handle)
    legend = figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=columns, fontsize=8)
    note = figure.get_supxlabel()
    if note:
        figure.supxlabel("")
        legend.set_title(note, {"size": SMALL})
        legend.get_title().set_color("0.3")


def log_ticks(axis: Axis, *values: float) -> None:
    """Ticks of a logarithmic axis of few decades: those that are named, in plain numbers."""
    axis.set_major_locator(FixedLocator(values))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def legend_beside(axes: Axes) -> None:
    """The legend of a panel at its right, outside the data."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)
