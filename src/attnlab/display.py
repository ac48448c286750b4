"""How results show themselves: one short line in a console, a small table or picture in a notebook.

A `repr` that prints every number of a network helps nobody; these say what a thing is, how large it is, and the few
numbers that one looks at first. They work on arrays that are traced, whose numbers do not exist yet.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from html import escape
from typing import Any

import jax
import numpy as np

SHOWN = 6
"""Numbers of an array, or names of a list, that a line holds; more are counted."""


def line(kind: str, **facts: Any) -> str:
    """`kind(fact=..., ...)` on one line; facts that are None are left out.

    Example:
        >>> import numpy as np
        >>> from attnlab.display import line
        >>> line("Eigenpairs", values=np.array([1.0, 2.5]), products=12, vectors=np.zeros((2, 1000)), missed=None)
        'Eigenpairs(values=[1, 2.5], products=12, vectors=float64[2, 1000])'
    """
    return f"{kind}({', '.join(f'{name}={brief(fact)}' for name, fact in facts.items() if fact is not None)})"


def whatever_it_holds(show: Callable[[Any], str]) -> Callable[[Any], str]:
    """A `__repr__` that never raises: JAX shows pytrees whose leaves are shapes or placeholders, in error messages too,
    and an error of ours would stand in place of the one that it has to tell."""

    @wraps(show)
    def shown(thing: Any) -> str:
        try:
            return show(thing)
        except Exception:
            return f"{type(thing).__name__}(...)"

    return shown


class Words(str):
    """Text that stands in a line as it is, without quotation marks."""


def brief(fact: Any) -> str:
    """A number in four digits, an array by its numbers or, where they are many or traced, by its dtype and shape, a
    pytree by its leaves."""
    if isinstance(fact, bool | np.bool_ | Words):
        return str(fact)
    if isinstance(fact, str):
        return repr(fact)
    if isinstance(fact, int):
        return f"{fact:,}"
    if isinstance(fact, float | np.floating):
        return f"{fact:.4g}"
    if isinstance(fact, np.ndarray | jax.Array):
        return _array(fact)
    if isinstance(fact, Mapping):
        return f"{{{listed(fact)}}}"
    if isinstance(fact, list | tuple):
        return _tree(fact) if len(fact) > SHOWN else f"[{', '.join(brief(part) for part in fact)}]"
    return repr(fact)


def _array(array: Any) -> str:
    few = array.size <= SHOWN and array.ndim <= 1 and not isinstance(array, jax.core.Tracer)
    if few and isinstance(array, jax.Array):
        few = array.is_fully_addressable and not jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key)
    if not few:
        shape = ", ".join(str(size) for size in array.shape)
        return f"{array.dtype}[{shape}]"
    numbers = np.asarray(array)
    if numbers.ndim == 0:
        return brief(numbers.item())
    return f"[{', '.join(brief(number) for number in numbers.tolist())}]"


def _tree(tree: Any) -> str:
    leaves = jax.tree.leaves(tree)
    count = sum(int(np.prod(np.shape(leaf))) for leaf in leaves)
    return f"<{len(leaves)} leaves, {count:,} numbers>"


def parameters(tree: Any) -> Words:
    """A parameter pytree by its number of leaves and of numbers, or by the shape of its only leaf."""
    leaves = jax.tree.leaves(tree)
    return Words(brief(leaves[0]) if len(leaves) == 1 and np.ndim(leaves[0]) else _tree(tree))


def listed(names: Iterable[Any]) -> Words:
    """The first names of a list, and how many more there are."""
    shown = [str(name) for name in names]
    more = [f"{len(shown) - SHOWN} more"] if len(shown) > SHOWN else []
    return Words(", ".join([*shown[:SHOWN], *more]))


def html_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str = "") -> str:
    """A small HTML table: the first column as row headings, every other cell as `brief` shows it."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        f"<tr><th>{escape(str(first))}</th>{''.join(f'<td>{escape(brief(cell))}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    )
    caption = f"<caption>{escape(title)}</caption>" if title else ""
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
