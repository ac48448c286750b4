"""Attention computed otherwise against plain softmax attention, where it is exact, and against its own laws."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.approximation.approximate import (
    exact,
    low_rank,
    nystrom,
    positive_features,
    random_features,
    sliding_window,
    top_k,
    top_k_bound,
)
from attnlab.approximation.errors import approximation_errors, head_params, one_head
from attnlab.approximation.structure import decay_mask, graph_attention
from attnlab.approximation.tiled import tiled_attention
from attnlab.losses import square_loss
from attnlab.models.attention import AttentionConfig, SelfAttention
from attnlab.objectives import objective
from compare import assert_close
from oracles import hessian as naive_hessian

LENGTH, DIM = 8, 4


@pytest.fixture
def inputs(key):
    return tuple(jax.random.normal(k, (LENGTH, DIM)) for k in jax.random.split(key, 3))


def test_one_exact_head_is_the_layer(key):
    config = AttentionConfig(key_dim=3, value_dim=2)
    tokens, params = jax.random.normal(key, (2, LENGTH, DIM)), head_params(key, DIM, 3, 2)
    expected = SelfAttention(config).apply({"params": params}, tokens)
    assert_close(one_head(exact(config.score_scale))(params, tokens), expected)


@pytest.mark.parametrize("tile", [1, 4, 8])
def test_tiles_of_every_size_agree_and_survive_large_scores(tile, inputs):
    assert_close(jax.jit(tiled_attention, static_argnums=4)(*inputs, 300.0, tile), exact(300.0)(*inputs))


def test_a_tile_must_divide(inputs):
    with pytest.raises(ValueError, match="tile is 3, which does not divide the 8 queries"):
        tiled_attention(*inputs, tile=3)


@pytest.mark.parametrize(
    "whole", [top_k(LENGTH), sliding_window(LENGTH), nystrom(LENGTH)], ids=["top-k", "window", "nystrom"]
)
def test_with_the_whole_budget_they_are_exact(whole, inputs):
    assert_close(whole(*inputs), exact()(*inputs), 1e-8)


def test_random_features_converge_and_are_unbiased(inputs):
    queries, keys, values = (0.5 * x for x in inputs)
    wanted = exact()(queries, keys, values)

    @partial(jax.jit, static_argnums=1)
    @partial(jax.vmap, in_axes=(0, None))
    def decades(key, count):
        return jnp.log10(jnp.linalg.norm(random_features(key, DIM, count)(queries, keys, values) - wanted))

    # a hundred times the features: one decade less, and half a decade by more than 4 standard errors of 32 draws
    draws = jax.random.split(jax.random.key(7), 32)
    fall = decades(draws, 100) - decades(draws, 10_000)
    assert jnp.mean(fall) - 4 * jnp.std(fall, ddof=1) / 32**0.5 > 0.5
    directions = jax.random.normal(jax.random.key(8), (400_000, DIM))
    left, right = positive_features(queries[:1], directions), positive_features(keys[:1], directions)
    products = left[0] * right[0] * 400_000
    kernel = jnp.exp(queries[0] @ keys[0])
    assert abs(float(jnp.mean(products) - kernel)) < 4 * float(jnp.std(products)) / 400_000**0.5


def test_budgets_are_checked(inputs):
    with pytest.raises(ValueError, match="landmarks is 3, which does not divide the 8 tokens"):
        nystrom(3)(*inputs)
    with pytest.raises(ValueError, match="rank is 9"):
        low_rank(jax.random.key(1), LENGTH, 9)
    with pytest.raises(ValueError, match="count is 0"):
        top_k(0)


def test_low_rank_with_equal_values_returns_them(inputs):
    ones = jnp.ones((LENGTH, DIM))
    assert_close(low_rank(jax.random.key(1), LENGTH, 3)(*inputs[:2], ones), ones)


def test_top_k_keeps_the_highest_and_its_bound_is_attained(inputs):
    queries, keys, values = inputs
    best = jnp.argmax(queries @ keys.T, axis=-1)
    assert_close(top_k(1)(queries, keys, values), values[best])
    # two tokens with opposite values: the error is all of the bound
    weights, opposite = jnp.array([[0.75, 0.25]]), jnp.array([[1.0], [-1.0]])
    assert_close(top_k_bound(weights, opposite, 1), jnp.abs(opposite[0] - (weights @ opposite)[0]))


def test_errors_are_those_of_dense_matrices(key):
    tokens, targets = jax.random.normal(key, (2, 4, 3)), jax.random.normal(key, (2, 4, 2))
    params = head_params(key, 3, 2, 2)
    errors = approximation_errors(top_k(2), exact(), params, tokens, targets)
    found, wanted = (
        naive_hessian(objective(one_head(f), square_loss, tokens, targets), params) for f in (top_k(2), exact())
    )
    assert_close(errors.curvature, jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted))
    scores = slice(0, 12)  # key and query, 3 x 2 each, stand before value
    part, whole = found[scores, scores], wanted[scores, scores]
    assert_close(errors.score_curvature, jnp.linalg.norm(part - whole) / jnp.linalg.norm(whole))
    assert max(approximation_errors(exact(), exact(), params, tokens, targets)) == 0


def test_decays_multiply_and_a_lonely_node_is_not_a_number(inputs):
    decays = jnp.array([0.5, 0.25, 0.5])
    assert_close(decay_mask(decays), jnp.array([[1.0, 0, 0], [0.25, 1, 0], [0.125, 0.5, 1]]), 1e-14)
    edges = jnp.array([0, 1]), jnp.array([0, 0])
    outputs = graph_attention(*inputs, *edges)
    assert np.isfinite(outputs[0]).all()
    assert np.isnan(outputs[1:]).all()
