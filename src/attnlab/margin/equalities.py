"""The finite part of a problem with equality rows: parameters stay finite in their span and diverge outside it."""

import numpy as np
from jaxtyping import Float

from attnlab.checks import check_finite
from attnlab.margin.checking import check_same_shape, host_array
from attnlab.margin.problems import AnyArray, MarginProblem, check_problem


def equality_basis(problem: MarginProblem) -> Float[AnyArray, "r d e"]:
    """An orthonormal basis of the span of the equality rows, as matrices."""
    check_problem(problem)
    rows = np.flatnonzero(np.asarray(problem.equality))
    differences = np.asarray(problem.differences, float)[rows]
    queries = np.asarray(problem.queries, float)[np.asarray(problem.owner)[rows]]
    # Only here are rows formed: the cyclic or in-support ones, which are few.
    dense = (differences[:, :, None] * queries[:, None, :]).reshape(len(rows), differences.shape[1] * queries.shape[1])
    _, sizes, basis = np.linalg.svd(dense, full_matrices=False)
    rank = np.count_nonzero(sizes > 1e-12 * sizes.max(initial=0.0))
    return basis[:rank].reshape(rank, differences.shape[1], queries.shape[1])


def project_on_equalities(problem: MarginProblem, matrix: Float[AnyArray, "..."]) -> Float[AnyArray, "..."]:
    """The orthogonal projection of W on the span of the equality rows."""
    basis = equality_basis(problem)
    matrix = np.asarray(host_array("matrix", matrix, f"of shape {problem.shape}"), float)
    check_same_shape("matrix", matrix, problem.shape, "the problem's solution")
    return np.einsum("rde,r->de", basis, np.einsum("rde,de->r", basis, matrix.reshape(basis.shape[1:]))).reshape(
        matrix.shape
    )


def equality_solution(problem: MarginProblem, values: Float[AnyArray, " q"]) -> Float[AnyArray, "..."]:
    """The least-norm W with <a_k, W> = values_k on the equality rows, in their order: W_fin of several selected tokens.

    For selected tokens s, s' the value is the difference of scores that the loss prefers: the logarithm of the ratio of
    their optimal probabilities (arXiv 2308.16898; 2402.18551 for next tokens). Raises
    `ValueError` if the values contradict each other.
    """
    rows = np.flatnonzero(np.asarray(check_problem(problem).equality))
    values = np.asarray(host_array("values", values, f"{len(rows)} of them"), float)
    check_finite("values", values)
    if values.shape != rows.shape:
        raise ValueError(f"values have shape {values.shape}; expected {rows.shape}, one for each equality row.")
    differences = np.asarray(problem.differences, float)[rows]
    queries = np.asarray(problem.queries, float)[np.asarray(problem.owner)[rows]]
    gram = (differences @ differences.T) * (queries @ queries.T)
    multipliers = np.linalg.lstsq(gram, values, rcond=1e-13)[0]
    missed = np.abs(gram @ multipliers - values).max(initial=0.0)
    if missed > 1e-9 * (1 + np.abs(values).max(initial=0.0)):
        raise ValueError(
            f"values contradict each other: no W meets them, the best one misses by {missed:.3g}. "
            "Values of rows that depend on each other must depend in the same way."
        )
    return ((differences * multipliers[:, None]).T @ queries).reshape(problem.shape)
