"""Rules that divide in a basis of Kronecker products, that of the second moments G G^T and G^T G of a matrix's
gradients: Shampoo and SOAP.

With G of shape (m, n), L and R the averages of G G^T and G^T G and U, V their eigenvectors, both divide the averaged
gradient by a P that is diagonal in U (x) V: with P held, a step on a quadratic is Adam's in those coordinates, and so
is the edge of the eigenvalues of P^-1/2 H P^-1/2. Leaves of more axes than two are matrices of their last axis.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from attnlab.curvature.kronecker.factors import KroneckerBlock
from attnlab.curvature.operator import flat_dtype
from attnlab.dynamics.preconditioners import Preconditioner, divided
from attnlab.dynamics.rules.adaptive import AdaptiveMoments, AveragedOverP
from attnlab.dynamics.rules.base import Rate, check_stepped
from attnlab.dynamics.states import Sides, is_masked
from attnlab.types import Params, PyTree


class ShampooState(NamedTuple):
    """Steps taken, the averaged gradient, and of every leaf the averages of G G^T and G^T G."""

    count: Array  # type: ignore[assignment]  # the name that optax gives it
    mu: Params
    sides: PyTree


class SoapState(NamedTuple):
    """Steps taken, the averaged gradient, of every matrix the averages of G G^T and G^T G (of others nothing), and the
    mean square of gradients: of a matrix in the basis of those, as a `KroneckerBlock`."""

    count: Array  # type: ignore[assignment]  # the name that optax gives it
    mu: Params
    sides: PyTree
    nu: PyTree


@dataclass(frozen=True)
class Shampoo(AveragedOverP):
    """w' = w - eta m' / P with P = (1 - b1^t) L^1/4 (x) R^1/4, of averages of decay b2, corrected for their start, to
    whose eigenvalues eps is added; of a vector, or a single row, the root of the average of g g^T (Gupta, Koren,
    Singer, arXiv 1802.09568, with averages in the place of sums, as Anil et al., arXiv 2002.09018)."""

    b2: float = 0.99
    eps: float = 1e-12

    name = "shampoo"
    first_moment = (ShampooState, "mu")
    second_moment = (ShampooState, "sides")

    def optimizer(self, learning_rate: Rate) -> optax.GradientTransformation:
        return optax.chain(_transformation(self._start, self._step), optax.scale_by_learning_rate(learning_rate))

    def denominator(self, second: PyTree, steps: Array) -> Preconditioner:
        check_stepped(self.name, steps)

        def block(sides: Sides) -> KroneckerBlock:
            count = steps.astype(sides.right.dtype)
            seen, begun = (1 - jnp.asarray(b, count.dtype) ** count for b in (self.b2, self.b1))
            (left, low), (right, high) = (_eigh(side / seen) for side in sides)
            low, high = low + self.eps, high + self.eps
            if sides.left.size == 1:  # one axis: g is divided by R^1/2
                return KroneckerBlock(left, right, begun * jnp.sqrt(high)[None])
            return KroneckerBlock(left, right, begun * jnp.outer(low, high) ** 0.25)

        return jax.tree.map(lambda held: held if is_masked(held) else block(held), second, is_leaf=_is_sides)

    def _start(self, params: Params) -> ShampooState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return ShampooState(jnp.zeros((), jnp.int32), zeros, jax.tree.map(_no_sides, params))

    def _step(self, gradient: Params, state: ShampooState) -> tuple[Params, ShampooState]:
        sides = jax.tree.map(lambda g, held: _grown(held, g, self.b2), gradient, state.sides)
        mu = jax.tree.map(lambda m, g: self.b1 * m + (1 - self.b1) * g, state.mu, gradient)
        after = ShampooState(optax.safe_increment(state.count), mu, sides)
        return divided(mu, self.denominator(sides, after.count)), after


@dataclass(frozen=True)
class Soap(AdaptiveMoments):
    """w' = w - eta m' / P with P Adam's in the basis of L and R, the averages of decay b2 of G G^T and G^T G, found
    afresh every `frequency` steps; of vectors Adam (Vyas et al., arXiv 2409.11321, algorithm 3, with an exact
    eigendecomposition that already holds the step's own gradient)."""

    b1: float = 0.95
    b2: float = 0.95
    frequency: int = 10

    name = "soap"
    first_moment = (SoapState, "mu")
    second_moment = (SoapState, "nu")

    def optimizer(self, learning_rate: Rate) -> optax.GradientTransformation:
        return optax.chain(_transformation(self._start, self._step), optax.scale_by_learning_rate(learning_rate))

    def _start(self, params: Params) -> SoapState:
        def block(leaf: Array) -> Array | KroneckerBlock:
            if leaf.ndim < 2:
                return jnp.zeros_like(leaf)
            matrix = _matrix(leaf)
            left, right = (jnp.eye(size, dtype=matrix.dtype) for size in matrix.shape)
            return KroneckerBlock(left, right, jnp.zeros_like(matrix))

        zeros = jax.tree.map(jnp.zeros_like, params)
        sides = jax.tree.map(lambda leaf: _no_sides(leaf) if leaf.ndim > 1 else (), params)
        return SoapState(jnp.zeros((), jnp.int32), zeros, sides, jax.tree.map(block, params))

    def _step(self, gradient: Params, state: SoapState) -> tuple[Params, SoapState]:
        def square(g: Array, block: Array | KroneckerBlock, sides: Sides) -> Array | KroneckerBlock:
            if not isinstance(block, KroneckerBlock):
                return self.b2 * block + (1 - self.b2) * g**2
            fresh = state.count % self.frequency == 0
            left, right = jax.lax.cond(fresh, _bases, lambda _: (block.left, block.right), sides)
            turned = replace(block, left=left, right=right)
            return replace(turned, values=self.b2 * block.values + (1 - self.b2) * turned.coordinates(_matrix(g)) ** 2)

        sides = jax.tree.map(lambda g, held: _grown(held, g, self.b2) if held else (), gradient, state.sides)
        nu = jax.tree.map(square, gradient, state.nu, sides)
        mu = jax.tree.map(lambda m, g: self.b1 * m + (1 - self.b1) * g, state.mu, gradient)
        after = SoapState(optax.safe_increment(state.count), mu, sides, nu)
        return divided(mu, self.denominator(nu, after.count)), after


def _transformation(start: Callable, step: Callable) -> optax.GradientTransformation:
    return optax.GradientTransformation(start, lambda gradient, state, params=None: step(gradient, state))


def _is_sides(node: PyTree) -> bool:
    return is_masked(node) or isinstance(node, Sides)


def _matrix(leaf: Array) -> Float[Array, "m n"]:
    """A leaf as a matrix of its last axis, a vector as one row; in single precision at least."""
    wide = leaf.astype(flat_dtype(leaf))
    return wide.reshape(-1, leaf.shape[-1]) if leaf.ndim > 1 else wide.reshape(1, -1)


def _no_sides(leaf: Array) -> Sides:
    matrix = _matrix(leaf)
    rows, columns = matrix.shape
    return Sides(jnp.zeros((rows, rows), matrix.dtype), jnp.zeros((columns, columns), matrix.dtype))


def _grown(sides: Sides, gradient: Array, decay: float) -> Sides:
    matrix = _matrix(gradient)
    return Sides(
        decay * sides.left + (1 - decay) * matrix @ matrix.T, decay * sides.right + (1 - decay) * matrix.T @ matrix
    )


def _bases(sides: Sides) -> tuple[Array, Array]:
    return _eigh(sides.left)[0], _eigh(sides.right)[0]


def _eigh(matrix: Float[Array, "n n"]) -> tuple[Float[Array, "n n"], Float[Array, " n"]]:
    """Eigenvectors, and eigenvalues with what rounding puts below zero cut off."""
    values, vectors = jnp.linalg.eigh(matrix)
    return vectors, jnp.maximum(values, 0)
