"""Minibatches for the training loop."""

from dataclasses import dataclass, replace

import jax

from attnlab.checks import check_positive, check_range
from attnlab.objective import Objective
from attnlab.types import PRNGKey


@dataclass(frozen=True)
class _Minibatches:
    """Hashed by its size, so that equal choices share one compiled loop."""

    size: int

    def __call__(self, key: PRNGKey, risk: Objective) -> Objective:
        count = jax.tree.leaves(risk.inputs)[0].shape[0]
        check_range("size", self.size, 1, count, f"There are {count} examples.")
        rows = jax.random.choice(key, count, (self.size,), replace=False)
        inputs, targets = jax.tree.map(lambda leaf: leaf[rows], (risk.inputs, risk.targets))
        return replace(risk, inputs=inputs, targets=targets)


def minibatches(size: int) -> _Minibatches:
    """A `resample` for `train`: each step sees `size` examples (rows of inputs and targets), drawn without
    replacement, afresh at every step. Raises `ValueError` for a size that is not positive, or above the data's."""
    check_positive(size=size)
    return _Minibatches(size)
