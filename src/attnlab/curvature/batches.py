"""An objective over batches that do not fit in memory together: read one at a time, from inside jitted code.

A product with its Hessian is the weighted sum of the batches' products; nothing is kept between two batches but the
sum, so that memory is that of the largest batch.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from attnlab.checks import check_finite, check_not_empty
from attnlab.objective import Objective, as_partial, objective
from attnlab.types import Loss, Params, Predict, PyTree

Batch = tuple[PyTree, PyTree]
"""Inputs and targets."""


class _Group(NamedTuple):
    """Consecutive batches of one shape: one compiled loop serves them."""

    numbers: np.ndarray
    weights: np.ndarray
    shapes: Any


class Feed:
    """Batches by number, out of anything that can be read again from its beginning; equal only to itself."""

    def __init__(self, batches: Iterable[Batch]):
        if isinstance(batches, Iterator):
            raise TypeError(
                f"batches is a {type(batches).__name__}, which can be read only once; every product reads all of them. "
                "Pass a list, a dataset with __getitem__ and __len__, or an object whose __iter__ starts afresh."
            )
        self._batches = batches
        self._indexed = hasattr(batches, "__getitem__") and hasattr(batches, "__len__")
        self._next, self._iterator = 0, iter(batches)
        self.groups, self.digest = _survey(batches)

    @property
    def count(self) -> int:
        """How many batches there are."""
        return sum(len(group.numbers) for group in self.groups)

    def fetch(self, number: Any) -> Batch:
        """Batch `number` as NumPy arrays; in ascending order each pass reads every batch once."""
        number = int(number)
        if self._indexed:
            return _as_arrays(self._batches[number])  # type: ignore[index]
        if number < self._next:
            self._next, self._iterator = 0, iter(self._batches)
        while True:
            batch, self._next = next(self._iterator), self._next + 1
            if self._next > number:
                return _as_arrays(batch)


def _as_arrays(batch: Batch) -> Batch:
    inputs, targets = (jax.tree.map(_canonical, part) for part in batch)
    return inputs, targets


def _canonical(leaf: Any) -> np.ndarray:
    array = np.asarray(leaf)
    return array.astype(jax.dtypes.canonicalize_dtype(array.dtype))


def _survey(batches: Iterable[Batch]) -> tuple[tuple[_Group, ...], str]:
    """Read all batches once, check them; their groups, and a digest of all values."""
    shapes, sizes, digest = [], [], hashlib.blake2b()
    for number, batch in enumerate(batches):
        batch = _as_arrays(batch)
        for name, data in zip(("inputs", "targets"), batch, strict=True):
            check_not_empty(f"{name} of batch {number}", data)
            check_finite(f"{name} of batch {number}", data)
        shapes.append(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), batch))
        sizes.append(sum(leaf.size for leaf in jax.tree.leaves(batch[1])))
        for leaf in jax.tree.leaves(batch):
            digest.update(np.ascontiguousarray(leaf).data)
    if not shapes:
        raise ValueError("batches holds no batch; expected at least one.")
    weights = np.array(sizes) / sum(sizes)
    starts = [i for i in range(len(shapes)) if i == 0 or shapes[i] != shapes[i - 1]]
    runs = [np.arange(a, b) for a, b in zip(starts, [*starts[1:], len(shapes)], strict=True)]
    return tuple(_Group(run, weights[run], shapes[run[0]]) for run in runs), digest.hexdigest()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BatchedObjective:
    """The risk over all batches, sum_b w_b loss(predict(params, inputs_b), targets_b).

    w_b is the share of batch b in the number of target entries, so that with a loss that averages over entries the
    risk is that of all data at once, however unequal the batches. Takes the place of an `Objective` in every
    operator of `curvature`. Build it with `batched(...)`.
    """

    predict: Partial
    loss: Partial
    feed: Feed = field(metadata={"static": True})

    def __call__(self, params: Params) -> jax.Array:
        """The risk at `params`, a scalar in the scale of `loss`."""
        return self.total(lambda part: part(params))

    def total(self, function: Callable[[Objective], PyTree]) -> PyTree:
        """sum_b w_b function(objective of batch b), in compensated arithmetic (see `_add`)."""
        total: tuple[PyTree, PyTree] | None = None
        for group in self.feed.groups:

            def one(number: jax.Array, group: _Group = group) -> PyTree:
                inputs, targets = jax.pure_callback(self.feed.fetch, group.shapes, number, vmap_method="sequential")
                return function(Objective(self.predict, self.loss, inputs, targets))

            # Rematerialised, so that a derivative of the sum does not save every batch.
            total = _weighted_sum(jax.checkpoint(one), group, total)
        assert total is not None  # a feed has at least one group
        return jax.tree.map(jnp.add, *total)

    def batch(self, number: int) -> Objective:
        """The objective of one batch, in memory."""
        return objective(self.predict, self.loss, *self.feed.fetch(number))


def _weighted_sum(
    function: Callable[[jax.Array], PyTree], group: _Group, total: tuple[PyTree, PyTree] | None
) -> tuple[PyTree, PyTree]:
    numbers = jnp.asarray(group.numbers, jnp.int32)
    if total is None:
        shapes = jax.eval_shape(function, numbers[0])
        zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        total = (zero, zero)

    def step(total: tuple[PyTree, PyTree], item: tuple[jax.Array, jax.Array]) -> tuple[tuple[PyTree, PyTree], None]:
        number, weight = item
        terms = jax.tree.map(lambda leaf: weight.astype(leaf.dtype) * leaf, function(number))
        sums = jax.tree.map(_add, *total, terms)
        return jax.tree.transpose(jax.tree.structure(terms), jax.tree.structure((0, 0)), sums), None

    return jax.lax.scan(step, total, (numbers, jnp.asarray(group.weights)))[0]


def _add(total: jax.Array, lost: jax.Array, term: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Add `term`, and to `lost` what the addition rounds off (Knuth's TwoSum), so that the order of the batches and
    their number change no more than the last bit of total + lost."""
    new = total + term
    shadow = new - total
    return new, lost + ((total - (new - shadow)) + (term - shadow))


def batched(predict: Predict, loss: Loss, batches: Iterable[Batch]) -> BatchedObjective:
    """The risk of data that is read batch by batch: `batches` gives pairs (inputs, targets), of any sizes.

    `loss` averages over the entries (or positions) of its targets. `batches` is read once here, to check it and to
    weigh it, then once for every product: a list, a dataset with `__getitem__` and `__len__`, or any object whose
    `__iter__` starts afresh and gives the same batches again. Consecutive batches of one shape share a compiled
    loop, so put the batches of other shapes (a smaller last one) together. On one device.

    Raises `TypeError` for a one-time iterator; `ValueError` for no batch, or for one that is empty or not finite.
    """
    return BatchedObjective(as_partial(predict), as_partial(loss), Feed(batches))
