"""A network of features before attention: one step of descent, its best size, and the least risk of any such step."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from attnlab.icl.baselines import baseline
from attnlab.icl.composition import with_features
from attnlab.icl.diagnostics import risk
from attnlab.icl.learned_features import (
    best_kernel_risk,
    best_sine_risk,
    best_step_size,
    feature_attention_predict,
    feature_descent_predict,
    init_feature_attention,
    layer_kernel,
    learned_features,
    own_preconditioner,
)
from attnlab.icl.tasks import sine_features, sine_prompts
from attnlab.models.networks import MLPConfig
from compare import assert_close

CONFIG = MLPConfig((5, 3), activation="tanh", bias=True)
LENGTH = 6


@jax.jit
def random_model(key):
    params = init_feature_attention(key, CONFIG, 1, scale=0.5, spread=5.0)
    return {**params, "initial": jax.random.normal(key, (1, 3))}  # a start that is not zero


@pytest.fixture
def model(key):
    return random_model(key)


@jax.jit
def one_prompt(key):
    return jax.tree.map(lambda x: x[0], sine_prompts(key, LENGTH, 1))


def descent_in_sines(size):
    """One plain step on (sin x, cos x)."""
    return with_features(sine_features, baseline("gradient_descent", steps=1, step_size=size))


@jax.jit
def label_slopes(params, prompt):
    return jax.grad(lambda y: feature_attention_predict(params, replace(prompt, labels=y), config=CONFIG))(
        prompt.labels
    )


def test_a_layer_weighs_labels_with_its_kernel(model, key):
    """Of a layer that reads nothing but labels the prediction is linear in them, with the kernel as its slope."""
    prompt = replace(one_prompt(key), labels=jnp.zeros(LENGTH))
    layer = {**model["layer"], "value": model["layer"]["value"].at[:-1].set(0.0)}
    params = {**model, "initial": jnp.zeros((1, 3)), "layer": layer}
    features, query = (learned_features(model, x, config=CONFIG) for x in (prompt.inputs, prompt.query))
    expected = features @ layer_kernel(params).T @ query / LENGTH
    assert_close(label_slopes(params, prompt), expected, 1e-11)


def test_descent_is_the_gradient_step_by_autodiff(model, key):
    prompt = one_prompt(key)
    preconditioner = jax.random.normal(key, (3, 3))

    def loss(weights):
        features = learned_features(model, prompt.inputs, config=CONFIG)
        return jnp.mean((features @ weights - prompt.labels) ** 2) / 2

    start = model["initial"][0]
    stepped = start - preconditioner @ jax.jit(jax.grad(loss))(start)
    found = feature_descent_predict(model, prompt, preconditioner=preconditioner, config=CONFIG)
    assert_close(found, learned_features(model, prompt.query, config=CONFIG) @ stepped, 1e-12)


def test_own_preconditioner_finds_a_step_and_measures_what_is_none(model, key):
    """A layer whose kernel is a step's is found whole; a skew part is left out; coordinates do not matter."""
    inputs = jnp.linspace(-5.0, 5.0, 50)[:, None]
    factor, skew = jax.random.normal(key, (2, 3, 3))

    def with_kernel(matrix):
        zero = jnp.zeros((4, 4))
        layer = {"query": zero.at[:3, :3].set(matrix), "key": jnp.eye(4), "value": -jnp.eye(4), "output": jnp.eye(4)}
        return {**model, "layer": layer}

    step = factor @ factor.T
    assert_close(layer_kernel(with_kernel(step)), step, 1e-12)
    found, distance = own_preconditioner(with_kernel(step), inputs, config=CONFIG)
    assert_close(found, step, 1e-8)
    assert distance < 1e-8
    skew = skew - skew.T
    found, distance = own_preconditioner(with_kernel(step + 0.1 * skew), inputs, config=CONFIG)
    assert_close(found, step, 1e-8)
    features = learned_features(model, inputs, config=CONFIG)
    kernels = [jnp.linalg.norm(features @ matrix @ features.T) for matrix in (0.1 * skew, step + 0.1 * skew)]
    assert_close(distance, kernels[0] / kernels[1], 1e-8)
    found, distance = own_preconditioner(with_kernel(-step), inputs, config=CONFIG)
    assert jnp.linalg.norm(found) < 1e-8 * jnp.linalg.norm(step)
    assert_close(distance, 1.0, 1e-8)


def test_best_step_size_is_the_minimum(key):
    prompts = jax.jit(sine_prompts, static_argnums=(1, 2))(key, LENGTH, 64)
    slope = jax.jit(jax.value_and_grad(lambda size: risk(descent_in_sines(size), prompts).value))
    least, gradient = slope(jax.jit(partial(best_step_size, descent_in_sines))(prompts))
    assert abs(gradient) < 1e-10 * least
    assert least < slope(0.0)[0]


def kernel_risk(kernel, features, covariance, length):
    """The exact risk of (1/N) sum_i y_i k(x_i, x_q) for inputs uniform on the rows of `features`."""
    n = len(features)
    labels = features @ covariance @ features.T  # E y(x) y(x')
    square = jnp.trace(kernel.T @ labels @ kernel) / n**2
    diagonal = jnp.sum(jnp.diag(labels)[:, None] * kernel**2) / n
    return (jnp.trace(labels) - 2 * jnp.sum(labels * kernel) / n + diagonal / length + (1 - 1 / length) * square) / n


@pytest.mark.parametrize("length", [1, 4])
def test_best_kernel_risk_is_the_minimum_over_all_kernels(key, length):
    """Against Newton's step on the n^2 values of the kernel, by autodiff."""
    features, factor = jax.random.normal(key, (6, 2)), jax.random.normal(jax.random.fold_in(key, 1), (2, 2))
    covariance = factor @ factor.T

    @jax.jit
    def least():
        def loss(kernel):
            return kernel_risk(kernel.reshape(6, 6), features, covariance, length)

        zero = jnp.zeros(36)
        return loss(-jnp.linalg.solve(jax.hessian(loss)(zero), jax.grad(loss)(zero)))

    assert_close(best_kernel_risk(features, jnp.full(6, 1 / 6), covariance, length), least(), 1e-10)


@jax.jit
def sampled_risks(key):
    """Of a step from the mean task with the optimal kernel, and of the best plain step on (sin x, cos x)."""
    length, mean, square = 10, jnp.array([0.0, 0.6 / jnp.pi]), (0.5**3 - 0.1**3) / 2.4
    prompts = sine_prompts(key, length, 20_000, (0.1, 0.5))
    covariance = jnp.diag(square - mean**2)
    grid = sine_features(jnp.linspace(-5, 5, 2001)[:, None])
    signal = jnp.einsum("np,pq,nq->n", grid, covariance, grid)
    ratios = jnp.einsum("n,np,nq->pq", 1 / signal, grid, grid) / len(grid) @ covariance
    inner = jnp.linalg.solve(jnp.eye(2) + (length - 1) * ratios, length * ratios)

    def step(prompt):
        context, query = sine_features(prompt.inputs), sine_features(prompt.query)
        weights = covariance @ (length * query - (length - 1) * inner @ query)
        kernel = context @ weights / jnp.einsum("np,pq,nq->n", context, covariance, context)
        return query @ mean + (prompt.labels - context @ mean) @ kernel / length

    return risk(step, prompts), risk(descent_in_sines(best_step_size(descent_in_sines, prompts)), prompts)


def test_best_sine_risk_is_reached_and_not_undercut(key):
    floor = best_sine_risk(10, (0.1, 0.5))
    best, plain = sampled_risks(key)
    assert abs(best.value - floor) < 4 * best.standard_error
    assert plain.value - floor > 4 * plain.standard_error


def test_bad_input_is_refused(key):
    with pytest.raises(ValueError, match=r"config\.bias is False"):
        init_feature_attention(key, MLPConfig((3, 2)), 1, scale=0.3, spread=1.0)
    with pytest.raises(ValueError, match="variance of the tasks is 0"):
        best_kernel_risk(jnp.eye(2), jnp.full(2, 0.5), jnp.diag(jnp.array([1.0, 0.0])), 3)
    with pytest.raises(ValueError, match="length is 0"):
        best_sine_risk(0, (0.1, 0.5))
