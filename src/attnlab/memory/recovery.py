"""Sparse signals found by softmax: superposition codes by approximate message passing, and one token among many.

A code word is x with one nonzero entry c in each of L sections of M entries, seen as y = A x + N(0, sigma^2) through a
matrix with n rows and entries N(0, 1/n), c^2 = n P / L. The best denoiser of a section is softmax attention over its
entries at inverse temperature c / tau^2 (Barbier and Krzakala; Rush, Greig, Venkataramanan, arXiv 1501.05892).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Array, Float

from attnlab.models.heads import softmax_weights
from attnlab.types import PRNGKey, Real


class Code(NamedTuple):
    """Sizes of a superposition code at rate `log2(M) L / n` bits a row, power P = `power`, noise variance 1."""

    sections: int
    entries: int
    rows: int
    power: float

    @property
    def amplitude(self) -> float:
        """The nonzero entry c."""
        return (self.rows * self.power / self.sections) ** 0.5


class Decoding(NamedTuple):
    """By iteration: the distance |x_t - x|^2 / n per row, and what state evolution says of it."""

    measured: Float[Array, " T"]
    predicted: Float[Array, " T"]


def decode(key: PRNGKey, code: Code, iterations: int) -> Float[Array, " T"]:
    """Approximate message passing on one random code word: |x_t - x|^2 / n after t = 1 ... T iterations.

    r_t = y - A x_t + r_(t-1) / tau_(t-1)^2 (P - |x_t|^2 / n), the last being Onsager's term: the sum over sections of
    the softmax Jacobian's trace times c^2 / n. tau_t^2 = |r_t|^2 / n.
    """
    keys = jax.random.split(key, 3)
    matrix = jax.random.normal(keys[0], (code.rows, code.sections * code.entries)) / code.rows**0.5
    places = jax.random.randint(keys[1], (code.sections,), 0, code.entries)
    signal = code.amplitude * jax.nn.one_hot(places, code.entries, dtype=matrix.dtype).ravel()
    received = matrix @ signal + jax.random.normal(keys[2], (code.rows,))

    def step(state: tuple[Array, Array, Array], _: None) -> tuple[tuple[Array, Array, Array], Array]:
        estimate, residual, variance = state
        fields = (estimate + residual @ matrix).reshape(code.sections, code.entries)
        estimate = code.amplitude * softmax_weights(code.amplitude / variance * fields).ravel()
        onsager = (code.power - jnp.sum(estimate**2) / code.rows) / variance
        residual = received - matrix @ estimate + onsager * residual
        return (estimate, residual, jnp.mean(residual**2)), jnp.sum((estimate - signal) ** 2) / code.rows

    start = (jnp.zeros_like(signal), received, jnp.mean(received**2))
    return jax.lax.scan(step, start, length=iterations)[1]


def state_evolution(key: PRNGKey, code: Code, iterations: int, draws: int = 20_000) -> Float[Array, " T"]:
    """P (1 - s_t) with tau_(t+1)^2 = 1 + P (1 - s_t), s_t the mean weight that softmax puts on the right entry.

    The scores are c^2 / tau^2 on the right entry plus c / tau times N(0, 1) on all; the mean is over `draws`.
    """
    noise = jax.random.normal(key, (draws, code.entries))

    def step(variance: Array, _: None) -> tuple[Array, Array]:
        ratio = code.amplitude / jnp.sqrt(variance)
        scores = ratio * noise
        right = softmax_weights(scores.at[:, 0].add(ratio**2))[:, 0]
        error = code.power * (1 - jnp.mean(right))
        return 1 + error, error

    return jax.lax.scan(step, jnp.asarray(1 + code.power), length=iterations)[1]


def pooling_threshold(length: int | np.ndarray, error: float) -> np.ndarray:
    """Signal strength at which the sum over `length` tokens, noise N(0, 1) each, tells signal from none: 2 z sqrt(L).

    z is the normal quantile of 1 - `error`, the same for misses and false alarms (derived here).
    """
    return -2 * scipy.special.ndtri(error) * np.sqrt(length)


def attention_threshold(length: int | np.ndarray, error: float) -> np.ndarray:
    """The same for the highest score, which softmax attention reads as its temperature falls.

    The level that the maximum of L noises stays under with probability 1 - error, plus the quantile of the token's own
    noise; grows as sqrt(2 log L) (derived here, to leading order in the error: a noise may save a miss).
    """
    level = scipy.special.ndtri((1 - error) ** (1 / np.asarray(length)))
    return level - scipy.special.ndtri(error)


def detection_errors(
    key: PRNGKey, length: int, strength: Real, level: Real, draws: int, pooled: bool
) -> Float[Array, "2"]:
    """Shares of false alarms and of misses when the sum (`pooled`) or the maximum of the tokens' scores passes `level`.

    Scores are N(0, 1), and `strength` more on one token where there is a signal.
    """
    noise = jax.random.normal(key, (2, draws, length))
    scores = noise.at[1, :, 0].add(strength)
    statistic = jnp.sum(scores, axis=-1) if pooled else jnp.max(scores, axis=-1)
    alarms = jnp.mean(statistic > level, axis=1)
    return jnp.stack([alarms[0], 1 - alarms[1]])
