"""How long gradient flow takes to learn one layer from a small start, in closed form.

Gradient flow d theta / dt = -grad risk of the reduced layer; t is the number of steps times the learning rate.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnlab.checks import is_concrete
from attnlab.icl.tasks import LinearRegression
from attnlab.types import Real


def merged_growth(
    times: Float[Array, " t"],
    start: Real,
    dimension: int,
    length: Real,
    noise_variance: Real = 0.0,
) -> Float[Array, " t"]:
    """g(t), Gamma = g I, for x, w ~ N(0, I), one value c and a merged query-key matrix U: a logistic curve.

    From the balanced start U = (u / sqrt d) I, c = u (conserved), g = u^2 / sqrt d obeys dg/dt = 4 sqrt d g (1 - g /
    g*) with g* = N / (N + d + 1 + noise): arXiv 2501.16265, here at finite N. `start` is g(0), 0 < start <
    g*.
    """
    limit = length / (length + dimension + 1 + noise_variance)
    if is_concrete(start) and is_concrete(limit) and not 0 < float(start) < float(limit):
        raise ValueError(f"start is {start}; expected a start between 0 and the optimum {limit}.")
    return limit / (1 + (limit / start - 1) * jnp.exp(-4 * dimension**0.5 * times))


def direction_forces(problem: LinearRegression, length: Real) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
    """A and C with risk = tr(L O) + sum_m (-2 A_m g_m + C_m g_m^2) for a preconditioner diag(g), Gaussian inputs.

    Lambda and Omega must be diagonal (choose their common eigenvectors as coordinates): A = l^2 o and
    C = l^2 [(1 + 1/N) l o + S/N]. The optimum is g = A / C.
    """
    if problem.inputs != "gaussian":
        raise ValueError(f"inputs are '{problem.inputs}'; expected 'gaussian'.")
    covariance, tasks = problem.covariance, problem.task_moment
    if is_concrete((covariance, tasks)):
        for name, given in (("covariance", covariance), ("task_covariance", tasks)):
            matrix = np.asarray(given)
            if np.max(np.abs(matrix - np.diag(np.diag(matrix)))) > 1e-6 * np.max(np.abs(matrix)):
                raise ValueError(f"{name} is not diagonal; expected coordinates along the common eigenvectors.")
    inputs, tasks = jnp.diag(covariance), jnp.diag(tasks)
    label_variance = problem.signal + problem.noise_variance
    gain = inputs**2 * tasks
    return gain, inputs**2 * ((1 + 1 / length) * inputs * tasks + label_variance / length)


def staircase_times(levels: Float[Array, " t"], start: Real, gain: Real, curvature: Real) -> Float[Array, " t"]:
    """When the preconditioner along one eigendirection reaches the given levels: a step of the staircase.

    For separate values, keys and queries (`population.rank_one_weights`) a head along eigenvector m with
    value = |key| = |query| = z (balanced, conserved) has g = z^3 and dz/dt = 2 z^2 (A - C z^3); `gain` A and
    `curvature` C are those of `direction_forces`. Aligned heads do not interact, so every step of the staircase is
    exact. With r = (A / C)^(1/3) and z = r s, t = [-1/s + J(s)] / (2 A r) between the ends, J' = s / (1 - s^3). Small
    starts wait for a time 1 / (2 A z(0)): that is why steps are well apart (arXiv 2501.16265).
    """
    limit = gain / curvature
    if is_concrete((levels, start, limit)):
        reached = np.append(np.asarray(levels), np.asarray(start))
        if np.min(reached) <= 0 or np.max(reached) >= float(limit):
            raise ValueError(
                f"start and levels are {start} and {levels}; expected values in (0, {limit}), the optimum."
            )

    def clock(level: Array) -> Array:
        s = jnp.cbrt(level / limit)
        wait = -1 / s
        # partial fractions: 3 s / (1 - s^3) = 1 / (1 - s) + (s - 1) / (1 + s + s^2)
        rest = -jnp.log1p(-s) / 3 + jnp.log1p(s + s**2) / 6 - jnp.arctan((2 * s + 1) / 3**0.5) / 3**0.5
        return wait + rest

    return (clock(levels) - clock(jnp.asarray(start, levels.dtype))) / (2 * gain * jnp.cbrt(limit))
