"""Linear systems with an operator, brought near the identity by a Kronecker approximation of it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from attnlab.checks import check_same_structure
from attnlab.curvature.kronecker.factors import KroneckerApproximation
from attnlab.curvature.linear_systems import Solution, solve
from attnlab.curvature.operator import Operator
from attnlab.trees import length
from attnlab.types import Params


def preconditioned_solve(
    operator: Operator,
    vector: Params,
    approximation: KroneckerApproximation,
    *,
    damping: float,
    tolerance: float = 1e-5,
    steps: int = 1000,
) -> Solution:
    """(A + damping I)^-1 vector by MINRES on M (A + damping I) M with M = (K + damping I)^-1/2, K the approximation.

    Stops at a relative residual of `tolerance` of the preconditioned system; the `residual` that comes back is that of
    the system itself, taken afresh. Raises `ValueError` for an approximation of other parameters than the operator's,
    a K + damping I that is singular, and as `solve` does.

    Example:
        >>> import attnlab as al
        >>> import jax
        >>> from attnlab.curvature.kronecker import kronecker_approximation, preconditioned_solve
        >>> inputs = jax.random.normal(jax.random.key(0), (8, 3))
        >>> risk = al.objective(lambda params, x: x @ params["w"], al.square_loss, inputs, inputs[:, :2])
        >>> params = {"w": 0 * inputs[:3, :2]}
        >>> exact = kronecker_approximation("kfac", risk, params)  # of one layer under the square loss
        >>> operator, gradient = al.ggn(risk, params), jax.grad(risk)(params)
        >>> found = preconditioned_solve(operator, gradient, exact, damping=0.01, tolerance=1e-4)
        >>> int(found.products)  # one, and another for the residual
        2
    """
    check_same_structure("the preconditioner's point", approximation.point, operator.point)
    check_same_structure("vector", vector, operator.point)
    root = approximation.inverse(damping, -0.5)
    shift = jnp.asarray(damping, operator.flat_dtype)
    near = replace(operator, linear=Partial(_between, root.linear, operator.linear, shift))
    found = solve(near, root.mv(vector), tolerance=tolerance, steps=steps)
    solution = root.mv(found.vector)
    flat = operator.ravel(solution)
    target = operator.ravel(vector)
    rest = target - operator.ravel(operator.mv(operator.unravel(flat))) - shift * flat
    size = length(target)
    return Solution(solution, length(rest) / jnp.where(size > 0, size, 1), found.products)


def _between(root: Partial, linear: Partial, shift: jax.Array, vector: Params) -> Params:
    inner = root(vector)
    return root(jax.tree.map(lambda image, own: image + shift.astype(own.dtype) * own, linear(inner), inner))
