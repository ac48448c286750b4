"""The one training loop: any objective, any optax optimizer, probes inside the scan, ensembles, resumable."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Bool

from attnlab.checks import check_arrays, check_finite, check_intervals, check_leading_axis
from attnlab.display import line, parameters, whatever_it_holds
from attnlab.objectives import BatchedObjective, Risk, check_loss, check_objective
from attnlab.runs import DamagedFileError
from attnlab.runs.checkpoint import Checkpoint, fingerprint
from attnlab.runs.session import AT_ONCE, OpenSession, Session, fold
from attnlab.training.optimizer import check_optimizer, check_state, member_values, set_values, start_optimizer, update
from attnlab.training.probe import Probe, TrainingState, by_name, check_probes, measure, median_of_finite, start_probes
from attnlab.training.records import Records, check_no_divergence, concatenate, load_records
from attnlab.types import Params, PRNGKey, PyTree

Resample = Callable[[PRNGKey, Any], Risk]
"""`resample(key, risk) -> risk` draws the objective of one step: a minibatch, or fresh data. Pure, one shape."""

PARTS = 50
"""Into how many jitted calls a run is cut: between two of them it reports and saves."""


class TrainingProgress(NamedTuple):
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

    @whatever_it_holds
    def __repr__(self) -> str:
        """What was trained for how long, from which loss to which, and what was measured."""
        return line("Trajectory", **self.records.facts(), params=parameters(self.params))

    @property
    def params(self) -> Params:
        """The parameters at the end."""
        return self.state.params


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
    risk: Risk,
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
    start: TrainingState | None = None,
    session: Session = AT_ONCE,
) -> Trajectory:
    """Minimise `risk` from `params` for `steps` steps of an optax optimizer, measuring `probes` on the way.

    Many runs in one: with keys (m,) instead of one key, and a leading axis m on every leaf of `params` (and on each of
    the `hyperparameters`), it trains m members side by side, over seeds, learning rates or both::

        keys = jax.random.split(key, 3)
        train(risk, jax.vmap(init)(keys), optax.inject_hyperparams(optax.sgd)(learning_rate=0.1), keys,
              hyperparameters={"learning_rate": jnp.array([0.05, 0.1, 0.2])}, steps=1000)

    A member that diverges carries its NaN, and the others go on.

    Args:
        risk: the objective; full batch unless `resample` is given. Of a `batched` one every step reads all batches, one
            at a time, so that memory is that of the largest.
        params: where to start; not looked at where `start` is given.
        optimizer: any optax gradient transformation; one that takes extra arguments is given the step's loss as
            `value`, its gradient as `grad`, its objective as `value_fn` and that one's gradient as `grad_fn`.
        key: for `resample` and the probes; not looked at where `start` is given.
        steps: number of steps, a multiple of `every`.
        every: probes are taken before step 0, `every`, 2 `every`, ..., and after the last: steps / every + 1 times.
        probes: by name.
        resample: draws the objective of each step from a key; the probes always see `risk`.
        hyperparameters: numbers by name, of an ensemble also one for each member (m,), that take the place of those in
            the state of an optimizer that was wrapped in `optax.inject_hyperparams`.
        own_risks: every member has its own data: all leaves of `risk` have the ensemble's leading axis too (build it
            with `jax.vmap`, or stack objectives leaf by leaf).
        start: the state that a run ended in (`Trajectory.state`), to take `steps` further steps from: with its
            parameters, its optimizer's state, its key, its count of steps, and what its probes remember, the numbers
            are those of one longer run. Probes that it does not know start there.
        session: where to save, and what to call between parts with a `TrainingProgress`. A killed run loses at most
            one of the `PARTS`. With more `steps`, a finished run goes on; what differs in anything else, or in JAX's
            version, is another run. `load_records` reads what was measured so far, `load_params` where it stands.

    Raises `ValueError` for steps that `every` does not divide, a loss that is not finite at the start, an unknown
    hyperparameter, leaves without an ensemble's axis, a `start` of another optimizer, a directory of another run or of
    one that has taken more steps; `DamagedFileError` (a `ValueError`, with the `records` before the damage) for a file
    there that is not as it was written, `BlockingIOError` while another run writes there, `TypeError` for a probe whose
    memory changes structure, `DivergenceError` when the loss or the parameters are no longer finite: what was saved
    until then stays.

    Example:
        >>> import attnlab as al
        >>> import jax, jax.numpy as jnp, optax
        >>> inputs = jnp.diag(jnp.array([1.0, 2.0]))
        >>> risk = al.objective(lambda params, x: x @ params, al.square_loss, inputs, jnp.zeros(2))
        >>> run = al.train(risk, jnp.ones(2), optax.sgd(0.25), jax.random.key(0), steps=2, every=2)
        >>> run.params.tolist()  # factors 1 - 0.25 (1, 4) a step
        [0.5625, 0.0]
        >>> run.records.losses.shape
        (2,)
    """
    check_intervals(steps, every)
    steps, every = int(steps), int(every)  # 1e4 is a whole number too
    if start is not None:
        params, key = _started(start)
    members = _members(key)
    if own_risks and members is None:
        raise ValueError("own_risks is for ensembles; expected keys of shape (m,), and got one key. Split it.")
    plan = _Plan(optimizer, by_name(probes or {}), every, resample, members, own_risks)
    session.check_one_by_one("train")
    first = _first_state(risk, params, key, plan, hyperparameters or {}, start)
    with session.open(lambda: _identity(risk, first, plan)) as stretch:
        parts, state = _run_parts(risk, first, plan, steps, stretch)
    return Trajectory(concatenate(parts), state)


def _started(start: Any) -> tuple[Params, PRNGKey]:
    if not isinstance(start, TrainingState):
        raise TypeError(
            f"start is a {type(start).__name__}; expected the state that a run ended in, train(...).state. Parameters "
            "alone are given as params."
        )
    return start.params, start.key


def _members(key: PRNGKey) -> int | None:
    """Of an ensemble, else None."""
    if not (isinstance(key, jax.Array) and jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)):
        what = f"an array of {key.dtype}, shape {key.shape}" if isinstance(key, jax.Array) else repr(key)
        raise TypeError(
            f"key is {what}; expected a typed key, jax.random.key(seed), or for an ensemble a split of one."
        )
    if key.ndim > 1:
        raise ValueError(f"key has shape {key.shape}; expected (), or (m,) for an ensemble of m. Flatten it.")
    return key.shape[0] if key.ndim else None


def _first_state(
    risk: Risk,
    params: Params,
    key: PRNGKey,
    plan: _Plan,
    hyperparameters: Mapping[str, ArrayLike],
    start: TrainingState | None,
) -> TrainingState:
    """The state before the first step, all but the memory of the probes; checks all that can be checked by then."""
    _check_functions(risk, plan)
    check_finite("params", params)
    if plan.members is not None:
        check_leading_axis("params", params, plan.members, "Stack one point a key.")
    if isinstance(risk, BatchedObjective):
        _check_batches(risk, plan)
    if plan.own_risks:
        check_leading_axis("risk", risk, plan.members or 0, "Stack one objective a key.")
    check_objective(_one_risk(risk, plan), _one_member(params, plan))
    if plan.members is None:  # of an ensemble a member that diverges is let be
        check_loss(_loss(risk, params))

    def build(params: Params, key: PRNGKey, values: dict[str, Array]) -> TrainingState:
        return TrainingState(jnp.array(0), params, start_optimizer(plan.optimizer, params, values), key, {})

    def go_on(state: TrainingState, values: dict[str, Array]) -> TrainingState:
        return state._replace(optimizer_state=set_values(state.optimizer_state, values))

    values = member_values(hyperparameters, plan.members)
    each = (lambda function: function) if plan.members is None else jax.vmap
    params = jax.tree.map(jnp.asarray, params)
    if start is None:
        state = each(build)(params, key, values)
    else:
        fresh = jax.eval_shape(each(build), params, key, {})
        check_state("start", start.optimizer_state, fresh.optimizer_state)
        kept = {name: start.memory[name] for name, _ in plan.probes if name in start.memory}
        state = each(go_on)(start._replace(params=params, memory=kept), values)
    one_risk, one_state = _one_risk(risk, plan), _one_member(state, plan)
    check_probes(one_risk, one_state, plan.probes)
    _check_resample(one_risk, one_state.key, plan.resample)
    return state


def _check_batches(risk: BatchedObjective, plan: _Plan) -> None:
    if plan.own_risks:
        raise ValueError(
            "own_risks is for data in memory, and risk is a BatchedObjective, which has no axis of members; expected "
            "one Objective with a leading axis. Train the members one by one."
        )
    risk.feed.check_again()


@jax.jit
def _loss(risk: Risk, params: Params) -> Array:
    return risk(params)


def _check_functions(risk: Any, plan: _Plan) -> None:
    """What a user may pass in place of an objective or an optimizer."""
    if not callable(risk):
        raise TypeError(
            f"risk is a {type(risk).__name__}; expected an Objective. Build it with "
            "attnlab.objectives.objective(predict, loss, inputs, targets)."
        )
    if any(callable(leaf) for leaf in jax.tree.leaves(risk)):
        raise TypeError(
            f"risk is a {type(risk).__name__} that holds a function; expected an Objective, whose leaves are arrays. "
            "Build it with attnlab.objectives.objective(predict, loss, inputs, targets), or give a function of the "
            "parameters alone as jax.tree_util.Partial(function)."
        )
    check_arrays("risk", risk)
    check_optimizer(plan.optimizer)
    for name, function in (("optimizer", plan.optimizer), ("resample", plan.resample), *plan.probes):
        try:
            hash(function)
        except TypeError as error:
            raise TypeError(
                f"'{name}' cannot be hashed: {error}; expected a static argument of jax.jit. Make its class a "
                "frozen dataclass, and bind arrays with functools.partial instead of fields."
            ) from None


def _check_resample(risk: Risk, key: PRNGKey, resample: Resample | None) -> None:
    try:
        drawn = risk if resample is None else jax.eval_shape(resample, key, risk)
    except TypeError as error:
        raise TypeError(f"resample failed: {error}; expected a function resample(key, risk) -> risk.") from error
    if not callable(drawn):
        raise TypeError(
            f"resample returned a {type(drawn).__name__}; expected an Objective on other data. "
            "dataclasses.replace(risk, inputs=..., targets=...) makes one."
        )


def _one_member(tree: PyTree, plan: _Plan) -> PyTree:
    return tree if plan.members is None else jax.tree.map(lambda leaf: jnp.asarray(leaf)[0], tree)


def _one_risk(risk: Risk, plan: _Plan) -> Risk:
    return _one_member(risk, plan) if plan.own_risks else risk


def _each_member(function: Callable, plan: _Plan, out_axes: Any = 0) -> Callable:
    in_axes = (0 if plan.own_risks else None, 0)
    return function if plan.members is None else jax.vmap(function, in_axes=in_axes, out_axes=out_axes)


def _step_of(state: TrainingState) -> Array:
    return jnp.ravel(state.step)[0]  # all members stand at one step


def _identity(risk: Risk, state: TrainingState, plan: _Plan) -> str:
    """A digest of all that decides a run's numbers, but for the number of steps: its arrays and batches, and its
    program, which holds what is no array: the model, the loss, the optimizer with its schedule, `every`, and the probes
    with their options.
    """
    started = jax.eval_shape(lambda risk, state: _start_probes(risk, state, plan), risk, state)
    programs = _start_probes.lower(risk, state, plan), _advance.lower(risk, started, plan, 1)
    names = ",".join(name for name, _ in plan.probes)
    batches = risk.feed.digests if isinstance(risk, BatchedObjective) else ()
    text = "\n".join([names, *batches, *(program.as_text() for program in programs)])
    return f"{fingerprint((risk, state))}/{hashlib.sha256(text.encode()).hexdigest()}"


def _run_parts(
    risk: Risk, first: TrainingState, plan: _Plan, steps: int, session: OpenSession
) -> tuple[list[Records], TrainingState]:
    size = -(-(steps // plan.every) // PARTS)
    last = int(_step_of(first)) + steps

    def chunks(state: TrainingState) -> int | None:
        left = (last - int(_step_of(state))) // plan.every
        _check_left(left, last, state, session.checkpoint)
        return min(size, left) or None

    def step(state: TrainingState, intervals: int) -> tuple[TrainingState, Records]:
        state, records, finite = _advance(risk, state, plan, intervals)
        check_no_divergence([*session.parts, records], finite, plan.members, session.checkpoint)
        return state, records

    def part(state: TrainingState) -> Records:
        return _advance(risk, state, plan, 1)[1]

    def watch(_: TrainingState) -> Callable[[TrainingState], Any]:
        report = session.session.report
        assert report is not None
        return lambda state: report(_progress(state, session.parts[-1], last, plan.members))

    try:
        state = fold(step, lambda: _start_probes(risk, first, plan), chunks, session, part=part, watch=watch)
    except DamagedFileError as error:
        load_records(error.path.parent)  # raises the same, with what can be read
        raise
    records = session.parts[0].losses[:0]
    end = session.at_end(lambda: Records(_step_of(state)[None], _measure_last(risk, state, plan), records))
    return [*session.parts, end], state


def _progress(state: TrainingState, records: Records, last: int, members: int | None) -> TrainingProgress:
    newest = jax.tree.map(lambda leaf: np.asarray(leaf[-1]), records.values)
    loss = float(median_of_finite(records.losses[-1:].ravel()))
    return TrainingProgress(int(_step_of(state)), last, loss, newest, members)


def _check_left(left: int, last: int, state: TrainingState, checkpoint: Checkpoint | None) -> None:
    if left < 0 and checkpoint is not None:
        raise ValueError(
            f"steps would end at step {last}, and the run in {checkpoint.directory} has gone on to step "
            f"{int(_step_of(state))}; expected as many steps at least. load_records reads the first of them."
        )


@jax.jit(static_argnames=("plan", "intervals"))
def _advance(
    risk: Risk, state: TrainingState, plan: _Plan, intervals: int
) -> tuple[TrainingState, Records, Bool[Array, "..."]]:
    """`intervals` times: measure, then `plan.every` steps; and whether the parameters are finite after the last."""
    advance = _each_member(lambda risk, state: _advance_one(risk, state, plan, intervals), plan, out_axes=(0, 1))
    state, records = advance(risk, state)
    if plan.members is None:
        return state, records, _all_finite(state.params)
    return state, records._replace(steps=records.steps[:, 0]), jax.vmap(_all_finite)(state.params)


def _advance_one(risk: Risk, state: TrainingState, plan: _Plan, intervals: int) -> tuple[TrainingState, Records]:
    def interval(state: TrainingState, _: None) -> tuple[TrainingState, tuple[Array, PyTree, Array]]:
        values, memory = measure(risk, state, plan.probes)
        measured_at = state.step
        state, losses = jax.lax.scan(
            lambda state, _: _step(risk, state, plan), state._replace(memory=memory), length=plan.every
        )
        return state, (measured_at, values, losses)

    state, (steps, values, losses) = jax.lax.scan(interval, state, length=intervals)
    return state, Records(steps, values, losses.reshape(-1))


def _step(risk: Risk, state: TrainingState, plan: _Plan) -> tuple[TrainingState, Array]:
    """One step of the optimizer, and the loss before it."""
    batch = risk
    if plan.resample is not None:
        batch = plan.resample(jax.random.fold_in(state.key, 2 * state.step), risk)
    loss, gradient = jax.value_and_grad(batch)(state.params)
    updates, optimizer_state = update(plan.optimizer, gradient, state.optimizer_state, state.params, loss, batch)
    params = optax.apply_updates(state.params, updates)
    # behind jnp.where a loss can be finite at parameters that are not
    recorded = jnp.where(_all_finite(state.params), loss, jnp.nan)
    return TrainingState(state.step + 1, params, optimizer_state, state.key, state.memory), recorded


def _all_finite(params: Params) -> Bool[Array, ""]:
    return jax.tree.reduce(jnp.logical_and, jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), params))


@jax.jit(static_argnames=("plan",))
def _measure_last(risk: Risk, state: TrainingState, plan: _Plan) -> dict[str, PyTree]:
    values = _each_member(lambda risk, state: measure(risk, state, plan.probes)[0], plan)(risk, state)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], values)


@jax.jit(static_argnames=("plan",))
def _start_probes(risk: Risk, state: TrainingState, plan: _Plan) -> TrainingState:
    return _each_member(lambda risk, state: start_probes(risk, state, plan.probes), plan)(risk, state)
