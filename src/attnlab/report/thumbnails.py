"""Small images of figures, for a page that holds all of them."""

import base64
import io
from pathlib import Path

from PIL import Image

WIDTH = 720
COLORS = 64


def thumbnail(path: Path) -> str:
    """The PNG at `path`, at most 720 pixels wide and of 64 colours, in base64; the same bytes on every call.

    Raises `ValueError` for a file that is no image.
    """
    try:
        image = Image.open(path).convert("RGB")
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} (it is no image: {error})") from error
    image.thumbnail((WIDTH, 4 * WIDTH))
    buffer = io.BytesIO()
    image.quantize(COLORS).save(buffer, format="png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
