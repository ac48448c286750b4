"""The landscape of one full layer: stationary points, the swapped path, and the local minima it leads to.

A rank-one step Gamma = k q^T can be taken in two ways: along the usual path a key reads x and the value reads y
(query_key U = k q^T, value (0, 1)), or along the swapped one the key reads y and the value reads x (query_key [0; q^T],
value (k, 0)). A layer that has taken one direction along the swapped path and the others along the usual one can sit at
a strict local minimum: one value vector serves both paths, so their cross terms cost risk, but to move the direction
over it would first have to unlearn it. Convergence results for this layer start from the subspace without a swapped
path, which gradient flow cannot leave (arXiv 2306.09927), so they do not contradict it.

For Lambda = diag(2, 1, .5, .25, .1), noise variance 0.1 and N = 20 its risk is 1.936 against 0.792, and isotropic
inputs have it as soon as the context is long enough: without noise d = 2 at N = 4, d = 3 at N = 25, d = 4 at N = 60.
None of the random starts ends badly where the tasks are whitened, Omega = Lambda^-1. (All of these are claims.) The
analysis `icl-landscape` counts the starts that do: in the first case about a third with one head and a tenth with two,
for isotropic inputs up to four fifths.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from attnlab.icl.optima import optimal_preconditioner
from attnlab.icl.population import Effective
from attnlab.icl.tasks import LinearRegression
from attnlab.objectives import Objective
from attnlab.types import Params, Real, Scalar


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

    def step(vector: Array, _: None) -> tuple[Array, tuple[Array, ...]]:
        value, gradient = jax.value_and_grad(lambda v: risk(unravel(v)))(vector)
        eigenvalues, vectors = jnp.linalg.eigh(jax.hessian(lambda v: risk(unravel(v)))(vector))
        flat_directions = jnp.abs(eigenvalues) <= 1e-10 * jnp.max(jnp.abs(eigenvalues))
        inverse = jnp.where(flat_directions, 0, 1 / jnp.where(flat_directions, 1, eigenvalues))
        following = vector - vectors @ (inverse * (gradient @ vectors))
        return following, (vector, value, jnp.linalg.norm(gradient), eigenvalues)

    _, path = jax.lax.scan(step, flat, length=steps + 1)
    last, value, gradient_norm, eigenvalues = (series[-1] for series in path)
    return StationaryPoint(unravel(last), value, gradient_norm, eigenvalues)


def balance(effective: Effective) -> Effective:
    """The same layer with |value| = |query_key| in each head: the scale at which gradient flow from a small start ends.

    Hessian eigenvalues depend on that scale, so compare them balanced.
    """
    value, query_key = effective["value"], effective["query_key"]
    value_norm = jnp.linalg.norm(value, axis=1)
    ratio = jnp.sqrt(jnp.linalg.norm(query_key, axis=(1, 2)) / value_norm)
    return {"value": value * ratio[:, None], "query_key": query_key / ratio[:, None, None]}


def swapped_start(problem: LinearRegression, length: Real) -> Effective:
    """One head that takes the top direction e of the inputs along the swapped path, the others along the usual one.

    Both paths carry their share of the best preconditioner Gamma*: value (-4 e, 1), query_key
    [(I - e e^T) Gamma* (I - e e^T); -(e^T Gamma* e / 4) e^T]. A start for `stationary_point` or for training, in the
    basin of the local minimum where there is one.
    """
    _, vectors = jnp.linalg.eigh(problem.covariance)
    top = vectors[:, -1]
    others = jnp.eye(len(top), dtype=top.dtype) - jnp.outer(top, top)
    best = optimal_preconditioner(problem, length)
    query_key = jnp.concatenate([others @ best @ others, -(top @ best @ top) / 4 * top[None, :]])
    return {"value": jnp.append(-4 * top, jnp.ones((), top.dtype))[None], "query_key": query_key[None]}
