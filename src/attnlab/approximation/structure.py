"""Attention in other clothes: messages on a graph, and masked linear attention as a linear recurrence."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnlab.types import Real


def graph_attention(
    queries: Float[Array, "L d"],
    keys: Float[Array, "M d"],
    values: Float[Array, "M v"],
    senders: Int[Array, " E"],
    receivers: Int[Array, " E"],
    scale: Real = 1.0,
) -> Float[Array, "L v"]:
    """Softmax attention along the edges of a graph: O(E) work, E the number of edges (sender key, receiver query).

    Equal to attention under the mask that is true at (receiver, sender). A query without an edge gets NaN.
    """
    count = queries.shape[0]
    scores = scale * jnp.sum(queries[receivers] * keys[senders], axis=-1)
    peaks = jax.ops.segment_max(jax.lax.stop_gradient(scores), receivers, count)
    masses = jnp.exp(scores - peaks[receivers])
    totals = jax.ops.segment_sum(masses, receivers, count)
    return jax.ops.segment_sum(masses[:, None] * values[senders], receivers, count) / totals[:, None]


def decay_mask(decays: Float[Array, " L"]) -> Float[Array, "L L"]:
    """M_ij = a_i a_(i-1) ... a_(j+1) for j <= i, zero above: one on the diagonal."""
    places = jnp.arange(decays.shape[0])
    logs = jnp.cumsum(jnp.log(decays))
    below = places[:, None] >= places[None]
    return jnp.where(below, jnp.exp(logs[:, None] - logs[None]), 0.0)


def masked_linear_attention(
    queries: Float[Array, "L d"], keys: Float[Array, "L d"], values: Float[Array, "L v"], decays: Float[Array, " L"]
) -> Float[Array, "L v"]:
    """(M * Q K^T) V with the decay mask M: quadratic in the length (Dao and Gu, arXiv 2405.21060, the dual form)."""
    return (decay_mask(decays) * (queries @ keys.T)) @ values


def recurrent_linear_attention(
    queries: Float[Array, "L d"], keys: Float[Array, "L d"], values: Float[Array, "L v"], decays: Float[Array, " L"]
) -> Float[Array, "L v"]:
    """The same map as a state-space model: state S_i = a_i S_(i-1) + k_i v_i^T (d x v), output q_i^T S_i."""

    def step(state: Array, token: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
        query, key, value, decay = token
        state = decay * state + jnp.outer(key, value)
        return state, query @ state

    start = jnp.zeros((keys.shape[1], values.shape[1]), values.dtype)
    return jax.lax.scan(step, start, (queries, keys, values, decays))[1]
