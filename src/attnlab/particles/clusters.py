"""Energies and clusters of tokens on the sphere."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from attnlab.checks import check_number
from attnlab.types import Real, Scalar

CLOSE = 0.99
"""Cosine of neighbours in one cluster."""


def interaction_energy(tokens: Float[Array, "n d"], beta: Real) -> Scalar:
    """1 / (2 beta n^2) sum_ij e^{beta <x_i, x_j>}: greatest where all tokens agree.

    With V = I it never falls: its slope along the flow is sum_i |x_i'|^2 / n without normalisation, and with it sum_i
    Z_i |x_i'|^2 / n^2, Z_i = sum_j e^{beta <x_i, x_j>} (Geshkovski et al., arXiv 2312.10794, section 3).
    """
    return jnp.mean(jnp.exp(beta * tokens @ tokens.T)) / (2 * beta)


def cluster_labels(tokens: Float[Array, "n d"], close: float = CLOSE) -> Int[Array, " n"]:
    """For each token the first one that chains of neighbours, of cosine at least `close`, lead to. Pure."""
    check_number("close", close, -1.0, 1.0, "It is a cosine.")
    unit = tokens / jnp.linalg.norm(tokens, axis=1, keepdims=True)
    near = unit @ unit.T >= close
    reached = near | jnp.eye(len(tokens), dtype=bool)
    for _ in range(int(np.ceil(np.log2(max(len(tokens), 2))))):  # paths of twice the length each time
        reached = (reached.astype(jnp.float32) @ reached.astype(jnp.float32)) > 0
    return jnp.argmax(reached, axis=1)


def count_clusters(tokens: Float[Array, "n d"], close: float = CLOSE) -> Int[Array, ""]:
    """How many clusters there are.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnlab.particles.clusters import count_clusters
        >>> int(count_clusters(jnp.array([[1.0, 0.0], [0.999, 0.04], [0.0, 1.0]])))
        2
    """
    return jnp.sum(cluster_labels(tokens, close) == jnp.arange(len(tokens)))


def metastable_count(counts: Int[Array, " t"], times: Float[Array, " t"]) -> tuple[int, float]:
    """How many clusters last the longest in logarithmic time, and how long, as a ratio of times: of the numbers below
    that of the tokens, and above one, which is the end. The horizon may cut the longest stage short.

    Raises `ValueError` where no number of clusters lasts at least twice as long as it took, a horizon too short to
    tell.
    """
    numbers, moments = np.asarray(counts), np.asarray(times)
    spans = np.diff(np.log(np.maximum(moments, moments[moments > 0].min())))
    inner = [number for number in np.unique(numbers) if 1 < number < numbers[0]]
    lasting = [float(np.sum(spans[numbers[:-1] == number])) for number in inner]
    if not lasting or max(lasting) < np.log(2):
        raise ValueError(
            f"times end at {moments[-1]:g} with {numbers[-1]} clusters, and no number lasted from a time to its "
            "double; expected a longer horizon, or a larger beta: small ones have no such stage."
        )
    best = int(np.argmax(lasting))
    return int(inner[best]), float(np.exp(lasting[best]))
