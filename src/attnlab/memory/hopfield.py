"""Modern Hopfield networks: attention over stored patterns as descent on an energy and as the best denoiser.

Ramsauer et al., arXiv 2008.02217: the update x -> X^T softmax(beta X x) over the patterns X (n, d).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.checks import LARGEST, SMALLEST, check_key, check_number, check_positive
from attnlab.models.heads import softmax_weights
from attnlab.types import PRNGKey, Real, Scalar


def _check_beta(beta: Real) -> None:
    check_number("beta", beta, SMALLEST, LARGEST, "It is an inverse temperature.")


def hopfield_update(patterns: Float[Array, "n d"], states: Float[Array, "m d"], beta: Real) -> Float[Array, "m d"]:
    """One step of every state: attention with the patterns as keys and values.

    Raises `ValueError` for a `beta` that is not positive and finite.
    """
    _check_beta(beta)
    return softmax_weights(beta * (states @ patterns.T)) @ patterns


def hopfield_energy(patterns: Float[Array, "n d"], states: Float[Array, "m d"], beta: Real) -> Float[Array, " m"]:
    """-log sum_i e^(beta p_i . x) / beta + |x|^2 / 2: no update raises it, the update is a step of length 1 on it.

    Raises `ValueError` for a `beta` that is not positive and finite.
    """
    _check_beta(beta)
    return jnp.sum(states**2, axis=1) / 2 - jax.nn.logsumexp(beta * (states @ patterns.T), axis=1) / beta


def denoising_slope(
    key: PRNGKey, patterns: Float[Array, "n d"], noise: Real, beta: Real, draws: int
) -> tuple[Scalar, Scalar]:
    """d/d beta of the mean square error of one update on p + N(0, noise^2), and its standard error over `draws`.

    For patterns of one norm, drawn with equal probability, the posterior mean of p is the update with beta = 1 /
    noise^2 (derived here: the Gaussian likelihoods' |p|^2 cancel), so that the slope vanishes there. Raises
    `ValueError` for `draws`, `noise` or `beta` that are not positive.
    """
    check_key(key)
    check_positive(draws=draws)
    _check_beta(beta)
    check_number("noise", noise, SMALLEST, LARGEST, "It is a standard deviation.")
    choice, noise_key = jax.random.split(key)
    clean = patterns[jax.random.randint(choice, (draws,), 0, patterns.shape[0])]
    noisy = clean + noise * jax.random.normal(noise_key, clean.shape)

    def errors(beta: Array) -> Array:
        return jnp.sum((hopfield_update(patterns, noisy, beta) - clean) ** 2, axis=1)

    slopes = jax.jacfwd(errors)(jnp.asarray(beta))
    return jnp.mean(slopes), jnp.std(slopes) / draws**0.5
