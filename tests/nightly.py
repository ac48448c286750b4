"""Which cases of a parametrised test run every time, and which nightly alone."""

import pytest


def nightly(values, quick):
    """The values for `parametrize`: those in `quick` run every time, the others carry the marker `slow`."""
    missing = [value for value in quick if value not in values]
    assert not missing, f"quick cases {missing} are none of {list(values)}"
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]
