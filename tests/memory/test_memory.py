"""Memories against loops and closed cases; state evolution, thresholds and counted ranks at their edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.data.markov import entropy_rate, markov_sequences, random_transitions, stationary
from attnlab.data.sparse import Code, code_word, sparse_tokens
from attnlab.memory.associative import first_step, recall_errors, recall_objective, storage_error, zipf
from attnlab.memory.capacity import (
    jacobian_rank,
    memorization_error,
    published_capacity,
    rank_with_random_contexts,
    rank_with_shared_context,
    readout_rank,
    scalar_head_params,
    scalar_heads,
)
from attnlab.memory.hopfield import denoising_slope, hopfield_energy, hopfield_update
from attnlab.memory.recovery import (
    attention_threshold,
    decode,
    detection_threshold,
    pooling_threshold,
    read,
    state_evolution,
)
from attnlab.memory.scaling import fit_power_law
from compare import assert_close


def test_scalar_heads_against_a_loop(key):
    params = scalar_head_params(key, 2, 4, 3)
    queries, contexts = jax.random.normal(key, (3, 4)), jax.random.normal(key, (3, 5, 4))
    expected = np.zeros(3)
    for m in range(3):
        for query, second, value in zip(*(np.asarray(params[n]) for n in ("query", "key", "value")), strict=True):
            masses = np.exp(np.asarray(contexts[m]) @ second @ query.T @ np.asarray(queries[m]))
            expected[m] += masses @ np.asarray(contexts[m]) @ value / masses.sum()
    assert_close(scalar_heads(params, (queries, contexts)), jnp.asarray(expected))


def test_rank_is_limited_by_the_outputs_and_by_the_gauge(key):
    params = scalar_head_params(key, 1, 3, 1)
    inputs = jax.random.normal(key, (40, 3)), jax.random.normal(key, (40, 4, 3))
    assert jacobian_rank(scalar_heads, params, jax.tree.map(lambda x: x[:4], inputs)) == 4
    assert jacobian_rank(scalar_heads, params, inputs) == rank_with_random_contexts(1, 3, 1) == 9 - 1
    assert published_capacity(2, 5, 3) == 5
    with pytest.raises(ValueError, match="heads is 0"):
        scalar_head_params(key, 0, 3, 1)


# heads, width, head dimension, tokens: fewer and more tokens than the width, and than the head dimension
SHAPES = [
    (1, 3, 2, 6),
    (1, 3, 3, 4),
    (2, 3, 1, 4),
    (3, 2, 1, 7),
    (1, 1, 1, 2),
    (2, 4, 2, 4),
    (1, 4, 6, 3),
    (2, 3, 2, 1),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rank_in_a_shared_context_of_any_length(shape):
    *sizes, tokens = shape
    params = scalar_head_params(jax.random.key(1), *sizes)
    context = jnp.broadcast_to(jax.random.normal(jax.random.key(2), (tokens, sizes[1])), (60, tokens, sizes[1]))
    inputs = jax.random.normal(jax.random.key(3), (60, sizes[1])), context
    assert jacobian_rank(scalar_heads, params, inputs) == rank_with_shared_context(*shape)


def test_long_contexts_hide_nothing_that_random_ones_show():
    assert rank_with_shared_context(2, 4, 3, 5) == rank_with_random_contexts(2, 4, 3)


def test_one_label_is_fitted():
    assert memorization_error(jax.random.key(1), (1, 2, 1), 1) < 1e-12


def test_first_step_descends_and_recalls(key):
    keys, outputs = jnp.eye(6), jnp.eye(6)
    labels = jax.random.permutation(key, 6)
    memory = first_step(keys, outputs, labels)
    np.testing.assert_array_equal(jnp.argmax(keys @ memory.T @ outputs.T, axis=1), labels)
    risk = recall_objective(keys, outputs, labels)
    assert float(risk({"W": memory})) < float(risk({"W": jnp.zeros((6, 6))}))


def test_orthogonal_keys_are_recalled_without_error():
    errors = recall_errors(jnp.eye(5), jax.random.normal(jax.random.key(1), (5, 3)), 100.0)
    assert_close(jnp.stack(list(errors.values())), jnp.zeros(3), 1e-12, scale=1.0)


def test_zipf_sums_to_one_and_what_is_not_stored_is_lost(key):
    probabilities = zipf(40, 1.5)
    assert probabilities.sum() == pytest.approx(1)
    assert probabilities[3] / probabilities[0] == pytest.approx(4**-1.5)
    # in many dimensions all that is stored is recalled, and of the rest one class in forty by chance
    error = float(storage_error(key, probabilities, 40, 4096, 10))
    assert 0.5 * probabilities[10:].sum() < error <= probabilities[10:].sum() + 1e-12


def test_a_hopfield_state_falls_into_its_pattern():
    patterns = jnp.eye(4)
    state = hopfield_update(patterns, patterns[:1] + 0.2, 60.0)
    assert_close(state, patterns[:1], 1e-8)


def test_a_quiet_code_is_decoded_and_a_noisy_one_is_not(key):
    good, bad = Code(64, 8, rows=400, power=15.0), Code(64, 8, rows=60, power=1.0)
    assert float(decode(key, good, 8)[-1]) < 1e-3 * good.power
    assert float(state_evolution(key, good, 8)[-1]) < 1e-3 * good.power
    assert float(state_evolution(key, bad, 8)[-1]) > 0.5 * bad.power
    assert good.amplitude**2 * 64 == pytest.approx(400 * 15.0)


def test_thresholds_grow_as_they_should():
    lengths = np.array([10, 1000])
    assert np.diff(np.log(pooling_threshold(lengths, 0.1))) / np.log(100) == pytest.approx(0.5)
    one, many = attention_threshold(np.array([1, 10**8]), 0.1)
    assert one == pytest.approx(pooling_threshold(1, 0.1))
    assert many == pytest.approx(np.sqrt(2 * np.log(1e8)), rel=0.25)


def test_attention_reads_the_mean_or_the_highest_token(key):
    tokens = jax.random.normal(key, (5, 7, 2))
    assert_close(read(tokens, 0.0), tokens[..., 0].mean(axis=1))
    assert_close(read(tokens, 1e6), tokens[..., 0].max(axis=1))


def test_measured_detection_threshold_is_that_of_two_normal_variables(key):
    strength, error = detection_threshold(key, 1, 0.1, 0.0, 4000, parts=2)
    assert abs(strength - pooling_threshold(1, 0.1)) < 4 * error
    assert error < 0.1


def test_one_token_has_the_signal_where_the_label_says_so(key):
    quiet, labels = map(np.asarray, sparse_tokens(key, 6, 5, 3, 0.0))
    loud, _ = sparse_tokens(key, 6, 5, 3, 2.0)
    np.testing.assert_array_equal(labels, [0, 0, 0, 1, 1, 1])
    change = np.asarray(loud) - quiet
    np.testing.assert_allclose(change.sum(axis=(1, 2)), 2.0 * labels, atol=1e-12)
    np.testing.assert_allclose(change.max(axis=(1, 2)), 2.0 * labels, atol=1e-12)
    assert np.all(change[..., 1:] == 0)
    with pytest.raises(ValueError, match="count is 5; expected an even number"):
        sparse_tokens(key, 5, 5, 3, 1.0)


def test_code_words_have_one_entry_a_section(key):
    code = Code(8, 4, rows=2000, power=3.0)
    matrix, signal, received = code_word(key, code)
    sections = np.asarray(signal).reshape(8, 4)
    np.testing.assert_array_equal((sections != 0).sum(axis=1), np.ones(8))
    assert_close(jnp.sum(signal**2) / code.rows, jnp.array(code.power))
    assert abs(float(jnp.mean((received - matrix @ signal) ** 2)) - 1) < 4 * (2 / 2000) ** 0.5


def test_power_laws_are_fitted_with_their_error():
    x, random = np.array([1.0, 2, 4, 8]), np.random.default_rng(1)
    exact = fit_power_law(x, 3 * x**-0.7, 0.01 * x**-0.7)
    assert exact.exponent == pytest.approx(-0.7)
    assert exact.factor == pytest.approx(3)
    certain = fit_power_law([16.0, 32.0], [0.46, 0.34], [0.0, 0.02])  # one point without error
    assert certain.exponent == pytest.approx(np.log(0.34 / 0.46) / np.log(2))
    draws = [fit_power_law(x, np.exp(-np.log(x) + 0.02 * random.standard_normal(4)), 0.02 / x) for _ in range(400)]
    assert np.std([draw.exponent for draw in draws]) == pytest.approx(draws[0].error, rel=0.15)
    # Of 400 intervals at 80 %, 320 +- 8 cover the exponent.
    covered = sum(low <= -1 <= high for low, high in (draw.interval(0.8) for draw in draws))
    assert abs(covered - 320) < 4 * 8
    with pytest.raises(ValueError, match="at least two positive points"):
        fit_power_law([1.0, 2.0], [1.0, 0.0], [0.1, 0.1])


def test_markov_chains_have_their_statistics(key):
    transitions = random_transitions(key, 3)
    law = stationary(transitions)
    assert_close(law @ transitions, law, 1e-12)
    assert_close(entropy_rate(jnp.full((4, 4), 0.25)), jnp.log(jnp.array(4.0)), 1e-12)
    assert float(entropy_rate(jnp.roll(jnp.eye(4), 1, axis=1))) == 0
    states, following = markov_sequences(key, transitions, 5000, 4)
    np.testing.assert_array_equal(states[:, 1:], following[:, :-1])
    pairs = np.zeros((3, 3))
    np.add.at(pairs, (np.asarray(states), np.asarray(following)), 1 / states.size)
    assert np.abs(pairs - np.asarray(law[:, None] * transitions)).max() < 5 * 0.5 / 5000**0.5


KEY, SOME = jax.random.key(0), jnp.ones((3, 2))
CODE = Code(4, 8, 16, 2.0)
MISTAKES = {
    "labels beyond the outputs": (lambda: first_step(SOME, SOME, jnp.array([0, 1, 3])), "labels is 3; expected 0"),
    "labels below zero": (lambda: first_step(SOME, SOME, jnp.array([0, -1, 1])), "labels is -1; expected 0"),
    "values of another number": (lambda: recall_errors(SOME, SOME[:2], 1.0), "values has shape .* first axis of 3"),
    "beta that is no number": (lambda: recall_errors(SOME, SOME, jnp.nan), "beta is nan"),
    "more stored than there are": (lambda: storage_error(KEY, np.full(4, 0.25), 2, 3, 5), "stored is 5; expected 1"),
    "less than none stored": (lambda: storage_error(KEY, np.full(4, 0.25), 2, 3, -1), "stored is -1"),
    "probabilities of two": (lambda: storage_error(KEY, np.full(4, 0.5), 2, 3, 1), "sum of probabilities is 2.0"),
    "an exponent that is no number": (lambda: zipf(3, np.nan), "exponent is nan"),
    "infinite temperature": (lambda: hopfield_energy(SOME, SOME, 0.0), "beta is 0.0"),
    "negative temperature": (lambda: hopfield_update(SOME, SOME, -1.0), "beta is -1.0"),
    "no draws": (lambda: denoising_slope(KEY, SOME, 1.0, 1.0, 0), "draws is 0"),
    "noise below zero": (lambda: denoising_slope(KEY, SOME, -1.0, 1.0, 5), "noise is -1.0"),
    "parameters that are no numbers": (lambda: jacobian_rank(jnp.dot, jnp.full(2, jnp.nan), SOME.T), "params has 2"),
    "a tolerance below zero": (lambda: jacobian_rank(jnp.dot, jnp.ones(2), SOME.T, -1.0), "tolerance is -1.0"),
    "heads wider than the model": (lambda: rank_with_random_contexts(1, 2, 3), "head_dim is 3; expected 1"),
    "no heads": (lambda: readout_rank(0, 3), "heads is 0"),
    "no examples": (lambda: memorization_error(KEY, (1, 2, 1), 0), "count is 0"),
    "no iterations": (lambda: decode(KEY, CODE, 0), "iterations is 0"),
    "no power": (lambda: state_evolution(KEY, CODE._replace(power=0.0), 3), "power is 0.0"),
    "no chance of an error": (lambda: pooling_threshold(8, 0.0), "error is 0.0"),
    "more errors than by guessing": (lambda: attention_threshold(8, 0.7), "error is 0.7"),
    "no parts": (lambda: detection_threshold(KEY, 8, 0.1, 1.0, 10, parts=0), "parts is 0"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_bad_input(name):
    call, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        call()
