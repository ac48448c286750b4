"""The look of every figure, and files that come out the same on every rerun."""

from contextlib import AbstractContextManager
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from attnlab.runs import replace_file


def style() -> AbstractContextManager[None]:
    """matplotlib's settings for attnlab's figures, within a `with` block; the colours are safe for the colour-blind."""
    return mpl.rc_context(fname=Path(__file__).with_name("attnlab.mplstyle"))


def save_figure(figure: Figure, path: Path) -> tuple[Path, Path]:
    """Write `path`.png and `path`.pdf without dates, so that equal figures are equal files; returns both paths."""
    png, pdf = path.with_suffix(".png"), path.with_suffix(".pdf")
    with replace_file(png) as partial:
        figure.savefig(partial, metadata={"Software": None})
    with replace_file(pdf) as partial:
        figure.savefig(partial, metadata={"CreationDate": None, "Producer": None, "Creator": None})
    return png, pdf
