"""Initialisation schemes by name. Each takes the scale that the scheme leaves open and returns a Flax initialiser."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from attnlab.checks import unknown_name
from attnlab.types import PRNGKey

Initializer = Callable[[PRNGKey, tuple[int, ...], DTypeLike], jax.Array]


def orthogonal(gain: float = 1.0) -> Initializer:
    """`gain` times a Haar-distributed matrix with orthonormal columns (rows, if it is wide)."""
    return nn.initializers.orthogonal(gain)


def identity(gain: float = 1.0) -> Initializer:
    """`gain` times ones on the diagonal, zeros elsewhere; deterministic, for matrices only."""

    def init(key: PRNGKey, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
        if len(shape) != 2:
            raise ValueError(f"the identity scheme makes matrices; shape {shape} has {len(shape)} axes. Take another.")
        return gain * jnp.eye(*shape, dtype=dtype)

    return init


INITIALIZERS: dict[str, Callable[[float], Initializer]] = {
    # entries N(0, gain^2 / fan_in), N(0, 2 gain^2 / (fan_in + fan_out)), N(0, 2 gain^2 / fan_in), N(0, gain^2)
    "lecun_normal": lambda gain: nn.initializers.variance_scaling(gain**2, "fan_in", "normal"),
    "xavier_normal": lambda gain: nn.initializers.variance_scaling(gain**2, "fan_avg", "normal"),
    "xavier_uniform": lambda gain: nn.initializers.variance_scaling(gain**2, "fan_avg", "uniform"),
    "he_normal": lambda gain: nn.initializers.variance_scaling(2 * gain**2, "fan_in", "normal"),
    "normal": lambda gain: nn.initializers.normal(gain),
    "orthogonal": orthogonal,
    "identity": identity,
    "zeros": lambda gain: nn.initializers.zeros,
}


def initializer(name: str, gain: float = 1.0) -> Initializer:
    """The scheme called `name`, one of the keys of `INITIALIZERS`, scaled by `gain`.

    Fan-in is the number of rows of a matrix (inputs times kernel area for a convolution). Raises `ValueError` for
    another name or a negative or non-finite gain.
    """
    if name not in INITIALIZERS:
        raise unknown_name("initialisation scheme", name, INITIALIZERS)
    if not 0 <= gain < float("inf"):
        raise ValueError(f"gain is {gain}; expected zero or a positive finite number.")
    return INITIALIZERS[name](gain)
