"""Optimizers whose direction is a maximal margin: normalised gradient descent and mirror descent in l_p geometry."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from attnlab.checks import is_concrete
from attnlab.types import Params, PyTree, Real


def normalize_gradient() -> optax.GradientTransformation:
    """Divide the gradient by its Euclidean norm over all leaves; a gradient of zero stays.

    Scaled by its largest entry first, so that no square underflows: there is no epsilon to stall at. For gradients of
    attention below 1e-300 train the objective's `rescaled`.
    """

    def update(
        gradient: PyTree, state: optax.EmptyState, params: Params | None = None
    ) -> tuple[PyTree, optax.EmptyState]:
        largest = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(gradient)]))
        scaled = jax.tree.map(lambda leaf: leaf / jnp.where(largest > 0, largest, 1), gradient)
        norm = optax.tree.norm(scaled)
        return jax.tree.map(lambda leaf: leaf / jnp.where(norm > 0, norm, 1), scaled), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def normalized_descent(step_size: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """w <- w - step_size * g / ||g||: steps of constant length.

    Raises `ValueError` for a step size that is not a positive number or a schedule.

    >>> import jax.numpy as jnp
    >>> from attnlab.margin import normalized_descent
    >>> optimizer, weights = normalized_descent(0.5), jnp.zeros(2)
    >>> change, _ = optimizer.update(jnp.array([0.0, 4e-9]), optimizer.init(weights), weights)
    >>> float(change[1])
    -0.5
    """
    _check_step_size(step_size)
    return optax.chain(normalize_gradient(), optax.sgd(step_size))


def mirror_descent(step_size: Real, p: float) -> optax.GradientTransformation:
    """Mirror descent with the potential ||w||_p^p / p, p > 1 (arXiv 2410.14581, l_p-AttGD),

        phi_p(w') = phi_p(w) - step_size * g,   phi_p(w) = sign(w) |w|^(p - 1),

    entry by entry: gradient descent for p = 2. Chain it after `normalize_gradient` for steps that do not fade. Raises
    `ValueError` for p <= 1, whose potential has no inverse mirror map.

    >>> import jax.numpy as jnp
    >>> from attnlab.margin import mirror_descent
    >>> optimizer, weights = mirror_descent(1.0, p=3), jnp.array([1.0, 2.0])
    >>> change, _ = optimizer.update(jnp.array([-3.0, 3.0]), optimizer.init(weights), weights)
    >>> (weights + change).tolist()  # 1^2 + 3 and 2^2 - 3 are their squares
    [2.0, 1.0]
    """
    if isinstance(p, bool) or not isinstance(p, int | float | np.number) or not 1 < p < float("inf"):
        raise ValueError(f"p is {p!r}; expected a finite number above 1, as 1.5 or 3.")
    _check_step_size(step_size)

    def step(weights: jax.Array, gradient: jax.Array) -> jax.Array:
        return _power(_power(weights, p - 1) - step_size * gradient, 1 / (p - 1)) - weights

    def update(
        gradient: PyTree, state: optax.EmptyState, params: Params | None = None
    ) -> tuple[PyTree, optax.EmptyState]:
        if params is None:
            raise ValueError("mirror_descent needs the parameters: call update(gradient, state, params).")
        return jax.tree.map(step, params, gradient), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _check_step_size(step_size: Any) -> None:
    """Positive, where it is no schedule and not traced."""
    if callable(step_size) or not is_concrete(step_size):
        return
    if isinstance(step_size, str) or not (np.ndim(step_size) == 0 and 0 < step_size < float("inf")):
        raise ValueError(f"step_size is {step_size!r}; expected a positive number. Try 0.1.")


def _power(values: jax.Array, exponent: float) -> jax.Array:
    return jnp.sign(values) * jnp.abs(values) ** exponent
