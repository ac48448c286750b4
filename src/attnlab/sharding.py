"""Parameters spread over the devices of a mesh, so that each holds its share."""

from collections.abc import Hashable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from attnlab.checks import unknown_name
from attnlab.types import Params, PyTree


def parameter_shardings(params: Params, mesh: Mesh, axis: str) -> PyTree:
    """A `NamedSharding` for every leaf of `params` (arrays, or their shapes): cut along its largest axis that the
    devices of `axis` of the mesh divide, of equal ones the last; whole on every device where they divide none.

    Raises `ValueError` for an axis that the mesh does not have.
    """
    if axis not in mesh.axis_names:
        raise unknown_name("axis of the mesh", axis, mesh.axis_names)

    def of(leaf: Any) -> NamedSharding:
        shape = np.shape(leaf)
        dividing = [place for place, size in enumerate(shape) if size and size % mesh.shape[axis] == 0]
        names: list[Hashable] = [None] * len(shape)
        if dividing:
            names[max(dividing, key=lambda place: (shape[place], place))] = axis
        return NamedSharding(mesh, PartitionSpec(*names))

    return jax.tree.map(of, params)


def shard_parameters(params: Params, mesh: Mesh, axis: str) -> Params:
    """`params` on the devices of the mesh, each leaf cut as `parameter_shardings` says.

    With several processes every one of them gives the same values. Raises `ValueError` for an axis that the mesh does
    not have.

    Example:
        >>> import attnlab as al
        >>> import jax
        >>> mesh = jax.make_mesh((1,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> params = al.shard_parameters({"kernel": jax.numpy.ones((4, 6))}, mesh, "devices")
        >>> params["kernel"].addressable_shards[0].data.shape  # on one device all of it
        (4, 6)
    """
    return jax.tree.map(jax.device_put, params, parameter_shardings(params, mesh, axis))
