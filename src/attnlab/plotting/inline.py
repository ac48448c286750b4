"""A small picture inside a notebook's cell or a page: PNG in a data address, no file."""

import base64
import io
from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attnlab.plotting.style import style


def picture(draw: Callable[[Axes], object], alternative: str, size: tuple[float, float] = (5.0, 2.6)) -> str:
    """An HTML image of what `draw` puts on axes; `size` in inches, `alternative` what it shows, in words."""
    with style():
        figure = Figure(figsize=size)
        draw(figure.subplots())
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{alternative}" src="data:image/png;base64,{data}">'
