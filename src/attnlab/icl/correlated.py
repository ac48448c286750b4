"""Exact risks of one step of gradient descent when examples, tasks and the query are correlated.

All laws here are invariant under rotations, and the risk is convex in the preconditioner, so averaging it over
rotations shows that a multiple of the identity is best. For the prediction c f, f = sum_i <x_q, x_i> y_i, the least
risk is E y^2 - (E y f)^2 / E f^2, and the moments are polynomials. Targets carry no noise; add its variance if they do.

The `*_approximation` functions are the published ones (Li, Rawat, Oymak, arXiv 2407.10005), which replace
the context length n by an effective one, kappa n; they drop terms that grow with the alignment.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.icl.tasks import check_alignment, check_covariance
from attnlab.types import Scalar


def _drift(task_correlation: Float[Array, "T T"]) -> tuple[Array, Array]:
    correlation = check_covariance("task_correlation", task_correlation)
    if len(correlation) < 2:
        raise ValueError(
            "task_correlation is 1 x 1; expected (N + 1, N + 1), the query's task last, with N at least 1."
        )
    return correlation[:-1, :-1], correlation[:-1, -1]


def state_space_filter(
    task_correlation: Float[Array, "T T"], dimension: int, noise_variance: float = 0.0
) -> Float[Array, " N"]:
    """The best weights of the examples, (R + (d + 1 + noise) I)^-1 r, for the preconditioner I.

    `task_correlation` holds R_ij and, in its last column, r_i: the correlations of the tasks with each other and with
    the query's (`tasks.drifting_prompts`).
    """
    correlation, with_query = _drift(task_correlation)
    spread = (dimension + 1 + noise_variance) * jnp.eye(len(with_query), dtype=correlation.dtype)
    return jnp.linalg.solve(correlation + spread, with_query)


def state_space_risk(task_correlation: Float[Array, "T T"], dimension: int, noise_variance: float = 0.0) -> Scalar:
    """Least risk d - d r^T (R + (d + 1 + noise) I)^-1 r of a layer that may weigh the examples (H3).

    E y f = d w.r and E f^2 = d [w^T R w + (d + 1 + noise) |w|^2] for example weights w (arXiv 2407.10005).
    """
    _, with_query = _drift(task_correlation)
    return dimension * (1 - with_query @ state_space_filter(task_correlation, dimension, noise_variance))


def unweighted_risk(task_correlation: Float[Array, "T T"], dimension: int, noise_variance: float = 0.0) -> Scalar:
    """Least risk d - d (1.r)^2 / 1^T (R + (d + 1 + noise) I) 1 of linear attention, which weighs all examples alike."""
    correlation, with_query = _drift(task_correlation)
    spread = (dimension + 1 + noise_variance) * len(with_query)
    return dimension * (1 - jnp.sum(with_query) ** 2 / (jnp.sum(correlation) + spread))


class StepMoments(NamedTuple):
    """E y^2, E y f and E f^2 of the target y and f = sum_i <x_q, x_i> y_i."""

    target: float
    overlap: float
    square: float

    @property
    def step_size(self) -> float:
        """The best factor of f (of the sum over examples, not their mean)."""
        return self.overlap / self.square

    @property
    def risk(self) -> float:
        """The least E (y - c f)^2."""
        return self.target - self.overlap**2 / self.square


def retrieval_moments(dimension: int, length: int, alignment: float, noise_variance: float = 0.0) -> StepMoments:
    """The moments of `tasks.retrieval_prompts`, exact for every dimension and length.

    Given x_q with r = |x_q|^2, t = <x_q, x_i> is N(alpha r, s r) with s = 1 - alpha^2, and |x_i|^2 = t^2/r + s
    chi^2_{d-1}.
    """
    _check(dimension, length, alignment)
    d, n, a, s = dimension, length, alignment**2, 1 - alignment**2
    r1, r2, r3 = d, d * (d + 2), d * (d + 2) * (d + 4)  # E r, E r^2, E r^3
    overlap = a * r2 + s * r1  # E t^2
    same = a**2 * r3 + 6 * a * s * r2 + 3 * s**2 * r1 + s * (d - 1) * overlap  # E t^2 |x_i|^2
    different = a**2 * r3 + 2 * a * s * r2 + s**2 * r1  # E t_i t_j <x_i, x_j>
    return StepMoments(d, n * overlap, n * same + n * (n - 1) * different + noise_variance * n * overlap)


def alignment_moments(dimension: int, length: int, alignment: float, noise_variance: float = 0.0) -> StepMoments:
    """The moments of `tasks.aligned_prompts`, exact for every dimension and length.

    Given w with q = |w|^2, p = <w, x_i> is N(alpha q, q) and |x_i|^2 = p^2/q + chi^2_{d-1}; E x_q x_q^T = a w w^T + I
    with a = alpha^2, and labels carry the factor gamma = (a d + 1)^(-1/2).
    """
    _check(dimension, length, alignment)
    d, n, a = dimension, length, alignment**2
    squared_factor = 1 / (a * d + 1)  # gamma^2
    q1, q2, q3, q4 = d, d * (d + 2), d * (d + 2) * (d + 4), d * (d + 2) * (d + 4) * (d + 6)  # E q^k
    second = a * q2 + q1  # E p^2
    overlap = squared_factor * (a**2 * q3 + 2 * a * q2 + q1)  # gamma^2 E (a q + 1)^2 q
    different = squared_factor * (a**3 * q4 + 3 * a**2 * q3 + 3 * a * q2 + q1)  # gamma^2 E (a q + 1)^3 q
    # E (gamma^2 p^2 + noise)(a p^2 + |x_i|^2) with |x_i|^2 as above
    fourth = a * (a**2 * q4 + 6 * a * q3 + 3 * q2) + a**2 * q3 + 6 * a * q2 + 3 * q1  # E (a + 1/q) p^4
    same = squared_factor * (fourth + (d - 1) * second) + noise_variance * (a * second + a * q1 + d)
    return StepMoments(squared_factor * second, n * overlap, n * same + n * (n - 1) * different)


def retrieval_risk_approximation(dimension: int, length: int, alignment: float, noise_variance: float = 0.0) -> float:
    """d - d kappa n / (kappa n + d + 1 + noise) with kappa = alignment^2 d + 1, the published approximation."""
    _check(dimension, length, alignment)
    effective = (alignment**2 * dimension + 1) * length
    return dimension - dimension * effective / (effective + dimension + 1 + noise_variance)


def alignment_risk_approximation(dimension: int, length: int, alignment: float, noise_variance: float = 0.0) -> float:
    """d - d kappa n / (kappa n + (d + 1 + noise) / kappa) with kappa = alignment^2 d + 1, the published
    approximation."""
    _check(dimension, length, alignment)
    kappa = alignment**2 * dimension + 1
    effective = kappa * length
    return dimension - dimension * effective / (effective + (dimension + 1 + noise_variance) / kappa)


def _check(dimension: int, length: int, alignment: float) -> None:
    check_alignment(alignment)
    if dimension < 1 or length < 1:
        raise ValueError(f"dimension and length are {dimension} and {length}; expected at least 1 each.")
