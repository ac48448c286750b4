"""Whether data may be cut into batches: examples must not see each other, and the loss must be a mean over them."""

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.curvature.batches import BatchedObjective
from attnlab.objective import Objective
from attnlab.types import Params, PyTree


def check_batches(risk: BatchedObjective, params: Params) -> None:
    """Raise `ValueError` where the sum over batches would not be the risk of all data: batches that read differently
    the second time, outputs that depend on the rest of the batch, a loss that is not a mean. Looks at the first batch.
    """
    first, second = risk.feed.fetch(0), risk.feed.fetch(0)
    if any(not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)):
        raise ValueError(
            "batch 0 differs when it is read again (shuffling or random augmentation); expected the same batches in "
            "the same order for every product. Fix the seed of the data."
        )
    discrepancy, culprit = check_examples(risk.batch(0), params)
    if not discrepancy <= float(jnp.finfo(jnp.result_type(*jax.tree.leaves(params))).eps) ** 0.5:
        raise ValueError(f"the risk is not a mean over batches: {culprit} Relative discrepancy {discrepancy:.2g}.")


def check_examples(risk: Objective, params: Params) -> tuple[float, str]:
    """The relative discrepancy between a batch and its two parts, cut along the first axis, and its likely culprit.

    Outputs are compared first, then the loss. A batch of one example has no parts: discrepancy zero.
    """
    count = {np.shape(leaf)[:1] for leaf in jax.tree.leaves((risk.inputs, risk.targets))}
    if len(count) != 1 or not (size := next(iter(count))) or size[0] < 2:
        return 0.0, ""
    cut = max(1, size[0] // 3)  # unequal parts, so that a mean of means is found out
    parts = [
        Objective(risk.predict, risk.loss, *_slice((risk.inputs, risk.targets), ends))
        for ends in (slice(None, cut), slice(cut, None))
    ]
    whole, (first, rest) = _outputs(risk, params), [_outputs(part, params) for part in parts]
    joined = jax.tree.map(lambda a, b: np.concatenate([a, b]) if np.ndim(a) else a, first, rest)
    discrepancy = _distance(joined, whole)
    if discrepancy > float(np.finfo(jax.tree.leaves(whole)[0].dtype).eps) ** 0.5:
        return discrepancy, _culprit(risk, params)
    losses = [float(_loss(part, outputs)) for part, outputs in zip((risk, *parts), (whole, first, rest), strict=True)]
    mean = (cut * losses[1] + (size[0] - cut) * losses[2]) / size[0]
    scale = max(abs(losses[0]), abs(mean), 1e-300)
    return abs(losses[0] - mean) / scale, "the loss of a batch is not the mean over its examples. Average, do not sum."


def _culprit(risk: Objective, params: Params) -> str:
    """Why examples see each other: copies of one example in one batch differ under dropout, not under batch norm."""
    copies = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), risk.inputs)
    outputs = _outputs(Objective(risk.predict, risk.loss, copies, risk.targets), params)
    same = jax.tree.map(lambda leaf: np.broadcast_to(leaf[:1], leaf.shape), outputs)
    if _distance(same, outputs) > 1e-3:
        return "outputs depend on the place in the batch (dropout, even with a fixed key). Switch it off."
    return "outputs depend on the other examples (batch norm in training mode). Use its running averages."


def _slice(tree: PyTree, ends: slice) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[ends], tree)


@jax.jit
def _outputs_jitted(risk: Objective, params: Params) -> PyTree:
    return risk.outputs(params)


def _outputs(risk: Objective, params: Params) -> PyTree:
    return jax.tree.map(np.asarray, _outputs_jitted(risk, params))


@jax.jit
def _loss(risk: Objective, outputs: PyTree) -> jax.Array:
    return risk.loss(outputs, risk.targets)


def _distance(found: PyTree, expected: PyTree) -> float:
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))
    if any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    difference = sum(float(np.sum((a - b) ** 2)) for a, b in pairs)
    return (difference / max(sum(float(np.sum(b**2)) for _, b in pairs), 1e-300)) ** 0.5
