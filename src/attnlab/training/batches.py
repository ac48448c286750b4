"""Minibatches for the training loop."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from attnlab.checks import check_positive, check_range
from attnlab.objectives import BatchedObjective, Objective
from attnlab.types import PRNGKey


@dataclass(frozen=True)
class _Minibatches:
    """Hashed by its size, so that equal choices share one compiled loop."""

    size: int

    def __call__(self, key: PRNGKey, risk: Objective) -> Objective:
        if isinstance(risk, BatchedObjective):
            raise TypeError(
                "risk is a BatchedObjective, whose rows are not in memory; expected an Objective. Leave minibatches "
                "out: each step then reads all batches."
            )
        count = jax.tree.leaves(risk.inputs)[0].shape[0]
        check_range("size", self.size, 1, count, f"There are {count} examples.")
        rows = _distinct_rows(key, count, self.size)
        return risk.on(lambda leaf: leaf[rows])


def _distinct_rows(key: PRNGKey, count: int, size: int) -> Int[Array, " size"]:
    """`size` different numbers below `count`, every set of them as likely as another."""
    if 8 * size > count:
        return jax.random.choice(key, count, (size,), replace=False)
    # That sorts all `count`, at every step: 23 ms of 60,000. Of few rows Floyd's algorithm draws each from a range that
    # grows by one, and takes the new last number where the draw was there before (Bentley, Floyd 1987).
    last = count - size + jnp.arange(size)
    draws = jax.random.randint(key, (size,), 0, last + 1)

    def put(i: Array, rows: Array) -> Array:
        return rows.at[i].set(jnp.where((rows == draws[i]).any(), last[i], draws[i]))

    return jax.lax.fori_loop(0, size, put, jnp.full_like(draws, -1))


def minibatches(size: int) -> _Minibatches:
    """A `resample` for `train`: each step sees `size` examples (rows of inputs, targets and weights), drawn without
    replacement, afresh at every step. With weights or ignored labels each is a mean over its own positions that count,
    and NaN where none of a batch does. Raises `ValueError` for a size that is not positive, or above the data's.

    Example:
        >>> import attnlab as al
        >>> import jax.numpy as jnp
        >>> inputs = jnp.diag(jnp.array([1.0, 2.0]))
        >>> risk = al.objective(lambda params, x: x @ params, al.square_loss, inputs, jnp.zeros(2))
        >>> import jax
        >>> import optax
        >>> options = {"steps": 4, "every": 2, "resample": al.minibatches(1)}
        >>> al.train(risk, jnp.ones(2), optax.sgd(0.1), jax.random.key(0), **options).records.steps.tolist()
        [0, 2, 4]
    """
    check_positive(size=size)
    return _Minibatches(int(size))
