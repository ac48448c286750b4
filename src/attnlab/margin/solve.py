"""The one entry: a problem in, a maximal margin with its certificate out; the method chosen by norm and shape."""

from dataclasses import replace

import numpy as np

from attnlab.checks import unknown_name
from attnlab.margin.certificates import Answer, MaxMargin, Status, certify, dual_norm, matrix_norm, verdict
from attnlab.margin.checking import check_tolerance
from attnlab.margin.exact import exact_margin
from attnlab.margin.few import few_rows
from attnlab.margin.frobenius import Combination, active_set, combination, newton
from attnlab.margin.interior import gordan_multipliers, nearest_hull_point
from attnlab.margin.linear import exact_linear_program, linear_program
from attnlab.margin.lp import lp_margin
from attnlab.margin.nuclear import nuclear_margin
from attnlab.margin.problems import MarginProblem, Norm, check_norm, check_problem
from attnlab.margin.rows import Rows, normalized, reduced

EARLY = 1e-9
"""Complementarity of the interior point at which its active rows are tried first."""

PROVED = 1e-10
"""Gap up to which an answer in double precision is taken."""

METHODS = ("active set", "interior point")
"""Methods of the Frobenius problem; the other norms have one each."""


def max_margin(problem: MarginProblem, *, method: str | None = None, tolerance: float = 1e-8) -> MaxMargin:
    """Solve a max-margin problem and prove the answer.

    The Frobenius problem comes first: it decides feasibility, which no norm changes, and starts the others. `method`
    names one of `METHODS` for it; by default the shape decides. `tolerance` is the certified gap up to which the status
    is `SOLVED`; what is reached is 1e-10 or better, in the nuclear norm about 1e-9 where the rank is not clear. The
    arithmetic is NumPy's in double precision, whatever JAX is set to. Where that proves nothing, decimals decide: in
    the Frobenius norm down to margins of 1e-14 of the rows' norms, which count as none, and for p = 1 and infinity
    mostly; other norms may be `INACCURATE` for margins below about 1e-3 of the rows' norms. A zero query is infeasible.
    In a traced function `frobenius_traced` stands in, `frobenius_batch` for many small problems. Raises `ValueError`
    for an unknown method or norm and a tolerance outside (0, 1), `TypeError` for what is no concrete problem.
    """
    check_problem(problem)
    check_tolerance(tolerance)
    if method not in (None, *METHODS):
        raise unknown_name("method", str(method), METHODS)
    norm = check_norm(problem.norm)
    problem, unit = normalized(problem)
    if norm == "nuclear":
        return _in_units(_nuclear(problem, method, tolerance), unit, norm)
    if norm == "frobenius" and method is None:
        with np.errstate(all="ignore"):  # near the edge, where it proves nothing
            found = few_rows(problem)
        if found is not None:
            return _in_units(found, unit, norm)
    rows = Rows(problem)
    answer = frobenius_margin(problem, rows, method)
    if norm != "frobenius" and verdict(answer.proof, tolerance) != Status.INFEASIBLE:
        answer = _lp(problem, rows, answer)
    return _in_units(_result(problem, rows, answer, tolerance), unit, norm)


def _in_units(found: MaxMargin, unit: float, norm: Norm) -> MaxMargin:
    """The answer to a problem whose rows are `unit` times those of the one that was solved."""
    if unit == 1:
        return found
    proof = replace(found.certificate, margin=found.margin * unit, bound=found.certificate.bound * unit)
    multipliers = found.multipliers
    if found.status != Status.INFEASIBLE:
        multipliers = multipliers / unit / (unit if norm == "frobenius" else 1.0)
    return replace(found, multipliers=multipliers, certificate=proof)


def _lp(problem: MarginProblem, rows: Rows, start: Answer) -> Answer:
    """In double precision, or in decimals where that proves nothing."""
    norm, p = problem.norm, float(problem.norm[1])
    with np.errstate(all="ignore"):
        found = linear_program(rows, p) if p in (1, np.inf) else lp_margin(rows, p, start.multipliers)
        answer = None if found is None else _answer(norm, rows, *found)
    if answer is not None and verdict(answer.proof, PROVED) == Status.SOLVED:
        return answer
    exact = exact_linear_program(problem, rows, p) if p in (1, np.inf) else None
    return exact or answer or start


def _nuclear(problem: MarginProblem, method: str | None, tolerance: float) -> MaxMargin:
    """In span{Delta} x span{z}, where the nuclear norm and the rows' norms stay what they are."""
    smaller, left, right = reduced(problem)
    rows = Rows(smaller)
    with np.errstate(all="ignore"):  # see max_margin
        found = few_rows(smaller) if method is None else None
    if found is not None:
        answer = _answer("nuclear", rows, *nuclear_margin(rows, np.asarray(found.multipliers) * rows.scale))
    else:
        answer = frobenius_margin(smaller, rows, method)
        if verdict(answer.proof, tolerance) != Status.INFEASIBLE:
            answer = _answer("nuclear", rows, *nuclear_margin(rows, answer.multipliers))
    return _result(problem, rows, answer, tolerance, (left, right))


def _answer(norm: Norm, rows: Rows, matrix: np.ndarray, multipliers: np.ndarray) -> Answer:
    scores = rows.scores(matrix)
    return Answer(matrix, multipliers, scores - rows.bound, certify(norm, rows, matrix, multipliers, scores=scores))


def _own_answer(rows: Rows, found: Combination) -> Answer:
    """Of W = sum_k lambda_k a_k."""
    matrix, multipliers, scores = found.matrix, found.multipliers, found.scores
    proof = certify("frobenius", rows, matrix, multipliers, combined=matrix, scores=scores)
    return Answer(matrix, multipliers, scores - rows.bound, proof)


def frobenius_margin(problem: MarginProblem, rows: Rows, method: str | None) -> Answer:
    """The interior point takes over where the active set does not solve the problem, decimals where neither does."""
    guess = np.where(rows.void, 1.0, 0.0)
    if not rows.void.any():
        many = len(rows) > 8 * rows.dimension
        with np.errstate(all="ignore"):  # what overflows near the edge proves nothing, and is not taken
            if method == "active set" or (method is None and not many):
                answer = _own_answer(rows, active_set(rows))
                if verdict(answer.proof, PROVED) != Status.INACCURATE:
                    return answer
            if method != "active set":
                answer = _by_interior_point(rows)
                if verdict(answer.proof, PROVED) != Status.INACCURATE:
                    return answer
        guess = answer.multipliers
    return exact_margin(problem, guess)


def _by_interior_point(rows: Rows) -> Answer:
    """Interior point, then the best of its own answer, Newton's method on its active rows, and Gordan's multipliers."""
    point = nearest_hull_point(rows, tolerance=EARLY)
    for tolerance in (EARLY, 1e-15):  # the active rows are often clear long before the end
        point = nearest_hull_point(rows, point, tolerance=tolerance)
        multipliers, slacks = point.multipliers, point.slacks
        active = (multipliers / multipliers.max() > slacks / slacks.max()) | rows.free
        found = newton(rows, active)
        polished = _own_answer(rows, found)
        if found.solved and verdict(polished.proof, PROVED) == Status.SOLVED:
            return polished
    if point.level < 1e-10:
        contradiction = _own_answer(rows, combination(rows, gordan_multipliers(rows, multipliers)))
        if verdict(contradiction.proof, 0.0) == Status.INFEASIBLE:
            return contradiction
    plain = _own_answer(rows, combination(rows, multipliers / max(point.level, 1e-300)))
    better = plain.proof.gap <= polished.proof.gap or not np.isfinite(polished.proof.gap)
    return plain if better else polished


def _result(
    problem: MarginProblem,
    rows: Rows,
    answer: Answer,
    tolerance: float,
    bases: tuple[np.ndarray, np.ndarray] | None = None,
) -> MaxMargin:
    matrix, multipliers, slacks, proof = answer
    status = verdict(proof, tolerance)
    # Of multiplier and slack one is 0 at the solution: support is where the multiplier, relative to the largest, wins.
    support = multipliers > multipliers.max() * np.maximum(slacks, 0.0)
    if rows.any_free:
        support |= rows.free
    if status == Status.INFEASIBLE:
        matrix, multipliers = np.zeros_like(matrix), multipliers / (rows.bound @ multipliers)
    else:
        if problem.norm != "frobenius":
            multipliers = multipliers / dual_norm(rows.combine(multipliers), problem.norm)
        matrix = matrix / matrix_norm(matrix, problem.norm)
    if bases is not None:
        matrix = bases[0].T @ matrix @ bases[1]
    return MaxMargin(matrix.reshape(problem.shape), multipliers / rows.scale, support, status, proof)
