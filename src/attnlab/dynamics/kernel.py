"""The empirical neural tangent kernel along training: how far it moved, how it aligns with the targets."""

from collections import OrderedDict

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from attnlab.objectives import Objective
from attnlab.training.probe import Probe, TrainingState
from attnlab.types import Params, PRNGKey


def empirical_ntk(risk: Objective, params: Params) -> Float[Array, "m m"]:
    """J J^T with J the Jacobian of all m flat outputs in all parameters (Jacot, Gabriel, Hongler, arXiv 1806.07572).

    For a square loss over m entries the eigenvalues of the generalised Gauss-Newton matrix are 2 / m times its own.
    One linearisation and m products in each direction; for m up to some thousands.
    """
    flat, unravel = ravel_pytree(params)
    outputs, pull = jax.vjp(lambda vector: ravel_pytree(risk.outputs(unravel(vector)))[0], flat)
    jacobian = jax.lax.map(lambda row: pull(row)[0], jnp.eye(outputs.size, dtype=outputs.dtype))
    return jacobian @ jacobian.T


def kernel_distance(first: Float[Array, "m m"], second: Float[Array, "m m"]) -> Float[Array, ""]:
    """1 - <K, K'> / (||K|| ||K'||): 0 for kernels that agree up to scale (Fort et al., arXiv 2010.15110)."""
    return 1 - jnp.vdot(first, second) / (jnp.linalg.norm(first) * jnp.linalg.norm(second))


def kernel_alignment(kernel: Float[Array, "m m"], targets: Float[Array, " m"]) -> Float[Array, ""]:
    """<K, y y^T> / (||K|| ||y||^2), at most 1 (Cristianini et al. 2001)."""
    return targets @ kernel @ targets / (jnp.linalg.norm(kernel) * (targets @ targets))


def _targets(risk: Objective, params: Params) -> Float[Array, " m"]:
    """Targets as the outputs are: labels become centred one-hot vectors."""
    shape = jax.eval_shape(risk.outputs, params)
    if jnp.issubdtype(risk.targets.dtype, jnp.integer):
        classes = shape.shape[-1]
        return (jax.nn.one_hot(risk.targets, classes, dtype=shape.dtype) - 1 / classes).ravel()
    return risk.targets.ravel()


def ntk() -> Probe:
    """Probe: `distance` of the empirical NTK from that at the start, `alignment` with the targets, and `highest`, its
    largest eigenvalue."""

    def start(risk: Objective, state: TrainingState, key: PRNGKey) -> Float[Array, "m m"]:
        return empirical_ntk(risk, state.params)

    def measure(
        risk: Objective, state: TrainingState, memory: Float[Array, "m m"], key: PRNGKey
    ) -> tuple[dict[str, Array], Float[Array, "m m"]]:
        kernel = empirical_ntk(risk, state.params)
        values = OrderedDict(
            distance=kernel_distance(kernel, memory),
            alignment=kernel_alignment(kernel, _targets(risk, state.params)),
            highest=jnp.linalg.eigvalsh(kernel)[-1],
        )
        return values, memory

    return Probe(measure, start)
