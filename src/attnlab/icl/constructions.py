"""Weights that make attention implement an algorithm exactly.

Linear constructions are stacks for `models.stack_predict`, or, where tokens carry more than (x, y), for a predictor of
their own here. Equality with the algorithm holds up to rounding, for every prompt.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.icl.models import Layer, attention_layer, prompt_tokens
from attnlab.icl.tasks import Prompt, check_prompt
from attnlab.models import heads as equations
from attnlab.models.weightings import weighting
from attnlab.types import Real, Scalar


def gradient_step_layer(step_size: Real, initial: Float[Array, "outputs d"]) -> tuple[Layer, Float[Array, "outputs d"]]:
    """One step of gradient descent from the weights `initial`, for tokens (x, y) with any number of outputs.

    W_K = W_Q = diag(I, 0), W_V = [[0, 0], [W0, -I]], P = step_size I, scores / N (von Oswald et al., arXiv 2212.07677,
    proposition 1; matrices here act from the right, so they are transposed). Each label y_j becomes y_j - Delta W x_j.
    Returns the layer and W0, which the query token (x_q, -W0 x_q) needs.
    """
    outputs, dimension = initial.shape
    width = dimension + outputs
    dtype = initial.dtype
    inputs_only = jnp.diag(jnp.where(jnp.arange(width) < dimension, 1.0, 0.0).astype(dtype))
    value = jnp.zeros((width, width), dtype).at[:dimension, dimension:].set(initial.T)
    value = value.at[dimension:, dimension:].set(-jnp.eye(outputs, dtype=dtype))
    output = step_size * jnp.eye(width, dtype=dtype)
    return {"query": inputs_only, "key": inputs_only, "value": value, "output": output}, initial


def gradient_step_predict(
    layer: Layer,
    initial: Float[Array, "outputs d"],
    inputs: Float[Array, "N d"],
    labels: Float[Array, "N outputs"],
    query: Float[Array, " d"],
) -> Float[Array, " outputs"]:
    """Prediction of a `gradient_step_layer`: minus the label slots of the query token (x_q, -W0 x_q)."""
    context = jnp.concatenate([inputs, labels], axis=1)
    token = jnp.concatenate([query, -initial @ query])
    tokens = attention_layer(layer, jnp.concatenate([context, token[None, :]]))
    return -tokens[-1, query.shape[0] :]


def gradient_descent_stack(preconditioners: Float[Array, "L d d"]) -> list[Layer]:
    """A layer for each step of preconditioned gradient descent: `plus_plus_stack` that leaves the inputs alone."""
    return plus_plus_stack(preconditioners, jnp.zeros_like(preconditioners))


def plus_plus_stack(preconditioners: Float[Array, "L d d"], contractions: Float[Array, "L d d"]) -> list[Layer]:
    """GD++ with matrices A_k (`preconditioners`) and B_k (`contractions`).

    Layer k has scores x_i^T A_k x_j / N and writes -y_j into the labels, -B_k x_j into the inputs. The error on a
    noise-free prompt is x_q^T R w with R the product, later factors to the left, of I - M_k^T A_k M_k G, where
    M_{k+1} = (I - B_k G_k A_k^T) M_k and G_k = M_k G M_k^T (arXiv 2306.00297). One head has one matrix of
    scores, so scalar steps a_k and contractions b_k of `baselines.gradient_descent_plus_plus` are A_k = a_k I and
    B_k = (b_k / a_k) I.
    """
    if preconditioners.shape != contractions.shape or preconditioners.ndim != 3:
        raise ValueError(
            f"preconditioners have shape {preconditioners.shape}, contractions {contractions.shape}; "
            "expected one shape (layers, d, d) for both."
        )
    return [_plus_plus_layer(a, b) for a, b in zip(preconditioners, contractions, strict=True)]


def _plus_plus_layer(preconditioner: Float[Array, "d d"], contraction: Float[Array, "d d"]) -> Layer:
    d, dtype = preconditioner.shape[0], preconditioner.dtype
    zero = jnp.zeros((d + 1, d + 1), dtype)
    return {
        "query": zero.at[:d, :d].set(preconditioner),
        "key": zero.at[:d, :d].set(jnp.eye(d, dtype=dtype)),
        "value": jnp.eye(d + 1, dtype=dtype),
        "output": zero.at[:d, :d].set(-contraction.T).at[d, d].set(-1),
    }


def plus_plus_residual(
    preconditioners: Float[Array, "L d d"], contractions: Float[Array, "L d d"], covariance: Float[Array, "d d"]
) -> Float[Array, "d d"]:
    """R of `plus_plus_stack` when the empirical covariance is G = `covariance`."""
    identity = jnp.eye(len(covariance), dtype=covariance.dtype)
    residual, transform = identity, identity
    for a, b in zip(preconditioners, contractions, strict=True):
        residual = (identity - transform.T @ a @ transform @ covariance) @ residual
        transform = (identity - b @ transform @ covariance @ transform.T @ a.T) @ transform
    return residual


def newton_layers(dimension: int, steps: int, scale: Real, dtype: jnp.dtype | None = None) -> list[Layer]:
    """Newton's iteration for the inverse of G as `steps` + 2 linear attention layers, for `newton_predict`.

    Tokens are (x, u, y) with u_i = X_k x_i / 2^k. Since X_k G X_k x_i = (1/N) sum_j u_j (x_j^T u_i) up to that scale,
    the step X <- 2X - X G X is attention with query u_i, key x_j and value u_j; dividing by 2^k turns the factor 2 into
    the residual stream. The last layer reads (1/N) sum_j y_j x_j^T X_k x_q. That attention can run this iteration is
    due to Fu et al., arXiv 2310.17086; the weights here are linear attention only.
    """
    inputs, iterate, label = slice(0, dimension), slice(dimension, 2 * dimension), 2 * dimension
    zero = jnp.zeros((2 * dimension + 1, 2 * dimension + 1), dtype)
    identity = jnp.eye(dimension, dtype=dtype)
    first = zero.at[inputs, inputs].set(identity)
    second = zero.at[iterate, inputs].set(identity)  # takes the slot u to where keys hold x
    into_iterate = zero.at[inputs, iterate].set(scale * identity)
    start = {"query": first, "key": first, "value": first, "output": into_iterate}
    keep = zero.at[iterate, iterate].set(identity)
    layers = [{"query": second, "key": first, "value": keep, "output": -(2.0 ** (k - 1)) * keep} for k in range(steps)]
    labels = zero.at[label, label].set(1.0)
    read = {"query": second, "key": first, "value": labels, "output": -(2.0**steps) * labels}
    return [start, *layers, read]


def newton_predict(layers: list[Layer], prompt: Prompt) -> Scalar:
    """Prediction of `newton_layers` for one prompt."""
    plain = prompt_tokens(prompt)
    dimension = prompt.query.shape[0]
    tokens = jnp.concatenate([plain[:, :dimension], jnp.zeros_like(plain[:, :dimension]), plain[:, dimension:]], axis=1)
    for layer in layers:
        tokens = attention_layer(layer, tokens)
    return -tokens[-1, -1]


def newton_residual(eigenvalues: Float[Array, "*n"], steps: int, scale: Real) -> Float[Array, "*n"]:
    """(1 - scale lambda^2)^(2^steps): what Newton's iteration from scale * G leaves of each eigendirection of G."""
    return (1 - scale * eigenvalues**2) ** (2**steps)


def gradient_descent_residual(eigenvalues: Float[Array, "*n"], steps: int, step_size: Real) -> Float[Array, "*n"]:
    """(1 - step_size lambda)^steps: what gradient descent leaves of each eigendirection of G."""
    return (1 - step_size * eigenvalues) ** steps


def gd_plus_plus_residual(
    eigenvalues: Float[Array, "*n"], step_sizes: Float[Array, " L"], contractions: Float[Array, " L"]
) -> Float[Array, "*n"]:
    """What GD++ leaves of each eigendirection of G: r <- r (1 - a_k lambda), lambda <- lambda (1 - b_k lambda)^2."""
    residual = jnp.ones_like(eigenvalues)
    for step_size, contraction in zip(step_sizes, contractions, strict=True):
        residual = residual * (1 - step_size * eigenvalues)
        eigenvalues = eigenvalues * (1 - contraction * eigenvalues) ** 2
    return residual


def _context_attention(scores: Float[Array, "... N"], values: Float[Array, "N v"], weights: str) -> Array:
    return equations.attend(weighting(weights).weights(scores, None), values)


def nadaraya_watson_attention(prompt: Prompt, bandwidth: Real) -> Scalar:
    """Softmax attention with scores <x_q, x_i> / bandwidth^2 and values y_i.

    On a sphere ||x_q - x_i||^2 = const - 2 <x_q, x_i>, so this is the Nadaraya-Watson estimate with the Gaussian kernel
    exp(-||x_q - x_i||^2 / (2 bandwidth^2)); `nadaraya_watson` is the estimate itself.
    """
    check_prompt(prompt)
    scores = equations.attention_scores(prompt.query[None, :], prompt.inputs, 1.0) / bandwidth**2
    return _context_attention(scores, prompt.labels[:, None], "softmax")[0, 0]


def nadaraya_watson(prompt: Prompt, bandwidth: Real) -> Scalar:
    """sum_i k(x_q - x_i) y_i / sum_i k(x_q - x_i) with the Gaussian kernel of the given bandwidth."""
    check_prompt(prompt)
    distances = jnp.sum((prompt.inputs - prompt.query[None, :]) ** 2, axis=1)
    kernel = jnp.exp(-(distances - jnp.min(distances)) / (2 * bandwidth**2))
    return jnp.sum(kernel * prompt.labels) / jnp.sum(kernel)


def exponential_stack_predict(prompt: Prompt, step_sizes: Float[Array, " L"]) -> Scalar:
    """A stack of attention layers with scores exp(<x_i, x_j>), not normalised, that subtract from the labels.

    Layer k sends y_i to y_i - (step_k / N) sum_j exp(<x_i, x_j>) y_j; the prediction is minus the query's label. It is
    gradient descent on functions (`functional_gradient_descent`) in the space of the kernel exp(<x, x'>): Cheng, Chen,
    Sra, arXiv 2312.06528.
    """
    tokens = prompt_tokens(prompt)
    inputs, labels = tokens[:, :-1], tokens[:, -1:]
    kernel = jnp.exp(equations.attention_scores(inputs, inputs[:-1], 1.0))
    for step in step_sizes:
        labels = labels - step / prompt.labels.shape[0] * _context_attention(kernel, labels[:-1], "linear")
    return -labels[-1, 0]


def functional_gradient_descent(prompt: Prompt, step_sizes: Float[Array, " L"]) -> Scalar:
    """f <- f - (step / N) sum_j (f(x_j) - y_j) k(x_j, .) from 0, k(x, x') = exp(<x, x'>): the value at the query."""
    check_prompt(prompt)
    gram = jnp.exp(prompt.inputs @ prompt.inputs.T)
    coefficients = jnp.zeros_like(prompt.labels)
    for step in step_sizes:
        coefficients = coefficients - step / len(prompt.labels) * (gram @ coefficients - prompt.labels)
    return jnp.exp(prompt.inputs @ prompt.query) @ coefficients


def softmax_pair_predict(prompt: Prompt, scale: Real) -> Scalar:
    """Two softmax heads with scores +-scale <x_q, x_i> and opposite outputs, divided by 2 scale.

    The difference is odd in `scale`, so it is centred linear attention (1/N) sum_i (x_i - mean)^T x_q y_i up to
    O(scale^2); the even orders cancel. `centred_linear_predict` is that limit.
    """
    check_prompt(prompt)
    scores = equations.attention_scores(prompt.query[None, :], prompt.inputs, 1.0)
    plus, minus = (_context_attention(sign * scale * scores, prompt.labels[:, None], "softmax") for sign in (1, -1))
    return (plus - minus)[0, 0] / (2 * scale)


def centred_linear_predict(prompt: Prompt) -> Scalar:
    """(1/N) sum_i <x_i - mean x, x_q> y_i."""
    check_prompt(prompt)
    centred = prompt.inputs - jnp.mean(prompt.inputs, axis=0, keepdims=True)
    return jnp.mean(centred @ prompt.query * prompt.labels)
