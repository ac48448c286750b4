"""What a run measured: its records, those read back from its directory, and the error of a run that diverges."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, ArrayLike, Bool, Float

from attnlab.checks import is_concrete
from attnlab.display import line, whatever_it_holds
from attnlab.runs import DamagedFileError
from attnlab.runs.checkpoint import SEPARATOR, Checkpoint, saved_parts, saved_state
from attnlab.training.probe import summary
from attnlab.types import PyTree


class Records(NamedTuple):
    """What was measured: at `steps` (r,), by probe name, `values` (r, ...); `losses` (s,) at the start of each step.

    Of an ensemble of m members: `values` (r, m, ...) and `losses` (s, m). A loss is NaN where the parameters are not
    all finite, whatever the objective made of them.
    """

    steps: Array
    values: dict[str, PyTree]
    losses: Float[Array, "s ..."]

    @whatever_it_holds
    def __repr__(self) -> str:
        """Steps, losses, and the probes."""
        return line("Records", **self.facts())

    def facts(self) -> dict[str, Any]:
        """What a line says of them."""
        shape, measured = self.losses.shape, len(self.steps)
        loss = None
        if is_concrete(self.losses) and shape[0]:
            loss = [float(jnp.nanmedian(self.losses[0])), float(jnp.nanmedian(self.losses[-1]))]
        members = shape[1] if len(shape) > 1 else None
        return {"steps": shape[0], "members": members, "loss": loss, "measured": measured, "probes": list(self.values)}


class DivergenceError(ArithmeticError):
    """The loss or a parameter became infinite or NaN, of every member of an ensemble; `records` is what was measured
    until then."""

    def __init__(self, message: str, records: Records):
        super().__init__(message)
        self.records = records


def concatenate(parts: list[Records]) -> Records:
    """The records of consecutive parts, as one."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def load_records(directory: Path | str) -> Records:
    """What a run with this `directory` has saved so far, whether it finished, diverged, was killed or still runs.

    NumPy arrays, read without the model or the probes: a named tuple that a probe returned comes back as a dict by
    field, a tuple as a dict by position ("0", "1", ...). Raises `FileNotFoundError` where nothing was saved, and
    `DamagedFileError`, which holds the `records` before the damage, for a file that is not as it was written.
    """
    parts, damage = saved_parts(Path(directory))
    records = _join(parts) if parts else None
    if damage is None:
        assert records is not None
        return records
    count = 0 if records is None else len(records.losses)
    raise DamagedFileError(
        damage.path,
        damage.problem,
        records,
        f"The records of the {count} steps before it are in this error's records. Delete {directory} to run anew.",
    ) from damage


def _join(parts: list[dict[str, np.ndarray]]) -> Records:
    nested = [unflatten_dict(part, sep=SEPARATOR) for part in parts]
    whole = jax.tree.map(lambda *leaves: np.concatenate(leaves), *nested)
    return Records(whole["steps"], whole.get("values", {}), whole["losses"])


def load_params(directory: Path | str) -> PyTree:
    """The newest parameters that a run with this `directory` has saved, read without the model: NumPy arrays in nested
    dicts, named as `load_records` names what probes returned. Errors as of `load_records`."""
    found = saved_state(Path(directory))
    prefix = f"params{SEPARATOR}"
    if "params" in found:  # a single array
        return found["params"]
    held = {name.removeprefix(prefix): leaf for name, leaf in found.items() if name.startswith(prefix)}
    return unflatten_dict(held, sep=SEPARATOR)


def check_no_divergence(
    parts: list[Records], finite_at_end: Bool[Array, "..."], members: int | None, checkpoint: Checkpoint | None
) -> None:
    """Raise `DivergenceError` if no member is finite at a step of the newest part, or after it (`finite_at_end`)."""
    if _any_finite(parts[-1].losses).all() and np.any(finite_at_end):
        return
    records = concatenate(parts)
    losses = np.asarray(records.losses)
    first = int(np.argmin([*_any_finite(losses), False]))
    step = int(records.steps[0]) + first
    before = losses[first - 1 : first]
    last = f"; the last finite loss was {before[np.isfinite(before)].min():.6g}" if first else ""
    remedy = (
        "Lower the learning rate, or warm it up; if that does not help, look for a derivative that does not exist, "
        "such as that of sqrt at zero, also behind jnp.where."
        if first
        else "Look at the objective where the run starts."
    )
    raise DivergenceError(
        f"{_what_diverged(losses, first, step, members)}{last}{_last_finite_probes(records, members)}. {remedy} "
        f"Measurements until then are in this error's records{_where_saved(checkpoint)}.",
        records,
    )


def _what_diverged(losses: np.ndarray, first: int, step: int, members: int | None) -> str:
    if members is None and first < len(losses) and np.isinf(losses[first]):
        return f"the loss at step {step} is {losses[first]}"
    what = "the loss or a parameter" if first < len(losses) else "a parameter"
    who = "" if members is None else f" in any of the {members} members"
    return f"{what} at step {step} is not finite{who}"


def _where_saved(checkpoint: Checkpoint | None) -> str:
    if checkpoint is None or not checkpoint.exists():
        return ""
    return f"; attnlab.training.load_records({str(checkpoint.directory)!r}) reads those that were saved"


def _last_finite_probes(records: Records, members: int | None) -> str:
    """The numbers of the last measurement that was finite; of an ensemble, where anything of a probe was."""
    flat = [np.asarray(leaf, float).reshape(len(leaf), -1) for leaf in jax.tree.leaves(records.values)]
    decide = np.all if members is None else np.any
    rows = np.flatnonzero(np.all([decide(np.isfinite(leaf), axis=1) for leaf in flat], axis=0))
    if not flat or not rows.size:
        return ""
    values = jax.tree.map(lambda leaf: np.asarray(leaf[rows[-1]]), records.values)
    return f"; the last finite probes, at step {records.steps[rows[-1]]}: {summary(values, members)}"


def _any_finite(losses: ArrayLike) -> np.ndarray:
    """At each step, whether the loss of at least one member is finite."""
    finite = np.isfinite(np.asarray(losses))
    return finite.reshape(len(finite), -1).any(axis=1)
