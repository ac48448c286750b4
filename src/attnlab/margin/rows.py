"""The constraint map of a problem and its adjoint, without its matrix: on the host, in double precision."""

from copy import copy
from dataclasses import replace
from functools import cached_property
from math import frexp, ldexp
from typing import Any

import numpy as np

from attnlab.margin.problems import MarginProblem

DENSE_BELOW = 300
"""Up to so many rows the Gram matrix is kept: it then costs less than the products it replaces."""

ORDER_ONE = 8
"""Powers of two up to which a problem's numbers are left as they are."""

SMALL = 30_000
"""Up to so many entries of all rows, Delta and z are multiplied row by row, without the structure of shared queries."""


def norms(vectors: np.ndarray) -> np.ndarray:
    """Of each row, without overflow."""
    largest = abs(vectors).max(axis=1, initial=0.0)
    scaled = vectors / np.where(largest > 0, largest, 1.0)[:, None]
    return largest * np.sqrt(np.einsum("kd,kd->k", scaled, scaled))


def normalized(problem: MarginProblem) -> tuple[MarginProblem, float]:
    """The problem with differences and queries of order 1, and what its rows were divided by: a power of two."""
    differences, queries = np.asarray(problem.differences, float), np.asarray(problem.queries, float)
    powers = [frexp(abs(array).max(initial=0.0))[1] for array in (differences, queries)]
    if max(map(abs, powers)) <= ORDER_ONE:
        return problem, 1.0
    parts = np.ldexp(differences, -powers[0]), np.ldexp(queries, -powers[1])
    return replace(problem, differences=parts[0], queries=parts[1]), ldexp(1.0, sum(powers))


class Rows:
    """The rows a_k = Delta_k z_{o(k)}^T of a problem, each divided by its norm ||Delta_k|| ||z_{o(k)}||.

    With `bound` divided likewise the feasible set is the same, and the Gram matrix has a unit diagonal. Multipliers
    divided by `scale` are those of the problem's own rows. With `unit=False` they are these: no norm is taken.
    """

    def __init__(self, problem: MarginProblem, *, unit: bool = True):
        self.problem = problem
        self.queries = np.asarray(problem.queries, float)
        self.owner = np.asarray(problem.owner)
        self.differences = np.asarray(problem.differences, float)
        self.bound = np.asarray(problem.bound, float)
        self.free = np.asarray(problem.equality)
        self.scale: Any = 1.0
        if unit:
            scale = norms(self.differences) * norms(self.queries)[self.owner]
            # A zero row stays zero: it says nothing with bound 0, and proves infeasibility with bound 1.
            self.scale = np.where(scale > 0, scale, 1.0)
            self.differences = self.differences / self.scale[:, None]
            self.bound = self.bound / self.scale

    @property
    def void(self) -> np.ndarray:
        """Rows that are zero and demand a margin."""
        differences, queries = (self.differences != 0).any(axis=1), (self.queries != 0).any(axis=1)
        return ~(differences & queries[self.owner]) & (self.bound > 0)

    @cached_property
    def top(self) -> np.float64:
        """The largest bound."""
        return self.bound.max()

    @cached_property
    def any_free(self) -> bool:
        """Whether there are equalities."""
        return bool(self.free.any())

    @cached_property
    def all_strict(self) -> bool:
        """Whether every row demands a margin."""
        return bool(self.bound.all())

    @cached_property
    def _small(self) -> bool:
        """Whether fewer calls matter more than fewer operations."""
        return self.differences.size * self.queries.shape[1] <= SMALL

    @cached_property
    def own_queries(self) -> np.ndarray:
        """z_{o(k)}, a row each."""
        return self.queries[self.owner]

    @cached_property
    def _starts(self) -> np.ndarray:
        """First row of every owner that has one."""
        return np.flatnonzero(np.diff(self.owner, prepend=-1))

    @cached_property
    def _blocks(self) -> np.ndarray | None:
        """The rows as (owner, row, dimension) where every owner has as many; else None."""
        lengths = np.diff(self._starts, append=len(self))
        if (lengths != lengths[0]).any():
            return None
        return self.differences.reshape(len(lengths), lengths[0], -1)

    def __len__(self) -> int:
        return len(self.bound)

    @property
    def dimension(self) -> int:
        """Largest possible rank of the rows."""
        (m, d), (n, e) = self.differences.shape, self.queries.shape
        return min(d, m) * min(n, e)

    def scores(self, matrix: np.ndarray) -> np.ndarray:
        """<a_k, W> = Delta_k . (W z_{o(k)}), of all rows."""
        if self._small:
            return ((self.differences @ matrix) * self.own_queries).sum(1)
        images = self.queries @ matrix.T
        if self._blocks is not None:
            return (self._blocks @ images[self.owner[self._starts], :, None]).ravel()
        return np.einsum("kd,kd->k", self.differences, images[self.owner])

    def combine(self, multipliers: np.ndarray) -> np.ndarray:
        """sum_k lambda_k a_k, the adjoint of `scores`: one outer product a query, after summing the rows of each."""
        if self._small:
            return (multipliers[:, None] * self.differences).T @ self.own_queries
        starts = self._starts
        if self._blocks is not None:
            sums = (multipliers.reshape(len(starts), 1, -1) @ self._blocks)[:, 0]
        else:
            sums = np.add.reduceat(multipliers[:, None] * self.differences, starts, axis=0)
        return sums.T @ self.queries[self.owner[starts]]

    def normal(self, multipliers: np.ndarray) -> np.ndarray:
        """G lambda: the scores of sum_k lambda_k a_k. Through the Gram matrix where it is small."""
        if len(self) <= DENSE_BELOW:
            return self.dense_gram @ multipliers
        return self.scores(self.combine(multipliers))

    @cached_property
    def dense_gram(self) -> np.ndarray:
        """All of `gram`."""
        gram = self.differences @ self.differences.T
        gram *= self.own_queries @ self.own_queries.T
        return gram

    def gram(self, members: np.ndarray) -> np.ndarray:
        """G_kl = <a_k, a_l> = (Delta_k . Delta_l) (z_{o(k)} . z_{o(l)}), between the given rows."""
        if len(self) <= DENSE_BELOW:
            return self.dense_gram[members[:, None], members]
        differences, queries = self.differences[members], self.queries[self.owner[members]]
        return (differences @ differences.T) * (queries @ queries.T)

    def normal_matrix(self, weights: np.ndarray) -> np.ndarray:
        """sum_k weights_k vec(a_k) vec(a_k)^T = sum_i (sum_{k of i} weights_k Delta_k Delta_k^T) (x) z_i z_i^T."""
        starts, d, e = self._starts, self.differences.shape[1], self.queries.shape[1]
        weighted = self.differences * weights[:, None]
        if self._blocks is not None:
            left = weighted.reshape(self._blocks.shape).transpose(0, 2, 1) @ self._blocks
        else:
            runs = zip(np.split(weighted, starts[1:]), np.split(self.differences, starts[1:]), strict=True)
            left = np.stack([scaled.T @ plain for scaled, plain in runs])
        queries = self.queries[self.owner[starts]]
        right = queries[:, :, None] * queries[:, None, :]
        matrix = left.reshape(len(starts), d * d).T @ right.reshape(len(starts), e * e)
        return matrix.reshape(d, d, e, e).transpose(0, 2, 1, 3).reshape(d * e, d * e)

    def weighted_gram(self, weights: np.ndarray) -> np.ndarray:
        """sum_ij weights_ij (a_k)_ij (a_l)_ij, one query's rows at a time."""
        gram = np.empty((len(self), len(self)))
        starts = self._starts
        for a, b in zip(starts, np.append(starts[1:], len(self)), strict=True):
            query = self.queries[self.owner[a]]
            # Delta_k^T diag(sum_j weights_ij z_j z'_j) Delta_l, with z' the query of row l
            gram[a:b] = self.differences[a:b] @ (((self.queries * query) @ weights.T)[self.owner] * self.differences).T
        return gram

    def demanding(self, factor: float) -> "Rows":
        """The same rows with their bounds times a factor."""
        some = copy(self)
        some.bound, some.top = self.bound * factor, self.top * factor
        return some

    def members(self, rows: np.ndarray) -> "Rows":
        """Some of the rows, as they are scaled here."""
        some = copy(self)
        for cached in [name for name, value in vars(Rows).items() if isinstance(value, cached_property)]:
            some.__dict__.pop(cached, None)
        for name in ("differences", "owner", "scale", "bound", "free"):
            setattr(some, name, getattr(self, name)[rows])
        return some


def orthonormal_rows(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(coordinates, basis) with matrix = coordinates @ basis, the basis' rows orthonormal, of the least size.

    The thin QR of the transpose when that is smaller, else the matrix in its own coordinates.
    """
    if matrix.shape[0] >= matrix.shape[1]:
        return matrix, np.eye(matrix.shape[1])
    basis, triangle = np.linalg.qr(matrix.T)
    return triangle.T, basis.T


def reduced(problem: MarginProblem) -> tuple[MarginProblem, np.ndarray, np.ndarray]:
    """The problem in span{Delta} x span{z}, where a solution in a unitarily invariant norm lives.

    Returns it with the bases L, R (orthonormal rows): W = L^T W_reduced R.
    """
    differences, left = orthonormal_rows(np.asarray(problem.differences, float))
    queries, right = orthonormal_rows(np.asarray(problem.queries, float))
    shape = (len(left), len(right))
    smaller = MarginProblem(differences, queries, problem.owner, problem.bound, problem.equality, problem.norm, shape)
    return smaller, left, right
