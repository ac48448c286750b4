"""LayerNorm, activations and initialisation schemes against their definitions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive_models import ACTIVATIONS as NAIVE_ACTIVATIONS
from naive_models import layer_norm as naive_layer_norm

from attnlab.models.initializers import INITIALIZERS, initializer
from attnlab.models.layers import ACTIVATIONS, LayerNorm, activation_by_name, layer_norm
from compare import assert_close

ROWS, COLUMNS = 300, 200


def test_layer_norm_is_the_loop(key):
    tokens, affine = jax.random.normal(key, (4, 5)), jax.random.normal(key, (2, 5))
    params = {"scale": affine[0], "bias": affine[1]}
    expected = np.stack([naive_layer_norm(token, params, 0.1) for token in tokens])
    assert_close(LayerNorm(0.1).apply({"params": params}, tokens), expected, 1e-14)


def test_layer_norm_at_initialisation_has_mean_zero_and_variance_one(key):
    tokens = 3 + 5 * jax.random.normal(key, (4, 6))
    normalized, _ = LayerNorm(1e-12).init_with_output(key, tokens)
    assert_close(jnp.mean(normalized, axis=-1), jnp.zeros(4), 1e-14, scale=1)
    assert_close(jnp.var(normalized, axis=-1), jnp.ones(4), 1e-11)


def test_layer_norm_does_not_cancel(key):
    """Where the mean is 10^7 standard deviations, E[x^2] - E[x]^2 would lose every digit of the variance."""
    tokens = 1e7 + jnp.round(jax.random.normal(key, (64,)) * 2**16) / 2**16
    normalized = layer_norm(tokens, jnp.ones(64), jnp.zeros(64), 1e-6)
    exact = np.asarray(tokens, np.longdouble)
    exact = (exact - exact.mean()) / np.sqrt(exact.var() + np.longdouble(1e-6))
    assert_close(normalized, exact.astype(np.float64), 1e-8)


def test_layer_norm_is_invariant_to_shift_and_scale(key):
    tokens = jax.random.normal(key, (4, 6))
    arguments = (jnp.ones(6), jnp.zeros(6))
    assert_close(layer_norm(tokens + 2.5, *arguments, 1e-6), layer_norm(tokens, *arguments, 1e-6), 1e-13)
    assert_close(layer_norm(3 * tokens, *arguments, 9e-6), layer_norm(tokens, *arguments, 1e-6), 1e-13)


def test_layer_norm_of_a_constant_token_has_finite_second_derivatives():
    def squared_norm(x):
        return jnp.sum(layer_norm(x, jnp.ones(3), jnp.zeros(3), 1e-6) ** 2)

    hessian = jax.jit(jax.hessian(squared_norm))(jnp.ones(3))
    # At a constant token the output is P x / sqrt(eps) to first order, P the centring projection; squared norm twice.
    assert_close(hessian, 2 / 1e-6 * (jnp.eye(3) - 1 / 3), 1e-12)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_is_its_definition(name):
    x = jnp.linspace(-4, 4, 41)
    assert_close(activation_by_name(name)(x), np.vectorize(NAIVE_ACTIVATIONS[name])(np.asarray(x)), 1e-14)


def test_unknown_activation():
    with pytest.raises(ValueError, match=r"no activation 'rellu'.*Did you mean 'relu'"):
        activation_by_name("rellu")


# variance of one entry of a matrix of ROWS x COLUMNS (fan-in, fan-out), by the scheme's definition
VARIANCES = {
    "lecun_normal": 1 / ROWS,
    "xavier_normal": 2 / (ROWS + COLUMNS),
    "xavier_uniform": 2 / (ROWS + COLUMNS),
    "he_normal": 2 / ROWS,
    "normal": 1.0,
}


@pytest.mark.parametrize("name", VARIANCES)
def test_mean_and_variance_of_the_entries(each_key, name):
    """Over N entries the mean of x^2 has standard error at most std sqrt(2 / N), with equality for a Gaussian."""
    weights = np.asarray(initializer(name, 0.8)(each_key, (ROWS, COLUMNS), jnp.float64))
    variance, number = 0.64 * VARIANCES[name], weights.size
    assert abs(weights.mean()) < 5 * math.sqrt(variance / number)
    assert abs((weights**2).mean() - variance) < 5 * variance * math.sqrt(2 / number)


@pytest.mark.parametrize("name", ["lecun_normal", "xavier_normal", "he_normal", "normal"])
def test_normal_schemes_are_not_truncated(each_key, name):
    weights = np.asarray(initializer(name)(each_key, (ROWS, COLUMNS), jnp.float64))
    kurtosis = (weights**4).mean() / (weights**2).mean() ** 2
    # 3 for a Gaussian, with standard error sqrt(24 / N); 2.4 if it were truncated at two standard deviations
    assert abs(kurtosis - 3) < 5 * math.sqrt(24 / weights.size)


def test_uniform_scheme_is_bounded(key):
    weights = initializer("xavier_uniform", 0.8)(key, (ROWS, COLUMNS), jnp.float64)
    assert float(jnp.max(jnp.abs(weights))) <= 0.8 * math.sqrt(6 / (ROWS + COLUMNS))


def test_fan_in_of_a_convolution_counts_the_kernel(key):
    kernel = np.asarray(initializer("lecun_normal")(key, (3, 3, 20, 40), jnp.float64))
    variance = 1 / (3 * 3 * 20)
    assert abs((kernel**2).mean() - variance) < 5 * variance * math.sqrt(2 / kernel.size)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_orthogonal_scheme(key, shape):
    weights = initializer("orthogonal", 1.5)(key, shape, jnp.float64)
    gram = weights.T @ weights if shape[0] >= shape[1] else weights @ weights.T
    assert_close(gram, 2.25 * jnp.eye(min(shape)), 1e-13)


def test_deterministic_schemes(key):
    assert_close(initializer("identity", 2.0)(key, (3, 2), jnp.float64), jnp.array([[2.0, 0], [0, 2], [0, 0]]), 0)
    assert_close(initializer("zeros")(key, (3, 2), jnp.float64), jnp.zeros((3, 2)), 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", INITIALIZERS)
def test_scheme_keeps_dtype_and_is_a_function_of_the_key(name, dtype):
    init, key = initializer(name, 0.5), jax.random.key(1)
    weights = init(key, (4, 3), dtype)
    assert weights.dtype == dtype
    assert weights.shape == (4, 3)
    assert_close(init(key, (4, 3), dtype), weights, 0, scale=1)


BAD_SCHEMES = [
    (lambda: initializer("xavier"), "no initialisation scheme 'xavier'.*Did you mean"),
    (lambda: initializer("normal", -1.0), "gain is -1.0; expected zero or a positive finite number"),
    (lambda: initializer("normal", float("nan")), "gain is nan"),
    (lambda: initializer("identity")(jax.random.key(0), (3, 3, 1, 1), jnp.float64), "identity scheme makes matrices"),
]


@pytest.mark.parametrize(("call", "message"), BAD_SCHEMES)
def test_bad_scheme(call, message):
    with pytest.raises(ValueError, match=message):
        call()
