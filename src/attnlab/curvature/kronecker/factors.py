"""Blocks of the form (U (x) V) diag(values) (U (x) V)^T, and operators made of one block a weight."""

import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from attnlab.checks import check_number, check_same_structure, is_concrete
from attnlab.curvature.operator import Operator
from attnlab.trees import leaf_names
from attnlab.types import Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KroneckerBlock:
    """The block of one weight W (m, n), by its eigenvalues in a basis of Kronecker products; a bias is (1, n).

    Attributes:
        left: U, the orthonormal columns for the rows of W.
        right: V, those for its columns.
        values: (m, n): of u_i v_j^T.
    """

    left: Float[Array, "m m"]
    right: Float[Array, "n n"]
    values: Float[Array, "m n"]

    def coordinates(self, matrix: Float[Array, "... m n"]) -> Float[Array, "... m n"]:
        """U^T W V."""
        return jnp.einsum("im,...ij,jn->...mn", self.left, matrix, self.right)

    def scaled(self, values: Float[Array, "m n"], weight: Array) -> Array:
        """The product of the block with other eigenvalues and a weight, in the weight's own shape."""
        matrix = weight.reshape(self.values.shape).astype(self.values.dtype)
        image = self.left @ (values * self.coordinates(matrix)) @ self.right.T
        return image.reshape(weight.shape).astype(weight.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KroneckerApproximation:
    """A block-diagonal approximation of the Gauss-Newton matrix, one `KroneckerBlock` a weight; crosses `jit`.

    `attnlab.curvature.kronecker.kronecker_approximation` makes it.

    Attributes:
        blocks: in the order of the leaves of `point`.
        point: the parameters at which it was taken: all of them, or a dict of those of a block.
        name: of the approximation, its key in `APPROXIMATIONS`.
    """

    blocks: tuple[KroneckerBlock, ...]
    point: Params
    name: str = field(metadata={"static": True})

    @property
    def operator(self) -> Operator:
        """As an operator: spectra, traces and norms are those of any other."""
        return self._function([block.values for block in self.blocks])

    def inverse(self, damping: float, power: float = -1.0) -> Operator:
        """(K + damping I)^-1, or another `power` of K + damping I, as an operator.

        Raises `ValueError` for a negative damping, and where K + damping I is singular to rounding.
        """
        return self._function([values**power for values in self._damped(damping)])

    def solve(self, vector: Params, damping: float) -> Params:
        """(K + damping I)^-1 vector, exactly; `vector` is like `point`. Raises `ValueError` as `inverse` does, and for
        a vector of another structure."""
        check_same_structure("vector", vector, self.point)
        return self.inverse(damping).mv(vector)

    def trace(self) -> Float[Array, ""]:
        """The sum of the eigenvalues."""
        return jnp.asarray(sum(jnp.sum(block.values) for block in self.blocks))

    def log_determinant(self, damping: float) -> Float[Array, ""]:
        """log det(K + damping I). Raises as `inverse` does."""
        return jnp.asarray(sum(jnp.sum(jnp.log(values)) for values in self._damped(damping)))

    def _function(self, values: list[Array]) -> Operator:
        return Operator(Partial(_apply, self.blocks, values), self.point)

    def _damped(self, damping: float) -> list[Array]:
        check_number("damping", damping, 0, math.inf, "It is added to every eigenvalue.")
        damped = [block.values + jnp.asarray(damping, block.values.dtype) for block in self.blocks]
        for name, values in zip(leaf_names(self.point), damped, strict=True):
            if is_concrete(values):
                _check_positive(self.name, name, values, damping)
        return damped


def _check_positive(kind: str, name: str, values: Array, damping: float) -> None:
    lowest, highest = float(jnp.min(values)), float(jnp.max(values))
    if not lowest > np.finfo(values.dtype).eps * abs(highest):
        raise ValueError(
            f"{kind} of '{name}' has the eigenvalue {lowest:.3g} beside {highest:.3g} at damping {damping}: it is "
            "singular; expected a positive definite K + damping I. Raise the damping."
        )


def _apply(blocks: tuple[KroneckerBlock, ...], values: list[Array], vector: Params) -> Params:
    leaves, structure = jax.tree.flatten(vector)
    images = [block.scaled(scale, leaf) for block, scale, leaf in zip(blocks, values, leaves, strict=True)]
    return jax.tree.unflatten(structure, images)
