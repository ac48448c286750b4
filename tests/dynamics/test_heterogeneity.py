"""Distances of spectra against their definitions, and against SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial.distance
import scipy.stats

from attnlab.dynamics.heterogeneity import jensen_shannon, log_wasserstein


@pytest.fixture
def spectra(key):
    """Two spectra of different length, over several orders of magnitude, of both signs."""
    first, second = jax.random.split(key)
    sizes = 10.0 ** (3 * jax.random.normal(first, (40,)) / 2)
    others = 10.0 ** (jax.random.normal(second, (25,)) - 1)
    return sizes * jax.random.rademacher(second, (40,), float), others


def test_wasserstein_is_that_of_the_logarithms(spectra):
    expected = scipy.stats.wasserstein_distance(*(np.log10(np.abs(values)) for values in spectra))
    assert float(log_wasserstein(*spectra, floor=0.0)) == pytest.approx(expected, rel=1e-12)


def test_wasserstein_leaves_null_eigenvalues_out(spectra):
    first, second = spectra
    noise = 1e-17 * jnp.max(jnp.abs(first)) * jnp.arange(5.0)
    found = log_wasserstein(jnp.concatenate([noise, first]), second)
    kept = [np.abs(values[np.abs(values) > 1e-8 * np.abs(values).max()]) for values in map(np.asarray, spectra)]
    assert float(found) == pytest.approx(scipy.stats.wasserstein_distance(*map(np.log10, kept)), rel=1e-12)


def test_jensen_shannon_is_that_of_the_histograms(spectra):
    edges = np.linspace(min(map(np.min, spectra)), max(map(np.max, spectra)), 65)
    shares = [np.histogram(values, edges)[0] / values.size for values in spectra]
    expected = scipy.spatial.distance.jensenshannon(*shares, base=2) ** 2
    assert float(jensen_shannon(*spectra)) == pytest.approx(expected, abs=1e-12)


def test_a_spectrum_is_at_no_distance_from_itself(spectra):
    assert float(jensen_shannon(spectra[0], spectra[0])) == 0
    assert float(log_wasserstein(spectra[0], spectra[0])) == 0
    with pytest.raises(ValueError, match="bins is 0; expected a positive whole number"):
        jensen_shannon(*spectra, bins=0)
