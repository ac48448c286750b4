"""Prompts: laws of in-context linear regression with known moments, and other families to sample from.

A prompt holds N context examples (x_i, y_i), a query x_q that is not among them, and the target of the query, which
carries no label noise. All arrays may have leading batch axes; models and baselines take one prompt, so `jax.vmap`
them over a batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnlab.checks import check_finite, check_integer, check_positive, is_concrete, unknown_name
from attnlab.types import PRNGKey, Real, Scalar


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prompt:
    """Context examples, the query, and the noise-free target of the query."""

    inputs: Float[Array, "*batch N d"]
    labels: Float[Array, "*batch N"]
    query: Float[Array, "*batch d"]
    target: Float[Array, "*batch"]


def check_prompt(prompt: Prompt) -> None:
    """Raise `ValueError` unless the shapes of one prompt fit together and its context is not empty."""
    *batch, length, dimension = prompt.inputs.shape
    if length == 0:
        raise ValueError("the prompt has a context of length 0; expected at least one example (x, y).")
    expected = {"labels": (*batch, length), "query": (*batch, dimension), "target": tuple(batch)}
    for name, shape in expected.items():
        found = jnp.shape(getattr(prompt, name))
        if found != shape:
            raise ValueError(
                f"{name} has shape {found}; with inputs of shape {prompt.inputs.shape} expected {shape}. "
                "A prompt is inputs (..., N, d), labels (..., N), query (..., d), target (...)."
            )


class InputLaw(NamedTuple):
    """A law of independent components of mean 0 and variance 1, and its excess kurtosis E s^4 - 3."""

    sample: Callable[..., Array]
    excess_kurtosis: float


def _uniform(key: PRNGKey, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    return jax.random.uniform(key, shape, dtype, -(3**0.5), 3**0.5)


INPUT_LAWS: dict[str, InputLaw] = {
    "gaussian": InputLaw(jax.random.normal, 0.0),
    "uniform": InputLaw(_uniform, -1.2),
    "rademacher": InputLaw(jax.random.rademacher, -2.0),
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LinearRegression:
    """The law of a linear regression prompt: x = A s, y = <w, x> + sqrt(noise_variance) * N(0, 1).

    The components of s are independent with the law `inputs`; A = Lambda^(1/2) is `mixing`. The task w is uniform on
    the rows of `tasks`, or N(0, Omega) if there are none; Omega = E w w^T is `task_moment` in both cases. Build it with
    `linear_regression`.
    """

    mixing: Float[Array, "d d"]
    task_moment: Float[Array, "d d"]
    tasks: Float[Array, "M d"] | None
    noise_variance: Scalar
    inputs: str = field(metadata={"static": True})

    @property
    def dimension(self) -> int:
        """Dimension d of the inputs."""
        return self.mixing.shape[-1]

    @property
    def covariance(self) -> Float[Array, "d d"]:
        """Lambda, the covariance of the inputs."""
        return self.mixing @ self.mixing.T

    @property
    def signal(self) -> Scalar:
        """tr(Lambda Omega) = E <w, x>^2: the risk of the prediction 0."""
        return jnp.sum(self.covariance * self.task_moment)


def linear_regression(
    covariance: Float[Array, "d d"],
    task_covariance: Float[Array, "d d"] | None = None,
    *,
    tasks: Float[Array, "M d"] | None = None,
    noise_variance: Real = 0.0,
    inputs: str = "gaussian",
) -> LinearRegression:
    """In-context linear regression with inputs of the given covariance.

    Tasks are N(0, `task_covariance`) (the identity if neither is given) or uniform on the finite set `tasks`. `inputs`
    is a key of `INPUT_LAWS`, the law of the independent components that Lambda^(1/2) mixes: x ~ U(-1/2, 1/2)^d is
    covariance I/12 with `uniform`. Raises `ValueError` for a covariance that is not symmetric positive
    (semi-)definite, shapes that do not fit, a negative noise variance, or an unknown input law.
    """
    if inputs not in INPUT_LAWS:
        raise unknown_name("input law", inputs, INPUT_LAWS)
    if tasks is not None and task_covariance is not None:
        raise ValueError("task_covariance and tasks are both given; expected one law of the tasks: leave one out.")
    covariance = check_covariance("covariance", covariance)
    given = jnp.eye(len(covariance), dtype=covariance.dtype) if task_covariance is None else task_covariance
    moment = check_covariance("task_covariance", given)
    if moment.shape != covariance.shape:
        raise ValueError(f"task_covariance has shape {moment.shape}; expected that of covariance, {covariance.shape}.")
    noise_variance = jnp.asarray(noise_variance, covariance.dtype)
    if is_concrete(noise_variance) and not 0 <= float(noise_variance) < float("inf"):
        raise ValueError(f"noise_variance is {noise_variance}; expected a finite variance of at least 0.")
    problem = LinearRegression(_root(covariance), moment, None, noise_variance, inputs)
    return problem if tasks is None else with_tasks(problem, tasks)


def with_tasks(problem: LinearRegression, tasks: Float[Array, "M d"]) -> LinearRegression:
    """The same problem with tasks uniform on the rows of `tasks`."""
    if jnp.ndim(tasks) != 2 or tasks.shape[0] == 0 or tasks.shape[1] != problem.dimension:
        raise ValueError(f"tasks have shape {jnp.shape(tasks)}; expected (M, {problem.dimension}) with M at least 1.")
    return replace(problem, tasks=tasks, task_moment=tasks.T @ tasks / len(tasks))


def isotropic(dimension: int, noise_variance: float = 0.0, dtype: jnp.dtype | None = None) -> LinearRegression:
    """x and w both N(0, I_d). Raises `ValueError` for a dimension that is no positive whole number.

    Example:
        >>> import attnlab as al
        >>> problem = al.isotropic(3, noise_variance=0.5)
        >>> problem.covariance.tolist()
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    check_positive(dimension=dimension)
    return linear_regression(jnp.eye(dimension, dtype=dtype), noise_variance=noise_variance)


def _root(covariance: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """The symmetric square root, so that diagonal covariances keep the coordinates independent."""
    values, vectors = jnp.linalg.eigh(covariance)
    return (vectors * jnp.sqrt(jnp.maximum(values, 0))[None, :]) @ vectors.T


def check_covariance(name: str, matrix: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """The matrix as an array; raise `ValueError` unless it is symmetric positive semi-definite (values of concrete
    matrices only)."""
    if jnp.ndim(matrix) != 2 or matrix.shape[0] != matrix.shape[1] or matrix.size == 0:
        raise ValueError(f"{name} has shape {jnp.shape(matrix)}; expected a square matrix (d, d).")
    check_finite(name, matrix)
    if is_concrete(matrix):
        _check_semidefinite(name, np.asarray(matrix))
    return jnp.asarray(matrix)


def _check_semidefinite(name: str, matrix: np.ndarray) -> None:
    tolerance = 100 * float(jnp.finfo(matrix.dtype).eps) * float(np.max(np.abs(matrix))) * len(matrix)
    asymmetry = float(np.max(np.abs(matrix - matrix.T)))
    if asymmetry > tolerance:
        raise ValueError(
            f"{name} is not symmetric (by {asymmetry:.3g}); pass ({name} + {name}.T) / 2 if that is meant."
        )
    smallest = float(np.linalg.eigvalsh(matrix)[0])
    if smallest < -tolerance:
        raise ValueError(
            f"{name} has the eigenvalue {smallest:.3g}; expected a positive semi-definite matrix. "
            "Project it onto that cone, or check that it is a covariance and not its inverse or logarithm."
        )


def sample_tasks(key: PRNGKey, problem: LinearRegression, count: int) -> Float[Array, "count d"]:
    """Draw `count` task vectors w."""
    if problem.tasks is not None:
        return problem.tasks[jax.random.randint(key, (count,), 0, len(problem.tasks))]
    normal = jax.random.normal(key, (count, problem.dimension), problem.mixing.dtype)
    return normal @ _root(problem.task_moment)


def sample_inputs(key: PRNGKey, problem: LinearRegression, shape: tuple[int, ...]) -> Float[Array, "*shape d"]:
    """Draw inputs x = A s."""
    law = INPUT_LAWS[problem.inputs]
    return law.sample(key, (*shape, problem.dimension), problem.mixing.dtype) @ problem.mixing.T


def sample_prompts(key: PRNGKey, problem: LinearRegression, length: int, batch: int) -> Prompt:
    """Draw `batch` prompts with `length` context examples, each with a task of its own.

    Example:
        >>> import attnlab as al
        >>> import jax
        >>> prompts = al.sample_prompts(jax.random.key(0), al.isotropic(3), length=5, batch=2)
        >>> prompts.inputs.shape, prompts.labels.shape, prompts.query.shape
        ((2, 5, 3), (2, 5), (2, 3))
    """
    _check_size(length, batch)
    key_tasks, key_rest = jax.random.split(key)
    return prompts_for(key_rest, problem, sample_tasks(key_tasks, problem, batch), length)


def prompts_for(key: PRNGKey, problem: LinearRegression, tasks: Float[Array, "batch d"], length: int) -> Prompt:
    """Draw one prompt for each of the given task vectors."""
    batch = len(tasks)
    _check_size(length, batch)
    key_inputs, key_noise = jax.random.split(key)
    inputs = sample_inputs(key_inputs, problem, (batch, length + 1))
    clean = jnp.einsum("bnd,bd->bn", inputs, tasks)
    noise = jnp.sqrt(problem.noise_variance) * jax.random.normal(key_noise, (batch, length), clean.dtype)
    return Prompt(inputs[:, :-1], clean[:, :-1] + noise, inputs[:, -1], clean[:, -1])


def retrieval_prompts(
    key: PRNGKey, dimension: int, length: int, batch: int, alignment: float, noise_variance: float = 0.0
) -> Prompt:
    """Contexts retrieved by the query: x_q, w ~ N(0, I), x_i | x_q ~ N(alignment x_q, (1 - alignment^2) I).

    Li, Rawat, Oymak, arXiv 2407.10005
    """
    _check_size(length, batch)
    check_alignment(alignment)
    key_query, key_task, key_inputs, key_noise = jax.random.split(key, 4)
    query = jax.random.normal(key_query, (batch, dimension))
    task = jax.random.normal(key_task, (batch, dimension))
    fresh = jax.random.normal(key_inputs, (batch, length, dimension))
    inputs = alignment * query[:, None, :] + (1 - alignment**2) ** 0.5 * fresh
    return _label(key_noise, inputs, query, task, noise_variance)


def aligned_prompts(
    key: PRNGKey, dimension: int, length: int, batch: int, alignment: float, noise_variance: float = 0.0
) -> Prompt:
    """Inputs aligned with the task: w ~ N(0, I), every x | w ~ N(alignment w, I), y = <w, x> / sqrt(alignment^2 d + 1).

    Li, Rawat, Oymak, arXiv 2407.10005; the factor keeps labels and targets comparable across alignments.
    """
    _check_size(length, batch)
    check_alignment(alignment)
    key_task, key_inputs, key_noise = jax.random.split(key, 3)
    task = jax.random.normal(key_task, (batch, dimension))
    fresh = jax.random.normal(key_inputs, (batch, length + 1, dimension))
    inputs = alignment * task[:, None, :] + fresh
    task = task / (alignment**2 * dimension + 1) ** 0.5
    return _label(key_noise, inputs[:, :-1], inputs[:, -1], task, noise_variance)


def drifting_prompts(
    key: PRNGKey, dimension: int, task_correlation: Float[Array, "T T"], batch: int, noise_variance: float = 0.0
) -> Prompt:
    """Example i has its own task w_i, E w_i w_j^T = R_ij I with ones on the diagonal of R; the query's is the last one.

    Temporal heterogeneity in the sense of Li, Rawat, Oymak, arXiv 2407.10005
    """
    correlation = check_covariance("task_correlation", task_correlation)
    length = len(correlation) - 1
    _check_size(length, batch)
    key_task, key_inputs, key_noise = jax.random.split(key, 3)
    normal = jax.random.normal(key_task, (batch, length + 1, dimension), correlation.dtype)
    tasks = jnp.einsum("ij,bjd->bid", _root(correlation), normal)
    inputs = jax.random.normal(key_inputs, tasks.shape, tasks.dtype)
    clean = jnp.sum(inputs * tasks, axis=-1)
    noise = noise_variance**0.5 * jax.random.normal(key_noise, (batch, length), clean.dtype)
    return Prompt(inputs[:, :-1], clean[:, :-1] + noise, inputs[:, -1], clean[:, -1])


def sine_prompts(
    key: PRNGKey,
    length: int,
    batch: int,
    amplitude: tuple[float, float] = (0.1, 5.0),
    phase: tuple[float, float] = (0.0, jnp.pi),
) -> Prompt:
    """y = a sin(x + p), x ~ U(-5, 5) of dimension 1, amplitude a and phase p uniform on their intervals, independently.

    The family of Finn et al., arXiv 1703.03400; von Oswald et al., arXiv 2212.07677, train on amplitudes (0.1, 0.5).
    """
    _check_size(length, batch)
    # Three keys: one key for both would tie the phase to the amplitude.
    key_inputs, key_amplitude, key_phase = jax.random.split(key, 3)
    inputs = jax.random.uniform(key_inputs, (batch, length + 1), minval=-5.0, maxval=5.0)
    amplitudes = jax.random.uniform(key_amplitude, (batch, 1), minval=amplitude[0], maxval=amplitude[1])
    phases = jax.random.uniform(key_phase, (batch, 1), minval=phase[0], maxval=phase[1])
    labels = amplitudes * jnp.sin(inputs + phases)
    return Prompt(inputs[:, :-1, None], labels[:, :-1], inputs[:, -1:], labels[:, -1])


def sine_features(inputs: Float[Array, "*N 1"]) -> Float[Array, "*N 2"]:
    """(sin x, cos x), in which `sine_prompts` are linear: a sin(x + p) = (a cos p) sin x + (a sin p) cos x."""
    return jnp.concatenate([jnp.sin(inputs), jnp.cos(inputs)], axis=-1)


def composition_prompts(
    key: PRNGKey, dimension: int, width: int, length: int, batch: int
) -> tuple[Prompt, Float[Array, "batch T width"]]:
    """Two-layer tasks y = <v, relu(W x)> and their intermediate steps relu(W x), the chain of thought of each example.

    x ~ N(0, I_d), entries of W N(0, 2/d) and of v N(0, 1/width), so that labels have variance 1 (Li et al., arXiv
    2305.18869). The last of the N+1 steps is the query's.
    """
    _check_size(length, batch)
    key_inputs, key_first, key_second = jax.random.split(key, 3)
    inputs = jax.random.normal(key_inputs, (batch, length + 1, dimension))
    first = jax.random.normal(key_first, (batch, width, dimension)) * (2 / dimension) ** 0.5
    second = jax.random.normal(key_second, (batch, width)) * width**-0.5
    steps = jax.nn.relu(jnp.einsum("bwd,bnd->bnw", first, inputs))
    labels = jnp.einsum("bw,bnw->bn", second, steps)
    return Prompt(inputs[:, :-1], labels[:, :-1], inputs[:, -1], labels[:, -1]), steps


def shuffle_labels(key: PRNGKey, prompts: Prompt) -> Prompt:
    """The same prompts with the labels permuted inside each context: inputs and labels keep their laws, not their
    tie."""
    shuffled = jax.random.permutation(key, prompts.labels, axis=-1, independent=True)
    return Prompt(prompts.inputs, shuffled, prompts.query, prompts.target)


def add_noise(key: PRNGKey, prompts: Prompt, noise_variance: Real) -> Prompt:
    """The same prompts with independent N(0, `noise_variance`) added to every label of the contexts."""
    if is_concrete(noise_variance) and not 0 <= float(noise_variance) < float("inf"):
        raise ValueError(f"noise_variance is {noise_variance}; expected a finite variance of at least 0.")
    noise = noise_variance**0.5 * jax.random.normal(key, prompts.labels.shape, prompts.labels.dtype)
    return replace(prompts, labels=prompts.labels + noise)


def scale_prompts(prompts: Prompt, inputs: float = 1.0, tasks: float = 1.0) -> Prompt:
    """Linear prompts with every input multiplied by `inputs` and every task by `tasks` (noise scales with the
    labels)."""
    both = inputs * tasks
    return Prompt(inputs * prompts.inputs, both * prompts.labels, inputs * prompts.query, both * prompts.target)


def check_alignment(alignment: float) -> None:
    """Raise `ValueError` unless 0 <= alignment <= 1."""
    if is_concrete(alignment) and not 0 <= float(alignment) <= 1:
        raise ValueError(f"alignment is {alignment}; expected a correlation, 0 <= alignment <= 1.")


def _label(key: PRNGKey, inputs: Array, query: Array, task: Array, noise_variance: float) -> Prompt:
    clean = jnp.einsum("bnd,bd->bn", inputs, task)
    noise = noise_variance**0.5 * jax.random.normal(key, clean.shape, clean.dtype)
    return Prompt(inputs, clean + noise, query, jnp.sum(query * task, axis=-1))


def _check_size(length: int, batch: int) -> None:
    for name, value in (("length", length), ("batch", batch)):
        check_integer(**{name: value})
        if value < 1:
            raise ValueError(
                f"{name} is {value}; expected at least 1: a context of length 0 has nothing to learn from."
            )
