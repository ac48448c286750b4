"""The one training loop: any objective, any optax optimizer, probes inside the scan, resumable."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from attnlab.checks import check_positive
from attnlab.objective import Objective, check_objective
from attnlab.training.checkpoint import Checkpoint, fingerprint
from attnlab.training.probe import Probe, TrainingState
from attnlab.types import Params, PRNGKey, PyTree

Resample = Callable[[PRNGKey, Objective], Objective]
"""`resample(key, risk) -> risk` draws the objective of one step: a minibatch, or fresh data. Pure, one shape."""

PARTS = 50
"""Into how many jitted calls a run is cut: between two of them it reports and saves."""


class Records(NamedTuple):
    """What was measured: at `steps` (r,), by probe name, `values` (r, ...); `losses` (s,) at the start of each step."""

    steps: Array
    values: dict[str, PyTree]
    losses: Float[Array, " s"]


class Progress(NamedTuple):
    """What a progress report sees: steps done, steps in all, the newest loss, the newest values of each probe."""

    step: int
    steps: int
    loss: float
    values: dict[str, PyTree]


@dataclass(frozen=True)
class Trajectory:
    """A finished run: what was measured, and the state that it ended in."""

    records: Records
    state: TrainingState

    @property
    def params(self) -> Params:
        """The parameters at the end."""
        return self.state.params


class DivergenceError(ArithmeticError):
    """The loss became infinite or NaN; `records` holds what was measured until then."""

    def __init__(self, message: str, records: Records):
        super().__init__(message)
        self.records = records


@dataclass(frozen=True)
class _Plan:
    """The static choices of a run."""

    optimizer: optax.GradientTransformation
    probes: tuple[tuple[str, Probe], ...]
    every: int
    resample: Resample | None


def train(
    risk: Objective,
    params: Params,
    optimizer: optax.GradientTransformation,
    key: PRNGKey,
    *,
    steps: int,
    every: int = 1,
    probes: Mapping[str, Probe] | None = None,
    resample: Resample | None = None,
    directory: Path | None = None,
    report: Callable[[Progress], Any] | None = None,
) -> Trajectory:
    """Minimise `risk` from `params` for `steps` steps of an optax optimizer, measuring `probes` on the way.

    Args:
        risk: the objective; full batch unless `resample` is given.
        params: where to start.
        optimizer: any optax gradient transformation.
        key: for `resample` and the probes.
        steps: number of steps, a multiple of `every`.
        every: the probes are taken before step 0, `every`, 2 `every`, ..., and after the last: steps / every + 1 times.
        probes: by name.
        resample: draws the objective of each step from a key; the probes always see `risk`.
        directory: where to save; a run that was killed resumes there, and gives the same numbers on the same machine.
            It loses at most one of the `PARTS` parts.
        report: called between the parts.

    Raises `ValueError` for steps that `every` does not divide or a directory of another run, `TypeError` for a probe
    whose memory changes structure, `DivergenceError` when the loss is no longer finite: what was saved until then
    stays.
    """
    check_positive(steps=steps, every=every)
    if steps % every:
        raise ValueError(f"steps is {steps}; expected a multiple of every, which is {every}. Change one of them.")
    check_objective(risk, params)
    plan = _Plan(optimizer, tuple(sorted((probes or {}).items())), every, resample)
    memory = {name: probe.start(params) for name, probe in plan.probes}
    start = TrainingState(jnp.array(0), params, _standard_promotion(optimizer.init)(params), key, memory)
    _check_probes(risk, start, plan)
    checkpoint = None
    if directory is not None:
        names = ",".join(name for name, _ in plan.probes)
        checkpoint = Checkpoint(Path(directory), fingerprint((risk, start)) + f"/{steps}/{every}/{names}")
    parts, state = _run_parts(risk, start, plan, steps, checkpoint, report)
    final = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], _measure(risk, state, plan)[0])
    last = Records(jnp.asarray(state.step)[None], final, parts[0].losses[:0])
    return Trajectory(_concatenate([*parts, last]), state)


def _run_parts(
    risk: Objective,
    state: TrainingState,
    plan: _Plan,
    steps: int,
    checkpoint: Checkpoint | None,
    report: Callable[[Progress], Any] | None,
) -> tuple[list[Records], TrainingState]:
    intervals = steps // plan.every
    size = -(-intervals // PARTS)
    sizes = [min(size, intervals - done) for done in range(0, intervals, size)]
    parts: list[Records] = []
    if checkpoint is not None:
        template = jax.eval_shape(lambda risk, state: _advance(risk, state, plan, 1)[1], risk, state)
        parts, state = checkpoint.restore(template, state) or (parts, state)
    for number in range(len(parts), len(sizes)):
        state, records = _advance(risk, state, plan, sizes[number])
        parts.append(records)
        _check_finite_losses(parts, records)
        if checkpoint is not None:
            checkpoint.save(number, records, state)
        if report is not None:
            newest = jax.tree.map(lambda leaf: np.asarray(leaf[-1]), records.values)
            report(Progress(int(state.step), steps, float(records.losses[-1]), newest))
    return parts, state


@jax.jit(static_argnames=("plan", "intervals"))
def _advance(risk: Objective, state: TrainingState, plan: _Plan, intervals: int) -> tuple[TrainingState, Records]:
    """`intervals` times: measure, then `plan.every` steps."""

    def step(state: TrainingState, _: None) -> tuple[TrainingState, Array]:
        key, batch_key = jax.random.split(state.key)
        batch = risk if plan.resample is None else plan.resample(batch_key, risk)
        loss, gradient = jax.value_and_grad(batch)(state.params)
        updates, optimizer_state = _standard_promotion(plan.optimizer.update)(
            gradient, state.optimizer_state, state.params
        )
        params = optax.apply_updates(state.params, updates)
        return TrainingState(state.step + 1, params, optimizer_state, key, state.memory), loss

    def interval(state: TrainingState, _: None) -> tuple[TrainingState, tuple[Array, PyTree, Array]]:
        values, memory = _measure(risk, state, plan)
        measured_at = state.step
        state, losses = jax.lax.scan(step, state._replace(memory=memory), length=plan.every)
        return state, (measured_at, values, losses)

    state, (steps, values, losses) = jax.lax.scan(interval, state, length=intervals)
    return state, Records(steps, values, losses.reshape(-1))


def _measure(risk: Objective, state: TrainingState, plan: _Plan) -> tuple[dict[str, PyTree], dict[str, Any]]:
    values, memory = {}, {}
    for number, (name, probe) in enumerate(plan.probes):
        key = jax.random.fold_in(state.key, number)
        values[name], memory[name] = probe.measure(risk, state, state.memory[name], key)
    return values, memory


def _standard_promotion(function: Callable) -> Callable:
    # optax mixes Python scalars, float32 schedules and integer counts: strict promotion would refuse its arithmetic.
    def wrapped(*arguments: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return function(*arguments)

    return wrapped


def _check_probes(risk: Objective, state: TrainingState, plan: _Plan) -> None:
    _, memory = jax.eval_shape(lambda risk, state: _measure(risk, state, plan), risk, state)
    for name, _ in plan.probes:
        before, after = (
            [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree[name])] for tree in (state.memory, memory)
        )
        if before != after:
            raise TypeError(
                f"probe '{name}' starts with a memory of {before} and returns one of {after}; expected the "
                "same shapes and dtypes. Return the values and the memory, in this order."
            )


def _check_finite_losses(parts: list[Records], newest: Records) -> None:
    finite = np.isfinite(np.asarray(newest.losses))
    if finite.all():
        return
    records = _concatenate(parts)
    first = int(np.argmin(np.isfinite(np.asarray(records.losses))))
    last = f"; the last finite loss was {records.losses[first - 1]:.6g}" if first else ""
    raise DivergenceError(
        f"the loss at step {first} is {records.losses[first]}{last}. Lower the learning rate, or warm it up. "
        f"Measurements until then are in this error's records.",
        records,
    )


def _concatenate(parts: list[Records]) -> Records:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
