"""Every kind of attention in the table: its moments against autodiff of its own weights, masks, and unknown names."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention import attention_moments
from attnlab.models.attention import AttentionConfig
from attnlab.models.weightings import WEIGHTINGS, weighting
from compare import assert_close

LENGTH, WIDTH = 4, 3


@partial(jax.jit, static_argnums=0)
def by_autodiff(kind, tokens, natural, visible):
    """m(z), dm/dz and d²m/dz² of one query, and dA/dT."""
    average = lambda z: weighting(kind).weights(tokens @ z, visible) @ tokens  # noqa: E731
    of_scores = jax.jacfwd(lambda scores: weighting(kind).weights(scores, visible))
    derivatives = (average, jax.jacfwd(average), jax.jacfwd(jax.jacfwd(average)))
    return tuple(f(natural) for f in derivatives), of_scores(tokens @ natural)


@pytest.mark.parametrize("kind", WEIGHTINGS)
def test_moments_are_derivatives_of_the_weights(kind, key):
    config = AttentionConfig(key_dim=WIDTH, value_dim=2, weights=kind, merged=True, scale=1.0, causal=True)
    tokens, matrix = jax.random.normal(key, (1, LENGTH, WIDTH)), 0.7 * jax.random.normal(key, (WIDTH, WIDTH))
    moments = attention_moments(config, {"query_key": matrix, "value": jnp.ones((WIDTH, 2))}, tokens)
    third = moments.third()
    for i in range(LENGTH):
        expected, slopes = by_autodiff(kind, tokens[0], matrix.T @ tokens[0, i], jnp.arange(LENGTH) <= i)
        found = (moments.first[0, 0, i], moments.second[0, 0, i], third[0, 0, i])
        for mine, theirs in zip(found, expected, strict=True):
            assert_close(mine, theirs, 1e-12, 1 + np.linalg.norm(theirs))
        assert_close(slopes, slopes.T, 1e-14)  # the weights are the gradient of a potential


@pytest.mark.parametrize("kind", [name for name, row in WEIGHTINGS.items() if not row.normalised])
def test_a_query_that_sees_nothing_returns_nothing(kind):
    scores, nowhere = jnp.ones((2, LENGTH)), jnp.zeros((2, LENGTH), bool)
    found = weighting(kind).derivatives(scores, nowhere)
    assert not np.any(found.weights)
    assert all(not np.any(x) for x in (found.slopes, found.bends) if x is not None)
    assert found.rest is None or np.all(found.rest == 1)


def test_far_scores_lose_no_digits():
    """Sigmoid's slope at 40 above its middle is e^-40, where 1 - sigma is 0."""
    found = weighting("sigmoid").derivatives(jnp.array([40 + np.log(2), -40 + np.log(2)]), None)
    assert_close(found.slopes, np.full(2, np.exp(-40.0) / (1 + np.exp(-40.0)) ** 2), 1e-13)
    assert_close(found.bends, np.array([-1, 1]) * np.exp(-40.0), 1e-13)


def test_unknown_kinds_are_named():
    with pytest.raises(ValueError, match=r"kind of attention weights 'sofmax'.*softmax"):
        AttentionConfig(key_dim=2, value_dim=2, weights="sofmax")
