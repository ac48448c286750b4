"""An explorer of a run: one HTML page that needs no network, with a slider over the measured steps and linked panels.

What a probe measured is shown by its shape: numbers as curves against the step, with a mark at the slider's; vectors
(eigenvalues, a grid of a density) and matrices (attention maps) as they are at the slider's step. Moving the slider
moves all of them. Built on bokeh, whose script is written into the page: the extra `explore`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.plotting.style import PALETTE
from attnlab.runs import load_arrays, replace_file
from attnlab.training import Records, Trajectory, load_records

Source = Trajectory | Records | Path | str
"""A finished run, its records, the directory of a run (which may still go on), or that of a saved analysis."""

SHOWN_CURVES = 12
"""Members of an ensemble, or entries of a short vector, that a panel draws as curves: of more losses the first, more
values as a vector."""

WIDTH, HEIGHT = 420, 230


def explore(source: Source, path: Path | str = "run.html", *, title: str | None = None) -> Path:
    """Write the page of a run to `path`, and return that.

    Args:
        source: a finished run, its records, the directory of a run or of a saved analysis (`results/NAME`): of the
            latter every group of arrays with `steps` is a run, each in a tab of its own.
        path: of the HTML file.
        title: of the page; the name of the directory, or "run", if left out.

    Raises `ImportError` without the package bokeh, `FileNotFoundError` where nothing was saved, `ValueError` for a
    directory in which nothing has steps and for a run without any measurement.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import numpy as np
        >>> from attnlab.explorer import explore
        >>> from attnlab.training import Records
        >>> records = Records(np.array([0, 5]), {"sharpness": np.array([2.0, 3.0])}, np.linspace(1, 0.1, 6))
        >>> page = explore(records, Path(tempfile.mkdtemp()) / "run.html")
        >>> "sharpness" in page.read_text(encoding="utf-8")
        True
    """
    try:
        from bokeh.embed import file_html
        from bokeh.models import TabPanel, Tabs
        from bokeh.resources import Resources
    except ImportError as error:
        raise ImportError("explore needs the package bokeh: pip install 'attnlab[explore]'.") from error
    runs = runs_of(source)
    name = title or (Path(source).name if isinstance(source, str | Path) else "run")
    pages = {run: _page(records) for run, records in runs.items()}
    model = next(iter(pages.values()))
    if len(pages) > 1:
        model = Tabs(tabs=[TabPanel(child=page, title=run) for run, page in pages.items()])
    html = file_html(model, Resources(mode="inline", log_level="error"), name)
    with replace_file(Path(path)) as partial:
        partial.write_text(html, encoding="utf-8")
    return Path(path)


def runs_of(source: Source) -> dict[str, Records]:
    """The records of a run, or those in a saved analysis by the names of their groups; errors as of `explore`."""
    if isinstance(source, Trajectory):
        source = source.records
    if isinstance(source, Records):
        runs = {"run": source}
    elif (Path(source) / "arrays.npz").exists():
        runs = _groups("", load_arrays(Path(source)))
        if not runs:
            raise ValueError(f"no group of arrays in {source} has steps; expected those of an analysis of training.")
    else:
        runs = {Path(source).name: load_records(Path(source))}
    for name, records in runs.items():
        if len(records.steps) == 0:
            raise ValueError(f"the run '{name}' has no measurement; expected steps at which probes were taken.")
    return runs


def _groups(path: str, arrays: Mapping[str, Any]) -> dict[str, Records]:
    """Every dict within `arrays` that has `steps`, as records: what has a row a step is what was measured."""
    if "steps" in arrays and np.ndim(arrays["steps"]) == 1:
        steps = np.asarray(arrays["steps"])
        values = {name: part for name, part in arrays.items() if name not in ("steps", "losses")}
        kept = {name: part for name, part in values.items() if _rows(part) == len(steps)}
        return {path or "run": Records(jnp.asarray(steps), kept, jnp.asarray(arrays.get("losses", np.zeros(0))))}
    found: dict[str, Records] = {}
    for name, part in arrays.items():
        if isinstance(part, Mapping):
            found |= _groups(f"{path}/{name}".strip("/"), part)
    return found


def _rows(part: Any) -> int:
    shapes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(part)}
    return next(iter(shapes))[0] if len(shapes) == 1 and () not in shapes else -1


def _page(records: Records) -> Any:
    """The slider above the panels of one run."""
    from bokeh.layouts import column, gridplot
    from bokeh.models import CustomJS, Div, Slider

    steps = np.asarray(records.steps)
    panels = [_loss_panel(records)] if len(records.losses) else []
    panels += [_panel(name, steps, values) for name, values in measured(records.values).items()]
    told = Div(text=f"<b>step {int(steps[0])}</b>", name="step")
    slider = Slider(start=0, end=max(len(steps) - 1, 1), value=0, step=1, name="slider", title="", width=2 * WIDTH)
    slider.show_value = False
    moving = [each for panel in panels for each in panel.moving]
    moved = CustomJS(args={"steps": steps.tolist(), "slider": slider, "told": told, "moving": moving}, code=MOVE)
    slider.js_on_change("value", moved)
    return column(told, slider, gridplot([panel.figure for panel in panels], ncols=2, toolbar_location="right"))


MOVE = """
const at = Math.min(slider.value, steps.length - 1);
told.text = `<b>step ${steps[at]}</b>`;
for (const [kind, model, rows] of moving) {
  if (kind == "mark") model.location = steps[at];
  if (kind == "title") model.text = rows[at];
  if (kind == "vector") model.data = {...model.data, y: rows[at]};
  if (kind == "matrix") model.data = {...model.data, image: [rows[at]]};
}
"""


def measured(values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What probes measured, by path: real arrays with a row a measurement, those without a finite number left out.

    >>> import numpy as np
    >>> from attnlab.explorer import measured
    >>> measured({"edge": {"ratio": np.ones(3)}})
    {'edge/ratio': array([1., 1., 1.])}
    """
    paths = jax.tree_util.tree_flatten_with_path(values)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in paths}
    numbers = {name: leaf.astype(float) for name, leaf in named.items() if leaf.dtype.kind in "fiub" and leaf.ndim}
    return {name: leaf for name, leaf in numbers.items() if np.isfinite(leaf).any()}


class _Panel:
    """A figure, and what of it moves with the slider: each (kind, model, rows)."""

    def __init__(self, figure: Any, *moving: tuple[str, Any, Any]):
        self.figure, self.moving = figure, moving


def _panel(name: str, steps: np.ndarray, values: np.ndarray) -> _Panel:
    """By the shape of one measurement: curves, a vector, or a matrix."""
    if values.ndim == 1 or (values.ndim == 2 and values.shape[1] <= SHOWN_CURVES):
        return _curves(name, steps, values.reshape(len(steps), -1), values if values.ndim == 1 else None)
    if values.ndim == 2:
        return _vector(name, values)
    return _matrix(name, values.reshape(len(steps), *values.shape[-2:]) if values.ndim == 3 else _first(values))


def _first(values: np.ndarray) -> np.ndarray:
    """The first matrix of each measurement: of the first head of the first sequence, say."""
    return values.reshape(len(values), -1, *values.shape[-2:])[:, 0]


def _loss_panel(records: Records) -> _Panel:
    losses, steps = np.asarray(records.losses, float), np.asarray(records.steps, int)
    # A loss is taken before its step: the last measurement, after the last step, has none of its own.
    every = losses.ndim == 1 and len(losses) == steps[-1] - steps[0]
    now = losses[np.minimum(steps - steps[0], len(losses) - 1)] if every and len(losses) else None
    taken = steps[0] + np.arange(len(losses))
    return _curves("loss", taken, losses.reshape(len(losses), -1)[:, :SHOWN_CURVES], now)


def _curves(name: str, steps: np.ndarray, values: np.ndarray, now: np.ndarray | None) -> _Panel:
    """`now` is what the title tells of the slider's step: a number each, where there is one."""
    from bokeh.models import HoverTool, Span

    positive = np.isfinite(values).any() and np.nanmin(values) > 0
    wide = positive and np.nanmax(values) > 10 * np.nanmin(values)
    figure = _figure(name, "step", y_axis_type="log" if wide else "linear")
    for number, curve in enumerate(values.T):
        figure.line(steps, curve, color=PALETTE[number % len(PALETTE)], line_width=1.5)
    if name.split("/")[-1] == "ratio":
        figure.add_layout(Span(location=1, dimension="width", line_dash="dashed", line_color="black"))
    if np.nanmin(values) == np.nanmax(values):
        middle = float(np.nanmin(values))
        figure.y_range.start, figure.y_range.end = middle - (abs(middle) or 1), middle + (abs(middle) or 1)
    mark = Span(location=float(steps[0]), dimension="height", line_color="gray", name=f"mark {name}")
    figure.add_layout(mark)
    figure.add_tools(HoverTool(tooltips=[("step", "@x"), (name, "@y{0.0000e+0}")], mode="vline"))
    titles = [] if now is None else [f"{name} = {value:.4g}" for value in now]
    figure.title.text = titles[0] if titles else name
    return _Panel(figure, ("mark", mark, None), *([("title", figure.title, titles)] if titles else []))


def _vector(name: str, values: np.ndarray) -> _Panel:
    from bokeh.models import ColumnDataSource, HoverTool

    figure = _figure(name, "place")
    source = ColumnDataSource({"x": np.arange(values.shape[1]).tolist(), "y": values[0].tolist()}, name=f"data {name}")
    figure.scatter("x", "y", source=source, color=PALETTE[0], size=4)
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    room = 0.05 * (high - low) or 1.0
    figure.y_range.start, figure.y_range.end = low - room, high + room
    figure.add_tools(HoverTool(tooltips=[("place", "@x"), (name, "@y{0.0000e+0}")]))
    return _Panel(figure, ("vector", source, list(values.astype(np.float32))))


def _matrix(name: str, values: np.ndarray) -> _Panel:
    from bokeh.models import ColorBar, ColumnDataSource, HoverTool, LinearColorMapper

    _, rows, columns = values.shape
    figure = _figure(name, "column")
    figure.y_range.flipped = True
    values = values.astype(np.float32)
    source = ColumnDataSource({"image": [values[0]]}, name=f"data {name}")
    colors = LinearColorMapper("Viridis256", low=float(np.nanmin(values)), high=float(np.nanmax(values)))
    figure.image("image", source=source, x=0, y=0, dw=columns, dh=rows, color_mapper=colors)
    figure.add_layout(ColorBar(color_mapper=colors, width=8), "right")
    figure.add_tools(HoverTool(tooltips=[("row, column", "$y{0}, $x{0}"), (name, "@image{0.0000e+0}")]))
    return _Panel(figure, ("matrix", source, list(values)))


def _figure(name: str, horizontal: str, **options: Any) -> Any:
    from bokeh.plotting import figure

    made = figure(
        width=WIDTH,
        height=HEIGHT,
        title=name,
        name=f"figure {name}",
        x_axis_label=horizontal,
        tools="pan,wheel_zoom,reset",
        **options,
    )
    made.toolbar.logo = None
    return made
