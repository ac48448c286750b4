"""Margins down to 1e-12 of the rows' norms: a verdict each, held against rational arithmetic."""

from collections import Counter
from dataclasses import replace
from decimal import Decimal
from math import isqrt

import numpy as np
import pytest
from edge_cases import bracket, edge_problem, judge
from margin_cases import dense_rows

from attnlab.margin import Status, max_margin
from attnlab.margin.solvers.decimal_arrays import decimal_norm, power, to_decimal, to_float


def exact_root(square):
    """The square root of a fraction, to double precision."""
    shift = 2 * max(0, 120 - (square.numerator.bit_length() - square.denominator.bit_length()))
    return isqrt((square.numerator << shift) // square.denominator) / 2 ** (shift // 2)


def verdicts(count):
    """Of so many random problems, half of them infeasible, a third of them with rows over six decades."""
    random, seen, smallest = np.random.default_rng(1), Counter(), 1.0
    for seed in range(count):
        relative, feasible = 10 ** random.uniform(-12, 0), bool(seed % 2)
        problem = edge_problem(relative, seed, feasible=feasible, decades=6.0 if seed % 3 == 0 else 0.0)
        found = max_margin(problem)
        square = judge(problem, found)
        assert found.status == (Status.SOLVED if feasible else Status.INFEASIBLE), seed
        if feasible:
            exact = exact_root(square)
            assert abs(found.margin / exact - 1) < 1e-9, seed
            assert abs(found.certificate.bound / exact - 1) < 1e-9, seed
            scores = dense_rows(problem) @ found.direction.ravel() / np.linalg.norm(dense_rows(problem), axis=1)
            assert scores.min() > -1e-15, seed
            smallest = min(smallest, found.certificate.residual)
        seen[found.status] += 1
    return seen, smallest


def test_verdicts_near_the_edge_are_those_of_rational_arithmetic():
    seen, smallest = verdicts(60)
    assert seen == {Status.SOLVED: 30, Status.INFEASIBLE: 30}
    assert smallest < 1e-9


@pytest.mark.slow
def test_a_thousand_verdicts_near_the_edge():
    seen, smallest = verdicts(1000)
    assert seen == {Status.SOLVED: 500, Status.INFEASIBLE: 500}
    assert smallest < 1e-11


def proved_in_norm(norm, count):
    """So many random problems, a quarter of them infeasible, whose bounds are those of rational arithmetic."""
    random, smallest = np.random.default_rng(3), 1.0
    for seed in range(count):
        relative, feasible = 10 ** random.uniform(-12, 0), bool(seed % 4)
        problem = edge_problem(relative, seed, feasible=feasible, decades=6.0 if seed % 3 == 0 else 0.0)
        problem = replace(problem, norm=norm)
        found = max_margin(problem)
        assert found.status == (Status.SOLVED if feasible else Status.INFEASIBLE), seed
        if feasible:
            # Rounding W moves every score by 1e-16 of |a| |W|, and rounding lambda what the rows combine to.
            largest = np.linalg.norm(dense_rows(problem), axis=1).max() * np.linalg.norm(found.direction)
            tolerance = 1e-15 * (largest / found.margin + 1 / found.certificate.residual)
            tolerance += 1e-8 if norm == "nuclear" else 1e-9
            np.testing.assert_allclose(bracket(problem, found), float(found.margin), rtol=tolerance, err_msg=str(seed))
            smallest = min(smallest, found.certificate.residual)
    return smallest


@pytest.mark.parametrize("norm", [("lp", 1.3), ("lp", 6.0), "nuclear"], ids=str)
def test_margins_near_the_edge_in_other_norms(norm):
    assert proved_in_norm(norm, 8) < 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("norm", [*(("lp", p) for p in (1.05, 1.3, 1.7, 3.0, 8.0)), "nuclear"], ids=str)
def test_many_margins_near_the_edge_in_other_norms(norm):
    assert proved_in_norm(norm, 60) < 1e-9


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, 7, np.inf])
def test_norms_in_decimals_are_those_of_double_precision(p):
    array = np.random.default_rng(0).normal(size=(3, 4))
    assert abs(float(decimal_norm(to_decimal(array), p)) / np.linalg.norm(array.ravel(), ord=p) - 1) < 1e-14


def test_powers_in_decimals_keep_their_signs():
    np.testing.assert_allclose(
        to_float(power(to_decimal(np.array([-8.0, 0.0, 4.0])), Decimal("0.5"))), [-(8**0.5), 0, 2]
    )
