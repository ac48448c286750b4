"""Scikit-learn's handwritten digits: 1,797 images of 8 x 8 pixels (UCI, CC BY 4.0), whole or as patch tokens."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnlab.checks import check_positive, check_range, unknown_name
from attnlab.data.dataset import Dataset
from attnlab.types import PRNGKey

IMAGES, SIDE, CLASSES = 1797, 8, 10

Scaling = Literal["unit", "standard"]
Targets = Literal["one_hot", "labels"]


def digit_images(key: PRNGKey, count: int, *, scaling: Scaling = "unit", targets: Targets = "one_hot") -> Dataset:
    """`count` different images (count, 8, 8, 1), drawn by `key`, with targets (count, 10) or labels (count,).

    Pixels lie in [0, 1] (`unit`), or have mean 0 and variance 1 over all pixels of all 1,797 images (`standard`), so
    that an image is the same in every subset. In JAX's default precision. Raises `ValueError` for a count above 1,797
    or an unknown name, `ModuleNotFoundError` without scikit-learn.
    """
    check_range("count", count, 1, IMAGES, f"There are {IMAGES} images.")
    _check_name("scaling", scaling, SCALINGS)
    _check_name("kind of targets", targets, TARGETS)
    images, labels = _load()
    chosen = jax.random.permutation(key, IMAGES)[:count]
    pixels = jnp.asarray(SCALINGS[scaling](images)[..., None], dtype=float)
    return Dataset(pixels[chosen], TARGETS[targets](jnp.asarray(labels, dtype=jnp.int32)[chosen]))


def digits(
    key: PRNGKey,
    count: int,
    *,
    patch: tuple[int, int] = (4, 4),
    scaling: Scaling = "unit",
    positions: Literal["one_hot", "sinusoidal"] | None = None,
    targets: Targets = "one_hot",
    per_token: bool = True,
) -> Dataset:
    """`count` different images as sequences of patch tokens, in reading order, drawn by `key`.

    Args:
        key: chooses the images.
        count: number of images n, at most 1,797.
        patch: height and width of a patch, which divide 8; (1, 8) makes each row of pixels a token.
        scaling: of the pixels, see `digit_images`.
        positions: a code of each patch's place appended to its pixels, a key of `POSITION_CODES`, or None.
        targets: `one_hot` vectors for regression, or `labels` for classification.
        per_token: repeat the target for every token, (n, L, 10) or (n, L), as a model with one output per token needs;
            otherwise (n, 10) or (n,), for a model that pools its tokens (`models.adapters.mean_over_tokens`).

    Inputs are (n, L, height * width), with a code wider. Raises as `digit_images`, and `ValueError` for a patch that
    does not divide the image.
    """
    _check_patch(patch, (SIDE, SIDE))
    if positions is not None:
        _check_name("position code", positions, POSITION_CODES)
    images, wanted = digit_images(key, count, scaling=scaling, targets=targets)
    tokens = patches(images[..., 0], patch)
    if positions is not None:
        code = jnp.asarray(POSITION_CODES[positions](SIDE // patch[0], SIDE // patch[1]), dtype=tokens.dtype)
        tokens = jnp.concatenate([tokens, jnp.broadcast_to(code, (count, *code.shape))], axis=-1)
    if per_token:
        wanted = jnp.repeat(wanted[:, None], tokens.shape[1], axis=1)
    return Dataset(tokens, wanted)


def patches(images: Float[Array, "n height width"], patch: tuple[int, int]) -> Float[Array, "n L pixels"]:
    """Non-overlapping patches in reading order, each with its pixels in reading order.

    Raises `ValueError` for a patch that does not divide the image.
    """
    count, height, width = images.shape
    _check_patch(patch, (height, width))
    rows, columns = height // patch[0], width // patch[1]
    blocks = images.reshape(count, rows, patch[0], columns, patch[1])
    return jnp.swapaxes(blocks, 2, 3).reshape(count, rows * columns, -1)


def _check_patch(patch: tuple[int, int], image: tuple[int, int]) -> None:
    check_positive(**{"patch[0]": patch[0], "patch[1]": patch[1]})
    if image[0] % patch[0] or image[1] % patch[1]:
        raise ValueError(
            f"patch is {patch}, which does not divide the {image[0]} x {image[1]} pixels; "
            "expected a height and a width that do, such as (4, 4) or (1, 8)."
        )


def _one_hot_code(rows: int, columns: int) -> np.ndarray:
    """(L, rows + columns): the row and the column of each patch as one-hot vectors."""
    row, column = _places(rows, columns)
    return np.concatenate([np.eye(rows)[row], np.eye(columns)[column]], axis=-1)


def _sinusoidal_code(rows: int, columns: int) -> np.ndarray:
    """(L, 4): cosine and sine of the angle pi (i + 1/2) / n for the row, then for the column; all places differ."""
    row, column = _places(rows, columns)
    angles = (np.pi * (row + 0.5) / rows, np.pi * (column + 0.5) / columns)
    return np.stack([wave(angle) for angle in angles for wave in (np.cos, np.sin)], axis=-1)


def _places(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    return np.divmod(np.arange(rows * columns), columns)


def _load() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the digits come with scikit-learn, which is not installed; run pip install scikit-learn."
        ) from error
    data = load_digits()
    return data.images, data.target


SCALINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "unit": lambda images: images / 16,  # stored as 0 ... 16
    "standard": lambda images: (images - images.mean()) / images.std(),
}

TARGETS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "one_hot": lambda labels: jax.nn.one_hot(labels, CLASSES, dtype=float),
    "labels": lambda labels: labels,
}

POSITION_CODES: dict[str, Callable[[int, int], np.ndarray]] = {
    "one_hot": _one_hot_code,
    "sinusoidal": _sinusoidal_code,
}


def _check_name(kind: str, name: str, table: dict[str, Callable]) -> None:
    """Raise `ValueError` unless `name` is a key of `table`."""
    if name not in table:
        raise unknown_name(kind, name, table)
