"""Position codes against their formulas, and tokens from sound against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.data.signals import frames, spectrogram
from attnlab.models.positions import frequencies, rotate, rotate_2d, sinusoidal, sinusoidal_shift
from compare import assert_close


def test_codes_are_sines_and_cosines_in_turn():
    found = sinusoidal(jnp.array([0.0, 3.0]), 4)
    expected = [[0, 1, 0, 1], [np.sin(3), np.cos(3), np.sin(0.03), np.cos(0.03)]]
    assert_close(found, jnp.array(expected), 1e-14)
    with pytest.raises(ValueError, match="width is 5; expected a positive even number"):
        frequencies(5)


def test_shifts_are_rotations_that_add():
    one, two = sinusoidal_shift(1.0, 6), sinusoidal_shift(2.0, 6)
    assert_close(one @ one, two, 1e-14)
    assert_close(one @ one.T, jnp.eye(6), 1e-14)


def test_rotations_against_complex_numbers(key):
    vectors, positions = jax.random.normal(key, (2, 5, 4)), jnp.arange(5.0)
    turned = rotate(vectors, positions)
    complexes = np.asarray(vectors[..., ::2]) + 1j * np.asarray(vectors[..., 1::2])
    expected = complexes * np.exp(1j * np.outer(np.arange(5), [1.0, 0.01]))
    assert_close(turned[..., ::2], jnp.asarray(expected.real), 1e-14)
    assert_close(turned[..., 1::2], jnp.asarray(expected.imag), 1e-14)
    grid = rotate_2d(vectors, positions, jnp.zeros(5))
    assert_close(grid[..., 2:], vectors[..., 2:], 1e-15)
    with pytest.raises(ValueError, match="6 entries; expected a multiple of 4"):
        rotate_2d(jnp.ones((5, 6)), positions, positions)


def test_frames_and_their_spectrum(key):
    signal = jax.random.normal(key, (2, 20))
    found = frames(signal, 8, 4)
    assert found.shape == (2, 4, 8)
    assert_close(found[1, 2], signal[1, 8:16], 0.0)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(8) / 8)
    assert_close(spectrogram(signal, 8, 4)[1, 2], jnp.abs(jnp.fft.rfft(signal[1, 8:16] * hann)))
    with pytest.raises(ValueError, match="length is 30"):
        frames(signal, 30, 4)
