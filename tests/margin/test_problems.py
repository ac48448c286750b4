"""Problems as data: what they demand, and what they refuse."""

import numpy as np
import pytest
from margin_cases import random_tokens

from attnlab.margin import attention_problem, margin_problem, max_margin, vector_problem, with_norm


def test_rows_are_differences_to_the_selected_token():
    x, z, selection = random_tokens(3, 4, 5, seed=1)
    problem = attention_problem(x, z, selection)
    expected = [x[i, selection[i]] - x[i, t] for i in range(3) for t in range(4) if t != selection[i]]
    np.testing.assert_array_equal(problem.differences, expected)
    np.testing.assert_array_equal(problem.owner, np.repeat(np.arange(3), 3))


def test_mask_of_one_token_each_is_the_index():
    x, z, selection = random_tokens(3, 4, 5, seed=1)
    by_index, by_mask = (attention_problem(x, z, s) for s in (selection, np.arange(4) == selection[:, None]))
    np.testing.assert_array_equal(by_index.differences, by_mask.differences)
    assert not by_mask.equality.any()


def test_unsorted_owners_are_sorted():
    x, z, selection = random_tokens(3, 4, 5, seed=2)
    problem = attention_problem(x, z, selection)
    order = np.random.default_rng(0).permutation(len(problem.owner))
    shuffled = margin_problem(problem.differences[order], z, owner=problem.owner[order])
    np.testing.assert_allclose(max_margin(shuffled).direction, max_margin(problem).direction, atol=1e-12)


def spoil(name, change):
    parts = dict(zip(("tokens", "queries", "selection"), random_tokens(3, 4, 5, seed=3), strict=True))
    parts[name] = change(parts[name])
    return parts


def with_value(array, index, value):
    array = array.copy()
    array[index] = value
    return array


def with_duplicate(tokens):
    selected = random_tokens(3, 4, 5, seed=3)[2][1]
    return with_value(tokens, (1, (selected + 1) % 4), tokens[1, selected])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("selection", lambda s: with_value(s, 1, 4), r"selection\[1\] is 4; expected 0 <= selection < 4"),
        ("selection", lambda s: with_value(s, 2, -1), r"selection\[2\] is -1"),
        ("selection", lambda s: s[:2], r"selection has shape \(2,\)"),
        ("selection", lambda s: s.astype(float), "dtype float64; expected 3 indices"),
        ("selection", lambda s: np.zeros((3, 4), bool), r"selection\[0\] selects no token"),
        ("selection", lambda s: np.ones((3, 4), bool), "none of the 9 rows demands a margin"),
        ("tokens", lambda x: x[:, :1], "sequences of one token leave nothing to select from"),
        ("tokens", lambda x: x[0], r"tokens have shape \(4, 5\); expected"),
        ("tokens", lambda x: with_value(x, (0, 1, 2), np.nan), r"tokens has 1 non-finite values.*\(0, 1, 2\)"),
        ("queries", lambda z: with_value(z, (1, 0), np.inf), r"queries has 1 non-finite"),
        ("queries", lambda z: z[:2], r"queries have shape \(2, 5\); expected \(3, "),
        ("tokens", with_duplicate, r"tokens \d \(selected\) and \d of sequence 1 are equal.*infeasible"),
    ],
)
def test_bad_input_is_named(name, change, message):
    with pytest.raises(ValueError, match=message):
        attention_problem(**spoil(name, change))


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        (("lp", 0.5), "expected an exponent p >= 1"),
        ("nucler", "Did you mean 'nuclear'"),
        (("lp", float("nan")), "p >= 1"),
    ],
)
def test_norms_that_are_none(norm, message):
    problem = vector_problem(random_tokens(3, 4, 5, seed=3)[0], np.zeros(3, int))
    with pytest.raises(ValueError, match=message):
        with_norm(problem, norm)
