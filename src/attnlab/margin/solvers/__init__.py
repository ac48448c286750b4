"""One solver a norm, all of one shape: `solve(rows, start) -> PrimalDual` from the Frobenius solution."""

from collections.abc import Callable, Mapping

import numpy as np

from attnlab.margin.certificates import PROVED, PrimalDual, Status, verdict
from attnlab.margin.problems import Norm, exponent
from attnlab.margin.rows import Rows
from attnlab.margin.solvers import decimals, frobenius, hull, linear, lp, nuclear

Solver = Callable[[Rows, PrimalDual], PrimalDual]

METHODS: Mapping[str, Callable[[Rows], PrimalDual]] = {
    "active set": frobenius.active_set,
    "interior point": hull.interior_point,
}
"""Of the Frobenius problem, in the order in which they are tried; the other norms have one solver each."""

MANY = 8
"""So many times more rows than dimensions are a matter for the interior point at once."""


def frobenius_solution(rows: Rows, method: str | None) -> PrimalDual:
    """By one of `METHODS`, or by those that the shape suggests, one after the other; decimals where they prove nothing.

    It decides feasibility, which no norm changes.
    """
    if rows.void.any():
        found = frobenius.combination(rows, np.where(rows.void, 1.0, 0.0))
        return decimals.solve(rows, found)
    suggested = list(METHODS)[1 if len(rows) > MANY * rows.dimension else 0 :]
    for name in [method] if method else suggested:
        found = METHODS[name](rows)
        if verdict(found.certificate, PROVED) != Status.INACCURATE:
            return found
    return decimals.solve(rows, found)


def own_start(rows: Rows, start: PrimalDual) -> PrimalDual:
    """The Frobenius solution, with which every norm starts, is the answer in its own."""
    return start


SOLVERS: Mapping[str, Solver] = {
    "frobenius": own_start,
    "nuclear": nuclear.solve,
    "lp": lp.solve,
    "linear program": linear.solve,
}


def solver(norm: Norm) -> Solver:
    """Of a norm; l_1 and l_infinity are linear programs."""
    if isinstance(norm, str):
        return SOLVERS[norm]
    return SOLVERS["linear program" if exponent(norm) in (1, np.inf) else "lp"]
