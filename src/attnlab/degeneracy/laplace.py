"""What the Hessian alone says of a minimum: rank, log-determinant, and the coefficient of its quadratic form."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.checks import check_number
from attnlab.curvature import hessian
from attnlab.curvature.operator import Operator
from attnlab.objectives import Risk
from attnlab.types import Params, Real, Scalar


class Laplace(NamedTuple):
    """The quadratic form of a risk at a minimum.

    Attributes:
        rank: eigenvalues above the tolerance; half of it is the learning coefficient where the minima form a manifold
            across which the risk grows quadratically (Morse-Bott).
        log_determinant: of the Hessian on these eigenvectors: the constant in Laplace's free energy.
        coefficient: n beta E[q(w)] of the quadratic form q under exp(-n beta q - gamma/2 ||w - w*||^2): half the sum of
            n beta h / (n beta h + gamma) over eigenvalues h; minus infinity where one falls faster than gamma holds.
        eigenvalues: all of them, ascending.
    """

    rank: Array
    log_determinant: Scalar
    coefficient: Scalar
    eigenvalues: Float[Array, " d"]


def laplace(risk: Risk, params: Params, scale: Real, localization: Real = 1.0, *, tolerance: float = 1e-8) -> Laplace:
    """Of the dense Hessian at `params`, n beta = `scale` and gamma = `localization`; `tolerance` is relative to the
    largest eigenvalue in modulus.

    Example:
        >>> import attnlab as al
        >>> import jax.numpy as jnp
        >>> from attnlab.degeneracy.laplace import laplace
        >>> risk = al.objective(lambda w, x: x * w[0] * w[1], al.square_loss, jnp.ones(1), jnp.ones(1))
        >>> int(laplace(risk, jnp.ones(2), 1e4).rank)  # a curve of minima in the plane
        1
    """
    check_number("scale", scale, 0.0, jnp.inf, "It is n beta.")
    check_number("localization", localization, math.ulp(0.0), jnp.inf, "It is gamma.")
    eigenvalues = _eigenvalues(hessian(risk, params, check=False))
    counted = eigenvalues > tolerance * jnp.max(jnp.abs(eigenvalues))
    logs = jnp.where(counted, jnp.log(jnp.where(counted, eigenvalues, 1)), 0)
    bent = scale * eigenvalues
    held = bent + localization > 0
    share = jnp.where(held, bent / jnp.where(held, bent + localization, 1), -jnp.inf)
    return Laplace(jnp.sum(counted), jnp.sum(logs), jnp.sum(share) / 2, eigenvalues)


@jax.jit
def _eigenvalues(operator: Operator) -> Float[Array, " d"]:
    return jnp.linalg.eigvalsh(operator.dense())
