"""The loss by how frequent the target token is: where imbalance slows an optimizer down."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from attnlab.checks import check_positive
from attnlab.objective import Objective
from attnlab.training.probe import Probe, probe
from attnlab.types import Params


def frequency_groups(tokens: Int[Array, "..."], vocabulary: int, groups: int) -> Int[Array, " vocabulary"]:
    """The group of each symbol: 0 holds the most frequent, and each about an equal share of all `tokens` (Kunstner et
    al., arXiv 2402.19449, section 1). A symbol that alone exceeds a share fills its group, so some may stay empty;
    symbols that never occur are in the last."""
    check_positive(vocabulary=vocabulary, groups=groups)
    counts = np.bincount(np.asarray(tokens).ravel(), minlength=vocabulary)
    order = np.argsort(-counts, kind="stable")
    middle = (np.cumsum(counts[order]) - counts[order] / 2) / max(counts.sum(), 1)
    group = np.empty(vocabulary, dtype=np.int32)
    group[order] = np.minimum((middle * groups).astype(np.int32), groups - 1)
    group[counts == 0] = groups - 1
    return jnp.asarray(group)


def group_losses(groups: Int[Array, " vocabulary"], count: int) -> Probe:
    """Probe: the mean cross-entropy of the targets in each group, `loss` (count,), and the `share` (count,) of all
    targets that it holds: share . loss is the whole loss. The loss of an empty group is 0.

    For objectives with logits as outputs and whole numbers as targets; raises `TypeError` for others. Raises
    `ValueError` for a group that is not one of the whole numbers below `count`, and before training starts where the
    outputs have another number of classes than there are `groups`.
    """
    check_positive(count=count)
    table = np.asarray(groups)
    if table.ndim != 1 or not np.issubdtype(table.dtype, np.integer):
        raise ValueError(f"groups has shape {table.shape} and dtype {table.dtype}; expected a whole number a class.")
    if table.size == 0 or table.min() < 0 or table.max() >= count:
        held = f"{table.min()} to {table.max()}" if table.size else "nothing"
        raise ValueError(
            f"groups holds {held} and count is {count}; expected groups 0 to {count - 1}. Raise count, or number the "
            "groups from 0."
        )
    return probe(_GroupLosses(tuple(table.tolist()), count))


@dataclass(frozen=True)
class _GroupLosses:
    groups: tuple[int, ...]
    count: int

    def __call__(self, risk: Objective, params: Params) -> dict[str, Float[Array, " count"]]:
        if not jnp.issubdtype(risk.targets.dtype, jnp.integer):
            raise TypeError(f"targets have dtype {risk.targets.dtype}; losses by group expect labels, whole numbers.")
        outputs = risk.outputs(params)
        if outputs.shape[-1] != len(self.groups):
            raise ValueError(
                f"groups has {len(self.groups)} entries and the outputs have {outputs.shape[-1]} classes; expected one "
                "group a class. Build it with frequency_groups(tokens, vocabulary, groups) for this vocabulary."
            )
        log_probabilities = jax.nn.log_softmax(outputs, axis=-1)
        losses = -jnp.take_along_axis(log_probabilities, risk.targets[..., None], axis=-1).ravel()
        group = jnp.asarray(self.groups)[risk.targets].ravel()
        totals = jnp.zeros(self.count, losses.dtype).at[group].add(losses)
        held = jnp.zeros(self.count, losses.dtype).at[group].add(jnp.ones_like(losses))
        return {"loss": totals / jnp.maximum(held, 1), "share": held / losses.size}
