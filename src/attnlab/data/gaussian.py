"""Gaussian tokens, and targets from a teacher."""

import jax
from jaxtyping import Array, Float

from attnlab.checks import check_positive
from attnlab.data.dataset import Dataset
from attnlab.types import Params, Predict, PRNGKey


def gaussian_tokens(key: PRNGKey, count: int, length: int, dim: int, std: float = 1.0) -> Float[Array, "n L D"]:
    """`count` sequences of `length` tokens with independent entries N(0, std^2), in JAX's default precision."""
    check_positive(count=count, length=length, dim=dim)
    _check_std("std", std)
    return std * jax.random.normal(key, (count, length, dim))


def taught(
    key: PRNGKey, teacher: Predict, teacher_params: Params, inputs: Float[Array, "n ..."], noise: float = 0.0
) -> Dataset:
    """The inputs with targets teacher(teacher_params, inputs) + N(0, noise^2), the noise independent in each entry.

    The teacher is any `predict(params, inputs)`: for an attention layer `from_linen(SelfAttention(config))`. At the
    teacher's own parameters the expected square loss is noise^2.
    """
    _check_std("noise", noise)
    outputs = teacher(teacher_params, inputs)
    return Dataset(inputs, outputs + noise * jax.random.normal(key, outputs.shape, outputs.dtype))


def _check_std(name: str, value: float) -> None:
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} is {value}; expected zero or a positive finite number, a standard deviation.")
