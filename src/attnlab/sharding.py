"""Parameters spread over the devices of a mesh, so that each holds its share; and flat vectors of them.

A vector in the order of the parameters would have to go through every device to be cut into leaves. In a `Layout` each
device's part of the flat vector holds its own shares of all leaves: to flatten or to cut moves nothing but the leaves
that are whole on every device, of which each holds a piece.
"""

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
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


@dataclass(frozen=True)
class Layout:
    """How a flat vector of parameters lies on a mesh: part d holds the shares of device d, leaf after leaf. Static.

    Attributes:
        mesh: the devices.
        axes: those of its axes over which any leaf is cut; over these is the vector.
        specs: of every leaf.
        shapes: of every leaf.
        structure: of the parameters.
    """

    mesh: Mesh
    axes: tuple[str, ...]
    specs: tuple[PartitionSpec, ...]
    shapes: tuple[tuple[int, ...], ...]
    structure: jax.tree_util.PyTreeDef

    @property
    def size(self) -> int:
        """Length of the flat vector; above the number of parameters where whole leaves are filled up by zeros."""
        return sum(self._width(share, rest) for share, rest in self._cuts()) * self._devices(self.axes)

    @property
    def filled(self) -> bool:
        """Whether there are entries that are no parameter."""
        return self.size > sum(math.prod(shape) for shape in self.shapes)

    @property
    def sharding(self) -> NamedSharding:
        """Of a flat vector."""
        return NamedSharding(self.mesh, PartitionSpec(self.axes))

    def ravel(self, tree: PyTree) -> jax.Array:
        """The leaves of a pytree like the parameters as one flat vector."""

        def local(*leaves: jax.Array) -> jax.Array:
            pieces = zip(leaves, self._cuts(), strict=True)
            return jnp.concatenate([self._piece(leaf.reshape(-1), rest) for leaf, (_, rest) in pieces])

        return self._spread(local, self.specs, PartitionSpec(self.axes))(*self.structure.flatten_up_to(tree))

    def unravel(self, vector: jax.Array) -> PyTree:
        """The pytree of a flat vector, in its dtype."""

        def local(vector: jax.Array) -> tuple[jax.Array, ...]:
            leaves, start = [], 0
            for share, rest in self._cuts():
                width = self._width(share, rest)
                piece, start = vector[start : start + width], start + width
                whole = jax.lax.all_gather(piece, rest, tiled=True) if rest else piece
                leaves.append(whole[: math.prod(share)].reshape(share))
            return tuple(leaves)

        return self.structure.unflatten(self._spread(local, (PartitionSpec(self.axes),), self.specs)(vector))

    def _cuts(self) -> list[tuple[tuple[int, ...], tuple[str, ...]]]:
        """Of every leaf the shape of a device's share, and the axes over which it is the same."""
        return [
            (
                NamedSharding(self.mesh, spec).shard_shape(shape),
                tuple(name for name in self.axes if name not in _names(spec)),
            )
            for spec, shape in zip(self.specs, self.shapes, strict=True)
        ]

    def _devices(self, axes: tuple[str, ...]) -> int:
        return math.prod(self.mesh.shape[name] for name in axes)

    def _width(self, share: tuple[int, ...], rest: tuple[str, ...]) -> int:
        """How much of a share each of the devices that have it holds in the vector."""
        return math.ceil(math.prod(share) / self._devices(rest))

    def _piece(self, flat: jax.Array, rest: tuple[str, ...]) -> jax.Array:
        if not rest:
            return flat
        width = self._width(flat.shape, rest)
        filled = jnp.pad(flat, (0, self._devices(rest) * width - flat.size))
        return jax.lax.dynamic_slice(filled, (jax.lax.axis_index(rest) * width,), (width,))

    def _spread(self, local: Callable, inputs: Any, outputs: Any) -> Callable:
        # The other axes of the mesh stay what they are: samples may lie along them.
        return jax.shard_map(
            local, mesh=self.mesh, in_specs=inputs, out_specs=outputs, axis_names=set(self.axes), check_vma=False
        )


def _names(spec: PartitionSpec) -> list[str]:
    """The axes of the mesh in a specification."""
    return [name for entry in spec if entry is not None for name in (entry if isinstance(entry, tuple) else (entry,))]


def layout_of(params: Params) -> Layout | None:
    """The layout of flat vectors of these parameters; None unless all lie on one mesh, and one of them is cut."""
    leaves, structure = jax.tree.flatten(params)
    places = [None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None) for leaf in leaves]
    shardings = [place for place in places if isinstance(place, NamedSharding)]
    if not leaves or len(shardings) < len(leaves):
        return None
    meshes, specs = {sharding.mesh for sharding in shardings}, tuple(sharding.spec for sharding in shardings)
    used = {name for spec in specs for name in _names(spec)}
    mesh = meshes.pop()
    if meshes or not isinstance(mesh, Mesh):
        return None
    axes = tuple(name for name in mesh.axis_names if name in used)
    if math.prod(mesh.shape[name] for name in axes) == 1:
        return None
    return Layout(mesh, axes, specs, tuple(np.shape(leaf) for leaf in leaves), structure)
