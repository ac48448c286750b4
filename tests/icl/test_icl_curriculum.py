"""Training in stages: what a stage sees, and where the last one ends."""

import jax
import jax.numpy as jnp
import optax
import pytest

from attnlab.icl.curriculum import leading_coordinates, train_in_stages
from attnlab.icl.optima import optimal_preconditioner, optimal_risk
from attnlab.icl.population import population_objective
from attnlab.icl.tasks import isotropic, linear_regression, sample_inputs
from compare import assert_close

DIMENSION, LENGTH = 3, 8
OPTIMIZER = optax.adam(optax.cosine_decay_schedule(0.05, 400))


def objectives(problem, dimensions):
    return [population_objective(leading_coordinates(problem, k), LENGTH, "reduced") for k in dimensions]


def test_leading_coordinates_are_those_of_a_smaller_problem(key):
    problem = linear_regression(jnp.diag(jnp.array([2.0, 1.0, 0.5])), noise_variance=0.1)
    small = leading_coordinates(problem, 2)
    inputs = sample_inputs(key, small, (20,))
    assert jnp.all(inputs[:, 2] == 0)
    assert jnp.all(inputs[:, :2] != 0)
    plain = linear_regression(jnp.diag(jnp.array([2.0, 1.0])), noise_variance=0.1)
    assert_close(optimal_risk(small, LENGTH), optimal_risk(plain, LENGTH), 1e-12)
    with pytest.raises(ValueError, match="count is 4"):
        leading_coordinates(problem, 4)


def test_stages_go_on_from_each_other_and_end_at_the_optimum(key):
    problem = isotropic(DIMENSION, 0.1)
    stages = objectives(problem, (1, 2, 3))
    start = {"preconditioner": 0.1 * jax.random.normal(key, (DIMENSION, DIMENSION))}
    runs = train_in_stages(stages, start, OPTIMIZER, key, steps=400, every=400)
    for before, after, stage in zip(runs, runs[1:], stages[1:], strict=False):
        assert_close(after.records.losses[0], stage(before.params), 1e-14)
    # the first stage cannot see the coordinates that are zero
    moved = runs[0].params["preconditioner"] - start["preconditioner"]
    assert jnp.abs(moved[0, 0]) > 0.1
    assert jnp.all(moved[1:, 1:] == 0)
    assert_close(runs[-1].params["preconditioner"], optimal_preconditioner(problem, LENGTH), 1e-4)


def test_ensembles_in_stages_and_no_stage():
    keys = jax.random.split(jax.random.key(0), 2)
    start = {"preconditioner": jnp.zeros((2, DIMENSION, DIMENSION))}
    stages = objectives(isotropic(DIMENSION), (1, 3))
    runs = train_in_stages(stages, start, OPTIMIZER, keys, steps=2)
    assert runs[-1].records.losses.shape == (2, 2)
    with pytest.raises(ValueError, match="stages is empty"):
        train_in_stages([], start, OPTIMIZER, keys, steps=2)
