"""Problems of a prescribed margin relative to their rows, and a judge of verdicts in rational arithmetic."""

from fractions import Fraction

import numpy as np
import scipy.linalg
from margin_cases import dense_rows

from attnlab.margin import Status, margin_problem


def edge_problem(margin, seed, *, feasible, decades=0.0):
    """Random rows of cosine at least `margin` with a hidden W.

    In every sequence rows of that cosine, in all but the first of up to three times it, contradict each other up to
    it: some lambda combines their parts perpendicular to W z to 0. Infeasible: one row -W z besides, which their
    combination +margin W z contradicts. The rows' sizes range over so many decades.
    """
    random = np.random.default_rng(seed)
    n, simplex, others = random.integers(1, 4), random.integers(2, 4), random.integers(0, 3)
    d = simplex + (random.integers(0, 3) if feasible else 0)  # else rounding decides: it moves 0 out of a flat hull
    e = random.integers(1, 4)
    matrix, queries = random.normal(size=(d, e)), random.normal(size=(n, e))
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    matrix /= np.linalg.norm(matrix)
    rows, owner = [], []
    for i, query in enumerate(queries):
        along, size = (image := matrix @ query) / np.linalg.norm(image), np.linalg.norm(image)
        across = random.normal(size=(simplex + others, d))
        across[simplex - 1] = -random.dirichlet(np.ones(simplex - 1)) @ across[: simplex - 1]
        across -= np.outer(across @ along, along)
        across /= np.linalg.norm(across, axis=1, keepdims=True)
        near = margin / size * (random.uniform(1, 3) if i else 1)
        sines = np.where(np.arange(simplex + others) < simplex, min(near, 0.9), random.uniform(0.91, 0.99))
        rows += list(np.sqrt(1 - sines**2)[:, None] * across + np.outer(sines, along))
        if not feasible and i == 0:
            rows.append(-along)
        owner += [i] * (len(rows) - len(owner))
    sizes = 10 ** random.uniform(-decades / 2, decades / 2, size=(len(rows), 1))
    return margin_problem(sizes * np.array(rows), queries, owner=np.array(owner))


def rational(array):
    return [[Fraction(float(value)) for value in row] for row in array]


def dot(first, second):
    return sum(a * b for a, b in zip(first, second, strict=True))


def solve_rational(matrix, right):
    """Gauss and Jordan for a positive semidefinite matrix; unknowns of rows that depend on earlier ones are 0."""
    table = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for k in range(len(table)):
        if not table[k][k]:
            continue
        table[k] = [value / table[k][k] for value in table[k]]
        for i in range(len(table)):
            if i != k and table[i][k]:
                table[i] = [a - table[i][k] * b for a, b in zip(table[i], table[k], strict=True)]
    return [row[-1] if row[k] else Fraction(0) for k, row in enumerate(table)]


def judge(problem, found):
    """The exact squared margin, where the answer's support proves it optimal; 0 where its multipliers, made exact by
    the rows of the largest share, prove infeasibility. Nothing of the answer is taken but these; no floating point.
    """
    differences, queries = rational(problem.differences), rational(problem.queries)
    owner, given = np.asarray(problem.owner), np.asarray(found.multipliers)
    rows = given[:, None] * dense_rows(problem)
    # Large shares of independent directions first, by the pivots of QR.
    order = scipy.linalg.qr(rows.T, mode="r", pivoting=True)[1]
    support = order[given[order] > 0]
    shares = np.linalg.norm(rows, axis=1)[support]
    gram = [
        [dot(differences[k], differences[j]) * dot(queries[owner[k]], queries[owner[j]]) for j in range(len(owner))]
        for k in support
    ]
    square = [[row[j] for j in support] for row in gram]
    if found.status == Status.INFEASIBLE:
        rounded = [Fraction(float(given[k])) for k in support]
        for least in (0, 1e-14, 1e-11, 1e-6):  # the small shares may be rounding of the large ones
            kept = np.flatnonzero(shares > least * shares.max())
            if contradict([[square[i][j] for j in kept] for i in kept], [rounded[i] for i in kept]):
                return Fraction(0)
        raise AssertionError("no proof of infeasibility")
    assert found.status == Status.SOLVED
    inside = solve_rational(square, [Fraction(1)] * len(support))
    assert all(value >= 0 for value in inside)
    assert all(dot(row, inside) == 1 for row in square)
    assert all(dot(inside, [row[j] for row in gram]) >= 1 for j in range(len(owner)))
    return 1 / sum(inside)


def contradict(gram, rounded):
    """Whether multipliers, moved by the least number of rows so that they combine to 0 exactly, are still positive."""
    change = solve_rational(gram, [-dot(row, rounded) for row in gram])
    inside = [a + b for a, b in zip(rounded, change, strict=True)]
    return all(value >= 0 for value in inside) and sum(inside) > 0 and not any(dot(row, inside) for row in gram)


def bracket(problem, found):
    """Bounds on the maximal margin, l_p or nuclear, that the rounded answer proves: rational scores and combinations of
    rows, whose norms alone are floating-point numbers. Nothing of the certificate is taken."""
    differences, queries = rational(problem.differences), rational(problem.queries)
    owned = [queries[owner] for owner in problem.owner]
    rows = [[a * b for a in difference for b in query] for difference, query in zip(differences, owned, strict=True)]
    direction = [Fraction(float(value)) for value in np.ravel(found.direction)]
    multipliers = [Fraction(float(value)) for value in found.multipliers]
    least = float(min(dot(row, direction) for row in rows))
    combined = np.array([float(dot(multipliers, column)) for column in zip(*rows, strict=True)])
    if problem.norm == "nuclear":
        own, dual = (np.linalg.svd(m.reshape(problem.shape), compute_uv=False) for m in (found.direction, combined))
        return least / own.sum(), dual.max() / float(sum(multipliers))
    p = problem.norm[1]
    own, dual = np.linalg.norm(found.direction.ravel(), ord=p), np.linalg.norm(combined, ord=p / (p - 1))
    return least / own, dual / float(sum(multipliers))
