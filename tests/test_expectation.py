"""What passes, in which unit, and how it is said."""

import json
from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from attnlab.expectation import Expectation, at_least, at_most, between, equal, expectations_table


@pytest.mark.parametrize(
    ("relation", "measured", "passes"),
    [
        ("equal", 1.05, True),
        ("equal", 1.2, False),
        ("equal", 0.8, False),
        ("at most", 0.1, True),
        ("at most", 1.2, False),
        ("at least", 1.9, True),
        ("at least", 0.8, False),
        ("equal", np.nan, False),
        ("at most", np.nan, False),
        ("at most", np.inf, False),
    ],
)
def test_relations(relation, measured, passes):
    assert Expectation("a", measured, relation, 1.0, tolerance=0.1).passed is passes


def test_deviations_are_in_units():
    assert equal("a", 5.2, 5.0, 0.5).deviation == pytest.approx(0.2)
    assert equal("a", [5.2, 0.0], [5.0, 0.0], 0.5, unit="relative").deviation == pytest.approx(0.04)
    by_error = equal("a", [5.2, 1.0], 5.0, 4.0, standard_error=[0.1, 1.0])
    assert by_error.deviation == pytest.approx(4.0)
    assert by_error.error == pytest.approx(1.0)
    assert equal("a", 1e-9, 0.0, 1.0, standard_error=0.0).deviation == np.inf
    assert equal("a", 0.0, 0.0, 0.0, unit="relative").passed


def test_only_what_goes_beyond_counts():
    assert at_most("a", [0.0, 3.0], [1.0, 2.0]).deviation == 1.0
    assert at_least("a", [0.0, 3.0], [1.0, 2.0]).deviation == 1.0
    assert (at_most("a", 3.0, 2.0).error, at_most("a", 1.0, 2.0).error) == (np.inf, 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relation": "below"}, "relation of 'a' is 'below'; expected one of 'equal', 'at most', 'at least'"),
        ({"unit": "%"}, "unit of 'a' is '%'; expected one of 'absolute', 'relative', 'standard error'"),
        ({"reference": [1.0, 2.0]}, r"'a' has a reference of shape \(2,\) and a measurement of shape \(\)"),
        ({"unit": "standard error"}, "'a' has the unit 'standard error' and the standard error None"),
        ({"standard_error": 0.1}, "'a' has the unit 'absolute' and the standard error 0.1"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        Expectation(**{"what": "a", "measured": 1.0, "relation": "equal", "reference": 1.0, **options})


def test_a_tolerance_must_be_named():
    with pytest.raises(ValueError, match="'a' has no tolerance; expected one"):
        _ = equal("a", 1.0, 1.0).passed


CASES = [
    (between("a", 1.0, 0.9, 1.1, source="s"), True, "1 ± 0.1"),
    (between("a", 1.2, 0.9, 1.1, source="s"), False, "1 ± 0.1"),
    (at_least("a", 5.0, 2.0), True, "≥ 2"),
    (at_most("a", 5.0, 4.0), False, "≤ 4"),
    (at_most("a", np.float64(5.0), np.float64(4.0), np.float64(1.0)), True, "≤ 4 ± 1"),
    (equal("a", [1.0, 2.0], [1.0, 2.0], 0.1, unit="relative"), True, "1, 2 ± 0.1 of it"),
    (equal("a", np.ones(9), 1.0, 4.0, standard_error=0.1), True, "1 ± 4 standard errors"),
]


@pytest.mark.parametrize(("expectation", "passed", "expected"), CASES)
def test_an_expectation_says_itself(expectation, passed, expected):
    assert expectation.passed is passed
    assert expectation.expected == expected
    assert json.loads(json.dumps(expectation.record()))["passed"] is passed


def test_the_table_shows_both_numbers():
    terminal = StringIO()
    Console(width=120, file=terminal).print(expectations_table([CASES[1][0]]))
    assert all(word in terminal.getvalue() for word in ("1.2", "1 ± 0.1", "no"))
