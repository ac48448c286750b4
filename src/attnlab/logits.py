"""Logits by their two factors, and the cross-entropy of them: no array of positions x vocabulary beyond one chunk.

The logits of N positions over C classes are Z = H W^T, with H (N, D) the last hidden state and W (C, D) the table. For
the share s_n of a position in the mean, p_n = softmax z_n and its label y_n,

    loss = sum_n s_n (log sum exp z_n - z_n[y_n]),     G = dloss/dZ = s (p - onehot(y)),
    dloss/dH = G W,     dloss/dW = G^T H,     curvature in Z:  u -> s (p * u - p (p . u)).

Everything is a sum over positions, so that chunks of positions are done one after another: each has all of its classes
at once, and nothing of it is kept but sums; a derivative of a derivative computes the chunk again.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnlab.types import PyTree

CHUNK_BYTES = 32 * 2**20
"""The most that one array of positions x vocabulary takes."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Logits:
    """Logits Z = H W^T, not multiplied out; a pytree.

    Attributes:
        hidden: H, (..., D).
        table: W, (classes, D).
    """

    hidden: Float[Array, "*B D"]
    table: Float[Array, "C D"]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the logits themselves, (..., classes)."""
        return (*self.hidden.shape[:-1], self.table.shape[0])

    @property
    def ndim(self) -> int:
        """The number of axes of the logits."""
        return self.hidden.ndim

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the logits."""
        return jnp.result_type(self.hidden, self.table)

    def dense(self) -> Float[Array, "*B C"]:
        """The logits themselves."""
        rows = self.hidden.reshape(-1, self.hidden.shape[-1])  # one product of two matrices, as in `layers.linear`
        return (rows @ self.table.T).reshape(self.shape)


def widened(values: PyTree) -> PyTree:
    """Every floating-point array in float32 at least: exponentials and sums over classes and positions need it."""

    def wide(leaf: Any) -> Any:
        dtype = jnp.result_type(leaf)
        narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
        return leaf.astype(jnp.float32) if narrow else leaf

    return jax.tree.map(wide, values)


def cross_entropy_of(logits: Logits, labels: Int[Array, "*B"], shares: Float[Array, "*B"]) -> Float[Array, ""]:
    """sum_n s_n (log sum exp z_n - z_n[y_n]), in chunks of positions."""

    def chunk(total: Array, hidden: Array, labels: Array, shares: Array) -> tuple[Array, None]:
        log_probabilities = jax.nn.log_softmax(hidden @ logits.table.T, axis=-1)
        picked = jnp.take_along_axis(log_probabilities, labels[:, None], axis=-1, mode="clip")[:, 0]
        return total - jnp.vdot(shares, picked), None

    zero = jnp.zeros((), logits.dtype)
    return _in_chunks(chunk, zero, logits, labels, shares)[0]


def gauss_newton(logits: Logits, shares: Float[Array, "*B"], vector: Logits) -> Logits:
    """J^T C J times `vector`: J the derivative of Z = H W^T in H and W, C the curvature of the cross-entropy in Z."""
    table, dtypes = logits.table, jax.tree.map(jnp.result_type, vector)
    vector = jax.tree.map(lambda part: part.astype(logits.dtype), vector)
    # Side by side, for one product: where the change of the table is a constant zero, XLA's fused products for CPUs
    # read beyond the one number that they have of it (seen in jax 0.10, float32).
    both = jnp.concatenate([table, vector.table], axis=1)

    def chunk(sums: Array, hidden: Array, change: Array, shares: Array) -> tuple[Array, Array]:
        probabilities = jax.nn.softmax(hidden @ table.T, axis=-1)
        changes = jnp.concatenate([change, hidden], axis=1) @ both.T  # u = J vector = dH W^T + H dW^T
        mean = jnp.sum(probabilities * changes, axis=-1, keepdims=True)
        curved = shares[:, None] * probabilities * (changes - mean)
        return sums + curved.T @ hidden, curved @ table

    sums, hidden = _in_chunks(chunk, jnp.zeros_like(table), logits, vector.hidden, shares)
    return jax.tree.map(lambda part, dtype: part.astype(dtype), Logits(hidden, sums), dtypes)


def along_slopes(logits: Logits, held: Logits, labels: Int[Array, "*B"], shares: Float[Array, "*B"]) -> Array:
    """<G, Z>, G the slopes of the cross-entropy at the logits `held`: its Hessian is the functional part's."""

    def chunk(total: Array, hidden: Array, at: Array, labels: Array, shares: Array) -> tuple[Array, None]:
        slopes = _slopes(at @ held.table.T, labels, shares)
        return total + jnp.vdot(slopes @ logits.table, hidden), None

    return _in_chunks(chunk, jnp.zeros((), logits.dtype), logits, held.hidden, labels, shares)[0]


def _slopes(scores: Float[Array, "N C"], labels: Int[Array, " N"], shares: Float[Array, " N"]) -> Float[Array, "N C"]:
    one_hot = jax.nn.one_hot(labels, scores.shape[-1], dtype=scores.dtype)
    return shares[:, None] * (jax.nn.softmax(scores, axis=-1) - one_hot)


def _in_chunks(function: Callable, sums: PyTree, logits: Logits, *by_position: Array) -> tuple[PyTree, PyTree]:
    """`function(sums, hidden, *by_position) -> sums, results` of chunk after chunk: the sums, and the results of all.

    Of more than one chunk nothing is kept for derivatives.
    """
    leading, classes = logits.hidden.shape[:-1], logits.table.shape[0]
    total = math.prod(leading)
    count, size = _chunks(total, classes * logits.dtype.itemsize)
    rows = [x.reshape(total, *x.shape[len(leading) :]) for x in (logits.hidden, *by_position)]
    if count == 1:
        sums, results = function(sums, *rows)
    else:
        step = jax.checkpoint(lambda sums, part: function(sums, *part), prevent_cse=False)
        sums, parts = jax.lax.scan(step, sums, tuple(_split(x, count, size) for x in rows))
        results = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])[:total], parts)
    return sums, jax.tree.map(lambda x: x.reshape(*leading, *x.shape[1:]), results)


def _split(rows: Array, count: int, size: int) -> Array:
    """Chunk after chunk, filled up by positions of zeros. Each takes every `count`-th position, so that positions that
    are spread over devices stay where they are."""
    filled = jnp.pad(rows, [(0, count * size - len(rows)), *[(0, 0)] * (rows.ndim - 1)])
    return jnp.swapaxes(filled.reshape(size, count, *rows.shape[1:]), 0, 1)


def _chunks(positions: int, bytes_each: int) -> tuple[int, int]:
    """How many chunks of how many positions: as few as `CHUNK_BYTES` allows, or up to twice, if they divide."""
    needed = min(positions, math.ceil(positions * bytes_each / CHUNK_BYTES))
    dividing = (count for count in range(needed, 2 * needed) if positions % count == 0)
    count = next(dividing, needed)
    return count, math.ceil(positions / count)


def map_examples(function: Callable[[Array], Array], outputs: PyTree) -> PyTree:
    """`function` of every leaf of a model's outputs that has an axis of examples: of logits, of the hidden state."""

    def of_leaf(leaf: Any) -> Any:
        return replace(leaf, hidden=function(leaf.hidden)) if isinstance(leaf, Logits) else function(leaf)

    return jax.tree.map(of_leaf, outputs, is_leaf=lambda leaf: isinstance(leaf, Logits))


def example_axes(outputs: PyTree) -> PyTree:
    """The `in_axes` with which `jax.vmap` takes a model's outputs apart into examples."""

    def of_leaf(leaf: Any) -> Any:
        return replace(leaf, hidden=0, table=None) if isinstance(leaf, Logits) else 0  # type: ignore[arg-type]

    return jax.tree.map(of_leaf, outputs, is_leaf=lambda leaf: isinstance(leaf, Logits))


def with_examples(outputs: PyTree) -> list[Array]:
    """The leaves of a model's outputs that have an axis of examples."""
    found: list[Array] = []
    map_examples(lambda leaf: found.append(leaf) or leaf, outputs)  # type: ignore[func-returns-value]
    return found
