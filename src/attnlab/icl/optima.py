"""Optimal weights and risks of one layer: full rank, low rank and adapted, and across context lengths.

With Gamma the preconditioner of `models.reduced_predict`, v = Gamma^T G w and equation (1) of `population` give

    risk(Gamma) = tr(L O) - 2 tr(L O L Gamma) + tr(L Gamma^T C Gamma),
    C = (1 + 1/N) L O L + (S/N) L + (1/N) sum_p kappa_p (A_p^T O A_p) A_p A_p^T,  S = tr(L O) + noise variance,

where L = Lambda and O = E w w^T: any task law with that second moment, and independent inputs of any kurtosis kappa.
For Gaussian inputs the optimum C^-1 L O is [(1 + 1/N) O L + (S/N) I]^-1 O: theorem 1 of Ahn et al., arXiv 2306.00297,
and of Zhang, Frei, Bartlett, arXiv 2306.09927, where it is shown to be the optimum of the full layer too.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.checks import check_range
from attnlab.icl.population import population_risk, reduced_weights
from attnlab.icl.tasks import INPUT_LAWS, LinearRegression, Prompt, with_tasks
from attnlab.types import Real, Scalar


def reduced_risk(preconditioner: Float[Array, "d d"], problem: LinearRegression, length: Real) -> Scalar:
    """Exact risk of one preconditioned step of gradient descent on prompts of `length` examples.

    A preconditioner trained at another length is simply evaluated at this one.
    """
    return population_risk(reduced_weights({"preconditioner": preconditioner}), problem, length)


def step_curvature(problem: LinearRegression, length: Real) -> Float[Array, "d d"]:
    """C of the module's text: the risk's Hessian in the columns of Gamma is 2 C tensor L."""
    covariance, tasks, mixing = problem.covariance, problem.task_moment, problem.mixing
    label_variance = problem.signal + problem.noise_variance
    projected = jnp.sum(mixing * (tasks @ mixing), axis=0)
    cumulant = INPUT_LAWS[problem.inputs].excess_kurtosis * (mixing * projected[None, :]) @ mixing.T
    average = covariance @ tasks @ covariance
    return average + (average + label_variance * covariance + cumulant) / length


def optimal_preconditioner(problem: LinearRegression, length: Real) -> Float[Array, "d d"]:
    """Gamma* = C^-1 Lambda Omega, the best preconditioner of one step (zero where the inputs have no variance)."""
    curvature = step_curvature(problem, length)
    return jnp.linalg.pinv(curvature, hermitian=True) @ problem.covariance @ problem.task_moment


def optimal_risk(problem: LinearRegression, length: Real) -> Scalar:
    """Risk at `optimal_preconditioner`: tr(L O) - tr(L O L Gamma*)."""
    covariance = problem.covariance
    gain = covariance @ problem.task_moment @ covariance
    return problem.signal - jnp.sum(gain * optimal_preconditioner(problem, length))


def spectral_risk(eigenvalues: Float[Array, " d"], length: Real, noise_variance: Real = 0.0) -> Scalar:
    """sum s_i - sum N s_i^2 / ((N + 1) s_i + S) for the eigenvalues s of Lambda^(1/2) Omega Lambda^(1/2).

    Equal to `optimal_risk` for Gaussian inputs, at O(d): for power-law spectra of any size. For s_i = 1 it is
    d (d + 1 + noise) / (N + d + 1 + noise).
    """
    total = jnp.sum(eigenvalues) + noise_variance
    return jnp.sum(eigenvalues - length * eigenvalues**2 / ((length + 1) * eigenvalues + total))


def _whitened_gap(problem: LinearRegression, length: Real, start: Float[Array, "d d"]) -> tuple[Array, Array]:
    """D^(1/2) L^(1/2) and (D^(1/2) L^(1/2)) (Gamma* - start) L^(1/2), whose squared norm is risk(start) - risk*.

    risk - risk* = tr(L E^T C E) for the gap E, and C = F^T F for F = D^(1/2) L^(1/2) with D = L^(-1/2) C L^(-1/2); any
    other root F of C has the same singular values, so the symmetric one serves.
    """
    values, vectors = jnp.linalg.eigh(step_curvature(problem, length))
    factor = (vectors * jnp.sqrt(jnp.maximum(values, 0))[None, :]) @ vectors.T
    return factor, factor @ (optimal_preconditioner(problem, length) - start) @ problem.mixing


def _start(problem: LinearRegression, start: Float[Array, "d d"] | None) -> Float[Array, "d d"]:
    start = jnp.zeros_like(problem.mixing) if start is None else start
    if start.shape != problem.mixing.shape:
        raise ValueError(f"start has shape {start.shape}; expected a preconditioner of shape {problem.mixing.shape}.")
    return start


def adapted_risks(
    problem: LinearRegression, length: Real, start: Float[Array, "d d"] | None = None
) -> Float[Array, " ranks"]:
    """Least risk after an update of rank 0, 1, ..., d to the preconditioner `start` (zero if left out).

    risk* + sum_{k > r} sigma_k^2(D^(1/2) L^(1/2) (Gamma* - start) L^(1/2)) by Eckart and Young: low-rank adaptation
    (arXiv 2407.10005), and from zero the plateaus of the staircase of arXiv 2501.16265.
    """
    _, gap = _whitened_gap(problem, length, _start(problem, start))
    squares = jnp.linalg.svd(gap, compute_uv=False) ** 2
    tails = jnp.append(jnp.cumsum(squares[::-1])[::-1], jnp.zeros((), squares.dtype))
    return optimal_risk(problem, length) + tails


def adapted_preconditioner(
    problem: LinearRegression, length: Real, rank: int, start: Float[Array, "d d"] | None = None
) -> Float[Array, "d d"]:
    """`start` plus its best update of the given rank; needs an invertible input covariance."""
    check_range("rank", rank, 0, problem.dimension, "The update is a d x d matrix.")
    start = _start(problem, start)
    factor, gap = _whitened_gap(problem, length, start)
    left, values, right = jnp.linalg.svd(gap)
    kept = (left[:, :rank] * values[None, :rank]) @ right[:rank]
    return start + jnp.linalg.solve(factor, jnp.linalg.solve(problem.mixing, kept.T).T)


def length_generalization_risk(problem: LinearRegression, train_length: Real, test_length: Real) -> Scalar:
    """Risk at `test_length` of the preconditioner that is optimal at `train_length`.

    Isotropic: d [(1 - g)^2 + g^2 (d + 1 + noise) / M] with g = N / (N + d + 1 + noise).
    """
    return reduced_risk(optimal_preconditioner(problem, train_length), problem, test_length)


def task_diversity_risk(problem: LinearRegression, tasks: Float[Array, "M d"], length: Real) -> Scalar:
    """Risk on fresh tasks of `problem` of the preconditioner that is optimal for the finite set `tasks`.

    For w ~ N(0, I), isotropic inputs and N to infinity its mean is d (1 - M/d)_+: training sees only their span.
    """
    return reduced_risk(optimal_preconditioner(with_tasks(problem, tasks), length), problem, length)


def fit_preconditioner(prompts: Prompt) -> Float[Array, "d d"]:
    """The preconditioner of least norm that fits the targets of a batch of prompts best: d^2 unknowns, so the risk of
    the fit peaks where the number of prompts is d^2."""
    length = prompts.labels.shape[-1]
    moments = jnp.einsum("bnd,bn->bd", prompts.inputs, prompts.labels) / length
    features = jnp.einsum("bi,bj->bij", moments, prompts.query).reshape(len(moments), -1)
    solution, *_ = jnp.linalg.lstsq(features, prompts.target)
    return solution.reshape(moments.shape[1], moments.shape[1])
