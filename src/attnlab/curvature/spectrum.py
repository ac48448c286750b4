"""Spectra of operators: extreme eigenpairs with residual bounds, and the spectral density with its error."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from attnlab.checks import check_finite, check_range, unknown_name
from attnlab.curvature.lanczos import (
    RestartPlan,
    RitzPairs,
    gauss_quadrature,
    plan_restarts,
    thick_restart,
    tridiagonalize,
)
from attnlab.curvature.operators import Operator
from attnlab.types import Params, PRNGKey

DENSE_DIMENSION = 512
"""Up to this dimension eigenpairs come from the dense matrix: no more work, and exact."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Eigenpairs:
    """Some eigenpairs of an operator.

    Attributes:
        values: (k,), ascending; with `which="both"` the k lowest, then the k highest.
        vectors: pytree like the operator's point with a leading axis k; orthonormal as flat vectors.
        residuals: (k,), bounds on ||A v - value v||: within that distance of each value lies an eigenvalue.
        products: how many products with the operator were taken.
    """

    values: Float[Array, " k"]
    vectors: Params
    residuals: Float[Array, " k"]
    products: Array


def eigenpairs(
    operator: Operator,
    key: PRNGKey,
    count: int = 1,
    *,
    which: Literal["low", "high", "both"] = "high",
    tolerance: float | None = None,
) -> Eigenpairs:
    """The `count` algebraically lowest or highest eigenpairs, or that many at both ends, in one jitted computation.

    Thick-restart Lanczos with locking, repeated eigenvalues included (see `lanczos.thick_restart`); the dense matrix up
    to dimension 512. `tolerance` bounds the residuals relative to the largest eigenvalue in modulus; by default it is
    the square root of the machine epsilon. Memory: 2 * wanted + 11 vectors. Warns where the tolerance was not reached:
    the residuals then say how far it came. Raises `ValueError` for a count that does not fit the dimension, or a
    product that is not finite.
    """
    if which not in ("low", "high", "both"):
        raise unknown_name("end of the spectrum", which, ("low", "high", "both"))
    ends = 2 if which == "both" else 1
    check_range("count", count, 1, operator.dimension // ends, "Ask for as many pairs as the operator has.")
    wanted = ends * count
    low, high = count if which != "high" else 0, count if which != "low" else 0
    dtype = ravel_pytree(operator.point)[0].dtype
    tolerance = float(jnp.finfo(dtype).eps) ** 0.5 if tolerance is None else tolerance
    if operator.dimension <= max(DENSE_DIMENSION, 2 * wanted + 10):
        pairs = _dense_eigenpairs(operator, low, high)
    else:
        pairs = _lanczos_eigenpairs(operator, key, tolerance, plan_restarts(low, high, operator.dimension))
    check_finite("the operator's product", pairs.values)
    limit = tolerance * pairs.scale
    if jnp.any(pairs.residuals > limit):
        warnings.warn(
            f"{int(jnp.sum(pairs.residuals > limit))} of {wanted} eigenpairs have residuals above {limit:.3g} after "
            f"{pairs.products} products; the largest is {jnp.max(pairs.residuals):.3g}. Raise the tolerance.",
            stacklevel=2,
        )
    unravel = ravel_pytree(operator.point)[1]
    return Eigenpairs(pairs.values, jax.vmap(unravel)(pairs.vectors), pairs.residuals, pairs.products)


@jax.jit(static_argnames=("low", "high"))
def _dense_eigenpairs(operator: Operator, low: int, high: int) -> RitzPairs:
    n = operator.dimension
    matrix = jax.lax.map(operator.flat_mv, jnp.eye(n, dtype=ravel_pytree(operator.point)[0].dtype))
    values, vectors = jnp.linalg.eigh(matrix)
    scale = jnp.max(jnp.abs(values))
    picked = jnp.array([*range(low), *range(n - high, n)])
    values, vectors = values[picked], vectors[:, picked].T
    residuals = jnp.linalg.norm(vectors @ matrix - values[:, None] * vectors, axis=1)
    return RitzPairs(values, vectors, residuals, scale, jnp.array(n))


@jax.jit(static_argnames=("plan",))
def _lanczos_eigenpairs(operator: Operator, key: PRNGKey, tolerance: float, plan: RestartPlan) -> RitzPairs:
    start_key, key = jax.random.split(key)
    start = jax.random.normal(start_key, (operator.dimension,), ravel_pytree(operator.point)[0].dtype)
    return thick_restart(operator.flat_mv, start, plan, tolerance, key)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SpectralDensity:
    """A spectral density by stochastic Lanczos quadrature: one Gauss rule a probe.

    Each probe's rule integrates polynomials up to degree 2 m - 1 against its own spectral measure exactly; the mean
    over probes estimates (1/n) sum_i f(lambda_i), and the spread over probes is its error.

    Attributes:
        nodes: (probes, m) Ritz values, ascending in each row.
        weights: (probes, m), each row sums to 1.
    """

    nodes: Float[Array, "probes m"]
    weights: Float[Array, "probes m"]

    def integral(self, function: Callable[[Array], Array]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """Mean of `function` over the eigenvalues, (1/n) sum_i f(lambda_i), and its standard error over the probes.

        `function` maps the nodes (m,) to (..., m).
        """
        per_probe = jax.vmap(lambda nodes, weights: function(nodes) @ weights)(self.nodes, self.weights)
        return jnp.mean(per_probe, axis=0), standard_error(per_probe)

    def moment(self, power: int) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """tr(A^power) / n, and its standard error."""
        return self.integral(lambda nodes: nodes**power)

    def density(self, grid: Float[Array, " g"], width: float) -> tuple[Float[Array, " g"], Float[Array, " g"]]:
        """The density convolved with a Gaussian of standard deviation `width` (in units of the eigenvalues), and its
        standard error, at each point of the grid."""
        norm = width * (2 * jnp.pi) ** 0.5
        return self.integral(lambda nodes: jnp.exp(-0.5 * ((grid[:, None] - nodes[None, :]) / width) ** 2) / norm)

    def cumulative(self, grid: Float[Array, " g"]) -> tuple[Float[Array, " g"], Float[Array, " g"]]:
        """Fraction of eigenvalues at or below each point of the grid, and its standard error; it needs no bandwidth."""
        return self.integral(lambda nodes: (nodes[None, :] <= grid[:, None]).astype(nodes.dtype))


def standard_error(samples: Float[Array, "probes *shape"]) -> Float[Array, "*shape"]:
    """Standard error of the mean over the leading axis (infinite for a single sample: one probe bounds nothing)."""
    count = samples.shape[0]
    if count == 1:
        return jnp.full(samples.shape[1:], jnp.inf, samples.dtype)
    return jnp.std(samples, axis=0, ddof=1) / count**0.5


def spectral_density(operator: Operator, key: PRNGKey, *, probes: int = 10, steps: int = 64) -> SpectralDensity:
    """Stochastic Lanczos quadrature with Rademacher probes, in one jitted computation (probes x steps products).

    Ubaru, Chen, Saad (2017); Ghorbani, Krishnan, Xiao (arXiv 1901.10159). No reorthogonalisation: a density does not
    need it, and memory stays a few vectors. Probes run one after another. Raises `ValueError` for more steps than the
    operator has dimensions, or a product that is not finite.
    """
    check_range("probes", probes, 1, 2**31 - 1, "Ask for at least one probe.")
    check_range("steps", steps, 1, operator.dimension, "A Krylov space has no more dimensions than the operator.")
    result = _spectral_density(operator, key, probes, steps)
    check_finite("the operator's product", result.nodes)
    return result


@jax.jit(static_argnames=("probes", "steps"))
def _spectral_density(operator: Operator, key: PRNGKey, probes: int, steps: int) -> SpectralDensity:
    dtype = ravel_pytree(operator.point)[0].dtype

    def one_probe(key):
        start = jax.random.rademacher(key, (operator.dimension,), dtype)
        return gauss_quadrature(tridiagonalize(operator.flat_mv, start, steps))

    return SpectralDensity(*jax.lax.map(one_probe, jax.random.split(key, probes)))
