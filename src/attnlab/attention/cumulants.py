"""Softmax attention of one query as the cumulants of its values, and what they say about scale and saturation.

With weights a = softmax(scale K q) the output is f(q) = sum_j a_j v_j. The log-partition function of a is the
cumulant-generating function of the keys, so every derivative in q brings down one more centred key:

    f = E_a[v],   df/dq = scale Cov_a(v, k),   d2f/dq2 = scale^2 E_a[(v - Ev) (k - Ek) (k - Ek)].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Array, Float

from attnlab.checks import check_range
from attnlab.models.heads import softmax_weights
from attnlab.types import PRNGKey, Real


class Cumulants(NamedTuple):
    """Joint cumulants of values and keys under the attention weights of one query."""

    mean: Float[Array, " v"]
    covariance: Float[Array, "v d"]
    third: Float[Array, "v d d"]


def attend_query(
    query: Float[Array, " d"], keys: Float[Array, "n d"], values: Float[Array, "n v"], scale: Real = 1.0
) -> Float[Array, " v"]:
    """The average of `values` under softmax(scale K q)."""
    return softmax_weights(scale * (keys @ query)) @ values


def cumulants(
    query: Float[Array, " d"], keys: Float[Array, "n d"], values: Float[Array, "n v"], scale: Real = 1.0
) -> Cumulants:
    """Mean of v, Cov(v, k) and the third cumulant of (v, k, k): times scale^m the m-th derivative of `attend_query`."""
    weights = softmax_weights(scale * (keys @ query))
    mean = weights @ values
    centred_values, centred_keys = values - mean[None], keys - (weights @ keys)[None]
    covariance = jnp.einsum("n,nv,nd->vd", weights, centred_values, centred_keys)
    third = jnp.einsum("n,nv,nd,ne->vde", weights, centred_values, centred_keys, centred_keys)
    return Cumulants(mean, covariance, third)


def softmax_jacobian_trace(weights: Float[Array, "*B n"]) -> Float[Array, "*B"]:
    """The trace of the Jacobian diag(a) - a a^T of softmax, 1 - sum_j a_j^2: 0 for a saturated row."""
    return 1 - jnp.sum(weights**2, axis=-1)


def saturation_constant(tokens: int) -> float:
    """c_N in E[1 - sum_j a_j^2] -> c_N / sigma for `tokens` independent scores N(0, sigma^2), sigma large.

    Derived here: only the two largest scores count, and of a pair with gap D the mass is 2 a (1 - a), whose integral
    over D > 0 is 1 / sigma. So c_N is the density of the gap at zero, N (N - 1) times the integral of
    phi(x)^2 Phi(x)^(N-2). For query and keys with unit entries, sigma = sqrt(d). Needs at least two tokens.
    """
    check_range("tokens", tokens, 2, float("inf"), "One token takes all the attention.")
    x = np.linspace(-12, 12, 4001)  # the trapezoidal rule is exact to rounding for an integrand that decays like this
    density = np.exp(-(x**2)) / (2 * np.pi) * scipy.special.ndtr(x) ** (tokens - 2)
    return float(tokens * (tokens - 1) * np.trapezoid(density, x))


def saturation(key: PRNGKey, dim: int, tokens: int, draws: int, scale: float = 1.0) -> Float[Array, " draws"]:
    """1 - sum_j a_j^2 of independent queries and keys with entries N(0, 1) in `dim` dimensions, one a draw.

    Given |q| the scores are independent N(0, scale^2 |q|^2), so only those and |q|^2 ~ chi^2_dim are drawn.
    """
    norm_key, score_key = jax.random.split(key)
    lengths = jnp.sqrt(2 * jax.random.gamma(norm_key, dim / 2, (draws,)))
    scores = scale * lengths[:, None] * jax.random.normal(score_key, (draws, tokens))
    return softmax_jacobian_trace(softmax_weights(scores))


def needle_logit(tokens: int | np.ndarray) -> np.ndarray:
    """The logit with which one token holds half the mass against `tokens` others with logits N(0, 1): log n + 1/2.

    The others' masses sum to n E[e^z] = n e^(1/2) (derived here; relative fluctuations of order n^(-1/2)).
    """
    return np.log(tokens) + 0.5
