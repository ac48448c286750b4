"""What is measured during training: a probe is a small pure function taken inside the training scan."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import Array

from attnlab.objective import Objective
from attnlab.trees import leaf_names
from attnlab.types import Params, PRNGKey, PyTree


class TrainingState(NamedTuple):
    """All that a training run carries from step to step: saved and restored whole.

    `memory` holds, by probe name, what each probe keeps between its measurements (a warm start, say).
    """

    step: Array
    params: Params
    optimizer_state: optax.OptState
    key: PRNGKey
    memory: dict[str, PyTree]


@dataclass(frozen=True)
class Probe:
    """A measurement taken every so many steps inside the training scan.

    Attributes:
        measure: `measure(risk, state, memory, key) -> (values, memory)`, pure; `values` is a pytree of arrays whose
            shapes do not depend on the data, `memory` has one structure throughout.
        start: `start(risk, state, key) -> memory`, once before the first step; the memory in `state` is still empty.
    """

    measure: Callable[[Objective, TrainingState, Any, PRNGKey], tuple[PyTree, Any]]
    start: Callable[[Objective, TrainingState, PRNGKey], Any] = lambda risk, state, key: ()


def probe(function: Callable[[Objective, Params], PyTree]) -> Probe:
    """The probe that measures `function(risk, params) -> pytree of arrays` and remembers nothing."""
    return Probe(_WithoutMemory(function))


@dataclass(frozen=True)
class _WithoutMemory:
    """Hashed by the function, so that probes of one function share one compiled loop."""

    function: Callable[[Objective, Params], PyTree]

    def __call__(self, risk: Objective, state: TrainingState, memory: Any, key: PRNGKey) -> tuple[PyTree, Any]:
        return self.function(risk, state.params), memory


def summary(values: dict[str, PyTree], members: int | None = None) -> str:
    """What probes measured at one step, in a line: each number by its name, of a vector the last entry, which of
    eigenvalues is the highest; of an ensemble, whose leaves have an axis of `members` first, the median over those that
    are finite. What has more axes is left out."""
    shown = []
    for name, leaf in zip(leaf_names(values), jax.tree.leaves(values), strict=True):
        entry = np.asarray(leaf) if members is None or np.ndim(leaf) == 0 else _median(leaf)
        if entry.ndim < 2 and entry.size:
            shown.append(f"{name} {entry.ravel()[-1]:.4g}")
    return " ".join(shown)


def _median(leaf: Array) -> np.ndarray:
    """Over the members, finite ones alone: NaN where there is none."""
    finite = np.ma.masked_invalid(np.asarray(leaf, float))
    return np.asarray(np.ma.filled(np.ma.median(finite, axis=0), np.nan))
