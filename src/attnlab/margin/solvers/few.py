"""Frobenius problems of few rows, from their Gram matrix alone: few array operations for an answer and its proof."""

from collections.abc import Iterator

import numpy as np
from scipy.linalg.lapack import dposv, dpotrs

from attnlab.margin.certificates import Certificate, PrimalDual
from attnlab.margin.rows import Rows
from attnlab.margin.solvers.active_set import Descent

FEW, VERY_FEW = 300, 64
"""Up to so many rows it is worth while; up to so many, the first guess of the active ones is the cheapest."""

WELL_CONDITIONED = 1e-12
"""Gap up to which an answer without shifts and with one refinement is taken."""


def solve(rows: Rows) -> PrimalDual | None:
    """The max-margin W of inequalities that all demand a margin, for which the rows need not be of norm 1.

    None where the short way does not prove itself.
    """
    if len(rows) > FEW or not rows.all_strict:
        return None
    differences, queries, gram = rows.differences, rows.own_queries, rows.dense_gram
    for guess in _guesses(gram):
        multipliers = _multipliers(gram, guess)
        if multipliers is not None:
            break
    else:
        return None
    matrix = (multipliers[:, None] * differences).T @ queries
    size, total = np.sqrt(np.vdot(matrix, matrix)), multipliers.sum()
    direction = matrix / size
    margin, bound = ((differences @ direction) * queries).sum(1).min(), size / total
    if multipliers.min() < 0 or not 1 - margin / bound <= WELL_CONDITIONED:
        return None
    certificate = Certificate(margin, bound, np.zeros(()), size / (multipliers @ np.sqrt(gram.diagonal())))
    return PrimalDual(matrix, multipliers, multipliers > 0, certificate)


def _guesses(gram: np.ndarray) -> Iterator[np.ndarray]:
    """Active rows, better and better guessed."""
    if len(gram) <= VERY_FEW:  # one step from equal multipliers, then the rows of less than the mean score
        m, scores = len(gram), gram.sum(0)
        scores = gram @ np.maximum(2 - scores / (scores.sum() / m), 0.0)
        yield scores < scores.sum() / m
    descent = Descent(gram.dot, np.ones(len(gram)))
    descent.step_size = 1 / gram[0, 0]
    for _ in range(4):
        descent.run(20)
        yield descent.multipliers > 0


def _multipliers(gram: np.ndarray, active: np.ndarray, *, steps: int = 12) -> np.ndarray | None:
    """minimise lambda^T G lambda / 2 - sum lambda over lambda >= 0 by a semismooth Newton method on the active rows.

    None if it does not settle, or meets rows that depend on each other.
    """
    m, ones, changes = len(gram), np.ones(len(gram)), len(gram)
    for _ in range(steps):
        members = active.nonzero()[0]
        if not len(members):
            return None
        factor, part, failed = dposv(gram[members[:, None], members], ones[members], lower=1)
        if failed:
            return None
        multipliers = np.zeros(m)
        multipliers[members] = part
        slopes = gram.dot(multipliers) - 1
        following = multipliers - slopes > WELL_CONDITIONED  # one of the two is 0
        changes, before = int(np.count_nonzero(following != active)), changes
        if not changes:
            multipliers[members] -= dpotrs(factor, slopes[members], lower=1)[0]
            return multipliers
        if changes > before:
            return None
        active = following
    return None
