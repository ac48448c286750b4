"""Whether chains have met: split R-hat, effective sample size, and the error of a mean."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.statistics import standard_error
from attnlab.types import Scalar

BLOCKS = (8, 4, 2, 1)
"""Numbers of blocks of each chain, whose means show how slowly it moves."""


def _split(series: Float[Array, "chains steps"]) -> Float[Array, "halves half"]:
    half = series.shape[1] // 2
    return jnp.concatenate([series[:, :half], series[:, series.shape[1] - half :]])


def _variances(halves: Float[Array, "m h"]) -> tuple[Scalar, Scalar]:
    """Within the halves, and pooled with what their means differ by."""
    length = halves.shape[1]
    within = jnp.mean(jnp.var(halves, axis=1, ddof=1))
    return within, within * (length - 1) / length + jnp.var(jnp.mean(halves, axis=1), ddof=1)


def split_rhat(series: Float[Array, "chains steps"]) -> Scalar:
    """Square root of pooled over within variance of the half chains: 1 where all have one law.

    Gelman et al., Bayesian Data Analysis (2013), equations 11.3 and 11.4. Constant series give 1.

    Example:
        >>> import jax
        >>> from attnlab.degeneracy.diagnostics import split_rhat
        >>> apart = jax.random.normal(jax.random.key(0), (4, 500)).at[0].add(3.0)
        >>> bool(split_rhat(apart) > 1.5), bool(split_rhat(apart[1:]) < 1.02)
        (True, True)
    """
    within, pooled = _variances(_split(series))
    return jnp.where(pooled > 0, jnp.sqrt(pooled / jnp.where(within > 0, within, jnp.finfo(within.dtype).tiny)), 1.0)


def effective_size(series: Float[Array, "chains steps"]) -> Scalar:
    """How many independent draws the mean of all chains is worth: chains x steps / (1 + 2 sum of autocorrelations).

    Autocorrelations of all half chains by the Fourier transform, with the variance between chains, summed in pairs
    until one is negative, the pairs made to fall (Geyer 1992; Vehtari et al., arXiv 1903.08008, section 3.2). At most
    draws x log10(draws).
    """
    halves = _split(series)
    count, length = halves.shape
    within, pooled = _variances(halves)
    centred = halves - jnp.mean(halves, axis=1, keepdims=True)
    spectrum = jnp.fft.rfft(centred, 2 * length, axis=1)
    covariance = jnp.mean(jnp.fft.irfft(jnp.abs(spectrum) ** 2, 2 * length, axis=1)[:, :length], axis=0) / length
    correlation = 1 - (within - covariance * length / (length - 1)) / jnp.where(pooled > 0, pooled, 1)
    correlation = correlation.at[0].set(1.0)
    pairs = correlation[: length // 2 * 2].reshape(-1, 2).sum(axis=1)
    positive = jnp.cumprod(pairs > 0)
    falling = jax.lax.cummin(jnp.where(positive > 0, pairs, 0))
    time = jnp.maximum(2 * jnp.sum(falling) - 1, 1 / jnp.log10(jnp.asarray(count * length, series.dtype)))
    return jnp.where(pooled > 0, count * length / time, count * length)


def error_of_mean(series: Float[Array, "chains steps"]) -> Scalar:
    """Standard error of the mean of all draws: the largest of several that agree where chains mix well.

    One is that of the effective number of draws. Its sum of autocorrelations stops at the first that noise makes
    negative, and so misses a mode that is slow and small. The others are those of the means of blocks of each chain,
    for every number in `BLOCKS`: they see slow modes, at the price of their own noise, so that the largest is some 10
    % too large where there are none.
    """
    spreads = [standard_error(_block_means(series, blocks)) for blocks in BLOCKS]
    autocorrelated = jnp.sqrt(_variances(_split(series))[1] / effective_size(series))
    return jnp.max(jnp.stack([autocorrelated, *spreads]))


def _block_means(series: Float[Array, "chains steps"], blocks: int) -> Float[Array, " means"]:
    chains, steps = series.shape
    return jnp.mean(series[:, : steps // blocks * blocks].reshape(chains * blocks, -1), axis=1)
