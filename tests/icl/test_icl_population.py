"""The exact population risk against Monte Carlo, against autodiff, and as an objective of the lab."""

import jax
import jax.numpy as jnp
import pytest
from icl_cases import DIMENSION, PROBLEMS, assert_within_error

from attnlab.icl.models import effective_weights, init_layer, layer_predict, stack_predict
from attnlab.icl.population import PARAMETRIZATIONS, population_objective, population_risk, reduced_weights
from attnlab.icl.tasks import isotropic, linear_regression, sample_prompts, with_tasks
from attnlab.objectives import check_objective
from compare import assert_close
from nightly import nightly

LENGTH, SAMPLES = 5, 50_000


def random_effective(key, heads):
    one, two = jax.random.split(key)
    return {
        "value": 0.5 * jax.random.normal(one, (heads, DIMENSION + 1)),
        "query_key": 0.5 * jax.random.normal(two, (heads, DIMENSION + 1, DIMENSION)),
    }


@jax.jit
def _errors_and_gradients(effective, prompts):
    def squared(effective, prompt):
        return (layer_predict(effective, prompt) - prompt.target) ** 2

    return jax.vmap(jax.value_and_grad(squared), (None, 0))(effective, prompts)


@pytest.mark.parametrize("heads", nightly((1, 2), (2,)))
@pytest.mark.parametrize("name", PROBLEMS)
def test_risk_and_gradient_against_monte_carlo(name, heads):
    problem = PROBLEMS[name]()
    effective = random_effective(jax.random.key(heads), heads)
    prompts = sample_prompts(jax.random.key(99), problem, LENGTH, SAMPLES)
    errors, gradients = _errors_and_gradients(effective, prompts)
    exact = jax.jit(jax.value_and_grad(population_risk))(effective, problem, LENGTH)
    assert_within_error(errors, exact[0])
    assert_within_error(gradients, exact[1])


def test_one_head_is_the_stated_formula(key):
    """(1 + 1/N) v^T L v + (1/N) tr(L B^T S B)(a^T S a) - 2 v^T L w + w^T L w for one task."""
    task = jnp.array([0.3, -1.0, 0.8])
    problem = with_tasks(PROBLEMS["gaussian"](), task[None])
    effective = random_effective(key, 1)
    a, B = effective["value"][0], effective["query_key"][0]
    covariance = problem.covariance
    root = jnp.concatenate([jnp.eye(DIMENSION), task[None]])
    S = (root @ covariance @ root.T).at[-1, -1].add(problem.noise_variance)
    v = B.T @ S @ a
    fluctuation = (v @ covariance @ v + jnp.trace(covariance @ B.T @ S @ B) * (a @ S @ a)) / LENGTH
    expected = v @ covariance @ v + fluctuation - 2 * v @ covariance @ task + task @ covariance @ task
    assert_close(population_risk(effective, problem, LENGTH), expected, 1e-13)


def test_gaussian_tasks_are_the_limit_of_symmetric_design(key):
    """A finite set with the fourth moments of N(0, 1) replaces the Gaussian in dimension 1: a three-point rule."""
    nodes = jnp.array([-(3**0.5), 0, 0, 0, 0, 3**0.5])[:, None]  # weights 1/6, 2/3, 1/6
    gaussian, finite = (
        linear_regression(jnp.eye(1), noise_variance=0.2),
        linear_regression(jnp.eye(1), tasks=nodes, noise_variance=0.2),
    )
    one, two = jax.random.split(key)
    effective = {"value": jax.random.normal(one, (2, 2)), "query_key": jax.random.normal(two, (2, 2, 1))}
    assert_close(population_risk(effective, finite, 7), population_risk(effective, gaussian, 7), 1e-13)


def test_heads_add_up(key):
    """Two equal heads with half the value each are one head; so is a head beside a zero head."""
    problem = PROBLEMS["uniform"]()
    one = random_effective(key, 1)
    expected = population_risk(one, problem, LENGTH)
    halves = {"value": jnp.repeat(one["value"] / 2, 2, 0), "query_key": jnp.repeat(one["query_key"], 2, 0)}
    assert_close(population_risk(halves, problem, LENGTH), expected, 1e-13)


def test_zero_layer_has_the_signal_as_risk():
    problem = PROBLEMS["gaussian"]()
    zero = jax.tree.map(jnp.zeros_like, random_effective(jax.random.key(0), 1))
    assert_close(population_risk(zero, problem, LENGTH), problem.signal, 1e-14)


@pytest.mark.parametrize("heads", [1, 2])
def test_effective_weights_predict_as_the_layer(key, heads):
    layer = init_layer(key, DIMENSION + 1, 0.7, heads=heads, head_dim=2)
    prompts = sample_prompts(key, PROBLEMS["gaussian"](), LENGTH, 8)
    direct = jax.vmap(lambda prompt: stack_predict([layer], prompt, heads=heads))(prompts)
    reduced = jax.vmap(lambda prompt: layer_predict(effective_weights(layer, heads), prompt))(prompts)
    assert_close(direct, reduced, 1e-12)


def example_params(name, key):
    keys = jax.random.split(key, 3)
    d = DIMENSION
    return {
        "merged": lambda: random_effective(key, 1),
        "layer": lambda: init_layer(key, d + 1, 0.5),
        "reduced": lambda: {"preconditioner": jax.random.normal(keys[0], (d, d))},
        "rank_one": lambda: {
            name: jax.random.normal(k, shape)
            for name, k, shape in zip(("value", "key", "query"), keys, ((2,), (2, d), (2, d)), strict=True)
        },
    }[name]()


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_objective_is_the_risk_of_its_effective_weights(name, key):
    problem = PROBLEMS["gaussian"]()
    params = example_params(name, key)
    risk = population_objective(problem, LENGTH, name)
    check_objective(risk, params)
    assert_close(risk(params), population_risk(PARAMETRIZATIONS[name](params), problem, LENGTH), 1e-14)


def test_objective_crosses_jit_and_serves_many_settings():
    """Length, noise and covariances are leaves: one compiled function, and vmap over settings."""
    effective = random_effective(jax.random.key(0), 1)
    compiled = jax.jit(lambda risk, effective: risk(effective))
    for length in (2, 8):
        for noise in (0.0, 0.5):
            problem = linear_regression(jnp.eye(DIMENSION), noise_variance=noise)
            risk = population_objective(problem, length)
            assert_close(compiled(risk, effective), population_risk(effective, problem, length), 1e-13)
    assert compiled._cache_size() == 1
    problem = PROBLEMS["gaussian"]()
    risks = jax.vmap(lambda length: population_risk(effective, problem, length))(jnp.array([2.0, 8.0]))
    assert_close(risks[1], population_risk(effective, problem, 8), 1e-13)


def test_bad_input_is_refused():
    effective = random_effective(jax.random.key(0), 1)
    with pytest.raises(ValueError, match="value has shape"):
        population_risk(effective, isotropic(5), LENGTH)
    with pytest.raises(ValueError, match="length is 0"):
        population_risk(effective, isotropic(DIMENSION), 0)
    with pytest.raises(ValueError, match="Did you mean 'merged'"):
        population_objective(isotropic(DIMENSION), LENGTH, "merge")
    reduced = reduced_weights({"preconditioner": jnp.eye(DIMENSION)})
    assert population_risk(reduced, isotropic(DIMENSION), LENGTH) > 0
