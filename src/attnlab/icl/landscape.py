"""The landscape of one full layer: stationary points, the swapped path, and the local minima it leads to.

A rank-one step Gamma = k q^T can be taken in two ways: along the usual path a key reads x and the value reads y
(query_key U = k q^T, value (0, 1)), or along the swapped one the key reads y and the value reads x
(query_key [0; q^T], value (k, 0)). With anisotropic inputs a layer that has taken the top direction along the swapped
path and the others along the usual one sits at a strict local minimum: one value vector serves both paths,
so their cross terms cost risk, but to move the top direction over it would first have to unlearn it.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from attnlab.icl.population import Effective
from attnlab.icl.tasks import LinearRegression
from attnlab.objective import Objective
from attnlab.types import Params, Scalar


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StationaryPoint:
    """A point with its risk, the norm of its gradient, and the ascending eigenvalues of its Hessian."""

    params: Params
    risk: Scalar
    gradient_norm: Scalar
    hessian_eigenvalues: Float[Array, " p"]

    def is_strict_minimum(self, symmetries: int, threshold: float = 1e-9) -> bool:
        """Whether exactly `symmetries` Hessian eigenvalues vanish (relative to the largest), and all others are
        positive.

        One head has one continuous symmetry, the scale between value and query_key.
        """
        relative = self.hessian_eigenvalues / self.hessian_eigenvalues[-1]
        flat = int(jnp.sum(jnp.abs(relative) <= threshold))
        return flat == symmetries and bool(jnp.all(relative[symmetries:] > threshold))


def stationary_point(risk: Objective, params: Params, steps: int = 30) -> StationaryPoint:
    """Newton's method to the stationary point nearby, of any index; directions of no curvature are left alone.

    Dense: for some hundred parameters. Whether it converged shows in `gradient_norm`.
    """
    flat, unravel = ravel_pytree(params)

    def value(vector: Array) -> Scalar:
        return risk(unravel(vector))

    def step(vector: Array, _: None) -> tuple[Array, None]:
        inverse = jnp.linalg.pinv(jax.hessian(value)(vector), rtol=1e-10, hermitian=True)
        return vector - inverse @ jax.grad(value)(vector), None

    flat, _ = jax.lax.scan(step, flat, length=steps)
    gradient_norm = jnp.linalg.norm(jax.grad(value)(flat))
    return StationaryPoint(unravel(flat), value(flat), gradient_norm, jnp.linalg.eigvalsh(jax.hessian(value)(flat)))


def balance(effective: Effective) -> Effective:
    """The same layer with |value| = |query_key| in each head: the scale at which gradient flow from a small start ends.

    Hessian eigenvalues depend on that scale, so compare them balanced.
    """
    value, query_key = effective["value"], effective["query_key"]
    value_norm = jnp.linalg.norm(value, axis=1)
    ratio = jnp.sqrt(jnp.linalg.norm(query_key, axis=(1, 2)) / value_norm)
    return {"value": value * ratio[:, None], "query_key": query_key / ratio[:, None, None]}


def swapped_start(problem: LinearRegression, strength: float = 0.4) -> Effective:
    """One head that takes the top direction e of the inputs along the swapped path, the others along the usual one.

    The value is (-4 e, 1) and `query_key` [strength (I - e e^T); -(strength / 4) e^T], so the preconditioner is about
    `strength` times the identity. A start for `stationary_point` or for training, in the basin of the local minimum
    where there is one.
    """
    _, vectors = jnp.linalg.eigh(problem.covariance)
    top = vectors[:, -1]
    others = jnp.eye(len(top), dtype=top.dtype) - jnp.outer(top, top)
    query_key = jnp.concatenate([strength * others, -strength / 4 * top[None, :]])
    return {"value": jnp.append(-4 * top, jnp.ones((), top.dtype))[None], "query_key": query_key[None]}
