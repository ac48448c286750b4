"""What arguments of this strand must be: arrays of real numbers with so many axes, indices, labels, tolerances.

Everything here works on the host, where a problem is built. What is traced passes the checks of functions that can be
traced, and is refused by those that cannot.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.checks import is_concrete


def host_array(name: str, value: Any, expected: str) -> np.ndarray:
    """`value` as a NumPy array; raises `TypeError` if it is traced, or no array of numbers."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        return value
    if not is_concrete(value):
        raise TypeError(
            f"{name} is traced; expected concrete numbers, {expected}. Build and solve problems outside jit, vmap and "
            "grad, or solve one that is built with frobenius_traced."
        )
    try:
        array = np.asarray(value)
    except ValueError:
        lengths = [np.shape(part)[:1] for part in value]
        raise ValueError(f"{name} have parts of unequal lengths, {lengths[:5]}...; expected {expected}.") from None
    if not (array.dtype.kind in "fiub" or jnp.issubdtype(array.dtype, jnp.floating)):
        raise TypeError(f"{name} have dtype {array.dtype}, as {str(value)[:40]!r}; expected real numbers, {expected}.")
    return array


def real_array(name: str, value: Any, axes: int, expected: str) -> np.ndarray:
    """Finite real numbers in double precision with so many axes, none of length 0; raises `ValueError` for others."""
    array = host_array(name, value, expected)
    if array.ndim != axes or not array.size:
        raise ValueError(f"{name} have shape {array.shape}; expected {expected}, none of them zero.")
    array = np.asarray(array, float)
    if not np.isfinite(array).all():
        bad = np.argwhere(~np.isfinite(array))
        raise ValueError(
            f"{name} has {len(bad)} non-finite values, the first at {tuple(map(int, bad[0]))}; expected finite "
            "numbers. Look at what made them, or leave these out."
        )
    return array


def whole_array(name: str, value: Any, shape: tuple[int, ...], expected: str) -> np.ndarray:
    """Whole numbers of a shape; raises `ValueError` for others."""
    array = host_array(name, value, expected)
    if array.shape != shape or array.dtype.kind not in "iu":
        raise ValueError(
            f"{name} has shape {array.shape} and dtype {array.dtype}; expected {expected}, whole numbers of shape "
            f"{shape}. Take argmax, or .astype(int)."
        )
    return array


def check_floating_vectors(name: str, array: Any) -> None:
    """Raise `TypeError` for whole numbers where vectors are expected: token numbers, mostly."""
    kind = array.dtype.kind if isinstance(array, np.ndarray) else jnp.result_type(array).kind
    if kind in "iub":
        raise TypeError(
            f"{name} have dtype {jnp.result_type(array)}; expected vectors of floating-point numbers. Look token "
            "numbers up in an embedding first, or cast vectors of whole numbers with .astype(float)."
        )


def check_index(name: str, selection: Any, lengths: Any) -> None:
    """Raise `ValueError` for an index outside its sequence, whose length is given (skipped while tracing)."""
    if not (isinstance(selection, np.ndarray) or is_concrete(selection)):
        return
    selection = np.asarray(selection)
    outside = (selection < 0) | (selection >= lengths)
    if outside.any():
        lengths = np.broadcast_to(lengths, selection.shape)
        i = int(outside.argmax())
        raise ValueError(
            f"{name}[{i}] is {selection[i]}; expected 0 <= {name} < {lengths[i]}, the sequence length. Count tokens "
            "from 0."
        )


def check_selection(name: str, selection: Any, count: int, length: int) -> None:
    """Raise `ValueError` unless these are indices, one for each of so many sequences of a length (also traced)."""
    dtype = getattr(selection, "dtype", None)
    if np.shape(selection) != (count,) or dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"{name} has shape {np.shape(selection)} and dtype {dtype}; expected {count} whole numbers, the index of "
            "one token for each sequence. Take argmax over the tokens."
        )
    check_index(name, selection, length)


def check_signs(name: str, labels: Any) -> None:
    """Raise `ValueError` for labels other than -1 and 1 (skipped while tracing)."""
    if not is_concrete(labels):
        return
    values = np.unique(np.asarray(labels))
    if not np.isin(values, (-1, 1)).all():
        remedy = "Map 0 and 1 by 2 * labels - 1." if np.isin(values, (0, 1)).all() else "Take the sign of the target."
        raise ValueError(f"{name} hold {values[:5]}; expected -1 and 1. {remedy}")


def check_tolerance(tolerance: Any) -> None:
    """Raise `ValueError` unless 0 < tolerance < 1 (skipped while tracing)."""
    if isinstance(tolerance, float) and 0 < tolerance < 1:
        return
    number = isinstance(tolerance, int | float | np.number | jax.Array) and not isinstance(tolerance, bool)
    if is_concrete(tolerance) and not (number and 0 < tolerance < 1):
        raise ValueError(
            f"tolerance is {tolerance!r}; expected a number between 0 and 1, the gap relative to the margin. Leave it "
            "out for the default."
        )


def check_same_shape(name: str, array: Any, shape: tuple[int, ...], of: str) -> None:
    """Raise `ValueError` unless an array has the shape."""
    if np.shape(array) != shape:
        raise ValueError(f"{name} has shape {np.shape(array)}; expected {shape}, that of {of}.")
