"""The one entry: a problem in, a maximal margin with its certificate out; the method chosen by norm and shape."""

import numpy as np

from attnlab.checks import unknown_name
from attnlab.margin.certificates import Certificate, MaxMargin, Status, certify, dual_norm, matrix_norm, verdict
from attnlab.margin.frobenius import active_set, newton
from attnlab.margin.interior import gordan_multipliers, nearest_hull_point
from attnlab.margin.lp import lp_margin
from attnlab.margin.nuclear import nuclear_margin
from attnlab.margin.problems import MarginProblem, check_norm
from attnlab.margin.rows import Rows, reduced

EARLY = 1e-9
"""Complementarity of the interior point at which its active rows are tried first."""

METHODS = ("active set", "interior point")
"""Methods of the Frobenius problem; the other norms have one each."""


def max_margin(problem: MarginProblem, *, method: str | None = None, tolerance: float = 1e-8) -> MaxMargin:
    """Solve a max-margin problem and prove the answer.

    The Frobenius problem comes first: it decides feasibility, which no norm changes, and starts the others. `method`
    names one of `METHODS` for it; by default the shape decides. `tolerance` is the certified gap up to which the status
    is `SOLVED`; what is reached is 1e-10 or better in the Frobenius and l_p norms, about 1e-9 in the nuclear norm. The
    arithmetic is NumPy's in double precision, whatever JAX is set to; `frobenius_batch` is the traced twin for many
    small problems. Raises `ValueError` for an unknown method or norm.
    """
    if method not in (None, *METHODS):
        raise unknown_name("method", str(method), METHODS)
    norm = check_norm(problem.norm)
    if norm == "nuclear":
        return _nuclear(problem, method, tolerance)
    rows = Rows(problem)
    multipliers, matrix, proof = frobenius_margin(rows, method)
    if norm != "frobenius" and verdict(proof, tolerance) != Status.INFEASIBLE:
        matrix, multipliers = lp_margin(rows, float(norm[1]), multipliers)
        proof = certify(norm, rows, matrix, multipliers)
    return _result(problem, rows, matrix, multipliers, proof, tolerance)


def _nuclear(problem: MarginProblem, method: str | None, tolerance: float) -> MaxMargin:
    """In span{Delta} x span{z}, where the nuclear norm and the rows' norms stay what they are."""
    smaller, left, right = reduced(problem)
    rows = Rows(smaller)
    multipliers, matrix, proof = frobenius_margin(rows, method)
    if verdict(proof, tolerance) != Status.INFEASIBLE:
        matrix, multipliers = nuclear_margin(rows, multipliers)
        proof = certify("nuclear", rows, matrix, multipliers)
    return _result(problem, rows, matrix, multipliers, proof, tolerance, (left, right))


def frobenius_margin(rows: Rows, method: str | None) -> tuple[np.ndarray, np.ndarray, Certificate]:
    """lambda, W and proof; the interior point takes over where the active set does not solve the problem."""
    many = len(rows) > 8 * rows.dimension
    if method == "active set" or (method is None and not many):
        multipliers, matrix = active_set(rows)
        proof = certify("frobenius", rows, matrix, multipliers)
        if method is not None or verdict(proof, 1e-10) == Status.SOLVED:
            return multipliers, matrix, proof
    return _by_interior_point(rows)


def _by_interior_point(rows: Rows) -> tuple[np.ndarray, np.ndarray, Certificate]:
    """Interior point, then the best of its own answer, Newton's method on its active rows, and Gordan's multipliers."""
    point = nearest_hull_point(rows, tolerance=EARLY)
    for tolerance in (EARLY, 1e-15):  # the active rows are often clear long before the end
        point = nearest_hull_point(rows, point, tolerance=tolerance)
        multipliers, slacks = point.multipliers, point.slacks
        active = (multipliers / multipliers.max() > slacks / slacks.max()) | rows.free
        polished, matrix, solved = newton(rows, active)
        proof = certify("frobenius", rows, matrix, polished)
        if solved and verdict(proof, 1e-10) == Status.SOLVED:
            return polished, matrix, proof
    if point.level < 1e-10:
        exact = gordan_multipliers(rows, multipliers)
        none = rows.combine(exact)
        proof_of_none = certify("frobenius", rows, none, exact)
        if verdict(proof_of_none, 0.0) == Status.INFEASIBLE:
            return exact, none, proof_of_none
    plain = multipliers / max(point.level, 1e-300)
    proof_of_plain = certify("frobenius", rows, rows.combine(plain), plain)
    if proof_of_plain.gap <= proof.gap or not np.isfinite(proof.gap):
        return plain, rows.combine(plain), proof_of_plain
    return polished, matrix, proof


def _result(
    problem: MarginProblem,
    rows: Rows,
    matrix: np.ndarray,
    multipliers: np.ndarray,
    proof: Certificate,
    tolerance: float,
    bases: tuple[np.ndarray, np.ndarray] | None = None,
) -> MaxMargin:
    status = verdict(proof, tolerance)
    support = _support(rows, matrix, multipliers)
    if status == Status.INFEASIBLE:
        matrix, multipliers = np.zeros_like(matrix), multipliers / (rows.bound @ multipliers)
    else:
        scale = 1.0 if problem.norm == "frobenius" else dual_norm(rows.combine(multipliers), problem.norm)
        multipliers = multipliers / scale
        matrix = matrix / matrix_norm(matrix, problem.norm)
    if bases is not None:
        matrix = bases[0].T @ matrix @ bases[1]
    return MaxMargin(matrix.reshape(problem.shape), rows.multipliers(multipliers), support, status, proof)


def _support(rows: Rows, matrix: np.ndarray, multipliers: np.ndarray) -> np.ndarray:
    """Rows whose multiplier, relative to the largest, exceeds their slack: one of the two is 0 at the solution."""
    slack = rows.scores(matrix) - rows.bound
    return rows.free | (multipliers > multipliers.max() * np.maximum(slack, 0.0))
