"""The leading eigenvector of a positive semidefinite map, by restarts from the best vector so far."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.krylov.lanczos import inner_products

KRYLOV_STEPS = 24
RESTARTS = 50


def leading_eigenvector(
    apply: Callable[[Array], Array], start: Float[Array, " n"], tolerance: float
) -> tuple[Float[Array, " n"], Float[Array, ""]]:
    """Leading eigenvector of a positive semidefinite map, and its relative residual: a restarted Krylov iteration."""
    steps = min(KRYLOV_STEPS, start.size)

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        _, residual, count = state
        return (residual > tolerance) & (count < RESTARTS)

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
            rest = rest - basis.T @ inner_products(basis, rest)
        length = jnp.linalg.norm(rest)
        # an exhausted space: the remaining basis vectors are zero and add zero eigenvalues
        alive = length > 100 * jnp.finfo(start.dtype).eps * jnp.linalg.norm(image)
        return (basis, jnp.where(alive, rest / positive(length), 0)), image

    empty = jnp.zeros((steps, start.size), start.dtype)
    (basis, _), images = jax.lax.scan(extend, (empty, start), jnp.arange(steps))
    projected = basis @ images.T
    values, vectors = jnp.linalg.eigh((projected + projected.T) / 2)
    coefficients = vectors[:, -1]
    vector = basis.T @ coefficients
    residual = jnp.linalg.norm(images.T @ coefficients - values[-1] * vector) / positive(values[-1])
    return vector / positive(jnp.linalg.norm(vector)), residual


def positive(x: Array) -> Array:
    """`x`, or 1 where it is not above 0: for divisions whose numerator is then zero too."""
    return jnp.where(x > 0, x, 1)
