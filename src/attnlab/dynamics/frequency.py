"""The loss by how frequent the target token is: where imbalance slows an optimizer down."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from attnlab.checks import check_positive
from attnlab.losses import cross_entropy
from attnlab.objectives import Objective, known_loss
from attnlab.training.probe import Probe, probe
from attnlab.types import Params, PyTree


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


def group_prediction(risk: Objective, groups: Int[Array, " vocabulary"], count: int) -> Objective:
    """The same inputs with balanced classes: the group of the target symbol takes the place of the symbol.

    The negative control of class imbalance: with the groups of `frequency_groups` a target is one of `count` classes of
    about equal frequency: that of the thousand rarest words is as frequent as that of the commonest. The first `count`
    outputs of the model are the logits.
    """
    return replace(risk, predict=Partial(_FirstOutputs(count), risk.predict), targets=groups[risk.targets])


@dataclass(frozen=True)
class _FirstOutputs:
    """Hashed by its count, so that equal choices share one compiled loop."""

    count: int

    def __call__(self, predict: Partial, params: Params, inputs: PyTree) -> Float[Array, "*batch count"]:
        return predict(params, inputs)[..., : self.count]


def group_losses(groups: Int[Array, " vocabulary"], count: int) -> Probe:
    """Probe: the mean cross-entropy of the targets in each group, `loss` (count,), and the `share` (count,) of all
    targets that it holds: share . loss is the whole loss. With weights or ignored labels both are weighted. The loss of
    an empty group is 0.

    For objectives with logits as outputs and whole numbers as targets, whose first axis is the examples'; raises
    `TypeError` for other targets. Raises `ValueError` for a group that is not one of the whole numbers below `count`,
    and before training starts where the outputs have another number of classes than there are `groups`.
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
        # in parts: the logits of a whole text on a large vocabulary, of every member of an ensemble, are gigabytes
        counts = _counts(risk)
        data = jax.tree.map(lambda leaf: leaf[:, None], (risk.inputs, risk.targets, counts))
        totals, held = jax.lax.map(lambda part: self._sums(risk, params, *part), data, batch_size=32)
        held = held.sum(axis=0)
        return {"loss": totals.sum(axis=0) / jnp.where(held > 0, held, 1), "share": held / held.sum()}

    def _sums(
        self, risk: Objective, params: Params, inputs: PyTree, targets: Array, counts: Array
    ) -> tuple[Array, Array]:
        """Weighted sum of the losses in each group, and the weight of the targets that it holds."""
        outputs = risk.predict(params, inputs)
        if outputs.shape[-1] != len(self.groups):
            raise ValueError(
                f"groups has {len(self.groups)} entries and the outputs have {outputs.shape[-1]} classes; expected one "
                "group a class. Build it with frequency_groups(tokens, vocabulary, groups) for this vocabulary."
            )
        counts, labels = counts.astype(outputs.dtype), jnp.where(counts > 0, targets, 0)
        losses = counts * cross_entropy.entries(outputs, labels)
        group, nothing = jnp.asarray(self.groups)[labels].ravel(), jnp.zeros(self.count, losses.dtype)
        return nothing.at[group].add(losses.ravel()), nothing.at[group].add(counts.ravel())


def _counts(risk: Objective) -> Float[Array, "*batch"]:
    """What every target counts in the risk: its weight, zero for an ignored label."""
    full = (known_loss(risk.loss) or cross_entropy).weights(risk.targets, risk.weights, jnp.result_type(float))
    return jnp.ones(risk.targets.shape) if full is None else full
