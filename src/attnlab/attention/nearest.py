"""The nearest Kronecker product to a block, matrix-free (Van Loan and Pitsianis 1993)."""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.attention.kronecker import KroneckerSum, Pairing, brought_to_scale, times_power

_KRYLOV_STEPS = 24
_RESTARTS = 50


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NearestKronecker:
    """The product `left ⊗ right` and how far the block is from it.

    Attributes:
        left: factor of the first pair of axes, of the same norm as `right`, with a trace that is not negative.
        right: factor of the second pair.
        relative_error: ||block - left ⊗ right|| / ||block|| in Frobenius norm. Exact for the returned factors, whatever
            the iteration did, down to the square root of the rounding error; 0 for the zero block.
        residual: relative residual of the singular pair; small where `left ⊗ right` is the nearest product.
        pairing: which axes the factors pair.
    """

    left: Float[Array, "p pp"]
    right: Float[Array, "q qp"]
    relative_error: Float[Array, ""]
    residual: Float[Array, ""]
    pairing: Pairing = field(metadata={"static": True})


@jax.jit(static_argnames=("pairing",))
def nearest_kronecker(
    block: KroneckerSum, *, pairing: Pairing = "straight", tolerance: float | None = None
) -> NearestKronecker:
    """Best approximation of `block` by one Kronecker product, the K-FAC form.

    The block rearranged with one pair of axes as rows and the other pair as columns is a matrix R, of which a Kronecker
    product is a rank-one piece: the answer is R's leading singular pair, found by a restarted Krylov iteration on R^T R
    with products that cost no more than `block.mv`. `straight` pairs rows with rows and columns with columns of the two
    parameters (what K-FAC does), `crossed` rows with columns. Iterates until the relative residual is `tolerance`
    (default: the rounding error to the power 3/4), at most 50 times.
    """
    tolerance = float(jnp.finfo(block.dtype).eps) ** 0.75 if tolerance is None else tolerance
    (block,), exponent = brought_to_scale(block)
    left_axes, right_axes = ("".join(block.axes(side, pairing)) for side in (0, 1))
    size = block.zeros(right_axes)
    to_left = lambda y: block.contract(y, right_axes, left_axes)  # noqa: E731
    to_right = lambda x: block.contract(x, left_axes, right_axes)  # noqa: E731
    gram = lambda y: to_right(to_left(y.reshape(size.shape))).ravel()  # noqa: E731
    start = jax.random.normal(jax.random.key(0), (size.size,), size.dtype)
    vector, residual = leading_eigenvector(gram, start, tolerance)

    unit = to_left(vector.reshape(size.shape))
    unit = unit / _positive(jnp.linalg.norm(unit.ravel()))
    # For a unit a the best right factor is R^T a, and ||R - a (R^T a)^T||^2 = ||R||^2 - ||R^T a||^2: exact for any a.
    other = to_right(unit)
    scale, norm = jnp.linalg.norm(other.ravel()), block.norm()
    error = jnp.where(norm > 0, jnp.sqrt(jnp.maximum(1 - (scale / _positive(norm)) ** 2, 0)), 0)
    # Half of the exponent for each factor; where it is odd, the root of two keeps their norms alike.
    odd = jnp.where(exponent % 2, 2**0.5, 1).astype(size.dtype)
    left = block.merged(times_power(odd * unit * jnp.sqrt(scale), exponent // 2), 0, pairing)
    right = block.merged(times_power(odd * other / _positive(jnp.sqrt(scale)), exponent // 2), 1, pairing)
    sign = jnp.where(jnp.trace(left) < 0, -1, 1).astype(left.dtype)
    return NearestKronecker(sign * left, sign * right, error, residual, pairing)


def leading_eigenvector(
    apply: Callable[[Array], Array], start: Float[Array, " n"], tolerance: float
) -> tuple[Float[Array, " n"], Float[Array, ""]]:
    """Leading eigenvector of a positive semidefinite map, and its relative residual: a restarted Krylov iteration."""
    steps = min(_KRYLOV_STEPS, start.size)

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        _, residual, count = state
        return (residual > tolerance) & (count < _RESTARTS)

    def restart(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        vector, residual = _krylov_step(apply, state[0], steps)
        return vector, residual, state[2] + 1

    start = start / jnp.linalg.norm(start)
    infinite = jnp.asarray(jnp.inf, start.dtype)
    vector, residual, _ = jax.lax.while_loop(unfinished, restart, (start, infinite, jnp.asarray(0)))
    return vector, residual


def _krylov_step(apply: Callable[[Array], Array], start: Array, steps: int) -> tuple[Array, Array]:
    """Rayleigh-Ritz on the Krylov space of `start`, with full reorthogonalization."""

    def extend(carry: tuple[Array, Array], k: Array) -> tuple[tuple[Array, Array], Array]:
        basis, vector = carry
        basis = basis.at[k].set(vector)
        image = apply(vector)
        rest = image
        for _ in range(2):
            rest = rest - basis.T @ (basis @ rest)
        length = jnp.linalg.norm(rest)
        # an exhausted space: the remaining basis vectors are zero and add zero eigenvalues
        alive = length > 100 * jnp.finfo(start.dtype).eps * jnp.linalg.norm(image)
        return (basis, jnp.where(alive, rest / _positive(length), 0)), image

    empty = jnp.zeros((steps, start.size), start.dtype)
    (basis, _), images = jax.lax.scan(extend, (empty, start), jnp.arange(steps))
    projected = basis @ images.T
    values, vectors = jnp.linalg.eigh((projected + projected.T) / 2)
    coefficients = vectors[:, -1]
    vector = basis.T @ coefficients
    residual = jnp.linalg.norm(images.T @ coefficients - values[-1] * vector) / _positive(values[-1])
    return vector / _positive(jnp.linalg.norm(vector)), residual


def _positive(x: Array) -> Array:
    """`x`, or 1 where it is not above 0: for divisions whose numerator is then zero too."""
    return jnp.where(x > 0, x, 1)
