"""One solver a norm, all of one shape: `solve(rows, start) -> PrimalDual` from the Frobenius solution."""

from collections.abc import Callable, Mapping

import numpy as np

from attnlab.margin.certificates import PrimalDual
from attnlab.margin.problems import Norm, exponent
from attnlab.margin.rows import Rows
from attnlab.margin.solvers import linear, lp, nuclear

Solver = Callable[[Rows, PrimalDual], PrimalDual]


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
