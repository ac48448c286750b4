"""Sound as tokens: overlapping frames of a signal, and their spectrogram."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.checks import check_positive, check_range


def frames(signal: Float[Array, "*B time"], length: int, hop: int) -> Float[Array, "*B L length"]:
    """Windows of `length` samples that start every `hop` samples; what is left over at the end is dropped.

    Raises `ValueError` for a length or hop that is not positive, or a length above the signal's.
    """
    check_positive(length=length, hop=hop)
    check_range("length", length, 1, signal.shape[-1], f"The signal has {signal.shape[-1]} samples.")
    starts = jnp.arange(0, signal.shape[-1] - length + 1, hop)
    return signal[..., starts[:, None] + jnp.arange(length)[None]]


def spectrogram(signal: Float[Array, "*B time"], length: int, hop: int) -> Float[Array, "*B L frequencies"]:
    """Magnitudes of the Fourier transform of every frame under a Hann window: length // 2 + 1 frequencies a token.

    A change of phase of the signal turns the complex transform and leaves its magnitude, up to what leaks from the
    negative frequencies.
    """
    windows = frames(signal, length, hop)
    hann = 0.5 - 0.5 * jnp.cos(2 * jnp.pi * jnp.arange(float(length)) / length)
    return jnp.abs(jnp.fft.rfft(jnp.einsum("...t,t->...t", windows, hann.astype(windows.dtype)), axis=-1))
