"""The addition task: its arithmetic by Python's integers, its distribution within error bars, its reading positions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.data.addition import VOCABULARY, add_digits, addition, answer_positions, as_text
from compare import assert_close

COUNT = 2000


@pytest.mark.parametrize("digits", [1, 2, 5, 12])
def test_every_sequence_is_a_true_sum(key, digits):
    data = addition(key, 200, digits)
    for text, answer in zip(as_text(data.inputs), as_text(data.targets), strict=True):
        problem, written = text.split("=")
        first, second = problem.split("+")
        assert (len(first), len(second), len(written)) == (digits, digits, digits + 1)
        assert int(first) + int(second) == int(written)
        assert written == answer


def test_all_sums_of_two_digits():
    """Every carry there is: 00 + 00 to 99 + 99."""
    numbers = np.arange(100)
    split = np.stack([numbers // 10, numbers % 10], axis=-1)
    first, second = (jnp.asarray(np.broadcast_to(x, (100, 100, 2))) for x in (split[:, None], split[None]))
    answer = np.asarray(add_digits(first, second)) @ np.array([100, 10, 1])
    assert np.array_equal(answer, numbers[:, None] + numbers[None])


def test_carry_runs_through():
    assert add_digits(jnp.array([9, 9, 9, 9, 9]), jnp.array([0, 0, 0, 0, 1])).tolist() == [1, 0, 0, 0, 0, 0]


def test_shape_of_the_paper(key):
    data = addition(key, 64)
    assert data.inputs.shape == (64, 18)
    assert data.targets.shape == (64, 6)
    assert len(VOCABULARY) == 12
    assert int(data.inputs.max()) < 12
    assert {leaf.dtype for leaf in data} == {jnp.dtype("int32")}


@pytest.mark.parametrize("digits", [1, 3, 5])
def test_answer_is_one_position_after_where_it_is_read(key, digits):
    data, positions = addition(key, 20, digits), np.asarray(answer_positions(digits))
    assert np.array_equal(data.inputs[:, positions + 1], data.targets)
    assert np.all(np.asarray(data.inputs)[:, positions[0]] == VOCABULARY.index("="))
    assert positions[-1] == data.inputs.shape[1] - 2


def test_digits_of_the_numbers_are_uniform_and_independent(each_key):
    """Each digit, and each pair of neighbouring places, within 5 standard errors of its binomial count."""
    tokens = np.asarray(addition(each_key, COUNT).inputs)
    operands = np.concatenate([tokens[:, :5], tokens[:, 6:11]], axis=1)
    error = 5 * math.sqrt(0.1 * 0.9 / COUNT)
    frequency = np.stack([(operands == digit).mean(axis=0) for digit in range(10)])
    assert np.all(abs(frequency - 0.1) < error)
    # a sum of digits modulo ten of two independent uniform digits is uniform again
    pairs = (operands[:, :-1] + operands[:, 1:]) % 10
    frequency = np.stack([(pairs == digit).mean(axis=0) for digit in range(10)])
    assert np.all(abs(frequency - 0.1) < error)


def test_leading_digit_of_the_answer(key):
    """The sum of two five-digit numbers reaches 100,000 with probability (1 - 10^-5) / 2."""
    leading = np.asarray(addition(key, COUNT).targets[:, 0])
    assert set(leading.tolist()) == {0, 1}
    assert abs(leading.mean() - 0.5) < 5 * 0.5 / math.sqrt(COUNT)


def test_data_are_a_function_of_the_key():
    first, again, other = (addition(jax.random.key(seed), 10) for seed in (1, 1, 2))
    assert_close(first, again, 0)
    assert not np.array_equal(first.inputs, other.inputs)
    assert_close(jax.jit(lambda key: addition(key, 10))(jax.random.key(1)), first, 0)


def test_as_text():
    assert as_text(jnp.array([1, 10, 9, 11, 1, 0])) == ["1+9=10"]


@pytest.mark.parametrize(("count", "digits", "message"), [(0, 5, "count is 0"), (3, 0, "digits is 0")])
def test_bad_sizes(count, digits, message):
    with pytest.raises(ValueError, match=message):
        addition(jax.random.key(0), count, digits)
