"""The one training loop: any objective, any optax optimizer, probes inside the scan, ensembles, resumable."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Float

from attnlab.checks import check_finite, check_intervals, check_leading_axis
from attnlab.objective import Objective, check_objective
from attnlab.training.checkpoint import Checkpoint, fingerprint
from attnlab.training.probe import Probe, TrainingState, summary
from attnlab.types import Params, PRNGKey, PyTree

Resample = Callable[[PRNGKey, Objective], Objective]
"""`resample(key, risk) -> risk` draws the objective of one step: a minibatch, or fresh data. Pure, one shape."""

PARTS = 50
"""Into how many jitted calls a run is cut: between two of them it reports and saves."""


class Records(NamedTuple):
    """What was measured: at `steps` (r,), by probe name, `values` (r, ...); `losses` (s,) at the start of each step.

    Of an ensemble of m members: `values` (r, m, ...) and `losses` (s, m).
    """

    steps: Array
    values: dict[str, PyTree]
    losses: Float[Array, "s ..."]


class Progress(NamedTuple):
    """What a progress report sees: steps done, steps in all, the newest loss, the newest values of each probe.

    Of an ensemble of `members` (else None): the median loss of those that have not diverged, and the values of all.
    """

    step: int
    steps: int
    loss: float
    values: dict[str, PyTree]
    members: int | None = None


@dataclass(frozen=True)
class Trajectory:
    """A finished run: what was measured, and the state that it ended in (an ensemble's with a leading axis)."""

    records: Records
    state: TrainingState

    @property
    def params(self) -> Params:
        """The parameters at the end."""
        return self.state.params


class DivergenceError(ArithmeticError):
    """The loss became infinite or NaN, of every member of an ensemble; `records` is what was measured until then."""

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
    members: int | None
    own_risks: bool


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
    hyperparameters: Mapping[str, ArrayLike] | None = None,
    own_risks: bool = False,
    directory: Path | None = None,
    report: Callable[[Progress], Any] | None = None,
) -> Trajectory:
    """Minimise `risk` from `params` for `steps` steps of an optax optimizer, measuring `probes` on the way.

    Many runs in one: with keys (m,) instead of one key, and a leading axis m on every leaf of `params` (and on each of
    the `hyperparameters`), it trains m members side by side, over seeds, learning rates or both:

        keys = jax.random.split(key, 3)
        train(risk, jax.vmap(init)(keys), optax.inject_hyperparams(optax.sgd)(learning_rate=0.1), keys,
              hyperparameters={"learning_rate": jnp.array([0.05, 0.1, 0.2])}, steps=1000)

    A member that diverges carries its NaN, and the others go on.

    Args:
        risk: the objective; full batch unless `resample` is given.
        params: where to start.
        optimizer: any optax gradient transformation; it is given the step's loss as `value`.
        key: for `resample` and the probes.
        steps: number of steps, a multiple of `every`.
        every: the probes are taken before step 0, `every`, 2 `every`, ..., and after the last: steps / every + 1 times.
        probes: by name.
        resample: draws the objective of each step from a key; the probes always see `risk`.
        hyperparameters: values by name that take the place of those in the state of an optimizer that was wrapped in
            `optax.inject_hyperparams`.
        own_risks: every member has its own data: all leaves of `risk` have the ensemble's leading axis too (build it
            with `jax.vmap`, or stack objectives leaf by leaf).
        directory: where to save; a run that was killed resumes there, and gives the same numbers on the same machine.
            It loses at most one of the `PARTS` parts. A run that differs in anything, or another version of JAX, is
            another run.
        report: called between the parts.

    Raises `ValueError` for steps that `every` does not divide, an unknown hyperparameter, leaves without an ensemble's
    axis or a directory of another run, `TypeError` for a probe whose memory changes structure, `DivergenceError` when
    the loss or the parameters are no longer finite: what was saved until then stays.
    """
    check_intervals(steps, every)
    members = key.shape[0] if key.ndim else None
    if own_risks and members is None:
        raise ValueError("own_risks is for ensembles; expected keys of shape (m,), and got one key. Split it.")
    plan = _Plan(optimizer, tuple(sorted((probes or {}).items())), every, resample, members, own_risks)
    start = _first_state(risk, params, key, plan, hyperparameters or {})
    checkpoint = None
    if directory is not None:
        checkpoint = Checkpoint(Path(directory), f"{_identity(risk, start, plan)}/{steps}")
    parts, state = _run_parts(risk, start, plan, steps, checkpoint, report)
    final = jax.tree.map(lambda leaf: leaf[None], _measure_last(risk, state, plan))
    last = Records(_step_of(state)[None], final, parts[0].losses[:0])
    records = _concatenate([*parts, last])
    _check_finite_end(state, records, plan)
    return Trajectory(records, state)


def _first_state(
    risk: Objective, params: Params, key: PRNGKey, plan: _Plan, hyperparameters: Mapping[str, ArrayLike]
) -> TrainingState:
    """The state before the first step, all but the memory of the probes; checks all that can be checked by then."""
    check_finite("params", params)
    if plan.members is not None:
        check_leading_axis("params", params, plan.members, "Stack one point a key.")
    if plan.own_risks:
        check_leading_axis("risk", risk, plan.members or 0, "Stack one objective a key.")
    check_objective(_one_risk(risk, plan), _one_member(params, plan))

    def build(params: Params, key: PRNGKey, values: dict[str, Array]) -> TrainingState:
        optimizer_state = _standard_promotion(plan.optimizer.init)(params)
        return TrainingState(jnp.array(0), params, _set(optimizer_state, values), key, {})

    values = {name: jnp.asarray(value) for name, value in hyperparameters.items()}
    if plan.members is not None:
        values = {name: jnp.broadcast_to(value, (plan.members,)) for name, value in values.items()}
        build = jax.vmap(build)
    state = build(jax.tree.map(jnp.asarray, params), key, values)
    _check_probes(_one_risk(risk, plan), _one_member(state, plan), plan)
    return state


def _one_member(tree: PyTree, plan: _Plan) -> PyTree:
    return tree if plan.members is None else jax.tree.map(lambda leaf: jnp.asarray(leaf)[0], tree)


def _one_risk(risk: Objective, plan: _Plan) -> Objective:
    return _one_member(risk, plan) if plan.own_risks else risk


def _set(optimizer_state: optax.OptState, values: dict[str, Array]) -> optax.OptState:
    for name, value in values.items():
        held = [leaf for _, leaf in optax.tree.get_all_with_path(optimizer_state, name)]
        if not held:
            raise ValueError(
                f"the optimizer's state holds no hyperparameter '{name}'; expected an optimizer that takes it, wrapped "
                f"as optax.inject_hyperparams(optax.sgd)({name}=0.1)."
            )
        optimizer_state = optax.tree.set(optimizer_state, **{name: value.astype(jnp.asarray(held[0]).dtype)})
    return optimizer_state


def _each_member(function: Callable, plan: _Plan, out_axes: Any = 0) -> Callable:
    in_axes = (0 if plan.own_risks else None, 0)
    return function if plan.members is None else jax.vmap(function, in_axes=in_axes, out_axes=out_axes)


def _step_of(state: TrainingState) -> Array:
    return jnp.ravel(state.step)[0]  # all members stand at one step


def _identity(risk: Objective, state: TrainingState, plan: _Plan) -> str:
    """A digest of all that decides a run's numbers, up to the number of steps: its arrays, and its program, which holds
    what is no array: the model, the loss, the optimizer with its schedule, `every`, and the probes with their options.
    """
    started = jax.eval_shape(lambda risk, state: _start_probes(risk, state, plan), risk, state)
    programs = _start_probes.lower(risk, state, plan), _advance.lower(risk, started, plan, 1)
    names = ",".join(name for name, _ in plan.probes)
    text = "\n".join([names, *(program.as_text() for program in programs)])
    return f"{fingerprint((risk, state))}/{hashlib.sha256(text.encode()).hexdigest()}"


def _restore(
    risk: Objective, state: TrainingState, plan: _Plan, checkpoint: Checkpoint | None
) -> tuple[list[Records], TrainingState] | None:
    if checkpoint is None:
        return None
    state = jax.eval_shape(lambda risk, state: _start_probes(risk, state, plan), risk, state)
    records = jax.eval_shape(lambda risk, state: _advance(risk, state, plan, 1)[1], risk, state)
    return checkpoint.restore(records, state)


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
    parts, state = _restore(risk, state, plan, checkpoint) or ([], _start_probes(risk, state, plan))
    for number in range(len(parts), len(sizes)):
        state, records = _advance(risk, state, plan, sizes[number])
        parts.append(records)
        _check_finite_losses(parts, records, plan, checkpoint)
        if checkpoint is not None:
            checkpoint.save(number, records, state)
        if report is not None:
            newest = jax.tree.map(lambda leaf: np.asarray(leaf[-1]), records.values)
            loss = float(np.nanmedian(records.losses[-1]))
            report(Progress(int(_step_of(state)), steps, loss, newest, plan.members))
    return parts, state


@jax.jit(static_argnames=("plan", "intervals"))
def _advance(risk: Objective, state: TrainingState, plan: _Plan, intervals: int) -> tuple[TrainingState, Records]:
    """`intervals` times: measure, then `plan.every` steps."""
    advance = _each_member(lambda risk, state: _advance_one(risk, state, plan, intervals), plan, out_axes=(0, 1))
    state, records = advance(risk, state)
    return state, records if plan.members is None else records._replace(steps=records.steps[:, 0])


def _advance_one(risk: Objective, state: TrainingState, plan: _Plan, intervals: int) -> tuple[TrainingState, Records]:
    def interval(state: TrainingState, _: None) -> tuple[TrainingState, tuple[Array, PyTree, Array]]:
        values, memory = _measure(risk, state, plan)
        measured_at = state.step
        state, losses = jax.lax.scan(
            lambda state, _: _step(risk, state, plan), state._replace(memory=memory), length=plan.every
        )
        return state, (measured_at, values, losses)

    state, (steps, values, losses) = jax.lax.scan(interval, state, length=intervals)
    return state, Records(steps, values, losses.reshape(-1))


def _step(risk: Objective, state: TrainingState, plan: _Plan) -> tuple[TrainingState, Array]:
    """One step of the optimizer, and the loss before it."""
    batch = risk
    if plan.resample is not None:
        batch = plan.resample(jax.random.fold_in(state.key, 2 * state.step), risk)
    loss, gradient = jax.value_and_grad(batch)(state.params)
    # the value is for optimizers that set their step by it, such as optax.polyak_sgd
    optimizer = optax.with_extra_args_support(plan.optimizer)
    updates, optimizer_state = _standard_promotion(optimizer.update)(
        gradient, state.optimizer_state, state.params, value=loss
    )
    params = optax.apply_updates(state.params, updates)
    return TrainingState(state.step + 1, params, optimizer_state, state.key, state.memory), loss


def _measure(risk: Objective, state: TrainingState, plan: _Plan) -> tuple[dict[str, PyTree], dict[str, Any]]:
    values, memory = {}, {}
    for number, (name, probe) in enumerate(plan.probes):
        key = _probe_key(state, number)
        measured = probe.measure(risk, state, state.memory[name], key)
        if not (isinstance(measured, tuple) and len(measured) == 2):
            raise TypeError(
                f"probe '{name}' returned a {type(measured).__name__}; expected the pair (values, memory). "
                "A plain function of (risk, params) becomes a probe by attnlab.training.probe."
            )
        values[name], memory[name] = measured
    return values, memory


@jax.jit(static_argnames=("plan",))
def _measure_last(risk: Objective, state: TrainingState, plan: _Plan) -> dict[str, PyTree]:
    return _each_member(lambda risk, state: _measure(risk, state, plan)[0], plan)(risk, state)


@jax.jit(static_argnames=("plan",))
def _start_probes(risk: Objective, state: TrainingState, plan: _Plan) -> TrainingState:
    return _each_member(lambda risk, state: _with_memory(risk, state, plan), plan)(risk, state)


def _with_memory(risk: Objective, state: TrainingState, plan: _Plan) -> TrainingState:
    memory = {}
    for number, (name, probe) in enumerate(plan.probes):
        memory[name] = probe.start(risk, state, _probe_key(state, number))
    return state._replace(memory=memory)


def _probe_key(state: TrainingState, number: int) -> PRNGKey:
    """Of one probe at one step; the minibatch of a step has the even number before."""
    return jax.random.fold_in(jax.random.fold_in(state.key, 2 * state.step + 1), number)


def _standard_promotion(function: Callable) -> Callable:
    # optax mixes Python scalars, float32 schedules and integer counts: strict promotion would refuse its arithmetic.
    def wrapped(*arguments: Any, **named: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return function(*arguments, **named)

    return wrapped


def _check_probes(risk: Objective, state: TrainingState, plan: _Plan) -> None:
    state = jax.eval_shape(lambda risk, state: _with_memory(risk, state, plan), risk, state)
    values, memory = jax.eval_shape(lambda risk, state: _measure(risk, state, plan), risk, state)
    for name, _ in plan.probes:
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


def _check_finite_losses(parts: list[Records], newest: Records, plan: _Plan, checkpoint: Checkpoint | None) -> None:
    if _any_finite(newest.losses).all():
        return
    records = _concatenate(parts)
    losses = np.asarray(records.losses)
    first = int(np.argmin(_any_finite(losses)))
    what = f"is {losses[first]}" if plan.members is None else f"is not finite in any of the {plan.members} members"
    last = f"; the last finite loss was {np.nanmin(losses[first - 1]):.6g}" if first else ""
    saved = f", and {checkpoint.directory} holds the parts before" if checkpoint is not None else ""
    raise DivergenceError(
        f"the loss at step {first} {what}{last}{_last_finite_probes(records, plan)}. Lower the learning rate, or warm "
        f"it up. Measurements until then are in this error's records{saved}.",
        records,
    )


def _last_finite_probes(records: Records, plan: _Plan) -> str:
    """The numbers of the last measurement that was finite; of an ensemble, where anything of a probe was."""
    flat = [np.asarray(leaf, float).reshape(len(leaf), -1) for leaf in jax.tree.leaves(records.values)]
    decide = np.all if plan.members is None else np.any
    rows = np.flatnonzero(np.all([decide(np.isfinite(leaf), axis=1) for leaf in flat], axis=0))
    if not flat or not rows.size:
        return ""
    values = jax.tree.map(lambda leaf: np.asarray(leaf[rows[-1]]), records.values)
    return f"; the last finite probes, at step {records.steps[rows[-1]]}: {summary(values, plan.members)}"


def _any_finite(losses: ArrayLike) -> np.ndarray:
    """At each step, whether the loss of at least one member is finite."""
    finite = np.isfinite(np.asarray(losses))
    return finite.reshape(len(finite), -1).any(axis=1)


def _check_finite_end(state: TrainingState, records: Records, plan: _Plan) -> None:
    # the loss is taken before each step, so the very last step shows in the parameters only
    if plan.members is None and not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params)):
        raise DivergenceError(
            f"the parameters after the last step, {int(state.step)}, are not finite; the last finite loss was "
            f"{float(records.losses[-1]):.6g}{_last_finite_probes(records, plan)}. Lower the learning rate, or warm it "
            "up.",
            records,
        )


def _concatenate(parts: list[Records]) -> Records:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
