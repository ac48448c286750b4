"""Sequences of a Markov chain: the simplest language, whose best predictor and least risk are known."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnlab.checks import check_positive
from attnlab.data.dataset import Dataset
from attnlab.types import PRNGKey, Scalar


def random_transitions(key: PRNGKey, states: int, spread: float = 1.0) -> Float[Array, "S S"]:
    """Rows softmax(N(0, spread^2)): row i is the distribution of what follows state i."""
    check_positive(states=states)
    return jax.nn.softmax(spread * jax.random.normal(key, (states, states)), axis=-1)


def stationary(transitions: Float[Array, "S S"]) -> Float[Array, " S"]:
    """The distribution p with p = p P of an irreducible chain."""
    count = transitions.shape[0]
    # p (P - I) = 0 has one redundant equation: the sum of p takes its place
    system = (transitions.T - jnp.eye(count, dtype=transitions.dtype)).at[-1].set(1.0)
    return jnp.linalg.solve(system, jnp.zeros(count, transitions.dtype).at[-1].set(1.0))


def entropy_rate(transitions: Float[Array, "S S"]) -> Scalar:
    """-sum_i p_i sum_j P_ij log P_ij in nats: the least cross-entropy of predicting the next state."""
    return -jnp.sum(stationary(transitions)[:, None] * jax.scipy.special.xlogy(transitions, transitions))


def markov_sequences(key: PRNGKey, transitions: Float[Array, "S S"], count: int, length: int) -> Dataset:
    """`count` stationary sequences: inputs (count, length) states, targets the states that follow each of them."""
    check_positive(count=count, length=length)
    start_key, step_key = jax.random.split(key)
    logits = jnp.log(transitions)
    start = jax.random.categorical(start_key, jnp.log(stationary(transitions)), shape=(count,))

    def step(state: Int[Array, " n"], key: PRNGKey) -> tuple[Array, Array]:
        following = jax.random.categorical(key, logits[state], axis=-1)
        return following, following

    following = jax.lax.scan(step, start, jax.random.split(step_key, length))[1].T
    return Dataset(jnp.concatenate([start[:, None], following[:, :-1]], axis=1), following)
