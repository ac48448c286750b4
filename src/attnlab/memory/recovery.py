"""Sparse signals found by softmax: superposition codes by approximate message passing, and one token among many.

The data are those of `attnlab.data.sparse`. The best denoiser of a section of a superposition code is softmax attention
over its entries at inverse temperature c / tau^2 (Barbier and Krzakala; Rush, Greig, Venkataramanan, arXiv 1501.05892).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.special
from jaxtyping import Array, Float

from attnlab.checks import LARGEST, SMALLEST, check_key, check_number, check_positive
from attnlab.data.sparse import Code, code_word, sparse_tokens
from attnlab.models.heads import softmax_weights
from attnlab.types import PRNGKey, Real


def _check_code(key: PRNGKey, code: Code, iterations: int) -> None:
    check_key(key)
    check_positive(sections=code.sections, entries=code.entries, rows=code.rows, iterations=iterations)
    check_number("power", code.power, SMALLEST, LARGEST, "It is that of the signal over the noise.")


def _check_error(error: float) -> None:
    check_number("error", error, SMALLEST, 0.5, "It is a probability; half is what guessing has.")


def decode(key: PRNGKey, code: Code, iterations: int, onsager: bool = True) -> Float[Array, " T"]:
    """Approximate message passing on one random code word: |x_t - x|^2 / n after t = 1 ... T iterations.

    r_t = y - A x_t + r_(t-1) / tau_(t-1)^2 (P - |x_t|^2 / n), the last being Onsager's term: the sum over sections of
    the softmax Jacobian's trace times c^2 / n. tau_t^2 = |r_t|^2 / n. Without that term (`onsager` false) it is
    iterative thresholding, whose errors are correlated with the matrix. Raises `ValueError` for sizes of the code or
    `iterations` that are not positive.
    """
    _check_code(key, code, iterations)
    matrix, signal, received = code_word(key, code)

    def step(state: tuple[Array, Array, Array], _: None) -> tuple[tuple[Array, Array, Array], Array]:
        estimate, residual, variance = state
        fields = (estimate + residual @ matrix).reshape(code.sections, code.entries)
        estimate = code.amplitude * softmax_weights(code.amplitude / variance * fields).ravel()
        memory = (code.power - jnp.sum(estimate**2) / code.rows) / variance if onsager else 0.0
        residual = received - matrix @ estimate + memory * residual
        return (estimate, residual, jnp.mean(residual**2)), jnp.sum((estimate - signal) ** 2) / code.rows

    start = (jnp.zeros_like(signal), received, jnp.mean(received**2))
    return jax.lax.scan(step, start, length=iterations)[1]


def state_evolution(key: PRNGKey, code: Code, iterations: int, draws: int = 20_000) -> Float[Array, " T"]:
    """P (1 - s_t) with tau_(t+1)^2 = 1 + P (1 - s_t), s_t the mean weight that softmax puts on the right entry.

    The scores are c^2 / tau^2 on the right entry plus c / tau times N(0, 1) on all; the mean is over `draws`. Raises
    `ValueError` for sizes of the code, `iterations` or `draws` that are not positive.
    """
    _check_code(key, code, iterations)
    check_positive(draws=draws)
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

    Raises `ValueError` for an `error` outside of (0, 1/2].
    """
    _check_error(error)
    return -2 * scipy.special.ndtri(error) * np.sqrt(length)


def attention_threshold(length: int | np.ndarray, error: float) -> np.ndarray:
    """The same for the highest of the tokens, which softmax attention reads as its logits grow.

    The level t that the maximum of L noises stays under with probability 1 - error is passed by neither the token nor
    another in Phi(t - mu) (1 - error)^((L - 1)/L) of the sequences, which is `error` at mu = t - Phi^-1(error
    (1 - error)^(-(L - 1)/L)). Derived here; grows as sqrt(2 log L).

    Raises `ValueError` for an `error` outside of (0, 1/2].
    """
    _check_error(error)
    share = 1 / np.asarray(length)
    level = scipy.special.ndtri((1 - error) ** share)
    return level - scipy.special.ndtri(error * (1 - error) ** (share - 1))


def read(tokens: Float[Array, "n L D"], scale: Real) -> Float[Array, " n"]:
    """sum_j softmax_j(scale e_0 . x_j) e_0 . x_j: what one head with its query and value along e_0 reads.

    The mean token for scale 0, the highest for a large one.
    """
    scores = tokens[..., 0]
    return jnp.sum(softmax_weights(scale * scores) * scores, axis=-1)


def detection_threshold(
    key: PRNGKey, length: int, error: float, scale: Real, count: int, parts: int = 1
) -> tuple[float, float]:
    """Measured strength at which `read` tells the two kinds of `sparse_tokens` apart, and its standard error.

    False alarms and misses are both `error`, each among `parts` times `count` / 2 sequences, which are drawn again, a
    part at a time, for every strength. The standard error is that of both shares over the slope of the misses. Raises
    `ValueError` for sizes that are not positive, an odd `count`, and an `error` outside of (0, 1/2].
    """
    check_key(key)
    check_positive(length=length, count=count, parts=parts)
    _check_error(error)
    keys = jax.random.split(key, parts)

    def readings(strength: float) -> np.ndarray:
        return np.concatenate([_readings(part, count, length, strength, scale) for part in keys], axis=1)

    level = np.quantile(readings(0.0)[0], 1 - error)

    def excess(strength: float) -> float:
        return float(np.mean(readings(strength)[1] <= level)) - error

    strength = float(scipy.optimize.brentq(excess, 0.0, 2 * float(pooling_threshold(length, error)), xtol=1e-3))
    slope = -excess(1.1 * strength) / (0.1 * strength)
    return strength, (4 * error * (1 - error) / (parts * count)) ** 0.5 / slope


@partial(jax.jit, static_argnums=(1, 2))
def _readings(key: PRNGKey, count: int, length: int, strength: Real, scale: Real) -> Float[Array, "2 n"]:
    """Readings of sequences without and with a signal."""
    return read(sparse_tokens(key, count, length, 1, strength).inputs, scale).reshape(2, -1)
