"""Moments against derivatives of the head's average in its natural parameter, and their special cases."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import layer_config, problem

from attnlab.attention import attention_moments
from attnlab.models.attention import SelfAttention, attention_maps
from compare import assert_close


@partial(jax.jit, static_argnums=3)
def derivatives(tokens, natural, visible, kind):
    """m(z), dm/dz and d²m/dz² of one query by autodiff."""

    def average(z):
        scores = tokens @ z
        powers = jnp.where(visible, jnp.exp(scores), 0)
        weights = {
            "softmax": powers / jnp.sum(powers),
            "softmax_sink": powers / (1 + jnp.sum(powers)),
            "linear": jnp.where(visible, scores, 0),
            "sigmoid": powers / (powers + len(tokens)),
        }[kind]
        return weights @ tokens

    return average(natural), jax.jacfwd(average)(natural), jax.jacfwd(jax.jacfwd(average))(natural)


@pytest.mark.parametrize("name", ["mask_per_sequence", "heads", "linear_causal", "sink_causal", "sigmoid_mask"])
def test_are_derivatives_in_the_natural_parameter(name, key):
    config, _, params, inputs, _, mask = problem(name, key)
    moments = attention_moments(config, params, inputs, mask)
    third = moments.third()
    visible = np.ones((*inputs.shape[:1], 1, inputs.shape[1], inputs.shape[1])) if mask is None else np.asarray(mask)
    visible = visible * (np.tril(np.ones(visible.shape)) if config.causal else 1)
    for head in range(config.heads):
        query, key_weights = (np.split(np.asarray(params[n]), config.heads, axis=1)[head] for n in ("query", "key"))
        for b, i in ((0, 0), (1, 3)):
            natural = config.score_scale * key_weights @ query.T @ inputs[b, i]
            expected = derivatives(inputs[b], natural, jnp.asarray(visible[b, 0, i] > 0), config.weights)
            found = (moments.first[b, head, i], moments.second[b, head, i], third[b, head, i])
            for mine, theirs in zip(found, expected, strict=True):
                assert_close(mine, theirs, 1e-12, 1 + np.linalg.norm(theirs))


def test_weights_are_those_of_the_layer(key):
    config, _, params, inputs, _, mask = problem("merged_heads", key)
    weights = attention_moments(config, params, inputs, mask).weights
    expected = attention_maps(SelfAttention(config), params, inputs, mask)[""]
    assert_close(weights, expected, 1e-14)


def test_third_along_a_direction(key):
    config, _, params, inputs, _, mask = problem("heads", key)
    moments = attention_moments(config, params, inputs, mask)
    direction = jax.random.normal(key, moments.first.shape)
    expected = jnp.einsum("bhiacd,bhid->bhiac", moments.third(), direction)
    assert_close(moments.third_along(direction), expected, 1e-13)


def test_one_hot_attention_has_no_higher_moments(key):
    """A score gap of thousands: softmax is exactly one-hot, and the covariance exactly zero."""
    config = layer_config(scale=1e6)
    inputs = jax.random.normal(key, (6, 4))
    params = SelfAttention(config).init(key, inputs)["params"]
    moments = attention_moments(config, params, inputs)
    assert jnp.all(jnp.max(moments.weights, axis=-1) == 1)
    assert jnp.max(jnp.abs(moments.second)) < 1e-28
    assert jnp.max(jnp.abs(moments.third())) < 1e-28


def test_uniform_attention_has_the_moments_of_the_data(key):
    config = layer_config()
    inputs = jax.random.normal(key, (50, 4))
    params = jax.tree.map(jnp.zeros_like, SelfAttention(config).init(key, inputs)["params"])
    moments = attention_moments(config, params, inputs)
    assert_close(moments.second[0, 0, 7], np.cov(inputs.T, bias=True), 1e-12)
    assert_close(moments.first[0, 0, 7], np.mean(inputs, axis=0), 1e-12)
