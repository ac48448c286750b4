"""The one estimate: intervals by Student's t, through jit, at every scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from attnlab.statistics import Estimate, estimate
from compare import assert_close


@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_intervals_are_those_of_students_t(level):
    samples = np.random.default_rng(0).standard_normal((7, 3))
    found = jax.jit(estimate)(jnp.asarray(samples))
    mean, error = samples.mean(axis=0), scipy.stats.sem(samples, axis=0)
    assert found.samples == 7
    assert_close(jnp.stack(found.interval(level)), scipy.stats.t.interval(level, 6, mean, error), 1e-12)


def test_a_bound_widens_the_interval_and_joins_the_error():
    found = Estimate({"a": jnp.array(1.0)}, {"a": jnp.array(3.0)}, 10, {"a": jnp.array(4.0)})
    assert found.error["a"] == 5
    low, high = found.interval()
    assert_close(high["a"] - low["a"], 2 * (4 + 3 * scipy.stats.t.ppf(0.975, 9)), 1e-12)


def test_one_sample_bounds_nothing():
    assert np.isinf(estimate(jnp.ones((1, 3))).interval()).all()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_error_scales_where_squares_do_not(scale):
    samples = jax.random.normal(jax.random.key(0), (9,), jnp.float32)
    found = estimate(jnp.float32(scale) * samples)
    expected = scale * scipy.stats.sem(np.asarray(samples, np.float64))
    assert abs(float(found.standard_error) / expected - 1) <= 1e-5


def test_a_level_is_between_none_and_all():
    with pytest.raises(ValueError, match="level is 95"):
        estimate(jnp.ones(3)).interval(95)
