"""Cumulants against finite sums, and the saturation law against its exact case of two tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention.cumulants import (
    attend_query,
    cumulants,
    needle_logit,
    saturation,
    saturation_constant,
    softmax_jacobian_trace,
)
from attnlab.models.heads import additive_scores
from compare import assert_close


def test_cumulants_are_derivatives(key):
    query, keys, values = (jax.random.normal(key, shape) for shape in ((3,), (6, 3), (6, 2)))
    found = cumulants(query, keys, values, 1.3)
    assert_close(found.mean, attend_query(query, keys, values, 1.3))
    assert_close(1.3 * found.covariance, jax.jacfwd(attend_query)(query, keys, values, 1.3))


def test_two_tokens_saturate_by_an_integral():
    # c_2 = 2 int phi^2 = 1 / sqrt(pi)
    assert saturation_constant(2) == pytest.approx(1 / np.sqrt(np.pi), rel=1e-12)
    with pytest.raises(ValueError, match="tokens is 1"):
        saturation_constant(1)


def test_trace_is_between_saturated_and_uniform():
    assert_close(softmax_jacobian_trace(jnp.array([[1.0, 0, 0, 0], [0.25] * 4])), jnp.array([0.0, 0.75]), 1e-15)


def test_scaled_attention_does_not_saturate(key):
    wide, narrow = (jnp.mean(saturation(key, d, 4, 20_000, d**-0.5)) for d in (1024, 64))
    assert float(jnp.abs(wide - narrow)) < 0.02
    assert float(needle_logit(1)) == 0.5


def test_additive_scores_against_a_loop(key):
    queries, keys, weight = (jax.random.normal(key, shape) for shape in ((2, 3), (4, 3), (3,)))
    expected = [[jnp.tanh(q + k) @ weight for k in keys] for q in queries]
    assert_close(additive_scores(queries, keys, weight), jnp.array(expected))
