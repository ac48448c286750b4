"""Frobenius-norm max-margin problems: a method by shape, the next one where it proves nothing, decimals at last."""

from collections.abc import Callable, Mapping

import numpy as np

from attnlab.margin.certificates import PROVED, PrimalDual, Status, verdict
from attnlab.margin.rows import Rows
from attnlab.margin.solvers import active_set, decimals, hull

METHODS: Mapping[str, Callable[[Rows], PrimalDual]] = {"active set": active_set.solve, "interior point": hull.solve}
"""By name, in the order in which they are tried."""

MANY = 8
"""So many times more rows than dimensions are a matter for the interior point at once."""


def solve(rows: Rows, method: str | None) -> PrimalDual:
    """The maximal margin or Gordan's multipliers, by one of `METHODS` or by those that the shape suggests."""
    if rows.void.any():
        found = active_set.combination(rows, np.where(rows.void, 1.0, 0.0))
        return decimals.solve(rows, found)
    suggested = list(METHODS)[1 if len(rows) > MANY * rows.dimension else 0 :]
    for name in [method] if method else suggested:
        found = METHODS[name](rows)
        if verdict(found.certificate, PROVED) != Status.INACCURATE:
            return found
    return decimals.solve(rows, found)
