"""How much of a matrix lies off its block diagonal, for any partition of its parameters, and what its blocks invert to.

A partition is an integer for each parameter, in the order of flat vectors: parameters of one integer are one block.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from attnlab.checks import check_key, check_whole
from attnlab.curvature.operator import Operator
from attnlab.statistics import Estimate
from attnlab.trees import leaf_names
from attnlab.types import Params, PRNGKey

Partition = Int[np.ndarray, " n"]


def partition_by(point: Params, name_of: Callable[[str], str]) -> Partition:
    """Whole leaves together: those to whose path `name_of` gives one name. The identity is the partition by matrix.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnlab.curvature.partitions import partition_by
        >>> point = {"layer_0": {"a": jnp.zeros(2), "b": jnp.zeros(1)}, "layer_1": {"a": jnp.zeros(1)}}
        >>> partition_by(point, lambda path: path.split("/")[0]).tolist()
        [0, 0, 0, 1]
    """
    names = [name_of(name) for name in leaf_names(point)]
    known = {name: number for number, name in enumerate(dict.fromkeys(names))}
    leaves = jax.tree.leaves(point)
    return np.concatenate([np.full(np.size(leaf), known[name]) for name, leaf in zip(names, leaves, strict=True)])


def partition_by_unit(point: Params) -> Partition:
    """The weights of each output together: every column of every kernel (in, out), of the read-out every class.

    Raises `ValueError`, naming it, for a leaf that has not two axes.
    """
    parts, start = [], 0
    for name, leaf in zip(leaf_names(point), jax.tree.leaves(point), strict=True):
        if np.ndim(leaf) != 2:
            raise ValueError(
                f"'{name}' has shape {np.shape(leaf)}; expected kernels (in, out), whose columns are units. Take the "
                "operator of their block."
            )
        rows, columns = np.shape(leaf)
        parts.append(np.tile(start + np.arange(columns), rows))
        start += columns
    return np.concatenate(parts)


def off_diagonal_share(matrix: Float[Array, "n n"], partition: Partition) -> Float[Array, ""]:
    """The share of ||A||_F^2 that lies between different blocks.

    Raises `ValueError` for a partition of another length.

    Example:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from attnlab.curvature.partitions import off_diagonal_share
        >>> float(off_diagonal_share(jnp.ones((4, 4)), np.array([0, 0, 1, 1])))
        0.5
    """
    labels = _labels(partition, len(matrix))
    return _share(matrix, labels)


@jax.jit
def _share(matrix: Array, labels: Array) -> Array:
    within = labels[:, None] == labels[None]
    squares = (matrix / jnp.max(jnp.abs(matrix))) ** 2
    return 1 - jnp.sum(jnp.where(within, squares, 0)) / jnp.sum(squares)


def off_diagonal_share_estimate(
    operator: Operator, partition: Partition, key: PRNGKey, *, samples: int = 48
) -> Estimate:
    """The same of an operator, without its matrix: 1 - sum_b |(A z_b)_b|^2 / |A z|^2 in the mean over Rademacher z.

    z_b is z within block b and zero elsewhere, so that a sample takes one product more than there are blocks; the
    standard error of the ratio of means is the jackknife's. Raises `ValueError` for a partition of another length.
    """
    check_key(key)
    check_whole(samples=samples)
    labels = _labels(partition, operator.dimension)
    squares = _squares(operator.in_order(), labels, int(labels.max()) + 1, jax.random.split(key, samples))
    total = jnp.sum(squares, axis=0)
    left_out = (total[None] - squares) / max(samples - 1, 1)
    shares = 1 - left_out[:, 0] / left_out[:, 1]
    error = jnp.sqrt((samples - 1) * jnp.mean((shares - jnp.mean(shares)) ** 2))
    return Estimate(1 - total[0] / total[1], error if samples > 1 else jnp.full_like(error, jnp.inf), samples)


@jax.jit(static_argnums=2)
def _squares(operator: Operator, labels: Array, blocks: int, keys: Array) -> Float[Array, "samples 2"]:
    def one(key: Array) -> Array:
        z = operator.sample(jax.random.rademacher, key)

        def within(block: Array) -> Array:
            inside = labels == block
            return jnp.sum(jnp.where(inside, operator.flat_mv(jnp.where(inside, z, 0)), 0) ** 2)

        return jnp.stack([jnp.sum(jax.lax.map(within, jnp.arange(blocks))), jnp.sum(operator.flat_mv(z) ** 2)])

    return jax.lax.map(one, keys)


def solve_blocks(
    matrix: Float[Array, "n n"], partition: Partition, vector: Float[Array, " n"], damping: float
) -> Float[Array, " n"]:
    """(B + damping I)^-1 vector, B the block diagonal of a matrix. Raises `ValueError` for a singular B + damping I."""
    labels = np.asarray(_labels(partition, len(matrix)))
    whole, right = np.asarray(matrix), np.asarray(vector)
    found = np.zeros_like(right)
    for block in np.unique(labels):
        inside = np.flatnonzero(labels == block)
        own = whole[np.ix_(inside, inside)] + damping * np.eye(len(inside), dtype=whole.dtype)
        try:
            found[inside] = np.linalg.solve(own, right[inside])
        except np.linalg.LinAlgError as error:
            raise ValueError(
                f"block {block} of {len(inside)} parameters is singular at damping {damping}. Raise the damping."
            ) from error
    return jnp.asarray(found)


def _labels(partition: Partition, size: int) -> Int[Array, " n"]:
    if np.shape(partition) != (size,):
        raise ValueError(f"partition has shape {np.shape(partition)}; expected ({size},), one integer a parameter.")
    return jnp.asarray(partition)
