"""Independent products side by side on the devices of this machine: the cores of a CPU where it was told to be several
devices, or all its accelerators. The numbers are those of one device, to rounding."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from attnlab.checks import is_concrete
from attnlab.objectives import BatchedObjective
from attnlab.types import PyTree

Held = TypeVar("Held")
Items = TypeVar("Items")
Found = TypeVar("Found")

AXIS = "samples"

LARGE_BYTES = 2**26
"""Of what a product reads: matrices of that size keep all cores of a CPU busy by themselves."""

WHOLE = PartitionSpec()


def local_sharding(held: PyTree, count: int) -> NamedSharding | None:
    """How `count` independent products, which read the arrays of `held` (an operator), go over the devices of this
    machine; None where they stay on one.

    They stay there inside of `jit`, where the arrays are spread already or read batch by batch, where a product is
    large on a CPU, and in one of several processes. Of the devices there are as many as divide `count`.
    """
    leaves = jax.tree.leaves(held)
    if jax.process_count() > 1 or not is_concrete(leaves) or _reads_batches(held):
        return None
    places = {device for leaf in leaves if isinstance(leaf, jax.Array) for device in leaf.devices()}
    if len(places) != 1:
        return None
    platform = places.pop().platform
    if platform == "cpu" and sum(np.size(leaf) * leaf.dtype.itemsize for leaf in leaves) > LARGE_BYTES:
        return None
    devices = jax.local_devices(backend=platform)
    used = max(number for number in range(1, len(devices) + 1) if count % number == 0)
    return None if used == 1 else NamedSharding(Mesh(np.array(devices[:used]), (AXIS,)), PartitionSpec(AXIS))


def _reads_batches(held: PyTree) -> bool:
    is_batched = lambda node: isinstance(node, BatchedObjective)  # noqa: E731
    return any(map(is_batched, jax.tree.leaves(held, is_leaf=is_batched)))


def everywhere(held: PyTree, sharding: NamedSharding) -> PyTree:
    """All arrays, whole on each of the devices."""
    return jax.device_put(held, NamedSharding(sharding.mesh, WHOLE))


def side_by_side(function: Callable[[Held, Items], Found], sharding: NamedSharding) -> Callable[[Held, Items], Found]:
    """`function(held, items)`, of items along the first axis, as each device says it of its own items; what it returns
    has that axis first too."""
    along = sharding.spec
    return jax.shard_map(function, mesh=sharding.mesh, in_specs=(WHOLE, along), out_specs=along, check_vma=False)


def together_again(found: PyTree, held: PyTree) -> PyTree:
    """What was computed side by side, where the arrays of `held` are; bound to that device if one of them is."""
    leaves = [leaf for leaf in jax.tree.leaves(held) if isinstance(leaf, jax.Array)]
    bound = next((leaf for leaf in leaves if leaf.committed), None)
    if bound is not None:
        return jax.device_put(found, next(iter(bound.devices())))
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), found)
