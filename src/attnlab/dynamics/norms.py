"""Norms on parameters in which an optimizer's step is the steepest: their duals, and the direction that attains them.

Steepest descent in a norm steps along ||g||_* d(g), where d(g) maximises <g, d> over ||d|| <= 1 and ||g||_* = <g, d(g)>
(Bernstein & Newhouse, arXiv 2409.20325). The largest entry gives sign descent, the largest spectral norm of a matrix
gives Muon, the sum of the lengths of blocks gives descent in the block of the steepest slope.

A norm that is the largest of many parts has a semidefinite relaxation: with parts D (rows x columns) of spectral norm
at most 1, k directions V_1 ... V_k with sum_i V_i V_i^T <= 1 take the place of the one, and for any A >= 0 that acts on
the rows <D, A D> <= tr A, so that <d, H d> <= tr A wherever H <= A. For the largest entry it is that of Goemans and
Williamson; for matrices the weights A are Shampoo's.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.checks import unknown_name
from attnlab.trees import ravel
from attnlab.types import Params, PyTree, Scalar


class Norm(ABC):
    """A norm on parameters, with its dual."""

    name: ClassVar[str]

    @abstractmethod
    def size(self, tree: Params) -> Scalar:
        """||tree||."""

    @abstractmethod
    def steepest(self, slope: Params) -> Params:
        """d with ||d|| <= 1 and <slope, d> = ||slope||_*."""

    def dual(self, slope: Params) -> Scalar:
        """||slope||_*."""
        return _inner(slope, self.steepest(slope))

    def descent(self, slope: Params) -> Params:
        """||slope||_* d, along which steepest descent steps."""
        direction = self.steepest(slope)
        length = _inner(slope, direction)
        return jax.tree.map(lambda leaf: length.astype(leaf.dtype) * leaf, direction)


@dataclass(frozen=True)
class LargestBlock(Norm):
    """The sum of the Euclidean norms of the leaves; the dual is the largest of them, and its direction one leaf."""

    name = "block"

    def size(self, tree: Params) -> Scalar:
        return jnp.sum(_lengths(tree))

    def dual(self, slope: Params) -> Scalar:
        return jnp.max(_lengths(slope))

    def steepest(self, slope: Params) -> Params:
        leaves, structure = jax.tree.flatten(slope)
        lengths = _lengths(slope)
        chosen = jnp.argmax(lengths)
        length = jnp.where(lengths[chosen] > 0, lengths[chosen], 1)
        alone = [jnp.where(place == chosen, leaf / length.astype(leaf.dtype), 0) for place, leaf in enumerate(leaves)]
        return jax.tree.unflatten(structure, alone)


class LargestPart(Norm):
    """The largest norm of many parts: a norm with a semidefinite relaxation. Weights are what acts on the rows of each
    part, a pytree; a stack is parameters with a leading axis of directions."""

    @abstractmethod
    def spread(self, slopes: PyTree) -> tuple[PyTree, PyTree]:
        """Of a stack of slopes the stack of directions that maximises their inner product over the relaxed ball, and
        the weights A >= 0 with slopes = A directions."""

    @abstractmethod
    def weigh(self, weights: PyTree, tree: Params, power: float = 1) -> Params:
        """A^power applied to parameters."""

    @abstractmethod
    def blend(self, weights: PyTree, share: float, like: Params) -> PyTree:
        """A and its mean on every row, a share of it: positive definite."""

    @abstractmethod
    def total(self, weights: PyTree, like: Params) -> Scalar:
        """The largest <d, A d> over the ball."""


@dataclass(frozen=True)
class LargestEntry(LargestPart):
    """The largest modulus of an entry; the dual is the sum of them, its direction the signs."""

    name = "entry"

    def size(self, tree: Params) -> Scalar:
        return jnp.max(jnp.abs(ravel(tree)))

    def dual(self, slope: Params) -> Scalar:
        return jnp.sum(jnp.abs(ravel(slope)))

    def steepest(self, slope: Params) -> Params:
        return jax.tree.map(jnp.sign, slope)

    def spread(self, slopes: PyTree) -> tuple[PyTree, PyTree]:
        weights = jax.tree.map(lambda leaf: jnp.linalg.norm(leaf, axis=0), slopes)
        unit = lambda leaf, length: leaf / jnp.where(length > 0, length, 1)[None]  # noqa: E731
        return jax.tree.map(unit, slopes, weights), weights

    def weigh(self, weights: PyTree, tree: Params, power: float = 1) -> Params:
        return jax.tree.map(lambda weight, leaf: weight**power * leaf, weights, tree)

    def blend(self, weights: PyTree, share: float, like: Params) -> PyTree:
        mean = _positive(jnp.mean(ravel(weights)))
        return jax.tree.map(lambda weight: weight + share * mean.astype(weight.dtype), weights)

    def total(self, weights: PyTree, like: Params) -> Scalar:
        return jnp.sum(ravel(weights))


@dataclass(frozen=True)
class LargestMatrix(LargestPart):
    """The largest spectral norm of a leaf; the dual is the sum of nuclear norms, its direction their polar factors.

    A leaf of three axes or more is a stack of matrices, of one or none a single row, whose spectral norm is its length.
    With `scaled`, each is measured over sqrt(max(1, columns / rows)), as optax's Muon scales its steps.
    """

    scaled: bool = False

    name = "matrix"

    def scale(self, leaf: Array) -> float:
        """What the norm of a leaf is divided by."""
        rows, columns = _as_matrices(leaf).shape[-2:]
        return max(1.0, columns / rows) ** 0.5 if self.scaled and leaf.ndim > 1 else 1.0

    def size(self, tree: Params) -> Scalar:
        tops = [jnp.max(_singular_values(leaf)) / self.scale(leaf) for leaf in jax.tree.leaves(tree)]
        return jnp.max(jnp.stack(tops))

    def dual(self, slope: Params) -> Scalar:
        sums = [jnp.sum(_singular_values(leaf)) * self.scale(leaf) for leaf in jax.tree.leaves(slope)]
        return jnp.sum(jnp.stack(sums))

    def steepest(self, slope: Params) -> Params:
        return jax.tree.map(lambda leaf: self.scale(leaf) * polar(leaf), slope)

    def spread(self, slopes: PyTree) -> tuple[PyTree, PyTree]:
        leaves, structure = jax.tree.flatten(slopes)
        found = [_spread(leaf) for leaf in leaves]
        scales = [self.scale(leaf[0]) for leaf in leaves]
        directions = [scale * pair[0] for scale, pair in zip(scales, found, strict=True)]
        weights = [pair[1] / scale for scale, pair in zip(scales, found, strict=True)]
        return jax.tree.unflatten(structure, directions), jax.tree.unflatten(structure, weights)

    def weigh(self, weights: PyTree, tree: Params, power: float = 1) -> Params:
        def one(weight: Array, leaf: Array) -> Array:
            factor = weight if power == 1 else _root(weight, power)
            return _from_wide(factor @ _as_wide(leaf), leaf)

        return jax.tree.map(one, weights, tree)

    def blend(self, weights: PyTree, share: float, like: Params) -> PyTree:
        leaves = jax.tree.leaves(weights)
        rows = sum(leaf[..., 0].size for leaf in leaves)
        mean = _positive(sum(jnp.sum(jnp.trace(leaf, axis1=-2, axis2=-1)) for leaf in leaves) / rows)
        identity = lambda leaf: jnp.eye(leaf.shape[-1], dtype=leaf.dtype)[None]  # noqa: E731
        return jax.tree.map(lambda leaf: leaf + share * mean.astype(leaf.dtype) * identity(leaf), weights)

    def total(self, weights: PyTree, like: Params) -> Scalar:
        traces = jax.tree.map(
            lambda weight, leaf: self.scale(leaf) ** 2 * jnp.sum(jnp.trace(weight, axis1=-2, axis2=-1)), weights, like
        )
        return jnp.sum(jnp.stack(jax.tree.leaves(traces)))


NORMS: dict[str, type[Norm]] = {row.name: row for row in (LargestEntry, LargestMatrix, LargestBlock)}
"""Norms whose dual is known."""


def norm_by_name(name: Any) -> Norm:
    """The norm called `name`, or the one given; `ValueError` for one whose dual is not known, `TypeError` for what is
    no norm."""
    if isinstance(name, Norm):
        return name
    if not isinstance(name, str):
        raise TypeError(
            f"norm is {name!r:.80}, a {type(name).__name__}, without a dual; expected one of {', '.join(NORMS)}, or an "
            "instance of a subclass of Norm that has the direction `steepest`."
        )
    if name not in NORMS:
        raise unknown_name("norm with a known dual", name, NORMS)
    return NORMS[name]()


def polar(matrix: Array) -> Array:
    """The nearest matrix with orthonormal rows or columns, U V^T of its singular value decomposition; of a vector its
    direction, of several matrices along leading axes each. Where singular values vanish one of several."""
    if matrix.ndim < 2:
        length = jnp.linalg.norm(matrix.ravel())
        return matrix / jnp.where(length > 0, length, 1)
    left, _, right = jnp.linalg.svd(matrix, full_matrices=False)
    return left @ right


def _inner(first: Params, second: Params) -> Scalar:
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return jnp.sum(jnp.stack([jnp.vdot(a, b) for a, b in pairs]))


def _positive(number: Scalar) -> Scalar:
    return jnp.maximum(number, jnp.finfo(number.dtype).tiny)


def _lengths(tree: Params) -> Float[Array, " m"]:
    return jnp.stack([jnp.linalg.norm(leaf.ravel()) for leaf in jax.tree.leaves(tree)])


def _as_matrices(leaf: Array) -> Float[Array, "b rows columns"]:
    """A leaf as a stack of matrices; a vector as one row."""
    return leaf.reshape(1, 1, -1) if leaf.ndim < 2 else leaf.reshape(-1, *leaf.shape[-2:])


def _as_wide(leaf: Array) -> Float[Array, "b rows columns"]:
    """With no more rows than columns, turned where need be: weights act on the shorter side."""
    matrices = _as_matrices(leaf)
    return matrices if matrices.shape[-2] <= matrices.shape[-1] else jnp.swapaxes(matrices, -2, -1)


def _from_wide(wide: Array, leaf: Array) -> Array:
    rows, columns = _as_matrices(leaf).shape[-2:]
    return (wide if rows <= columns else jnp.swapaxes(wide, -2, -1)).reshape(leaf.shape)


def _singular_values(leaf: Array) -> Array:
    return jnp.linalg.svd(_as_matrices(leaf), compute_uv=False)


def _spread(slopes: Float[Array, "k *shape"]) -> tuple[Float[Array, "k *shape"], Float[Array, "b rows rows"]]:
    """Of k matrices side by side the polar factor, and sqrt(sum_i G_i G_i^T)."""
    wide = jax.vmap(_as_wide)(slopes)
    gram = jnp.einsum("kbij,kblj->bil", wide, wide)
    values, vectors = jnp.linalg.eigh(gram)
    values = jnp.maximum(values, 0)
    floor = jnp.finfo(values.dtype).eps * values.shape[-1] * jnp.max(values, axis=-1, keepdims=True)
    inverse = jnp.where(values > floor, jax.lax.rsqrt(jnp.where(values > floor, values, 1)), 0)
    directions = jnp.einsum("bij,bj,blj,kblm->kbim", vectors, inverse, vectors, wide)
    weights = jnp.einsum("bij,bj,blj->bil", vectors, jnp.sqrt(values), vectors)
    return jax.vmap(_from_wide, in_axes=(0, None))(directions, slopes[0]), weights


def _root(weight: Float[Array, "b rows rows"], power: float) -> Float[Array, "b rows rows"]:
    values, vectors = jnp.linalg.eigh(weight)
    return jnp.einsum("bij,bj,blj->bil", vectors, values**power, vectors)
