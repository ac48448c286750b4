"""Algorithms that a transformer may implement in context, with one call: `baseline(name, **options)(prompt)`.

Every algorithm sees all N examples of one prompt and returns its prediction for the query; `jax.vmap` it over prompts.
Throughout G = (1/N) X^T X, g = (1/N) X^T y, and iterations start from the weights 0.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnlab.checks import is_concrete, unknown_name
from attnlab.icl.constructions import gd_plus_plus_residual
from attnlab.icl.tasks import Prompt, check_prompt
from attnlab.types import Real, Scalar


def empirical_moments(prompt: Prompt) -> tuple[Float[Array, "d d"], Float[Array, " d"]]:
    """G = (1/N) X^T X and g = (1/N) X^T y of one prompt."""
    check_prompt(prompt)
    length = prompt.labels.shape[0]
    return prompt.inputs.T @ prompt.inputs / length, prompt.labels @ prompt.inputs / length


def check_stable(name: str, step_size: Real, curvature: Float[Array, "d d"], steps: int) -> None:
    """Raise `ValueError` if several steps of this size diverge on a quadratic of this curvature (skipped while
    tracing)."""
    if steps < 2 or not (is_concrete(step_size) and is_concrete(curvature)):
        return
    top = float(np.max(np.abs(np.linalg.eigvals(np.asarray(curvature)))))
    if float(step_size) * top > 2 * (1 + 1e-9):
        raise ValueError(
            f"{name} is {float(step_size):.4g}; expected at most 2 / lambda_max = {2 / top:.4g}, beyond which {steps} "
            "steps diverge on this prompt. Lower it, or take one step."
        )


def check_stable_plus_plus(
    step_sizes: Float[Array, " L"], contractions: Float[Array, " L"], covariance: Float[Array, "d d"]
) -> None:
    """Raise `ValueError` if several steps of GD++ make the error along an eigendirection grow (skipped while
    tracing)."""
    if len(step_sizes) < 2 or not is_concrete((step_sizes, contractions, covariance)):
        return
    with jax.ensure_compile_time_eval():  # the caller may be traced, these arrays are not
        spectrum = jnp.linalg.eigvalsh(covariance)
        growth = np.abs(gd_plus_plus_residual(spectrum, step_sizes, contractions))
        eigenvalues = np.asarray(spectrum)
    worst = int(np.argmax(growth))  # also where it is not a number
    if not growth[worst] <= 1 + 1e-5:  # directions that the context does not see have 1, to rounding in 32 bits
        raise ValueError(
            f"step_sizes and contractions are {np.asarray(step_sizes)} and {np.asarray(contractions)}; expected that "
            f"no error grows, but {len(step_sizes)} steps multiply that along the eigenvalue {eigenvalues[worst]:.4g} "
            f"of this prompt's covariance by {growth[worst]:.4g}. Lower them, or take one step."
        )


def _check_steps(steps: int) -> None:
    if steps < 0:
        raise ValueError(f"steps is {steps}; expected a whole number of at least 0.")


def gradient_descent(prompt: Prompt, *, steps: int, step_size: Real) -> Scalar:
    """`steps` steps on ||Xw - y||^2 / (2N): residual polynomial (1 - step_size lambda)^steps.

    Raises `ValueError` for a step size that diverges, where the prompt's values are known.
    """
    covariance, _ = empirical_moments(prompt)
    check_stable("step_size", step_size, covariance, steps)
    identity = jnp.eye(len(covariance), dtype=covariance.dtype)
    return preconditioned_gradient_descent(prompt, steps=steps, preconditioner=step_size * identity)


def preconditioned_gradient_descent(prompt: Prompt, *, steps: int, preconditioner: Float[Array, "d d"]) -> Scalar:
    """`steps` steps w <- w + P (g - G w) with the `preconditioner` P.

    Raises `ValueError` for steps that diverge, where the prompt's values are known.
    """
    _check_steps(steps)
    covariance, moment = empirical_moments(prompt)
    check_stable("the step size (1 with this preconditioner)", 1.0, preconditioner @ covariance, steps)

    def step(weights: Array, _: None) -> tuple[Array, None]:
        return weights + preconditioner @ (moment - covariance @ weights), None

    weights, _ = jax.lax.scan(step, jnp.zeros_like(moment), length=steps)
    return prompt.query @ weights


def gradient_descent_plus_plus(
    prompt: Prompt, *, step_sizes: Float[Array, " L"], contractions: Float[Array, " L"]
) -> Scalar:
    """GD++ of arXiv 2212.07677: steps on data that each step also transforms, x <- (I - b_k G_k) x.

    Per eigenvalue lambda of G the residual goes r <- r (1 - a_k lambda), and then lambda <- lambda (1 - b_k lambda)^2.
    Raises `ValueError` for several steps that end with |r| > 1, where the prompt's values are known.
    """
    covariance, moment = empirical_moments(prompt)
    check_stable_plus_plus(step_sizes, contractions, covariance)
    identity = jnp.eye(len(moment), dtype=moment.dtype)

    def step(state: tuple[Array, Array], sizes: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        transform, solution = state  # M_k and P_k, the residual being I - G P_k; all are polynomials in G
        size, contraction = sizes
        solution = solution + size * transform @ transform @ (identity - covariance @ solution)
        transform = transform - contraction * transform @ transform @ covariance @ transform
        return (transform, solution), None

    (_, solution), _ = jax.lax.scan(step, (identity, jnp.zeros_like(identity)), (step_sizes, contractions))
    return prompt.query @ solution @ moment


def newton(prompt: Prompt, *, steps: int, scale: Real) -> Scalar:
    """Newton's iteration X <- X (2 I - G X) for the inverse of G from scale * G: residual (1 - scale
    lambda^2)^(2^steps).

    Fu et al., arXiv 2310.17086 Raises `ValueError` for a scale that diverges, where the values are known.
    """
    _check_steps(steps)
    covariance, moment = empirical_moments(prompt)
    check_stable("scale", scale, covariance @ covariance, 2**steps)

    def step(inverse: Array, _: None) -> tuple[Array, None]:
        return 2 * inverse - inverse @ covariance @ inverse, None

    inverse, _ = jax.lax.scan(step, scale * covariance, length=steps)
    return prompt.query @ inverse @ moment


def ridge(prompt: Prompt, *, penalty: Real) -> Scalar:
    """argmin ||Xw - y||^2 + penalty ||w||^2; the Bayes estimate for w ~ N(0, I) when `penalty` is the noise
    variance."""
    check_prompt(prompt)
    if is_concrete(penalty) and not float(penalty) > 0:
        raise ValueError(f"penalty is {penalty}; expected a positive number. Use least_squares for 0.")
    dimension = prompt.query.shape[-1]
    gram = prompt.inputs.T @ prompt.inputs + penalty * jnp.eye(dimension, dtype=prompt.query.dtype)
    return prompt.query @ jnp.linalg.solve(gram, prompt.inputs.T @ prompt.labels)


def least_squares(prompt: Prompt) -> Scalar:
    """The interpolant or least-squares fit of least norm."""
    check_prompt(prompt)
    return prompt.query @ jnp.linalg.pinv(prompt.inputs) @ prompt.labels


def nearest_neighbours(prompt: Prompt, *, neighbours: int) -> Scalar:
    """Mean label of the examples nearest to the query."""
    check_prompt(prompt)
    length = prompt.labels.shape[0]
    if not 1 <= neighbours <= length:
        raise ValueError(
            f"neighbours is {neighbours}; expected 1 <= neighbours <= {length}, the length of the context."
        )
    distances = jnp.sum((prompt.inputs - prompt.query[None, :]) ** 2, axis=1)
    _, nearest = jax.lax.top_k(-distances, neighbours)
    return jnp.mean(prompt.labels[nearest])


def discrete_bayes(prompt: Prompt, *, tasks: Float[Array, "M d"], noise_variance: Real) -> Scalar:
    """Posterior mean when the task is one of the rows of `tasks`, all equally likely (arXiv 2306.15063)."""
    check_prompt(prompt)
    if tasks.ndim != 2 or tasks.shape[1] != prompt.query.shape[-1]:
        raise ValueError(f"tasks have shape {tasks.shape}; expected (tasks, {prompt.query.shape[-1]}) for this query.")
    if is_concrete(noise_variance) and not float(noise_variance) > 0:
        raise ValueError(
            f"noise_variance is {noise_variance}; expected a positive number: without noise one task fits."
        )
    misfit = jnp.sum((prompt.labels[None, :] - tasks @ prompt.inputs.T) ** 2, axis=1)
    return jax.nn.softmax(-misfit / (2 * noise_variance)) @ (tasks @ prompt.query)


BASELINES: dict[str, Callable[..., Scalar]] = {
    "gradient_descent": gradient_descent,
    "preconditioned_gradient_descent": preconditioned_gradient_descent,
    "gradient_descent_plus_plus": gradient_descent_plus_plus,
    "newton": newton,
    "ridge": ridge,
    "least_squares": least_squares,
    "nearest_neighbours": nearest_neighbours,
    "discrete_bayes": discrete_bayes,
}


def baseline(name: str, **options: Real) -> Callable[[Prompt], Scalar]:
    """The algorithm called `name`, one of the keys of `BASELINES`, as a function of one prompt.

    `options` are the keyword arguments of that function. Raises `ValueError` for another name.
    """
    if name not in BASELINES:
        raise unknown_name("baseline", name, BASELINES)
    return partial(BASELINES[name], **options)
