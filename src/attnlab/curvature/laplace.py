"""Laplace's method: the evidence of a model and the variance of its predictions, from the curvature at a minimum.

With the prior N(0, I / alpha) and the negative log-likelihood c R(w) + constant, the posterior is N(w*, P^-1) with

    P = c A + alpha I,     log evidence = -c R(w*) + constant - alpha |w*|^2 / 2 + d/2 log alpha - 1/2 log det P,

A the Gauss-Newton matrix of the risk R (MacKay 1992; Immer et al., arXiv 2104.04975). Exact for a linear model of
Gaussian noise.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.checks import check_number, is_concrete
from attnlab.curvature.estimators import log_determinant
from attnlab.curvature.linear_systems import solve
from attnlab.curvature.operator import Operator
from attnlab.curvature.operators import ggn
from attnlab.objectives import Objective, check_objective, known_loss
from attnlab.statistics import Estimate
from attnlab.types import Params, PRNGKey, PyTree

DENSE_DIMENSION = 1024
"""Up to which the matrix is formed; beyond, the determinant is estimated and the systems are solved one by one."""


class _Likelihood(NamedTuple):
    """-log p(targets | params) = scale R(params) + constant."""

    scale: Array
    constant: Array


def laplace_evidence(
    risk: Objective,
    params: Params,
    *,
    prior_precision: float,
    noise_variance: float | None = None,
    key: PRNGKey | None = None,
    samples: int = 10,
    steps: int | None = None,
) -> Estimate:
    """Laplace's approximation of log p(targets), at `params`, a minimum of c R + prior_precision |params|^2 / 2.

    Args:
        risk: under `cross_entropy` with labels or `square_loss`, unweighted or with weights as counts.
        params: where the posterior has its mode.
        prior_precision: alpha of the prior N(0, I / alpha), positive.
        noise_variance: of every target, for the square loss alone.
        key: of the samples that estimate the determinant, above 1,024 parameters; below it is exact, with the standard
            error 0.
        samples: as `log_determinant` takes them, and `steps`: their error is that of the evidence, and halved.
        steps: of Lanczos.

    Raises `ValueError` for a precision or a variance that is not positive or missing, and for many parameters without a
    key; `TypeError` for another loss.

    Example:
        >>> import attnlab as al
        >>> import jax.numpy as jnp
        >>> from attnlab.curvature.laplace import laplace_evidence
        >>> risk = al.objective(lambda w, x: w * x, al.square_loss, jnp.ones(1), jnp.array([2.0]))
        >>> found = laplace_evidence(risk, jnp.array(1.0), prior_precision=1.0, noise_variance=1.0)
        >>> round(float(found.value), 4)  # log N(2; 0, 1 + 1) = -1 - log(4 pi) / 2
        -2.2655
    """
    check_objective(risk, params)
    likelihood = _likelihood(risk, noise_variance)
    operator = ggn(risk, params)
    alpha = _positive("prior_precision", prior_precision)
    damping = alpha / likelihood.scale
    determinant = _log_determinant(operator, damping, key, samples, steps)
    norm = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
    fit = likelihood.scale * risk(params) + likelihood.constant
    occam = operator.dimension * (jnp.log(alpha) - jnp.log(likelihood.scale)) / 2
    value = -fit - alpha * norm / 2 + occam - determinant.value / 2
    bound = None if determinant.bound is None else determinant.bound / 2
    return Estimate(value, determinant.standard_error / 2, determinant.samples, bound)


def laplace_variance(
    risk: Objective,
    params: Params,
    inputs: PyTree,
    *,
    prior_precision: float,
    noise_variance: float | None = None,
    tolerance: float = 1e-6,
) -> Estimate:
    """The variance of the model's outputs at other `inputs` under the posterior: the diagonal of J P^-1 J^T.

    Of the linearised model (Immer, Korzepa, Bauer, arXiv 2008.08711), without the noise of the targets; shaped like the
    outputs. Up to 1,024 parameters by the matrix, with no error; beyond by one linear system an output, with the
    `bound` that its residual leaves. Arguments and errors as for `laplace_evidence`.

    Example:
        >>> import attnlab as al
        >>> import jax.numpy as jnp
        >>> from attnlab.curvature.laplace import laplace_variance
        >>> risk = al.objective(lambda w, x: w * x, al.square_loss, jnp.ones(1), jnp.array([2.0]))
        >>> found = laplace_variance(risk, jnp.array(1.0), jnp.array([3.0]), prior_precision=1.0, noise_variance=1.0)
        >>> found.value.tolist()  # 3^2 / (1 + 1)
        [4.5]
    """
    check_objective(risk, params)
    check_number("tolerance", tolerance, 0, math.inf, "It is that of the linear systems, relative.")
    likelihood = _likelihood(risk, noise_variance)
    damping = _positive("prior_precision", prior_precision) / likelihood.scale
    operator = ggn(risk, params).in_order()
    outputs, rows = _jacobian_rows(risk, params, inputs, operator)
    if operator.dimension <= DENSE_DIMENSION:
        damped = operator.dense() + damping * jnp.eye(operator.dimension, dtype=operator.flat_dtype)
        solved = jnp.linalg.solve(damped, rows.T).T
        bound = None
    else:
        found = [solve(operator, operator.unravel(row), damping=float(damping), tolerance=tolerance) for row in rows]
        solved = jnp.stack([operator.ravel(each.vector) for each in found])
        # x is off by at most residual |row| / damping, and the variance by that times |row|.
        residuals = jnp.stack([each.residual for each in found])
        bound = (residuals * jnp.sum(rows**2, axis=1) / damping / likelihood.scale).reshape(outputs.shape)
    value = (jnp.sum(rows * solved, axis=1) / likelihood.scale).reshape(outputs.shape)
    return Estimate(value, jnp.zeros_like(value), 1, bound)


def _likelihood(risk: Objective, noise_variance: float | None) -> _Likelihood:
    """Of the loss: the cross-entropy is the mean of -log p, the square loss of squared residuals."""
    loss = known_loss(risk.loss)
    if loss is None:
        raise TypeError(
            f"the loss is {risk.loss.func}; the evidence needs a negative log-likelihood: square_loss or cross_entropy."
        )
    total = risk.total()
    if loss.likelihood != "Gaussian":
        if noise_variance is not None:
            raise ValueError(f"noise_variance is {noise_variance}; the cross-entropy has no noise. Leave it out.")
        return _Likelihood(total, jnp.zeros_like(total))
    if noise_variance is None:
        raise ValueError("noise_variance is missing; expected that of the targets, as the square loss does not say it.")
    variance = _positive("noise_variance", noise_variance)
    return _Likelihood(total / (2 * variance), total / 2 * jnp.log(2 * jnp.pi * variance))


def _positive(name: str, value: float) -> Array:
    check_number(name, value, -math.inf, math.inf, "It is a precision or a variance.")
    if is_concrete(value) and not value > 0:
        raise ValueError(f"{name} is {value}; expected a positive number: without it the posterior has no width.")
    return jnp.asarray(value, float)


def _log_determinant(
    operator: Operator, damping: Array, key: PRNGKey | None, samples: int, steps: int | None
) -> Estimate:
    """log det(A + damping I)."""
    if operator.dimension > DENSE_DIMENSION:
        if key is None:
            raise ValueError(
                f"key is missing; {operator.dimension} parameters are more than {DENSE_DIMENSION}, and their "
                "determinant is estimated from samples. Pass key=jax.random.key(0)."
            )
        return log_determinant(operator, key, damping=float(damping), samples=samples, steps=steps)
    damped = operator.dense() + damping * jnp.eye(operator.dimension, dtype=operator.flat_dtype)
    value = jnp.linalg.slogdet(damped)[1]
    return Estimate(value, jnp.zeros_like(value), 1)


def _jacobian_rows(
    risk: Objective, params: Params, inputs: PyTree, operator: Operator
) -> tuple[Array, Float[Array, "K n"]]:
    """The outputs, and a flat gradient of each."""
    return _rows(risk.predict, params, inputs, operator)


@jax.jit
def _rows(predict: jax.tree_util.Partial, params: Params, inputs: PyTree, operator: Operator) -> tuple[Array, Array]:
    outputs, pull = jax.vjp(lambda params: predict(params, inputs), params)
    identity = jnp.eye(outputs.size, dtype=outputs.dtype).reshape(outputs.size, *outputs.shape)
    return outputs, jax.lax.map(lambda row: operator.ravel(pull(row)[0]), identity)
