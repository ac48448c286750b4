"""Losses: pure functions `loss(outputs, targets) -> scalar`, averages over all positions."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnlab.checks import unknown_name
from attnlab.types import Loss, Scalar


def square_loss(outputs: Float[Array, "*shape"], targets: Float[Array, "*shape"]) -> Scalar:
    """Mean of the squared differences over all entries.

    For one sequence of L tokens with v features it is ||F - Y||^2 / (L v), so that its Hessian in F is 2 / (L v)
    times the identity (Ormaniec, Dangel, Singh, arXiv 2410.10986, section 2).
    """
    if outputs.shape != targets.shape:
        raise ValueError(
            f"targets have shape {targets.shape}; the square loss expects the outputs' {outputs.shape}. "
            "Reshape them, or one-hot encode class labels."
        )
    return jnp.mean((outputs - targets) ** 2)


def cross_entropy(
    outputs: Float[Array, "*batch classes"], targets: Int[Array, "*batch"] | Float[Array, "*batch classes"]
) -> Scalar:
    """Mean over all positions of -sum_c y_c log softmax(outputs)_c.

    `targets` are class labels (integers, one axis fewer than `outputs`) or distributions over the classes. The
    Hessian in the outputs of one of n positions is (diag p - p p^T) / n.
    """
    log_probabilities = jax.nn.log_softmax(outputs, axis=-1)
    if jnp.issubdtype(targets.dtype, jnp.integer):
        if targets.shape != outputs.shape[:-1]:
            raise ValueError(
                f"targets have shape {targets.shape}; class labels for outputs of shape {outputs.shape} "
                f"have shape {outputs.shape[:-1]}."
            )
        picked = jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1)
        return -jnp.mean(picked)
    if targets.shape != outputs.shape:
        raise ValueError(
            f"targets have shape {targets.shape}; target distributions for outputs of shape {outputs.shape} "
            "have that same shape."
        )
    return -jnp.mean(jnp.sum(targets * log_probabilities, axis=-1))


LOSSES: dict[str, Loss] = {"square": square_loss, "cross_entropy": cross_entropy}


def loss_by_name(name: str) -> Loss:
    """The loss called `name`, one of the keys of `LOSSES`; raises `ValueError` for another."""
    if name not in LOSSES:
        raise unknown_name("loss", name, LOSSES)
    return LOSSES[name]
