"""Prompts have the laws they state, baselines are their algorithms, and bad input is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from icl_cases import PROBLEMS, assert_within_error

from attnlab.icl.baselines import BASELINES, baseline, check_stable, empirical_moments
from attnlab.icl.models import init_layer, looped_predict, prompt_tokens, stack_predict
from attnlab.icl.tasks import (
    INPUT_LAWS,
    Prompt,
    check_prompt,
    composition_prompts,
    drifting_prompts,
    isotropic,
    linear_regression,
    sample_inputs,
    sample_prompts,
    sample_tasks,
    shuffle_labels,
    sine_prompts,
    with_tasks,
)
from compare import assert_close

D, N = 4, 9


@pytest.fixture
def prompt(key):
    return jax.tree.map(lambda x: x[0], sample_prompts(key, isotropic(D, 0.3), N, 1))


@pytest.mark.parametrize("name", PROBLEMS)
def test_second_moments_of_inputs_and_tasks(name, each_key):
    problem = PROBLEMS[name]()
    inputs, tasks = sample_inputs(each_key, problem, (20_000,)), sample_tasks(each_key, problem, 20_000)
    for samples, moment in ((inputs, problem.covariance), (tasks, problem.task_moment)):
        assert_within_error(jnp.einsum("bi,bj->bij", samples, samples), moment)


@pytest.mark.parametrize("name", INPUT_LAWS)
def test_kurtosis_of_input_laws(name, each_key):
    fourth = sample_inputs(each_key, linear_regression(jnp.eye(2), inputs=name), (50_000,)) ** 4 - 3
    assert_within_error(fourth, INPUT_LAWS[name].excess_kurtosis * jnp.ones(2))


def test_labels_and_target_of_prompts(each_key):
    problem = linear_regression(jnp.eye(D), tasks=jnp.ones((1, D)), noise_variance=0.3)
    prompts = sample_prompts(each_key, problem, N, 5_000)
    assert_close(prompts.target, jnp.sum(prompts.query, axis=1), 1e-13)  # no noise on the query
    noise = (prompts.labels - jnp.sum(prompts.inputs, axis=-1)) ** 2
    assert_within_error(noise, 0.3 * jnp.ones(N))


def test_drifting_tasks_correlate_as_stated(each_key):
    correlation = jnp.array([[1.0, 0.2, 0.5], [0.2, 1.0, -0.3], [0.5, -0.3, 1.0]])
    prompts = drifting_prompts(each_key, D, correlation, 50_000)
    # E y_i x_i is w_i on average over inputs: <y_i x_i, y_j x_j> has mean d R_ij.
    estimates = prompts.labels[..., None] * prompts.inputs
    with_query = jnp.sum(estimates * (prompts.target[:, None] * prompts.query)[:, None, :], axis=-1)
    assert_within_error(with_query, D * correlation[:2, 2])
    assert_within_error(jnp.sum(estimates[:, 0] * estimates[:, 1], axis=-1), jnp.asarray(D * 0.2))


def test_sine_prompts(key):
    prompts = sine_prompts(key, N, 2_000)
    assert prompts.inputs.shape == (2_000, N, 1)
    assert jnp.all(jnp.abs(prompts.inputs) <= 5)
    assert jnp.all(jnp.abs(prompts.labels) <= 5)
    # y = a sin x cos p + a cos x sin p exactly; amplitude and phase are not tied to each other.
    x = prompts.inputs[..., 0]
    design = jnp.stack([jnp.sin(x), jnp.cos(x)], axis=-1)
    fit = jax.vmap(lambda a, b: jnp.linalg.lstsq(a, b)[0])(design, prompts.labels)
    x_q = prompts.query[:, 0]
    assert_close(fit[:, 0] * jnp.sin(x_q) + fit[:, 1] * jnp.cos(x_q), prompts.target, 1e-9)
    amplitude, phase = jnp.linalg.norm(fit, axis=1), jnp.arctan2(fit[:, 1], fit[:, 0])
    assert abs(np.corrcoef(amplitude, phase)[0, 1]) < 4.5 / 2_000**0.5


def test_composition_prompts(key):
    prompts, steps = composition_prompts(key, D, 6, N, 5_000)
    assert steps.shape == (5_000, N + 1, 6)
    assert jnp.all(steps >= 0)
    labels = jnp.concatenate([prompts.labels, prompts.target[:, None]], axis=1)
    second = jax.vmap(lambda s, y: jnp.linalg.lstsq(s, y)[0])(steps, labels)
    assert_close(jnp.einsum("bnw,bw->bn", steps, second), labels, 1e-8)
    assert_within_error(prompts.target**2, jnp.ones(()))


def test_shuffling_keeps_the_labels(key):
    prompts = sample_prompts(key, isotropic(D), N, 3)
    shuffled = shuffle_labels(key, prompts)
    assert_close(jnp.sort(shuffled.labels, axis=1), jnp.sort(prompts.labels, axis=1), 1e-15)
    assert not jnp.allclose(shuffled.labels, prompts.labels)


def test_gradient_descent_is_autodiff_descent(prompt):
    weights = jnp.zeros(D)
    for _ in range(4):
        residual = jax.grad(lambda w: jnp.sum((prompt.inputs @ w - prompt.labels) ** 2) / (2 * N))(weights)
        weights = weights - 0.2 * residual
    found = baseline("gradient_descent", steps=4, step_size=0.2)(prompt)
    assert_close(found, prompt.query @ weights, 1e-13)
    preconditioned = baseline("preconditioned_gradient_descent", steps=4, preconditioner=0.2 * jnp.eye(D))
    assert_close(preconditioned(prompt), found, 1e-13)


def test_second_order_and_direct_solvers_agree(prompt):
    covariance, moment = empirical_moments(prompt)
    exact = prompt.query @ np.linalg.solve(covariance, moment)
    scale = 1 / jnp.linalg.eigvalsh(covariance)[-1] ** 2
    assert_close(baseline("least_squares")(prompt), exact, 1e-11)
    assert_close(baseline("newton", steps=25, scale=scale)(prompt), exact, 1e-8)
    assert_close(baseline("ridge", penalty=1e-9)(prompt), exact, 1e-6)


def test_ridge_is_stationary(prompt):
    basis = jnp.eye(D)
    weights = jnp.stack(
        [baseline("ridge", penalty=0.7)(Prompt(prompt.inputs, prompt.labels, e, prompt.target)) for e in basis]
    )
    slope = jax.grad(lambda w: jnp.sum((prompt.inputs @ w - prompt.labels) ** 2) + 0.7 * jnp.sum(w**2))(weights)
    assert_close(slope, jnp.zeros(D), 1e-11, scale=1.0)


def test_least_squares_interpolates_short_contexts(key):
    short = jax.tree.map(lambda x: x[0], sample_prompts(key, isotropic(D), 2, 1))
    at_example = Prompt(short.inputs, short.labels, short.inputs[1], short.labels[1])
    assert_close(baseline("least_squares")(at_example), short.labels[1], 1e-11)


def test_nearest_neighbours(prompt):
    order = np.argsort(np.linalg.norm(np.asarray(prompt.inputs - prompt.query[None]), axis=1))
    expected = jnp.mean(prompt.labels[order[:3]])
    assert_close(baseline("nearest_neighbours", neighbours=3)(prompt), expected, 1e-14)


def test_discrete_bayes_is_the_posterior_mean(key):
    """By Bayes' rule written out, and with the least risk among the baselines on its own prompts."""
    tasks = jax.random.normal(key, (3, D))
    prompts = sample_prompts(key, linear_regression(jnp.eye(D), tasks=tasks, noise_variance=0.5), 3, 500)
    bayes = baseline("discrete_bayes", tasks=tasks, noise_variance=0.5)
    one = jax.tree.map(lambda x: np.asarray(x[0]), prompts)
    likelihood = [np.prod(np.exp(-((one.labels - one.inputs @ w) ** 2))) for w in np.asarray(tasks)]
    expected = np.dot(likelihood, np.asarray(tasks) @ one.query) / np.sum(likelihood)
    assert_close(bayes(jax.tree.map(jnp.asarray, one)), jnp.asarray(expected), 1e-12)

    def risk(algorithm):
        return jnp.mean((jax.vmap(algorithm)(prompts) - prompts.target) ** 2)

    assert risk(bayes) < risk(baseline("ridge", penalty=0.5))


def test_softmax_layer_with_network_runs_and_is_equivariant(prompt, key):
    """Permuting the context permutes nothing in the prediction; a network and several heads fit in."""
    layer = init_layer(key, D + 1, 0.5, heads=2, head_dim=3)
    one, two = jax.random.split(key)
    layer |= {"hidden": jax.random.normal(one, (D + 1, 7)), "hidden_output": 0.1 * jax.random.normal(two, (7, D + 1))}
    swapped = Prompt(prompt.inputs[::-1], prompt.labels[::-1], prompt.query, prompt.target)
    found = stack_predict([layer, layer], prompt, weights="softmax", heads=2)
    assert_close(stack_predict([layer, layer], swapped, weights="softmax", heads=2), found, 1e-11)
    assert_close(looped_predict(layer, prompt, 2, weights="softmax", heads=2), found, 1e-13)
    assert prompt_tokens(prompt).shape == (N + 1, D + 1)


def test_bad_prompts_are_refused(prompt):
    with pytest.raises(ValueError, match="context of length 0"):
        check_prompt(Prompt(jnp.zeros((0, D)), jnp.zeros(0), jnp.zeros(D), jnp.zeros(())))
    with pytest.raises(ValueError, match=r"query has shape \(3,\)"):
        check_prompt(Prompt(prompt.inputs, prompt.labels, jnp.zeros(3), prompt.target))
    with pytest.raises(ValueError, match="length is 0"):
        sample_prompts(jax.random.key(0), isotropic(D), 0, 5)
    with pytest.raises(ValueError, match="loops is 0"):
        looped_predict(init_layer(jax.random.key(0), D + 1, 0.1), prompt, 0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: linear_regression(jnp.diag(jnp.array([1.0, -0.5]))), "eigenvalue -0.5"),
        (lambda: linear_regression(jnp.array([[1.0, 0.5], [0.0, 1.0]])), "not symmetric"),
        (lambda: linear_regression(jnp.ones((2, 3))), "expected a square matrix"),
        (lambda: linear_regression(jnp.full((2, 2), jnp.nan)), "non-finite"),
        (lambda: linear_regression(jnp.eye(2), jnp.eye(3)), "expected that of covariance"),
        (lambda: linear_regression(jnp.eye(2), tasks=jnp.ones((3, 4))), r"expected \(M, 2\)"),
        (lambda: linear_regression(jnp.eye(2), jnp.eye(2), tasks=jnp.ones((3, 2))), "both given"),
        (lambda: linear_regression(jnp.eye(2), noise_variance=-1.0), r"noise_variance is -1\.0"),
        (lambda: linear_regression(jnp.eye(2), inputs="unifrom"), "Did you mean 'uniform'"),
        (lambda: with_tasks(isotropic(2), jnp.ones((0, 2))), "M at least 1"),
        (lambda: baseline("gradient_decent"), "Did you mean 'gradient_descent'"),
    ],
)
def test_bad_problems_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gradient_descent", {"steps": 5, "step_size": 50.0}, "expected at most 2 / lambda_max"),
        ("gradient_descent", {"steps": -1, "step_size": 0.1}, "steps is -1"),
        ("newton", {"steps": 5, "scale": 50.0}, "scale is 50"),
        ("ridge", {"penalty": 0.0}, "Use least_squares"),
        ("nearest_neighbours", {"neighbours": N + 1}, "1 <= neighbours <= 9"),
        ("discrete_bayes", {"tasks": jnp.ones((2, 3)), "noise_variance": 1.0}, r"expected \(tasks, 4\)"),
        ("discrete_bayes", {"tasks": jnp.ones((2, D)), "noise_variance": 0.0}, "noise_variance is 0"),
    ],
)
def test_bad_options_are_refused(prompt, name, options, message):
    with pytest.raises(ValueError, match=message):
        baseline(name, **options)(prompt)


def test_one_large_step_is_allowed_and_all_baselines_are_tested(prompt):
    check_stable("step", 100.0, jnp.eye(2), 1)
    assert np.isfinite(baseline("gradient_descent", steps=1, step_size=50.0)(prompt))
    assert len(BASELINES) == 8
