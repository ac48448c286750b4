"""What counts as reproduced, and how it is said."""

import math
from io import StringIO

import pytest
from rich.console import Console

from attnlab.analysis import Finding, findings_table

CASES = [
    (Finding("a", 1.0, 0.9, 1.1, "s"), True, "0.9 to 1.1"),
    (Finding("a", 1.2, 0.9, 1.1, "s"), False, "0.9 to 1.1"),
    (Finding("a", 5.0, 2.0, math.inf, "s"), True, "at least 2"),
    (Finding("a", 5.0, -math.inf, 4.0, "s"), False, "at most 4"),
    (Finding("a", math.nan, -math.inf, math.inf, "s"), False, "at least -inf"),
]


@pytest.mark.parametrize(("finding", "reproduced", "expected"), CASES)
def test_a_finding_lies_in_its_interval(finding, reproduced, expected):
    assert finding.reproduced is reproduced
    assert finding.expected == expected


def test_the_table_shows_both_numbers():
    terminal = StringIO()
    Console(width=120, file=terminal).print(findings_table([CASES[1][0]]))
    text = terminal.getvalue()
    assert "1.2" in text
    assert "0.9 to 1.1" in text
    assert "no" in text
