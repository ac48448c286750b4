"""Constructed weights equal their algorithm on every prompt."""

import jax
import jax.numpy as jnp
import pytest

from attnlab.icl.baselines import baseline, empirical_moments
from attnlab.icl.constructions import (
    centred_linear_predict,
    exponential_stack_predict,
    functional_gradient_descent,
    gradient_descent_residual,
    gradient_descent_stack,
    gradient_step_layer,
    gradient_step_predict,
    nadaraya_watson,
    nadaraya_watson_attention,
    newton_layers,
    newton_predict,
    newton_residual,
    plus_plus_residual,
    plus_plus_stack,
    softmax_pair_predict,
)
from attnlab.icl.models import stack_predict
from attnlab.icl.tasks import Prompt, isotropic, sample_prompts
from compare import assert_close

DIMENSION, LENGTH = 4, 9


@pytest.fixture
def prompt(key):
    batch = sample_prompts(key, isotropic(DIMENSION, noise_variance=0.2), LENGTH, 1)
    return jax.tree.map(lambda x: x[0], batch)


def test_gradient_step_with_many_outputs(key):
    keys = jax.random.split(key, 4)
    initial = jax.random.normal(keys[0], (3, DIMENSION))
    inputs = jax.random.normal(keys[1], (LENGTH, DIMENSION))
    labels = jax.random.normal(keys[2], (LENGTH, 3))
    query = jax.random.normal(keys[3], (DIMENSION,))
    predicted = gradient_step_predict(*gradient_step_layer(0.3, initial), inputs, labels, query)

    def risk(weights):
        return jnp.sum((inputs @ weights.T - labels) ** 2) / (2 * LENGTH)

    assert_close(predicted, (initial - 0.3 * jax.grad(risk)(initial)) @ query, 1e-13)


def test_stack_of_gradient_steps(prompt, key):
    noise = jax.random.normal(key, (3, DIMENSION, DIMENSION))
    matrices = 0.1 * jnp.eye(DIMENSION)[None] + 0.02 * noise
    weights = jnp.zeros(DIMENSION)

    def risk(weights):
        return jnp.sum((prompt.inputs @ weights - prompt.labels) ** 2) / (2 * LENGTH)

    for matrix in matrices:
        weights = weights - matrix @ jax.grad(risk)(weights)
    assert_close(stack_predict(gradient_descent_stack(matrices), prompt), prompt.query @ weights, 1e-12)


def test_plus_plus_stack_against_its_residual(key):
    keys = jax.random.split(key, 4)
    inputs = jax.random.normal(keys[0], (LENGTH, DIMENSION))
    task, query = jax.random.normal(keys[1], (2, DIMENSION))
    prompt = Prompt(inputs, inputs @ task, query, query @ task)
    a, b = 0.3 * jax.random.normal(keys[2], (2, 3, DIMENSION, DIMENSION))
    residual = plus_plus_residual(a, b, inputs.T @ inputs / LENGTH)
    assert_close(prompt.target - stack_predict(plus_plus_stack(a, b), prompt), query @ residual @ task, 1e-12)


def test_plus_plus_stack_against_the_baseline(prompt):
    sizes, contractions = jnp.array([0.4, 0.6, 0.9]), jnp.array([0.2, 0.1, 0.3])
    identity = jnp.eye(DIMENSION)[None]
    # One head has one matrix of scores: it contracts the inputs by B_k G_k A_k^T.
    stack = plus_plus_stack(sizes[:, None, None] * identity, (contractions / sizes)[:, None, None] * identity)
    algorithm = baseline("gradient_descent_plus_plus", step_sizes=sizes, contractions=contractions)
    assert_close(stack_predict(stack, prompt), algorithm(prompt), 1e-12)


def test_plus_plus_per_eigenvalue():
    """One eigenvalue: r <- r (1 - a lambda), lambda <- lambda (1 - b lambda)^2."""
    a, b = jnp.array([0.4, 0.6]), jnp.array([0.2, 0.1])
    eigenvalue = 1.7
    residual = plus_plus_residual(a[:, None, None], (b / a)[:, None, None], jnp.full((1, 1), eigenvalue))
    second = eigenvalue * (1 - 0.2 * eigenvalue) ** 2
    assert_close(residual[0, 0], jnp.asarray((1 - 0.4 * eigenvalue) * (1 - 0.6 * second)), 1e-14)


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_newton_layers(prompt, steps):
    covariance, _ = empirical_moments(prompt)
    scale = 1 / jnp.linalg.eigvalsh(covariance)[-1] ** 2
    expected = baseline("newton", steps=steps, scale=scale)(prompt)
    assert_close(newton_predict(newton_layers(DIMENSION, steps, scale), prompt), expected, 1e-12)


@pytest.mark.parametrize(
    ("name", "option", "residual"),
    [("newton", "scale", newton_residual), ("gradient_descent", "step_size", gradient_descent_residual)],
)
def test_residual_polynomials(prompt, name, option, residual):
    """On noise-free labels of an eigenvector task the error is that eigendirection's residual."""
    covariance, _ = empirical_moments(prompt)
    values, vectors = jnp.linalg.eigh(covariance)
    algorithm = baseline(name, steps=3, **{option: 0.05})
    errors = [1 - algorithm(Prompt(prompt.inputs, prompt.inputs @ v, v, jnp.ones(()))) for v in vectors.T]
    assert_close(jnp.stack(errors), residual(values, 3, 0.05), 1e-12)


def test_softmax_attention_on_the_sphere_is_nadaraya_watson(prompt):
    def unit(x):
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    on_sphere = Prompt(unit(prompt.inputs), prompt.labels, unit(prompt.query), prompt.target)
    assert_close(nadaraya_watson_attention(on_sphere, 0.7), nadaraya_watson(on_sphere, 0.7), 1e-12)
    assert abs(nadaraya_watson_attention(prompt, 0.7) - nadaraya_watson(prompt, 0.7)) > 1e-3


def test_exponential_attention_is_functional_gradient_descent(prompt):
    small = Prompt(0.5 * prompt.inputs, prompt.labels, 0.5 * prompt.query, prompt.target)
    steps = jnp.array([0.3, 0.2, 0.5])
    assert_close(exponential_stack_predict(small, steps), functional_gradient_descent(small, steps), 1e-12)


def test_two_softmax_heads_tend_to_centred_linear_attention(prompt):
    limit = centred_linear_predict(prompt)
    coarse, fine = (abs(softmax_pair_predict(prompt, s) - limit) for s in (2e-2, 1e-2))
    assert 3.9 < coarse / fine < 4.1  # O(scale^2)
    assert fine < 1e-2


def test_mismatched_stacks_are_refused():
    with pytest.raises(ValueError, match=r"expected one shape \(layers, d, d\)"):
        plus_plus_stack(jnp.zeros((2, 3, 3)), jnp.zeros((1, 3, 3)))
