"""Shared problems of the in-context learning tests, and a comparator for Monte Carlo."""

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.icl.tasks import linear_regression

DIMENSION = 3


def _matrix(seed):
    factor = jax.random.normal(jax.random.key(seed), (DIMENSION, DIMENSION))
    return factor @ factor.T / DIMENSION + 0.2 * jnp.eye(DIMENSION)


PROBLEMS = {
    "gaussian": lambda: linear_regression(_matrix(10), _matrix(11), noise_variance=0.3),
    "uniform": lambda: linear_regression(_matrix(10), _matrix(11), noise_variance=0.3, inputs="uniform"),
    "finite_tasks": lambda: linear_regression(
        _matrix(10), tasks=jax.random.normal(jax.random.key(12), (4, DIMENSION)), noise_variance=0.3
    ),
    "finite_uniform": lambda: linear_regression(
        _matrix(10), tasks=jax.random.normal(jax.random.key(12), (2, DIMENSION)), inputs="uniform"
    ),
    "finite_rademacher": lambda: linear_regression(
        jnp.diag(jnp.array([2.0, 1.0, 0.3])), tasks=jnp.ones((1, DIMENSION)), inputs="rademacher"
    ),
}


def assert_within_error(samples, expected, errors=4.5):
    """The mean over the leading axis agrees with `expected` within `errors` standard errors, in every entry."""
    for found, wanted in zip(jax.tree.leaves(samples), jax.tree.leaves(expected), strict=True):
        found = np.asarray(found)
        error = found.std(axis=0, ddof=1) / len(found) ** 0.5
        gap = np.abs(found.mean(axis=0) - np.asarray(wanted))
        assert np.all(gap <= errors * error + 1e-12), f"{gap / np.maximum(error, 1e-300)} standard errors"
