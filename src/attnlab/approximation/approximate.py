"""Approximations of softmax attention, each a function (queries, keys, values) -> outputs of one head.

Random choices are drawn from a key when the approximation is built, so that what is returned is deterministic and can
be differentiated: the derivative is that of the approximation, not of what it approximates. Equal choices give one
function (or, where it is random, a pytree with the drawn numbers as leaves), so that what is compiled for it is used
again.
"""

from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from attnlab.checks import check_positive, check_range
from attnlab.models.heads import softmax_weights
from attnlab.types import PRNGKey

Attention = Callable[[Float[Array, "L d"], Float[Array, "L d"], Float[Array, "L v"]], Float[Array, "L v"]]


@cache
def exact(scale: float = 1.0) -> Attention:
    """softmax(scale Q K^T) V."""
    return lambda queries, keys, values: softmax_weights(scale * (queries @ keys.T)) @ values


def positive_features(vectors: Float[Array, "L d"], directions: Float[Array, "m d"]) -> Float[Array, "L m"]:
    """phi(x) = e^(w_i . x - |x|^2 / 2) / sqrt(m): E phi(x) . phi(y) = e^(x . y) for w ~ N(0, I).

    Choromanski et al., arXiv 2009.14794. With independent directions the mean square error of phi(x) . phi(y)
    is e^(2 x . y) (e^(|x + y|^2) - 1) / m.
    """
    exponents = vectors @ directions.T - jnp.sum(vectors**2, axis=-1, keepdims=True) / 2
    return jnp.exp(exponents) / directions.shape[0] ** 0.5


def random_features(key: PRNGKey, dim: int, features: int, scale: float = 1.0) -> Attention:
    """Attention with the kernel of positive random features, orthogonal within blocks of `dim` directions."""
    check_positive(dim=dim, features=features)
    return Partial(_feature_attention, _orthogonal_directions(key, dim, features), jnp.asarray(scale))


def _feature_attention(directions: Array, scale: Array, queries: Array, keys: Array, values: Array) -> Array:
    left, right = (positive_features(jnp.sqrt(scale) * x, directions) for x in (queries, keys))
    return (left @ (right.T @ values)) / (left @ jnp.sum(right, axis=0))[:, None]


def _orthogonal_directions(key: PRNGKey, dim: int, count: int) -> Array:
    """Rows N(0, I), orthogonal in blocks of `dim`: Haar rotations with independent chi lengths."""
    blocks = -(-count // dim)
    keys = jax.random.split(key)
    rotations = jax.random.orthogonal(keys[0], dim, (blocks,)).reshape(-1, dim)
    lengths = jnp.linalg.norm(jax.random.normal(keys[1], (blocks * dim, dim)), axis=1)
    return (lengths[:, None] * rotations)[:count]


@cache
def nystrom(landmarks: int, scale: float = 1.0) -> Attention:
    """Nystrom attention with segment means as landmarks (Xiong et al., arXiv 2102.03902).

    softmax(Q K_m^T) softmax(Q_m K_m^T)^+ softmax(Q_m K^T) V; raises `ValueError` unless `landmarks` divide the tokens.
    """
    check_positive(landmarks=landmarks)

    def attend(queries: Array, keys: Array, values: Array) -> Array:
        few_queries, few_keys = (_segment_means(x, landmarks) for x in (queries, keys))
        tall, square, wide = (
            softmax_weights(scale * (a @ b.T))
            for a, b in ((queries, few_keys), (few_queries, few_keys), (few_queries, keys))
        )
        return tall @ jnp.linalg.solve(square, wide @ values)

    return attend


def _segment_means(x: Array, segments: int) -> Array:
    if x.shape[0] % segments:
        raise ValueError(f"landmarks is {segments}, which does not divide the {x.shape[0]} tokens; expected a divisor.")
    return x.reshape(segments, -1, x.shape[1]).mean(axis=1)


def low_rank(key: PRNGKey, tokens: int, rank: int, scale: float = 1.0) -> Attention:
    """Keys and values projected from `tokens` to `rank` by one random matrix (Linformer: Wang et al., 2006.04768).

    Rows of the projection are non-negative and sum to one, so that with `rank` 1 it is a random average.
    """
    check_range("rank", rank, 1, tokens, f"There are {tokens} tokens.")
    projection = softmax_weights(3 * jax.random.normal(key, (rank, tokens)))
    return Partial(_projected_attention, projection, jnp.asarray(scale))


def _projected_attention(projection: Array, scale: Array, queries: Array, keys: Array, values: Array) -> Array:
    return softmax_weights(scale * (queries @ (projection @ keys).T)) @ (projection @ values)


@cache
def top_k(count: int, scale: float = 1.0) -> Attention:
    """Softmax over the `count` highest scores of every query; the choice itself has no derivative."""
    check_positive(count=count)

    def attend(queries: Array, keys: Array, values: Array) -> Array:
        scores = scale * (queries @ keys.T)
        least = jax.lax.top_k(jax.lax.stop_gradient(scores), count)[0][:, -1:]
        return softmax_weights(scores, scores >= least) @ values

    return attend


@cache
def sliding_window(width: int, scale: float = 1.0) -> Attention:
    """Softmax over the keys within `width` positions of every query."""

    def attend(queries: Array, keys: Array, values: Array) -> Array:
        places = jnp.arange(queries.shape[0])
        near = jnp.abs(places[:, None] - places[None]) <= width
        return softmax_weights(scale * (queries @ keys.T), near) @ values

    return attend


def top_k_bound(weights: Float[Array, "L M"], values: Float[Array, "M v"], count: int) -> Float[Array, " L"]:
    """2 (1 - mass) max_j ||v_j||: bounds the error of `top_k` for a query whose `count` highest weights sum to mass.

    Derived here: the kept weights grow by their share of the lost mass, so the two distributions differ by
    2 (1 - mass) in the 1-norm.
    """
    mass = jnp.sum(jax.lax.top_k(weights, count)[0], axis=-1)
    return 2 * (1 - mass) * jnp.max(jnp.linalg.norm(values, axis=-1))
