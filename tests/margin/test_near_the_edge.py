"""Margins down to 1e-12 of the rows' norms: a verdict each, held against rational arithmetic."""

from collections import Counter
from math import isqrt

import numpy as np
import pytest
from edge_cases import edge_problem, judge
from margin_cases import dense_rows

from attnlab.margin import Status, max_margin


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
