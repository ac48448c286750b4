"""The look of every figure, and files that come out the same on every rerun."""

from contextlib import AbstractContextManager
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from attnlab.runs import replace_file

STYLE = Path(__file__).with_name("attnlab.mplstyle")


def style() -> AbstractContextManager[None]:
    """matplotlib's settings for attnlab's figures, within a `with` block; the colours are safe for the colour-blind."""
    return mpl.rc_context(fname=STYLE)


def save_figure(figure: Figure, path: Path) -> tuple[Path, Path]:
    """Write `path`.png and `path`.pdf without dates, so that equal figures are equal files; returns both paths."""
    png, pdf = path.with_suffix(".png"), path.with_suffix(".pdf")
    with replace_file(png) as partial:
        figure.savefig(partial, metadata={"Software": None})
    with replace_file(pdf) as partial:
        figure.savefig(partial, metadata={"CreationDate": None, "Producer": None, "Creator": None})
    return png, pdf


PALETTE = tuple(mpl.rc_params_from_file(STYLE, use_default_template=False)["axes.prop_cycle"].by_key()["color"])
"""The colours of curves, in order."""

PARTS = {"hessian": ("black", "s", "$H$"), "ggn": ("#E69F00", "^", "$H_o$"), "functional": ("#56B4E9", "v", "$H_f$")}
"""Colour, marker and symbol of each part of a Hessian, in every figure."""

BLOCKS = {
    "value": ("#0072B2", "o", "V"),
    "query": ("#D55E00", "s", "Q"),
    "key": ("#009E73", "^", "K"),
    "output": ("#CC79A7", "D", "O"),
    "query_key": ("#7F3B08", "P", "QK"),
}
"""Colour, marker and symbol of each parameter of an attention layer, in every figure."""
