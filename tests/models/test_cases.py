"""The table of cases itself: what every test that draws from it relies on."""

import jax
import pytest

from attnlab.objectives import check_objective
from attnlab.trees import dimension
from cases import CASES


@pytest.mark.parametrize("name", CASES)
def test_case_is_small_valid_and_double(name):
    risk, params = CASES[name](jax.random.key(1))
    check_objective(risk, params)
    assert dimension(params) <= 140
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float64"}
    assert jax.eval_shape(risk, params).dtype == "float64"


def test_cases_are_functions_of_the_key():
    (_, first), (_, again), (_, other) = (CASES["softmax/square"](jax.random.key(seed)) for seed in (1, 1, 2))
    assert (first["query"] == again["query"]).all()
    assert (first["query"] != other["query"]).all()
