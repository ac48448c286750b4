"""What is measured during training: a probe is a small pure function taken inside the training scan."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import optax
from jaxtyping import Array

from attnlab.objective import Objective
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
        start: `start(params) -> memory` before the first measurement.
    """

    measure: Callable[[Objective, TrainingState, Any, PRNGKey], tuple[PyTree, Any]]
    start: Callable[[Params], Any] = lambda params: ()


def probe(function: Callable[[Objective, Params], PyTree]) -> Probe:
    """The probe that measures `function(risk, params) -> pytree of arrays` and remembers nothing."""
    return Probe(lambda risk, state, memory, key: (function(risk, state.params), memory))
