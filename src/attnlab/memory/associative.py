"""Associative memories: sums of outer products, what one gradient step stores, and how recall fails with load."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from attnlab.checks import (
    LARGEST,
    check_finite,
    check_key,
    check_leading_axis,
    check_number,
    check_positive,
    check_range,
    is_concrete,
)
from attnlab.losses import cross_entropy
from attnlab.models.adapters import from_function
from attnlab.models.heads import softmax_weights
from attnlab.objectives import Objective, objective
from attnlab.types import Params, PRNGKey, Real


def recall_objective(keys: Float[Array, "n d"], outputs: Float[Array, "M v"], labels: Int[Array, " n"]) -> Objective:
    """Cross-entropy of logits u_c^T W k over the `outputs` u_c, in the parameter {"W": (v, d)}."""

    def logits(outputs: Array, params: Params, keys: Array) -> Array:
        return keys @ params["W"].T @ outputs.T

    return objective(from_function(logits, outputs), cross_entropy, keys, labels)


def first_step(
    keys: Float[Array, "n d"], outputs: Float[Array, "M v"], labels: Int[Array, " n"]
) -> Float[Array, "v d"]:
    """- gradient of `recall_objective` at W = 0: the centred Hebbian matrix mean_n (u_(y_n) - mean u) k_n^T.

    At zero all classes are equally probable (derived here). Raises `ValueError` for labels that are no class.
    """
    check_leading_axis("labels", labels, len(keys), "Every key has one label.")
    if is_concrete(labels) and np.size(labels):
        for end in (np.min(labels), np.max(labels)):
            check_range("labels", int(end), 0, len(outputs) - 1, "A label is the place of an output.")
    centred = outputs - jnp.mean(outputs, axis=0, keepdims=True)
    return centred[labels].T @ keys / keys.shape[0]


def first_curvature(keys: Float[Array, "n d"], outputs: Float[Array, "M v"]) -> Float[Array, "v*d v*d"]:
    """Hessian of `recall_objective` at W = 0 in row-major order: Cov(u) x mean_n k_n k_n^T, an exact Kronecker product.

    The covariance is over the M outputs with equal weights (derived here).
    """
    centred = outputs - jnp.mean(outputs, axis=0, keepdims=True)
    return jnp.kron(centred.T @ centred / outputs.shape[0], keys.T @ keys / keys.shape[0])


def recall_errors(keys: Float[Array, "n d"], values: Float[Array, "n v"], beta: Real) -> dict[str, Float[Array, ""]]:
    """Mean squared error over mean squared value when every stored key is asked for its value, for three memories.

    `linear`: sum_i v_i k_i^T, expected (n - 1) / d for keys on the unit sphere; `least_squares`: the best matrix,
    expected max(0, 1 - d / n); `softmax`: attention over the pairs at inverse temperature `beta`. Raises `ValueError`
    for values of another number than the keys, and for a `beta` that is not a finite number of zero or more.
    """
    check_leading_axis("values", values, len(keys), "Every key has one value.")
    check_number("beta", beta, 0, LARGEST, "It is an inverse temperature.")
    weights = softmax_weights(beta * (keys @ keys.T))
    recalled = {
        "linear": keys @ (keys.T @ values),
        "least_squares": keys @ jnp.linalg.lstsq(keys, values)[0],
        "softmax": weights @ values,
    }
    return {name: jnp.mean((found - values) ** 2) / jnp.mean(values**2) for name, found in recalled.items()}


def zipf(count: int, exponent: float) -> Float[np.ndarray, " count"]:
    """Probabilities proportional to i^-exponent, i = 1 ... count.

    Raises `ValueError` for a count that is not positive and an exponent that is not finite.
    """
    check_positive(count=count)
    check_number("exponent", exponent, -LARGEST, LARGEST, "Zero makes all alike.")
    weights = np.arange(1.0, count + 1) ** -exponent
    return weights / weights.sum()


def storage_error(
    key: PRNGKey, probabilities: Float[Array | np.ndarray, " N"], classes: int, dim: int, stored: int
) -> Float[Array, ""]:
    """Probability of a wrong answer of W = sum over the `stored` most frequent items of u_(y_i) e_i^T.

    Item i has class i mod `classes`; embeddings e_i and u_c are independent and uniform on the sphere in `dim`
    dimensions; the answer is the class with the highest u_c^T W e_i. After Cabannes, Dohmatob, Bietti (arXiv
    2310.02984), with thresholded storage. Raises `ValueError` for sizes that are not positive, more stored items than
    there are, and probabilities that do not sum to one.
    """
    check_key(key)
    check_positive(classes=classes, dim=dim, stored=stored)
    check_range("stored", stored, 1, len(probabilities), "There are as many items as probabilities.")
    check_finite("probabilities", probabilities)
    if is_concrete(probabilities):
        total = float(np.sum(np.asarray(probabilities)))
        check_range("the sum of probabilities", total, 1 - 1e-6, 1 + 1e-6, "Divide them by their sum.")
    item_key, class_key = jax.random.split(key)
    items, outputs = (
        x / jnp.linalg.norm(x, axis=1, keepdims=True)
        for x in (jax.random.normal(item_key, (len(probabilities), dim)), jax.random.normal(class_key, (classes, dim)))
    )
    labels = jnp.arange(len(probabilities)) % classes
    memory = outputs[labels[:stored]].T @ items[:stored]
    answers = jnp.argmax(items @ memory.T @ outputs.T, axis=1)
    return jnp.sum(jnp.where(answers != labels, jnp.asarray(probabilities), 0.0))
