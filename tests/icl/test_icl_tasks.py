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


def descended(prompt, matrix, steps):
    """Autodiff descent on the least-squares loss of one prompt, its gradients multiplied by `matrix`."""
    weights = np.zeros(D)
    slope = jax.jit(jax.grad(lambda w: jnp.sum((prompt.inputs @ w - prompt.labels) ** 2) / (2 * N)))
    for _ in range(steps):
        weights = weights - matrix @ slope(weights)
    return prompt.query @ weights


def descended_on_transformed_data(prompt, step_sizes, contractions):
    """GD++ as it acts on a prompt: each step takes its fit off the labels, then contracts all inputs."""
    inputs, labels, query, found = *map(np.asarray, (prompt.inputs, prompt.labels, prompt.query)), 0.0
    for size, contraction in zip(step_sizes, contractions, strict=True):
        covariance, moment = inputs.T @ inputs / N, labels @ inputs / N
        found, labels = found + size * query @ moment, labels - size * inputs @ moment
        inputs, query = (x - contraction * x @ covariance for x in (inputs, query))
    return found


def inverted(prompt, steps, scale):
    """Newton's iteration for 1 / lambda of every eigenvalue by itself, from scale * lambda."""
    values, vectors = np.linalg.eigh(prompt.inputs.T @ prompt.inputs / N)
    inverses = scale * values
    for _ in range(steps):
        inverses = 2 * inverses - values * inverses**2
    return prompt.query @ vectors @ (inverses * (vectors.T @ (prompt.labels @ prompt.inputs / N)))


def penalised(prompt, penalty):
    """Least squares with a row sqrt(penalty) e_i and label 0 more for every coordinate."""
    inputs = np.concatenate([prompt.inputs, penalty**0.5 * np.eye(D)])
    return prompt.query @ np.linalg.lstsq(inputs, np.append(prompt.labels, np.zeros(D)))[0]


def mean_of_nearest(prompt, neighbours):
    order = np.argsort(np.linalg.norm(np.asarray(prompt.inputs - prompt.query[None]), axis=1))
    return np.mean(prompt.labels[order[:neighbours]])


def posterior_mean(prompt, tasks, noise_variance):
    """Bayes' rule written out."""
    squares = (np.asarray(prompt.labels) - np.asarray(tasks @ prompt.inputs.T)) ** 2
    likelihood = np.prod(np.exp(-squares / (2 * noise_variance)), axis=1)
    return np.dot(likelihood, tasks @ prompt.query) / np.sum(likelihood)


MATRIX, TASKS = jnp.diag(jnp.linspace(0.1, 0.3, D)).at[0, 1].set(0.1), jnp.sin(jnp.arange(3.0 * D)).reshape(3, D)
STEPS = {"step_sizes": jnp.array([0.3, 0.4, 0.2]), "contractions": jnp.array([0.1, 0.2, 0.15])}

# Options and an independent computation for every baseline.
ORACLES = {
    "gradient_descent": (
        {"steps": 4, "step_size": 0.2},
        lambda p, steps, step_size: descended(p, step_size * np.eye(D), steps),
    ),
    "preconditioned_gradient_descent": (
        {"steps": 4, "preconditioner": MATRIX},
        lambda p, steps, preconditioner: descended(p, preconditioner, steps),
    ),
    "gradient_descent_plus_plus": (STEPS, descended_on_transformed_data),
    "newton": ({"steps": 3, "scale": 0.05}, inverted),
    "ridge": ({"penalty": 0.7}, penalised),
    "least_squares": ({}, lambda p: penalised(p, 0.0)),
    "nearest_neighbours": ({"neighbours": 3}, mean_of_nearest),
    "discrete_bayes": ({"tasks": TASKS, "noise_variance": 0.5}, posterior_mean),
}


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_is_its_algorithm(prompt, name):
    options, oracle = ORACLES[name]
    expected = jnp.asarray(oracle(prompt, **options))
    assert_close(baseline(name, **options)(prompt), expected, 1e-12, scale=jnp.linalg.norm(prompt.labels))


def test_second_order_and_direct_solvers_agree(prompt):
    covariance, moment = empirical_moments(prompt)
    exact = prompt.query @ np.linalg.solve(covariance, moment)
    scale = 1 / jnp.linalg.eigvalsh(covariance)[-1] ** 2
    assert_close(baseline("least_squares")(prompt), exact, 1e-11)
    assert_close(baseline("newton", steps=25, scale=scale)(prompt), exact, 1e-8)
    assert_close(baseline("ridge", penalty=1e-9)(prompt), exact, 1e-6)


def test_least_squares_interpolates_short_contexts(key):
    short = jax.tree.map(lambda x: x[0], sample_prompts(key, isotropic(D), 2, 1))
    at_example = Prompt(short.inputs, short.labels, short.inputs[1], short.labels[1])
    assert_close(baseline("least_squares")(at_example), short.labels[1], 1e-11)


def test_discrete_bayes_has_the_least_risk_on_its_own_prompts(key):
    tasks = jax.random.normal(key, (3, D))
    prompts = sample_prompts(key, linear_regression(jnp.eye(D), tasks=tasks, noise_variance=0.5), 3, 500)
    bayes = baseline("discrete_bayes", tasks=tasks, noise_variance=0.5)

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
        (
            "gradient_descent",
            {"steps": 5, "step_size": 50.0},
            r"step_size is 50; expected at most 2 / lambda_max = \d\.\d",
        ),
        ("gradient_descent", {"steps": -1, "step_size": 0.1}, "steps is -1"),
        (
            "preconditioned_gradient_descent",
            {"steps": 5, "preconditioner": 50.0 * jnp.eye(D)},
            r"the step size \(1 with this preconditioner\) is 1; expected at most",
        ),
        (
            "gradient_descent_plus_plus",
            {"step_sizes": jnp.array([9.0, 8.0]), "contractions": jnp.zeros(2)},
            r"step_sizes and contractions are \[9\. 8\.\] and \[0\. 0\.\]; expected that no error grows",
        ),
        (
            "gradient_descent_plus_plus",
            {"step_sizes": jnp.array([0.1, 0.1]), "contractions": jnp.array([90.0, 0.0])},
            "Lower them, or take one step",
        ),
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


def test_one_large_step_is_allowed_and_tracing_skips_the_check(prompt):
    check_stable("step", 100.0, jnp.eye(2), 1)
    assert np.isfinite(baseline("gradient_descent", steps=1, step_size=50.0)(prompt))
    one = baseline("gradient_descent_plus_plus", step_sizes=jnp.array([50.0]), contractions=jnp.zeros(1))
    assert np.isfinite(one(prompt))
    two = baseline("gradient_descent_plus_plus", step_sizes=jnp.array([50.0, 50.0]), contractions=jnp.zeros(2))
    assert np.isfinite(jax.jit(two)(prompt))
