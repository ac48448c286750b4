"""The one entry: a problem in, a maximal margin with its certificate out; the solver chosen by norm and shape."""

from dataclasses import replace

import numpy as np

from attnlab.checks import unknown_name
from attnlab.margin.certificates import MaxMargin, PrimalDual, Status, dual_norm, matrix_norm, verdict
from attnlab.margin.checking import check_tolerance
from attnlab.margin.problems import MarginProblem, Norm, check_norm, check_problem
from attnlab.margin.rows import Rows, normalized, reduced
from attnlab.margin.solvers import METHODS, frobenius_solution, solver
from attnlab.margin.solvers.frobenius import few_rows


def max_margin(problem: MarginProblem, *, method: str | None = None, tolerance: float = 1e-8) -> MaxMargin:
    """Solve a max-margin problem and prove the answer.

    The Frobenius problem comes first: it decides feasibility, which no norm changes, and starts the others. `method`
    names one of `METHODS` for it; by default the shape decides. `tolerance` is the certified gap up to which the status
    is `SOLVED`; what is reached is 1e-10 or better, in the nuclear norm about 1e-9 where the rank is not clear. The
    arithmetic is NumPy's in double precision, whatever JAX is set to. Where that proves nothing, decimals decide, down
    to margins of 1e-14 of the rows' norms, which count as none: in the Frobenius norm, in the nuclear one and for
    1 < p <= 8 up to 256 entries of W (some seconds), and for other p mostly. A zero query is infeasible.
    In a traced function `frobenius_traced` stands in, `frobenius_batch` for many small problems. Raises `ValueError`
    for an unknown method or norm and a tolerance outside (0, 1), `TypeError` for what is no concrete problem.

    >>> import numpy as np
    >>> from attnlab.margin import attention_problem, max_margin
    >>> tokens = np.array([[[2.0, 0.0], [0.0, 0.0], [0.0, 1.0]]])  # one sequence of three tokens
    >>> found = max_margin(attention_problem(tokens, queries=np.ones((1, 1)), selection=np.array([0])))
    >>> found.status.name, float(found.margin), np.round(found.solution.ravel(), 9).tolist()
    ('SOLVED', 2.0, [0.5, 0.0])
    >>> bool(found.gap < 1e-10), found.support.tolist()  # proved; both other tokens hold it back
    (True, [True, False])
    """
    check_problem(problem)
    check_tolerance(tolerance)
    if method not in (None, *METHODS):
        raise unknown_name("method", str(method), tuple(METHODS))
    norm = check_norm(problem.norm)
    given, unit = normalized(problem)
    with np.errstate(all="ignore"):  # what overflows near the edge of feasibility proves nothing, and is not taken
        if norm == "nuclear":
            found = _in_spans(given, method, tolerance)
        else:
            found = _answer(*_solved(given, norm, method, tolerance), norm, tolerance, problem.shape)
    return _in_units(found, unit, norm)


def _in_spans(problem: MarginProblem, method: str | None, tolerance: float) -> MaxMargin:
    """In span{Delta} x span{z}, where the nuclear norm and the rows' norms stay what they are."""
    smaller, left, right = reduced(problem)
    found = _answer(*_solved(smaller, "nuclear", method, tolerance), "nuclear", tolerance, smaller.shape)
    return replace(found, direction=(left.T @ found.direction @ right).reshape(problem.shape))


def _solved(problem: MarginProblem, norm: Norm, method: str | None, tolerance: float) -> tuple[Rows, PrimalDual]:
    """The answer, and the rows it is of."""
    start = None
    if method is None and norm in ("frobenius", "nuclear"):
        own = Rows(problem, unit=False)
        start = few_rows(own)
        if start is not None and norm == "frobenius":
            return own, start
    rows = Rows(problem)
    start = frobenius_solution(rows, method) if start is None else replace(start, dual=start.dual * rows.scale)
    infeasible = verdict(start.certificate, tolerance) == Status.INFEASIBLE
    return rows, start if infeasible else solver(norm)(rows, start)


def _answer(rows: Rows, found: PrimalDual, norm: Norm, tolerance: float, shape: tuple[int, ...]) -> MaxMargin:
    """As `MaxMargin` promises it: W of norm 1, lambda of the problem's rows, and a verdict."""
    primal, dual, status = found.primal, found.dual, verdict(found.certificate, tolerance)
    if status == Status.INFEASIBLE:
        primal, dual = np.zeros_like(primal), dual / (rows.bound @ dual)
    else:
        if norm != "frobenius":
            dual = dual / dual_norm(rows.combine(dual), norm)
        primal = primal / matrix_norm(primal, norm)
    return MaxMargin(primal.reshape(shape), dual / rows.scale, found.support, status, found.certificate)


def _in_units(found: MaxMargin, unit: float, norm: Norm) -> MaxMargin:
    """The answer to a problem whose rows are `unit` times those of the one that was solved."""
    if unit == 1:
        return found
    certificate = replace(found.certificate, margin=found.margin * unit, bound=found.certificate.bound * unit)
    multipliers = found.multipliers
    if found.status != Status.INFEASIBLE:
        multipliers = multipliers / unit / (unit if norm == "frobenius" else 1.0)
    return replace(found, multipliers=multipliers, certificate=certificate)
