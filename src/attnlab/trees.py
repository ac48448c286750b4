"""Parameter pytrees: names of their leaves, blocks of them, flat vectors.

A *block* is named by a path such as `layer_0/attention/query`, or by any run of whole path components: `query` is
every leaf with a component `query`, `layer_0` every leaf below it. Of layers that are stacked along the first axis of
their leaves (`nn.scan`), `layers[1]` is the second one, and `layers[1]/query` its leaf.
"""

import re
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from attnlab.checks import unknown_name
from attnlab.types import Params, PyTree


def leaf_names(tree: PyTree) -> tuple[str, ...]:
    """Slash-joined path of every leaf, in flattening order (the order of every flat vector in attnlab).

    Names are unique: where two paths read alike, as those of {"a/b": x, "a": {"b": y}}, both are written with brackets,
    ['a/b'] and ['a']['b'].
    """
    paths = [path for path, _ in jax.tree.leaves_with_path(tree)]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]
    count = Counter(names)
    return tuple(
        name if count[name] == 1 else jax.tree_util.keystr(path) for name, path in zip(names, paths, strict=True)
    )


def leaf_sizes(tree: PyTree) -> tuple[int, ...]:
    """Number of elements of every leaf, in flattening order."""
    return tuple(int(np.size(leaf)) for leaf in jax.tree.leaves(tree))


def block_slices(tree: PyTree) -> dict[str, slice]:
    """Where each leaf stands in the flat vector of `tree`."""
    ends = np.cumsum(leaf_sizes(tree)).tolist()
    starts = [0, *ends[:-1]]
    return {name: slice(a, b) for name, a, b in zip(leaf_names(tree), starts, ends, strict=True)}


def _contains(name: str, block: str) -> bool:
    parts, wanted = name.split("/"), block.strip("/").split("/")
    return any(parts[i : i + len(wanted)] == wanted for i in range(len(parts) - len(wanted) + 1))


def matching_leaves(tree: PyTree, block: str | re.Pattern[str]) -> tuple[int, ...]:
    """Positions of the leaves that belong to `block`: a run of path components, or a compiled regular expression
    that is searched in the whole path. Raises `ValueError`, listing the names, when none does."""
    names = leaf_names(tree)
    if isinstance(block, re.Pattern):
        found = tuple(i for i, name in enumerate(names) if block.search(name))
        block = block.pattern
    else:
        found = tuple(i for i, name in enumerate(names) if _contains(name, block))
    if not found:
        raise unknown_block(block, names)
    return found


def unknown_block(block: str, names: Iterable[str]) -> ValueError:
    """The error for a block that no leaf belongs to."""
    error = unknown_name("parameter block", block, names)
    if not any(part.isdigit() for part in block.split("/")):
        return error
    indexed = re.sub(r"/(\d+)(?=/|$)", r"[\1]", block)
    return ValueError(f"{error} One layer of a stack along the first axis is written '{indexed}'.")


@dataclass(frozen=True)
class Selection:
    """Some leaves of a pytree of known structure: takes them out, and puts others in their place. Static, hashable.

    With an `index`, of each the entry along its first axis: one layer of a stack.
    """

    treedef: jax.tree_util.PyTreeDef
    positions: tuple[int, ...]
    names: tuple[str, ...]
    index: int | None = None

    def take(self, tree: PyTree) -> OrderedDict[str, PyTree]:
        """The selected leaves by name, in their order in the whole (plain dicts are flattened in sorted order)."""
        leaves = self.treedef.flatten_up_to(tree)
        chosen = [leaves[i] if self.index is None else leaves[i][self.index] for i in self.positions]
        return OrderedDict(zip(self.names, chosen, strict=True))

    def put(self, tree: PyTree, block: OrderedDict[str, PyTree]) -> PyTree:
        """`tree` with the selected leaves replaced by those of `block`."""
        leaves = self.treedef.flatten_up_to(tree)
        for name, i in zip(self.names, self.positions, strict=True):
            leaves[i] = block[name] if self.index is None else leaves[i].at[self.index].set(block[name])
        return self.treedef.unflatten(leaves)


def select(tree: PyTree, block: str | re.Pattern[str]) -> Selection:
    """The leaves of `tree` that belong to `block` (see `matching_leaves`), or the entries of a stack's leaves.

    Raises `ValueError`, listing the names, for a block that is not there, and for a stack that has no such entry;
    `TypeError` for a block that is neither a string nor a compiled regular expression.
    """
    if not isinstance(block, str | re.Pattern):
        raise TypeError(
            f"block is {block!r}; expected a name such as 'query' or 'layer_0/attention', or a regular expression that "
            "re.compile made. For several names take re.compile('query|key')."
        )
    names = leaf_names(tree)
    if isinstance(block, str) and block not in names and (entry := _INDEXED.search(block)):
        return _select_entry(tree, block, entry)
    positions = matching_leaves(tree, block)
    return Selection(jax.tree.structure(tree), positions, tuple(names[i] for i in positions))


_INDEXED = re.compile(r"\[(\d+)\](?=/|$)")


def _select_entry(tree: PyTree, block: str, entry: re.Match[str]) -> Selection:
    stack, index = block[: entry.start()], int(entry[1])
    names, leaves = leaf_names(tree), jax.tree.leaves(tree)
    lengths = {np.shape(leaves[i])[:1] for i in matching_leaves(tree, stack)}
    if len(lengths) != 1 or () in lengths:
        raise ValueError(
            f"block is '{block}', but the leaves below '{stack}' have first axes {sorted(lengths)}; expected one "
            "length, that of a stack of layers. Name a leaf, or a run of path components."
        )
    ((length,),) = lengths
    if index >= length:
        raise ValueError(f"block is '{block}'; expected an entry from 0 to {length - 1} of the stack '{stack}'.")
    positions = matching_leaves(tree, block.replace(entry[0], ""))
    indexed = tuple(
        re.sub(rf"((?:^|/){re.escape(stack)})(?=/|$)", rf"\1[{index}]", names[i], count=1) for i in positions
    )
    return Selection(jax.tree.structure(tree), positions, indexed, index)


def zeros_like(tree: PyTree) -> PyTree:
    """A pytree of zeros with the structure, shapes and dtypes of `tree`."""
    return jax.tree.map(jnp.zeros_like, tree)


def ravel(tree: Params) -> jax.Array:
    """All leaves as one flat vector, in flattening order."""
    return ravel_pytree(tree)[0]


def dimension(tree: Params) -> int:
    """Number of parameters."""
    return sum(leaf_sizes(tree))


def power_of_two(size: jax.Array) -> jax.Array:
    """The largest power of two that is at most `size`, within the normal numbers; 1 for zero and what is not finite.
    To divide by it rounds nothing, so that what is large or small is brought near 1 before it is squared."""
    usable = (size > 0) & jnp.isfinite(size)
    exponent = jnp.frexp(jnp.where(usable, size, 1))[1] - 1
    limits = jnp.finfo(size.dtype)
    return jnp.ldexp(jnp.ones_like(size), jnp.clip(exponent, limits.minexp + 1, limits.maxexp - 2))


def length(vector: jax.Array) -> jax.Array:
    """The Euclidean norm of an array, where the squares of its entries would overflow or underflow too."""
    unit = power_of_two(jnp.max(jnp.abs(vector)))
    return unit * jnp.linalg.norm(vector / unit)
