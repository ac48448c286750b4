"""What is measured during training: a probe is a small pure function taken inside the training scan."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import Array

from attnlab.checks import check_arrays
from attnlab.display import line, parameters, whatever_it_holds
from attnlab.objectives import Risk
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

    @whatever_it_holds
    def __repr__(self) -> str:
        """The step, and the size of the parameters."""
        return line("TrainingState", step=self.step, params=parameters(self.params), memory=list(self.memory))


@dataclass(frozen=True)
class Probe:
    """A measurement taken every so many steps inside the training scan.

    Attributes:
        measure: `measure(risk, state, memory, key) -> (values, memory)`, pure; `values` is a pytree of arrays whose
            shapes do not depend on the data, `memory` has one structure throughout.
        start: `start(risk, state, key) -> memory`, once before the first step; the memory in `state` is still empty.

    `risk` is what is trained, an `Objective` or a `BatchedObjective`; many probes measure the first kind alone.
    """

    measure: Callable[[Any, TrainingState, Any, PRNGKey], tuple[PyTree, Any]]
    start: Callable[[Any, TrainingState, PRNGKey], Any] = lambda risk, state, key: ()


NamedProbes = tuple[tuple[str, Probe], ...]


def probe(function: Callable[[Any, Params], PyTree]) -> Probe:
    """The probe that measures `function(risk, params) -> pytree of arrays` and remembers nothing.

    Example:
        >>> import attnlab as al
        >>> import jax.numpy as jnp
        >>> inputs = jnp.diag(jnp.array([1.0, 2.0]))
        >>> risk = al.objective(lambda params, x: x @ params, al.square_loss, inputs, jnp.zeros(2))
        >>> import jax
        >>> import optax
        >>> size = al.probe(lambda risk, params: jnp.linalg.norm(params))
        >>> options = {"steps": 2, "every": 1, "probes": {"size": size}}
        >>> run = al.train(risk, jnp.ones(2), optax.sgd(0.25), jax.random.key(0), **options)
        >>> run.records.values["size"].shape
        (3,)
    """
    return Probe(_WithoutMemory(function))


@dataclass(frozen=True)
class _WithoutMemory:
    """Hashed by the function, so that probes of one function share one compiled loop."""

    function: Callable[[Any, Params], PyTree]

    def __call__(self, risk: Risk, state: TrainingState, memory: Any, key: PRNGKey) -> tuple[PyTree, Any]:
        return self.function(risk, state.params), memory


def by_name(probes: Mapping[str, Probe]) -> NamedProbes:
    """The probes in the order of their names. Raises `TypeError` for what is no mapping, or no probe."""
    if not isinstance(probes, Mapping):
        raise TypeError(f"probes is a {type(probes).__name__}; expected a dict of probes by name.")
    for name, each in probes.items():
        if not isinstance(each, Probe):
            raise TypeError(
                f"probe '{name}' is a {type(each).__name__}; expected an attnlab.training.Probe. A function of "
                "(risk, params) becomes one by attnlab.training.probe(function)."
            )
    return tuple(sorted(probes.items(), key=lambda item: item[0]))


def start_probes(risk: Risk, state: TrainingState, probes: NamedProbes) -> TrainingState:
    """The state with what every probe remembers at the start, or still does of an earlier run."""
    memory = {}
    for number, (name, each) in enumerate(probes):
        kept = name in state.memory
        with _naming(name):
            memory[name] = state.memory[name] if kept else each.start(risk, state, _probe_key(state, number))
    return state._replace(memory=memory)


def measure(risk: Risk, state: TrainingState, probes: NamedProbes) -> tuple[dict[str, PyTree], dict[str, Any]]:
    """What every probe measures, and what it remembers from now on, by name."""
    values, memory = {}, {}
    for number, (name, each) in enumerate(probes):
        with _naming(name):
            measured = each.measure(risk, state, state.memory[name], _probe_key(state, number))
        if not (isinstance(measured, tuple) and len(measured) == 2):
            raise TypeError(
                f"probe '{name}' returned a {type(measured).__name__}; expected the pair (values, memory). "
                "A plain function of (risk, params) becomes a probe by attnlab.training.probe."
            )
        check_arrays(f"probe '{name}' returned a value, which", measured[0])
        values[name], memory[name] = measured
    return values, memory


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Says which probe it was that raised an error."""
    try:
        yield
    except Exception as error:
        kind = next((kind for kind in (ValueError, TypeError) if isinstance(error, kind)), RuntimeError)
        what = str(error) if type(error) is kind else f"{type(error).__name__}: {error}"
        raise kind(f"probe '{name}': {what}") from error


def _probe_key(state: TrainingState, number: int) -> PRNGKey:
    """Of one probe at one step; the minibatch of a step has the even number before."""
    return jax.random.fold_in(jax.random.fold_in(state.key, 2 * state.step + 1), number)


def check_probes(risk: Risk, state: TrainingState, probes: NamedProbes) -> None:
    """Raise `TypeError` for a probe whose memory changes structure, or that measures nothing."""
    state = jax.eval_shape(lambda risk, state: start_probes(risk, state, probes), risk, state)
    values, memory = jax.eval_shape(lambda risk, state: measure(risk, state, probes), risk, state)
    for name, _ in probes:
        before, after = (
            [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree[name])] for tree in (state.memory, memory)
        )
        structures = {str(jax.tree.structure(tree[name])) for tree in (state.memory, memory)}
        if before != after or len(structures) > 1:
            raise TypeError(
                f"probe '{name}' starts with a memory of {before} and returns one of {after}; expected the "
                "same structure, shapes and dtypes. Return the values and the memory, in this order."
            )
        if not jax.tree.leaves(values[name]):
            raise TypeError(f"probe '{name}' returns no array; expected at least one number to record.")


def summary(values: dict[str, PyTree], members: int | None = None) -> str:
    """What probes measured at one step, in a line: each number by its name, of a vector the last entry, which of
    eigenvalues is the highest; of an ensemble, whose leaves have an axis of `members` first, the median over those that
    are finite. What has more axes is left out."""
    shown = []
    for name, leaf in zip(leaf_names(values), jax.tree.leaves(values), strict=True):
        entry = np.asarray(leaf) if members is None or np.ndim(leaf) == 0 else median_of_finite(leaf)
        if entry.ndim < 2 and entry.size:
            shown.append(f"{name} {entry.ravel()[-1]:.4g}")
    return " ".join(shown)


def median_of_finite(leaf: Array) -> np.ndarray:
    """Over the members, finite ones alone: NaN where there is none."""
    finite = np.ma.masked_invalid(np.asarray(leaf, float))
    return np.asarray(np.ma.filled(np.ma.median(finite, axis=0), np.nan))
