"""A network of features before one linear attention layer: gradient descent in features that are learned with it.

The network maps an input x to features m(x); the layer sees the tokens (m(x_i), y_i) and, for the query, (m(x_q),
-W_0 m(x_q)) with a learned start W_0. With the weights of `constructions.gradient_step_layer` the prediction is that of
one step from W_0 on the prompt's least-squares loss in the features (von Oswald et al., arXiv 2212.07677, their
experiment on sine tasks).

The predictions are jitted, so that the network is traced once for all the prompts, steps and gradients around it.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.checks import check_positive, is_concrete
from attnlab.icl.composition import with_features
from attnlab.icl.constructions import gradient_step_predict
from attnlab.icl.diagnostics import Model, predictions
from attnlab.icl.models import effective_weights, init_layer
from attnlab.icl.tasks import Prompt, sine_features
from attnlab.models.adapters import from_linen
from attnlab.models.networks import MLP, MLPConfig
from attnlab.types import Params, PRNGKey, Scalar


def init_feature_attention(key: PRNGKey, config: MLPConfig, dimension: int, *, scale: float, spread: float) -> Params:
    """Parameters of `feature_attention_predict` for inputs of the given dimension, p = `config.widths[-1]` features.

    `features` are those of the network, with first biases uniform on (-spread, spread): all at zero they would start
    every unit at the same input. `initial` W_0 (1, p) is zero, and the matrices of `layer` have N(0, scale^2) entries.
    Raises `ValueError` for a network without biases.
    """
    if not config.bias:
        raise ValueError("config.bias is False; expected a network with biases, which `spread` is for. Pass bias=True.")
    feature_key, bias_key, layer_key = jax.random.split(key, 3)
    features = MLP(config).init(feature_key, jnp.zeros((1, dimension)))["params"]
    biases = jax.random.uniform(bias_key, features["layer_0_bias"].shape, minval=-spread, maxval=spread)
    return {
        "features": {**features, "layer_0_bias": biases},
        "initial": jnp.zeros((1, config.widths[-1])),
        "layer": init_layer(layer_key, config.widths[-1] + 1, scale),
    }


@partial(jax.jit, static_argnames="config")
def learned_features(params: Params, inputs: Float[Array, "*N d"], *, config: MLPConfig) -> Float[Array, "*N p"]:
    """The features m(x) of every input."""
    return from_linen(MLP(config))(params["features"], inputs)


@partial(jax.jit, static_argnames="config")
def feature_attention_predict(params: Params, prompt: Prompt, *, config: MLPConfig) -> Scalar:
    """Prediction for one prompt: minus the label slot of the query after the layer."""

    def layer(seen: Prompt) -> Scalar:
        labels = seen.labels[:, None]
        return gradient_step_predict(params["layer"], params["initial"], seen.inputs, labels, seen.query)[0]

    return with_features(lambda x: learned_features(params, x, config=config), layer)(prompt)


@partial(jax.jit, static_argnames="config")
def feature_descent_predict(
    params: Params, prompt: Prompt, *, preconditioner: Float[Array, "p p"], config: MLPConfig
) -> Scalar:
    """Prediction of one step W_0 - P grad L(W_0) on L(W) = ||W m(X) - y||^2 / (2N), P the `preconditioner`.

    P = step_size I is plain gradient descent in the features m(x), P = R^T R that in the features R m(x), P = 0 the
    start. The `layer` of `params` is not used.
    """
    start = params["initial"][0]

    def step(seen: Prompt) -> Scalar:
        descent = (seen.labels - seen.inputs @ start) @ seen.inputs / len(seen.labels)
        return seen.query @ (start + preconditioner @ descent)

    return with_features(lambda x: learned_features(params, x, config=config), step)(prompt)


def layer_kernel(params: Params) -> Float[Array, "p p"]:
    """The matrix P with which the layer weighs labels: y_i counts m_q^T P m_i / N in the prediction for x_q."""
    effective = effective_weights(params["layer"])
    return effective["value"][0, -1] * effective["query_key"][0, :-1].T


def own_preconditioner(
    params: Params, inputs: Float[Array, "n d"], *, config: MLPConfig
) -> tuple[Float[Array, "p p"], Scalar]:
    """The positive semi-definite part of `layer_kernel`, a P with which one step descends, and what it leaves out.

    The nearest such kernel m(x)^T P m(x') to that of the layer, in mean square over pairs of the inputs; the second
    number is its distance as a fraction of the layer's kernel, both for every choice of coordinates of the features.
    """
    features = learned_features(params, inputs, config=config)
    values, vectors = jnp.linalg.eigh(features.T @ features / len(features))
    kept = values > len(values) * jnp.finfo(values.dtype).eps * values[-1]
    # Features in coordinates where their second moments are the identity: the norm of P is there that of the kernel.
    colour = vectors * jnp.sqrt(jnp.where(kept, values, 0))[None, :]
    whiten = vectors * jnp.where(kept, jax.lax.rsqrt(jnp.where(kept, values, 1)), 0)[None, :]
    kernel = colour.T @ layer_kernel(params) @ colour
    signs, axes = jnp.linalg.eigh((kernel + kernel.T) / 2)
    positive = (axes * jnp.maximum(signs, 0)[None, :]) @ axes.T
    return whiten @ positive @ whiten.T, jnp.linalg.norm(kernel - positive) / jnp.linalg.norm(kernel)


def best_step_size(descent: Callable[[Scalar], Model], prompts: Prompt) -> Scalar:
    """The step size of least mean squared error over the prompts, for predictions that are affine in it.

    `descent(step_size)` is the model. With predictions p + step d and targets t it is <t - p, d> / ||d||^2.
    """
    start, one = (predictions(descent(jnp.asarray(size, prompts.target.dtype)), prompts) for size in (0, 1))
    direction = one - start
    return direction @ (prompts.target - start) / (direction @ direction)


def best_kernel_risk(
    features: Float[Array, "n p"],
    probabilities: Float[Array, " n"],
    task_covariance: Float[Array, "p p"],
    length: int,
) -> Scalar:
    """The least risk of one step in any features whatever, on noise-free tasks y = <w, phi(x)> linear in phi.

    The inputs take the rows of `features`, phi(x), with the given probabilities (nodes and weights of a quadrature);
    w has the covariance S. The least is over all predictions f(x_q) + (1/N) sum_i (y_i k(x_i, x_q) + g(x_i, x_q))
    affine in the labels; the squares of labels, which a trained layer may use too, are left out. Derived here: f and g
    are best when they take off the mean of w, and then, for the query x_q, phi_q its features and c = E k(x) phi(x),
    the risk is

        phi_q^T S phi_q - 2 phi_q^T S c + (1/N) E k(x)^2 phi^T S phi + (1 - 1/N) c^T S c.

    Its stationary point k(x) = N phi^T S (phi_q - (1 - 1/N) c) / phi^T S phi gives (I + (N - 1) M) c = N M phi_q with
    M = E[phi phi^T / (phi^T S phi)] S, and the value phi_q^T S (phi_q - c) there.
    Raises `ValueError` for inputs at which no task varies.
    """
    check_positive(length=length)
    signal = jnp.einsum("np,pq,nq->n", features, task_covariance, features)
    if is_concrete(signal) and not bool(jnp.all(signal > 0)):
        raise ValueError(
            f"the variance of the tasks is {float(jnp.min(signal)):.3g} at one of the inputs; expected a positive one. "
            "Leave such inputs out: their labels say nothing."
        )
    moments = jnp.einsum("n,np,nq->pq", probabilities, features, features)
    ratios = jnp.einsum("n,np,nq->pq", probabilities / signal, features, features) @ task_covariance
    identity = jnp.eye(len(moments), dtype=moments.dtype)
    reached = jnp.linalg.solve(identity + (length - 1) * ratios, length * ratios)
    return jnp.trace(task_covariance @ (identity - reached) @ moments)


def best_sine_risk(length: int, amplitude: tuple[float, float], nodes: int = 2000) -> Scalar:
    """`best_kernel_risk` of `tasks.sine_prompts` with phases in (0, pi), by the midpoint rule on (-5, 5)."""
    low, high = amplitude
    square = (high**3 - low**3) / (3 * (high - low))
    # y = a cos(p) sin(x) + a sin(p) cos(x): weights without correlation, of means 0 and E a 2 / pi, squares E a^2 / 2
    variances = jnp.array([square / 2, square / 2 - ((low + high) / jnp.pi) ** 2])
    inputs = jnp.linspace(-5.0, 5.0, nodes, endpoint=False) + 5 / nodes
    probabilities = jnp.full(nodes, 1 / nodes)
    return best_kernel_risk(sine_features(inputs[:, None]), probabilities, jnp.diag(variances), length)
