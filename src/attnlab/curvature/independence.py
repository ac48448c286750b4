"""Whether data may be cut into batches: examples must not see each other, and the loss must be a mean over them."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.logits import map_examples, with_examples
from attnlab.objectives import BatchedObjective, Objective, check_loss, check_objective
from attnlab.types import Params, PyTree


def check_batches(risk: BatchedObjective, params: Params) -> None:
    """Raise `ValueError` where the sum over batches would not be the risk of all data: batches that read differently
    the second time, outputs that depend on the rest of the batch, a loss that is not a mean over the positions that
    count, or not finite. Looks at every batch, at the price of two evaluations of the risk."""
    risk.feed.check_again()
    limit = float(jnp.finfo(jnp.result_type(*jax.tree.leaves(params))).eps) ** 0.5
    for number in (int(number) for group in risk.feed.groups for number in group.numbers):
        part = risk.batch(number)
        try:
            check_objective(part, params)
            check_loss(_value(part, params))
        except (TypeError, ValueError) as error:
            raise type(error)(f"batch {number}: {error}") from error
        discrepancy, culprit = check_examples(part, params)
        if not discrepancy <= limit:
            raise ValueError(
                f"the risk is not a mean over batches, seen in batch {number}: {culprit} Relative discrepancy "
                f"{discrepancy:.2g}."
            )


@jax.jit
def _value(risk: Objective, params: Params) -> jax.Array:
    return risk(params)


def check_examples(risk: Objective, params: Params) -> tuple[float, str]:
    """The relative discrepancy between a batch and its parts, cut along the first axis, and its likely culprit.

    The outputs of a part alone are compared first, then the loss of the whole with the mean over its parts. A batch of
    one example has no parts, nor has one that the model or the loss takes in no other size: discrepancy zero.
    """
    count = {np.shape(leaf)[:1] for leaf in jax.tree.leaves((risk.inputs, *risk.answers))}
    if len(count) != 1 or not (size := next(iter(count))) or size[0] < 2:
        return 0.0, ""
    try:
        jax.eval_shape(_compare_part, risk, params)
    except Exception:  # whatever a model raises on a part, it raises while it is traced, and it takes no parts
        return 0.0, ""
    outputs, loss = (float(error) for error in _compare_part(risk, params))
    if not outputs <= float(jnp.finfo(jnp.result_type(*jax.tree.leaves(params))).eps) ** 0.5:
        return outputs, _culprit(risk, params)
    return loss, (
        "the loss of a batch is not the mean over its examples. Average, do not sum; where some positions do not "
        "count, say so by weights, or by a loss like cross_entropy.ignoring(label)."
    )


@jax.jit
def _compare_part(risk: Objective, params: Params) -> tuple[jax.Array, jax.Array]:
    """The relative discrepancies of the outputs and of the loss."""
    size = len(jax.tree.leaves(risk.inputs)[0])
    # The middle alone: it misses those before it and those after it. Unequal parts, so that a mean of means shows.
    ends = [0, max(1, size // 3), max(2, size - 1), size]
    whole, middle = risk.outputs(params), risk.predict(params, _rows_of(risk.inputs, size, *ends[1:3]))
    if any(jnp.ndim(leaf) == 0 or len(leaf) % size for leaf in with_examples(whole)):
        return jnp.asarray(jnp.inf), jnp.asarray(jnp.inf)  # outputs of no example: of the batch
    mean, total = jnp.zeros(()), risk.total()
    for start, stop in pairwise(ends):
        if start < stop:
            rows = partial(_rows, size=size, start=start, stop=stop)
            part = risk.on(rows)
            share = part.total() / total
            score = part.score(map_examples(rows, whole)).astype(float)
            mean += jnp.where(share > 0, share.astype(float) * score, 0)  # the mean over no position is 0 / 0
    loss = risk.score(whole).astype(float)
    scale = jnp.maximum(jnp.abs(loss), jnp.abs(mean))
    difference = _distance(middle, _rows_of(whole, size, *ends[1:3]))
    return difference, jnp.abs(loss - mean) / jnp.where(scale > 0, scale, 1)


def _rows(leaf: jax.Array, size: int, start: int, stop: int) -> jax.Array:
    """Examples `start` to `stop` of `size`, of which each has one row or several."""
    return leaf[start * len(leaf) // size : stop * len(leaf) // size]


def _rows_of(tree: PyTree, size: int, start: int, stop: int) -> PyTree:
    return map_examples(lambda leaf: _rows(leaf, size, start, stop), tree)


def _culprit(risk: Objective, params: Params) -> str:
    """Why examples see each other: copies of one example in one batch differ under dropout, not under batch norm."""
    copies = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), risk.inputs)
    outputs = jax.jit(risk.predict)(params, copies)
    same = map_examples(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), outputs)
    if _distance(same, outputs) > 1e-3:
        return "outputs depend on the place in the batch (dropout, even with a fixed key). Switch it off."
    return "outputs depend on the other examples (batch norm in training mode). Use its running averages."


def _distance(found: PyTree, expected: PyTree) -> jax.Array:
    pairs = list(zip(with_examples(found), with_examples(expected), strict=True))
    differences = jnp.stack([jnp.sum((a - b).astype(float) ** 2) for a, b in pairs])
    sizes = jnp.stack([jnp.sum(b.astype(float) ** 2) for _, b in pairs])
    size = jnp.sum(sizes)
    return jnp.sqrt(jnp.sum(differences) / jnp.where(size > 0, size, 1))
