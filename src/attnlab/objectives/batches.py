"""An objective over batches that do not fit in memory together: read one at a time, from inside jitted code.

A product with its Hessian is the weighted sum of the batches' products; nothing is kept between two batches but the
sum, so that memory is that of the largest batch.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from attnlab.checks import check_finite, check_not_empty
from attnlab.display import Words, line, whatever_it_holds
from attnlab.objectives.in_memory import Objective, as_partial, loss_name, objective
from attnlab.types import LossFunction, Params, Predict, PyTree

Batch = tuple[PyTree, PyTree] | tuple[PyTree, PyTree, PyTree] | Mapping[str, PyTree]
"""Inputs and targets, and weights where there are any; or a mapping from these three names."""

Arrays = tuple[PyTree, PyTree, PyTree]
"""Inputs, targets and weights (None without) as NumPy arrays."""

NAMES = ("inputs", "targets", "weights")


class _Group(NamedTuple):
    """Consecutive batches of one shape, and their shares in the risk: one compiled loop serves them."""

    numbers: np.ndarray
    shares: np.ndarray
    shapes: Any


class Feed:
    """Batches by number, out of anything that can be read again from its beginning; equal only to itself."""

    def __init__(self, batches: Iterable[Batch], total: Callable[[Arrays], float]):
        """Reads all batches once; `total` says what one weighs in the mean."""
        if isinstance(batches, Iterator):
            raise TypeError(
                f"batches is a {type(batches).__name__}, which can be read only once; every product reads all of them. "
                "Pass a list, a dataset with __getitem__ and __len__, or an object whose __iter__ starts afresh."
            )
        if not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
            raise TypeError(f"batches is {batches!r}; expected an iterable of pairs (inputs, targets).")
        self._batches = batches
        self._indexed = hasattr(batches, "__getitem__") and hasattr(batches, "__len__")
        self._next, self._iterator = 0, iter(batches)
        self.groups, self.digests = _survey(batches, total)

    @property
    def count(self) -> int:
        """How many batches there are."""
        return len(self.digests)

    def fetch(self, number: Any) -> Arrays:
        """Batch `number` as NumPy arrays; in ascending order each pass reads every batch once."""
        number = int(number)
        if self._indexed:
            return _as_arrays(self._batches[number], number)  # type: ignore[index]
        if number < self._next:
            self._next, self._iterator = 0, iter(self._batches)
        while True:
            batch, self._next = next(self._iterator), self._next + 1
            if self._next > number:
                return _as_arrays(batch, number)

    def check_again(self) -> None:
        """Read all batches a second time; raise `ValueError` for the first that differs."""
        for number, digest in enumerate(self.digests):
            try:
                same = _digest(self.fetch(number)) == digest
            except (StopIteration, IndexError):
                same = False
            if not same:
                raise ValueError(
                    f"batch {number} differs when it is read again (shuffling or random augmentation); expected the "
                    "same batches in the same order for every product. Fix the seed of the data."
                )


def _as_arrays(batch: Batch, number: int) -> Arrays:
    parts: Any = batch
    if isinstance(batch, Mapping):
        if not {"inputs", "targets"} <= set(batch) <= set(NAMES):
            raise ValueError(
                f"batch {number} is a mapping with the keys {sorted(map(str, batch))}; expected inputs and targets, "
                "and weights where there are any. Rename them, or give pairs (inputs, targets)."
            )
        parts = tuple(batch.get(name) for name in NAMES)
    if not isinstance(parts, (tuple, list)) or len(parts) not in (2, 3):
        what = f"{len(parts)} things" if isinstance(parts, (tuple, list)) else f"a {type(batch).__name__}"
        raise ValueError(
            f"batch {number} holds {what}; expected a pair (inputs, targets), or (inputs, targets, weights). Put "
            "several inputs into one tuple or dict."
        )
    inputs, targets, weights = jax.tree.map(_canonical, (*parts, None)[:3])
    return inputs, targets, weights


def _canonical(leaf: Any) -> np.ndarray:
    array = np.asarray(leaf)
    return array.astype(jax.dtypes.canonicalize_dtype(array.dtype))


def _digest(batch: Arrays) -> str:
    digest = hashlib.blake2b(str(jax.tree.structure(batch)).encode())
    for leaf in jax.tree.leaves(batch):
        digest.update(f"{leaf.shape}{leaf.dtype}".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def _survey(batches: Iterable[Batch], total: Callable[[Arrays], float]) -> tuple[tuple[_Group, ...], tuple[str, ...]]:
    """Read all batches once, check them; their groups, and a digest of the values of each."""
    shapes, totals, digests = [], [], []
    for number, read in enumerate(batches):
        batch = _as_arrays(read, number)
        for name, data in zip(NAMES, batch, strict=True):
            if name != "weights" or data is not None:
                check_not_empty(f"{name} of batch {number}", data)
                check_finite(f"{name} of batch {number}", data)
        shapes.append(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), batch))
        try:
            totals.append(total(batch))
        except (TypeError, ValueError) as error:
            raise type(error)(f"batch {number}: {error}") from error
        digests.append(_digest(batch))
    if not shapes:
        raise ValueError("batches holds no batch; expected at least one.")
    if not sum(totals) > 0:
        raise ValueError(
            f"no position counts: in all {len(totals)} batches every weight is zero or the target ignored; expected at "
            "least one that counts. Look at the weights, and at the label that the loss ignores."
        )
    shares = np.array(totals) / sum(totals)
    # A batch in which nothing counts is not read: its mean would be 0 / 0.
    counted = [number for number, share in enumerate(shares) if share > 0]
    runs = [list(run) for _, run in groupby(counted, key=lambda number: _Shapes(shapes[number]))]
    return tuple(_Group(np.array(run), shares[run], shapes[run[0]]) for run in runs), tuple(digests)


@dataclass(frozen=True)
class _Shapes:
    """Shapes and dtypes of a batch, compared as a whole."""

    tree: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Shapes) and self.tree == other.tree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BatchedObjective:
    """The risk over all batches, sum_b w_b loss(predict(params, inputs_b), targets_b).

    w_b is the share of batch b in the weights of the positions that count (in their number, without weights and ignored
    labels), so that with a loss that averages over these the risk is that of all data at once, however unequal the
    batches. For a loss that is not of `attnlab.losses`, positions are the entries of the targets. Takes the place of an
    `Objective` in training and in every operator of `curvature`. Build it with `batched(...)`.
    """

    predict: Partial
    loss: Partial
    feed: Feed = field(metadata={"static": True})

    @whatever_it_holds
    def __repr__(self) -> str:
        """The loss and the number of batches."""
        return line("BatchedObjective", loss=Words(loss_name(self.loss)), batches=self.feed.count)

    def __call__(self, params: Params) -> jax.Array:
        """The risk at `params`, a scalar in the scale of `loss`."""
        return self.total(lambda part: part(params))

    def total(self, function: Callable[[Objective], PyTree]) -> PyTree:
        """sum_b w_b function(objective of batch b), in compensated arithmetic (see `_add`)."""
        total: tuple[PyTree, PyTree] | None = None
        for group in self.feed.groups:

            def one(number: jax.Array, group: _Group = group) -> PyTree:
                batch = jax.pure_callback(self.feed.fetch, group.shapes, number, vmap_method="sequential")
                return function(Objective(self.predict, self.loss, *batch))

            # Rematerialised, so that a derivative of the sum does not save every batch.
            total = _weighted_sum(jax.checkpoint(one), group, total)
        assert total is not None  # a feed has at least one group
        return jax.tree.map(jnp.add, *total)

    def batch(self, number: int) -> Objective:
        """The objective of one batch, in memory."""
        inputs, targets, weights = self.feed.fetch(number)
        return objective(self.predict, self.loss, inputs, targets, weights=weights)

    def shape(self) -> Objective:
        """The objective of the first batch, shapes alone."""
        return Objective(self.predict, self.loss, *self.feed.groups[0].shapes)


Risk = Objective | BatchedObjective
"""What training and curvature take: an objective in memory, or one in batches."""


def _weighted_sum(
    function: Callable[[jax.Array], PyTree], group: _Group, total: tuple[PyTree, PyTree] | None
) -> tuple[PyTree, PyTree]:
    numbers = jnp.asarray(group.numbers, jnp.int32)
    if total is None:
        shapes = jax.eval_shape(function, numbers[0])
        zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        total = (zero, zero)

    def step(total: tuple[PyTree, PyTree], item: tuple[jax.Array, jax.Array]) -> tuple[tuple[PyTree, PyTree], None]:
        number, share = item
        terms = jax.tree.map(lambda leaf: share.astype(leaf.dtype) * leaf, function(number))
        sums = jax.tree.map(_add, *total, terms)
        return jax.tree.transpose(jax.tree.structure(terms), jax.tree.structure((0, 0)), sums), None

    return jax.lax.scan(step, total, (numbers, jnp.asarray(group.shares)))[0]


def _add(total: jax.Array, lost: jax.Array, term: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Add `term`, and to `lost` what the addition rounds off (Knuth's TwoSum), so that the order of the batches and
    their number change no more than the last bit of total + lost."""
    new = total + term
    shadow = new - total
    return new, lost + ((total - (new - shadow)) + (term - shadow))


def batched(predict: Predict, loss: LossFunction, batches: Iterable[Batch]) -> BatchedObjective:
    """The risk of data that is read batch by batch: `batches` gives pairs (inputs, targets), of any sizes.

    Or triples (inputs, targets, weights), or mappings from these names; each is what an `objective` takes, in any
    pytree. `loss` averages over the entries (or positions) of its targets, and is given the weights where there are
    any; a batch then counts by the sum of its weights, and under a loss that ignores a label by the positions that are
    left. `batches` is read once here, to check and to weigh it, again when an operator is built, and then once for
    every product: a list, a dataset with `__getitem__` and `__len__`, or any object whose `__iter__` starts afresh and
    gives the same batches again. Consecutive batches of one shape share a compiled loop, so put the batches of other
    shapes (a smaller last one) together. On one device.

    Raises `TypeError` for a one-time iterator; `ValueError` for no batch, or for one that is empty, not finite or of
    another structure.

    Example:
        >>> import attnlab as al
        >>> import jax.numpy as jnp
        >>> batches = [(jnp.array([[1.0, 0.0]]), jnp.zeros(1)), (jnp.array([[0.0, 1.0]]), jnp.zeros(1))]
        >>> parts = al.batched(lambda params, x: x @ params, al.square_loss, batches)
        >>> al.hessian(parts, jnp.ones(2)).dense().tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    predict, loss = as_partial(predict), as_partial(loss)

    def total(batch: Arrays) -> float:
        inputs, targets, weights = batch
        return float(objective(predict, loss, inputs, targets, weights=weights).total())

    return BatchedObjective(predict, loss, Feed(batches, total))
