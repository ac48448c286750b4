"""Errors for bad input: each names the argument, what it was, what was expected and what to do."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.types import PyTree

SMALLEST, LARGEST = float(np.finfo(float).tiny), float(np.finfo(float).max)
"""Bounds of what is positive, and of what is finite."""


def is_concrete(tree: PyTree) -> bool:
    """Whether no leaf of `tree` is a tracer, so that its values can be looked at."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def lowest(tree: PyTree) -> float:
    """The least entry of arrays that are concrete, also within a jitted program."""
    with jax.ensure_compile_time_eval():
        return min(float(jnp.min(leaf)) for leaf in jax.tree.leaves(tree))


def check_finite(name: str, tree: PyTree) -> None:
    """Raise `ValueError` if a floating-point leaf of `tree` holds a NaN or an infinity (skipped while tracing)."""
    if not is_concrete(tree):
        return
    for path, leaf in jax.tree.leaves_with_path(tree):
        if not jnp.issubdtype(_dtype_of(name, path, leaf), jnp.inexact):
            continue
        array = local_values(leaf)
        bad = int(array.size - np.sum(np.isfinite(array)))
        if bad:
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"{name}{': ' + where if where else ''} has {bad} non-finite of {array.size} values; "
                "expected finite numbers. Look at the step or the input that made them."
            )


def _dtype_of(name: str, path: tuple, leaf: Any) -> Any:
    """The dtype of a leaf; raises `TypeError`, which says where it is, for one that is no array or number."""
    try:
        if isinstance(leaf, (str, bytes)):
            raise TypeError
        return jnp.result_type(leaf)
    except TypeError:
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        what = "function" if callable(leaf) else type(leaf).__name__
        raise TypeError(
            f"{name}{': ' + where if where else ''} is {leaf!r:.80}, a {what}; expected an array or a number. Keep "
            "what is no array out of it: in a static field, or bound inside predict."
        ) from None


def local_values(leaf: Any) -> np.ndarray:
    """The values of a concrete array that this process holds."""
    # NumPy, since under jit a JAX operation on a constant gives a tracer. Of an array that is spread over several
    # processes each looks at its own part.
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        return np.concatenate([np.ravel(shard.data) for shard in leaf.addressable_shards])
    return np.asarray(leaf)


def check_not_empty(name: str, tree: PyTree) -> None:
    """Raise `ValueError` if `tree` has no leaf, or a leaf with no element (an empty batch)."""
    leaves = jax.tree.leaves_with_path(tree)
    if not leaves:
        raise ValueError(f"{name} holds no array; expected at least one.")
    for path, leaf in leaves:
        if np.size(leaf) == 0:
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"{name}{': ' + where if where else ''} has shape {np.shape(leaf)}, which holds no element; "
                "expected a batch of at least one example."
            )


def check_arrays(name: str, tree: PyTree) -> None:
    """Raise `TypeError` if a leaf of `tree` is no array or number."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        _dtype_of(name, path, leaf)


def check_floating(name: str, tree: PyTree) -> None:
    """Raise `TypeError` if a leaf of `tree` is not a real floating-point array."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        dtype = _dtype_of(name, path, leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise TypeError(
                f"{name}: {where or 'the leaf'} has dtype {dtype}; expected real floating-point parameters. "
                "Cast it, or keep it out of the parameters (bind it inside predict)."
            )


def check_same_structure(name: str, tree: PyTree, expected: PyTree) -> None:
    """Raise `ValueError` if `tree` differs from `expected` in structure or in the shape of a leaf."""
    found, wanted = jax.tree.structure(tree), jax.tree.structure(expected)
    if found != wanted:  # type: ignore[operator]
        raise ValueError(f"{name} has the structure {found}; expected that of the parameters, {wanted}.")
    for (path, leaf), other in zip(jax.tree.leaves_with_path(tree), jax.tree.leaves(expected), strict=True):
        if np.shape(leaf) != np.shape(other):
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(f"{name}: {where} has shape {np.shape(leaf)}; expected {np.shape(other)}.")


def check_leading_axis(name: str, tree: PyTree, size: int, remedy: str) -> None:
    """Raise `ValueError` unless the first axis of every leaf of `tree` has `size` entries."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        if np.ndim(leaf) == 0 or np.shape(leaf)[0] != size:
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"{name}{': ' + where if where else ''} has shape {np.shape(leaf)}; expected a first axis of {size}. "
                f"{remedy}"
            )


def check_range(name: str, value: int | float, low: int | float, high: int | float, remedy: str) -> None:
    """Raise `ValueError` unless `low <= value <= high`, `TypeError` for what has no order with numbers."""
    if isinstance(value, (str, bytes)) or value is None:
        raise TypeError(f"{name} is {value!r}, a {type(value).__name__}; expected {low} <= {name} <= {high}. {remedy}")
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; expected {low} <= {name} <= {high}. {remedy}")


def check_positive(**numbers: int) -> None:
    """Raise `ValueError` unless every number, given by name, is a positive whole number."""
    for name, value in numbers.items():
        try:
            whole = not isinstance(value, (str, bytes)) and value == int(value)
        except (TypeError, ValueError, OverflowError):  # no number; NaN; infinity
            whole = False
        if not whole or value < 1:
            raise ValueError(f"{name} is {value!r}; expected a positive whole number.")


def check_integer(**numbers: int) -> None:
    """Raise `TypeError` unless every number, given by name, is a whole number of Python or NumPy."""
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"{name} is {value!r}, a {type(value).__name__}; expected a positive whole number, an int.")


def check_whole(**numbers: int) -> None:
    """Raise `TypeError` unless every number, given by name, is an integer, and `ValueError` unless it is positive."""
    check_integer(**numbers)
    check_positive(**numbers)


def check_number(name: str, value: Any, low: float, high: float, remedy: str) -> None:
    """Raise `TypeError` unless `value` is a real number, and `ValueError` unless it is finite and `low <= value <=
    high` (skipped while tracing)."""
    if not is_concrete(value):
        return
    if isinstance(value, (bool, str, bytes)) or np.ndim(value) or not np.isrealobj(np.asarray(value)):
        raise TypeError(f"{name} is {value!r}, a {type(value).__name__}; expected a real number. {remedy}")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {value!r}, a {type(value).__name__}; expected a real number. {remedy}") from None
    check_range(name, number, low, high, remedy)


def check_key(key: Any) -> None:
    """Raise `TypeError` unless `key` is one typed random key."""
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 0:
        return
    is_old = isinstance(key, (jax.Array, np.ndarray)) and key.dtype == np.uint32
    found = "an array of jax.random.PRNGKey" if is_old else f"{key!r:.80}, a {type(key).__name__}"
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        found = f"an array of keys of shape {key.shape}"
    remedy = "jax.random.wrap_key_data(key) makes one of it." if is_old else "Pass jax.random.key(0)."
    raise TypeError(f"key is {found}; expected one typed key of jax.random.key. {remedy}")


def check_intervals(steps: int, every: int) -> None:
    """Raise `ValueError` unless both are positive whole numbers and `every` divides `steps`."""
    check_positive(steps=steps, every=every)
    if steps % every:
        raise ValueError(f"steps is {steps}; expected a multiple of every, which is {every}. Change one of them.")


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for a name that is not in a table: it lists the table, of a long one its start, and the nearest."""
    known = list(known)
    near = get_close_matches(name, known, n=1 if len(known) <= LISTED else 3)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    listed = ", ".join(known[:LISTED]) or "(none)"
    more = f" and {len(known) - LISTED} more" if len(known) > LISTED else ""
    return ValueError(f"there is no {kind} '{name}'; expected one of: {listed}{more}.{hint}")


LISTED = 60
"""Names of a table that an error lists."""


def check_names(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raise `ValueError` for the first of `names` that is not in the table `known`."""
    known = list(known)
    for name in names:
        if name not in known:
            raise unknown_name(kind, name, known)
