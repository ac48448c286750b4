"""Risks in their matrices alone, for optimizers that have no step for vectors."""

from collections import OrderedDict
from dataclasses import dataclass, replace

import jax
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array

from attnlab.objectives import Objective
from attnlab.trees import Selection, leaf_names
from attnlab.types import Params, PyTree


def matrices_alone(risk: Objective, params: Params) -> tuple[Objective, OrderedDict[str, Array]]:
    """The risk as a function of the leaves of two axes or more, by name; scales and biases stay where they are.

    Raises `ValueError` where there is no such leaf.
    """
    names, leaves = leaf_names(params), jax.tree.leaves(params)
    positions = tuple(place for place, leaf in enumerate(leaves) if np.ndim(leaf) >= 2)
    if not positions:
        raise ValueError(f"params has the leaves {', '.join(names)}, none of two axes; expected at least one matrix.")
    chosen = Selection(jax.tree.structure(params), positions, tuple(names[place] for place in positions))
    return replace(risk, predict=Partial(_Completed(chosen), risk.predict, params)), chosen.take(params)


@dataclass(frozen=True)
class _Completed:
    chosen: Selection

    def __call__(self, predict: Partial, fixed: Params, block: OrderedDict[str, Array], inputs: PyTree) -> PyTree:
        return predict(self.chosen.put(fixed, block), inputs)
