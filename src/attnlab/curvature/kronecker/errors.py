"""How far an approximation of curvature is from the exact operator: in norm, in trace, in the damped inverse."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.checks import check_key, check_number, check_same_structure, check_whole
from attnlab.curvature.linear_systems import solve
from attnlab.curvature.operator import Operator
from attnlab.statistics import Estimate
from attnlab.types import Params, PRNGKey

DENSE_DIMENSION = 2048
"""Up to which matrices are formed; beyond, samples say what they can."""


class OperatorErrors(NamedTuple):
    """Of an approximation K of A; exact ones have the standard error 0.

    Attributes:
        frobenius: ||K - A|| / ||A||.
        shape: min_c ||c K - A|| / ||A|| = (1 - cos^2)^1/2 with the cosine of K and A: what no step size can mend.
        trace: tr K / tr A - 1.
        inverse: ||(K + damping)^-1 g - (A + damping)^-1 g|| / ||(A + damping)^-1 g||, its `bound` from the residual.
    """

    frobenius: Estimate
    shape: Estimate
    trace: Estimate
    inverse: Estimate


def operator_errors(
    approximation: Operator,
    exact: Operator,
    step: Params,
    gradient: Params,
    key: PRNGKey,
    *,
    damping: float,
    samples: int = 32,
) -> OperatorErrors:
    """Errors of `approximation` against `exact`, operators on one structure.

    Args:
        approximation: K.
        exact: A, positive semidefinite.
        step: (K + damping I)^-1 gradient, as `KroneckerApproximation.solve` gives it.
        gradient: g, like their points.
        key: of the samples.
        damping: of both inverses, positive.
        samples: where the dimension is above 2,048: Rademacher vectors of which both products are taken; the standard
            errors of these ratios are the jackknife's.

    Raises `ValueError` for operators or vectors of different structure and a damping that is not positive.
    """
    for name, tree in (("the exact operator's point", exact.point), ("step", step), ("gradient", gradient)):
        check_same_structure(name, tree, approximation.point)
    check_key(key)
    check_whole(samples=samples)
    check_number("damping", damping, float(jnp.finfo(exact.flat_dtype).tiny), math.inf, "It makes the inverse exist.")
    if exact.dimension <= DENSE_DIMENSION:
        return _of_matrices(approximation, exact, step, gradient, damping)
    products = _products(approximation, exact, jax.random.split(key, samples))
    frobenius, shape, trace = (_jackknife(ratio, products) for ratio in (_frobenius, _shape, _trace))
    found = solve(exact, gradient, damping=damping, tolerance=1e-6, steps=2000)
    wanted, got = exact.ravel(found.vector), exact.ravel(step)
    # The exact step is off by at most residual |g| / damping, for a positive semidefinite A.
    bound = found.residual * jnp.linalg.norm(exact.ravel(gradient)) / damping / jnp.linalg.norm(wanted)
    inverse = Estimate(_relative(got, wanted), jnp.zeros_like(bound), 1, bound)
    return OperatorErrors(frobenius, shape, trace, inverse)


def _of_matrices(
    approximation: Operator, exact: Operator, step: Params, gradient: Params, damping: float
) -> OperatorErrors:
    k, a = approximation.dense(), exact.dense()
    sums = jnp.stack([jnp.vdot(k, k), jnp.vdot(k, a), jnp.vdot(a, a), jnp.trace(k), jnp.trace(a)])
    damped = a + damping * jnp.eye(len(a), dtype=a.dtype)
    wanted = jnp.linalg.solve(damped, exact.ravel(gradient))
    values = (_frobenius(sums), _shape(sums), _trace(sums), _relative(exact.ravel(step), wanted))
    return OperatorErrors(*(Estimate(value, jnp.zeros_like(value), 1) for value in values))


@jax.jit
def _products(approximation: Operator, exact: Operator, keys: Array) -> Float[Array, "samples 5"]:
    """Of each sample z: <Kz, Kz>, <Kz, Az>, <Az, Az>, <z, Kz>, <z, Az>."""

    def one(key: Array) -> Array:
        z = exact.sample(jax.random.rademacher, key)
        k, a = approximation.flat_mv(z), exact.flat_mv(z)
        return jnp.stack([jnp.vdot(k, k), jnp.vdot(k, a), jnp.vdot(a, a), jnp.vdot(z, k), jnp.vdot(z, a)])

    return jax.lax.map(one, keys)


def _frobenius(sums: Float[Array, "5"]) -> Array:
    return jnp.sqrt(jnp.maximum(sums[0] - 2 * sums[1] + sums[2], 0) / sums[2])


def _shape(sums: Float[Array, "5"]) -> Array:
    return jnp.sqrt(jnp.maximum(1 - sums[1] ** 2 / (sums[0] * sums[2]), 0))


def _trace(sums: Float[Array, "5"]) -> Array:
    return sums[3] / sums[4] - 1


def _relative(found: Array, wanted: Array) -> Array:
    return jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted)


@partial(jax.jit, static_argnums=0)
def _jackknife(ratio: Callable[[Array], Array], products: Float[Array, "samples 5"]) -> Estimate:
    count = len(products)
    total = jnp.sum(products, axis=0)
    left_out = jax.vmap(lambda row: ratio((total - row) / max(count - 1, 1)))(products)
    spread = jnp.sqrt((count - 1) * jnp.mean((left_out - jnp.mean(left_out)) ** 2))
    return Estimate(ratio(total / count), spread if count > 1 else jnp.full_like(spread, jnp.inf), count)
