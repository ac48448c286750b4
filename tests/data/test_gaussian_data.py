"""Gaussian tokens and a teacher: moments within error bars, and a risk that is known at the teacher."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.data.gaussian import gaussian_tokens, taught
from attnlab.losses import square_loss
from attnlab.models.adapters import from_linen
from attnlab.models.attention import AttentionConfig, SelfAttention
from attnlab.objectives import objective
from compare import assert_close

COUNT, LENGTH, DIM = 400, 5, 3
TEACHER = from_linen(SelfAttention(AttentionConfig(key_dim=2, value_dim=2, causal=True)))


def teacher_params(key):
    shapes = {"query": (DIM, 2), "key": (DIM, 2), "value": (DIM, 2)}
    keys = dict(zip(shapes, jax.random.split(key, 3), strict=True))
    return {name: jax.random.normal(keys[name], shape) for name, shape in shapes.items()}


def test_moments_of_the_tokens(key):
    tokens = np.asarray(gaussian_tokens(key, COUNT, LENGTH, DIM, std=0.7))
    assert tokens.shape == (COUNT, LENGTH, DIM)
    rows, variance = tokens.reshape(COUNT, -1), 0.49
    covariance = rows.T @ rows / COUNT
    diagonal = np.diag(covariance)
    assert np.all(abs(rows.mean(axis=0)) < 5 * math.sqrt(variance / COUNT))
    assert np.all(abs(diagonal - variance) < 5 * variance * math.sqrt(2 / COUNT))
    assert np.all(abs(covariance - np.diag(diagonal)) < 5 * variance / math.sqrt(COUNT))


def test_without_noise_the_teacher_has_no_risk(key):
    params, tokens = teacher_params(key), gaussian_tokens(key, 6, LENGTH, DIM)
    data = taught(key, TEACHER, params, tokens)
    assert_close(data.inputs, tokens, 0)
    assert float(objective(TEACHER, square_loss, *data)(params)) == 0


def test_risk_of_the_teacher_is_the_noise(each_key):
    """The mean of N squared noises has standard error noise^2 sqrt(2 / N)."""
    tokens_key, noise_key, params_key = jax.random.split(each_key, 3)
    params, tokens = teacher_params(params_key), gaussian_tokens(tokens_key, COUNT, LENGTH, DIM)
    data = taught(noise_key, TEACHER, params, tokens, noise=0.3)
    risk = float(objective(TEACHER, square_loss, *data)(params))
    assert abs(risk - 0.09) < 5 * 0.09 * math.sqrt(2 / (COUNT * LENGTH * 2))


def test_a_plain_function_teaches_too(key):
    tokens = gaussian_tokens(key, 4, LENGTH, DIM)
    data = taught(key, lambda params, inputs: params * inputs, jnp.asarray(2.0), tokens)
    assert_close(data.targets, 2 * tokens, 0)


def test_data_are_a_function_of_the_key():
    first, again, other = (gaussian_tokens(jax.random.key(seed), 4, LENGTH, DIM) for seed in (1, 1, 2))
    assert_close(first, again, 0)
    assert not np.array_equal(first, other)


BAD_CALLS = [
    (lambda key: gaussian_tokens(key, 0, 2, 2), "count is 0"),
    (lambda key: gaussian_tokens(key, 2, 0, 2), "length is 0"),
    (lambda key: gaussian_tokens(key, 2, 2, 0), "dim is 0"),
    (lambda key: gaussian_tokens(key, 2, 2, 2, std=-1.0), "std is -1.0; expected zero or a positive finite number"),
    (lambda key: taught(key, TEACHER, teacher_params(key), jnp.ones((2, 3, DIM)), noise=-0.1), "noise is -0.1"),
]


@pytest.mark.parametrize(("call", "message"), BAD_CALLS)
def test_bad_call(call, message):
    with pytest.raises(ValueError, match=message):
        call(jax.random.key(0))
