"""One driver for long computations: cut into chunks, between which they save and report; resumed to the bit.

A `Session` says where a computation saves, what it reports and how it is cut. Opened, it owns its directory until the
computation ends, and `fold` is the loop that runs in it.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import jax
import numpy as np
from jax.sharding import Sharding

from attnlab.runs.checkpoint import Checkpoint
from attnlab.runs.files import owned_directory, replace_file, write_json
from attnlab.runs.provenance import manifest
from attnlab.types import PyTree

SAVE_SECONDS = 1.0
"""Least time between two saves of a state alone, so that the disk costs little: a run that is killed loses that much.
What comes in parts is saved with every part."""

SAVE_SHARE = 0.1
"""Largest share of the time that saving a large state may take: then the next save waits longer than `SAVE_SECONDS`."""

State = TypeVar("State")
Chunk = TypeVar("Chunk")


@dataclass(frozen=True)
class Session:
    """Where a long computation saves, what it reports, and how it is cut.

    Attributes:
        directory: where to save; a run that was killed resumes there, and gives the same numbers on the same machine.
            One run at a time writes there, and it belongs to one computation.
        report: called between two chunks with the progress of the computation.
        together: how many vectors run at once, where the computation has independent ones. Memory grows with it, and on
            a CPU it gains nothing; it keeps accelerators busy.
        sharding: how an array (together, n) of them is spread over devices, such as
            `NamedSharding(mesh, PartitionSpec("samples"))`; with a `directory`, over those of one process.
    """

    directory: Path | str | None = None
    report: Callable[[Any], Any] | None = None
    together: int = 1
    sharding: Sharding | None = None

    @property
    def in_chunks(self) -> bool:
        """Whether the computation stops on its way, to save or to report; otherwise it is one compiled program."""
        return self.directory is not None or self.report is not None

    def part(self, name: str, label: str) -> "Session":
        """The session of one of several computations: a folder of that name, with `/` and the like written as in a URL,
        and the `label` as its `Progress.part`."""
        report = self.report
        return replace(
            self,
            directory=None if self.directory is None else Path(self.directory) / quote(name, safe=""),
            report=None if report is None else lambda progress: report(replace(progress, part=label)),
        )

    def check_one_by_one(self, what: str) -> None:
        """Raise `ValueError` where a computation without independent vectors is asked to run several at once."""
        if self.together != 1 or self.sharding is not None:
            raise ValueError(
                f"session has together={self.together} and sharding={self.sharding}; expected 1 and None for {what}, "
                "of which each vector needs the last. Leave them out; the data may be spread over devices."
            )

    @contextmanager
    def open(self, identity: Callable[[], str]) -> Iterator["OpenSession"]:
        """Own the directory, if there is one, until the block ends; `identity()` digests all that decides the numbers.

        Raises `BlockingIOError` while another run holds it, `NotADirectoryError` where it cannot be one.
        """
        directory = None if self.directory is None else Path(self.directory)
        with nullcontext() if directory is None else owned_directory(directory):
            yield OpenSession(self, None if directory is None else Checkpoint(directory, identity()))


AT_ONCE = Session()
"""Nothing is saved or reported."""


class OpenSession:
    """A session that goes on: what an earlier one left, and what this one adds.

    Attributes:
        session: its choices.
        checkpoint: its directory; None without one.
        parts: what the chunks gave, those of earlier sessions first.
        resumed: whether an earlier session left something.
    """

    def __init__(self, session: Session, checkpoint: Checkpoint | None):
        self.session, self.checkpoint = session, checkpoint
        self.parts: list[PyTree] = []
        self.resumed = checkpoint is not None and checkpoint.exists()
        self._end: PyTree | None = None
        self._began = time.monotonic()
        self._due = self._began + SAVE_SECONDS

    def restore(self, start: Callable[[], State], part: Callable[[State], PyTree] | None = None) -> State:
        """The state that was saved, in the shapes of `start()`, which it is itself where nothing was. Where chunks give
        parts, `part(state)` is one of the shapes."""
        if self.checkpoint is None or not self.checkpoint.exists():
            return start()
        state = jax.eval_shape(start)
        found = self.checkpoint.restore(() if part is None else jax.eval_shape(part, state), state)
        assert found is not None  # it exists
        self.parts, self._end = ([], None) if part is None else (found.parts, found.end)
        return found.state

    def save(self, state: PyTree, part: PyTree | None, *, last: bool) -> None:
        """Add a part, and save it with the state; a state alone if it is time, or the `last` one."""
        if part is not None:
            self.parts.append(part)
        if self.checkpoint is None:
            return
        if part is not None:
            self.checkpoint.save(len(self.parts) - 1, part, state)
        elif last or time.monotonic() >= self._due:
            began = time.monotonic()
            self.checkpoint.save(0, (), state)
            now = time.monotonic()
            self._due = now + max(SAVE_SECONDS, (now - began) / SAVE_SHARE)
        self._end = None

    def at_end(self, measure: Callable[[], PyTree]) -> PyTree:
        """What is measured behind the last part, once: a run that goes on from there leaves it behind."""
        if self._end is None:
            self._end = measure()
            if self.checkpoint is not None:
                self.checkpoint.save_end(len(self.parts), self._end)
        return self._end

    def write_result(self, choices: dict[str, Any], **arrays: Any) -> None:
        """The numbers in `result.npz` and what made them in `manifest.json`, once, in the directory if there is one.

        The manifest's seconds are those of this session alone, and it says whether that was a resumed one.
        """
        directory = None if self.checkpoint is None else self.checkpoint.directory
        if directory is None or (directory / "manifest.json").exists():
            return
        with replace_file(directory / "result.npz") as partial:
            np.savez(partial, allow_pickle=False, **{name: np.asarray(array) for name, array in arrays.items()})
        record = {"resumed": self.resumed, **manifest(choices, time.monotonic() - self._began)}
        write_json(directory / "manifest.json", record)


def fold(
    step: Callable[[State, Chunk], tuple[State, PyTree | None]],
    start: Callable[[], State],
    chunks: Callable[[State], Chunk | None],
    session: OpenSession,
    *,
    part: Callable[[State], PyTree] | None = None,
    watch: Callable[[State], Callable[[State], Any]] | None = None,
) -> State:
    """`state, part = step(state, chunk)` from `start()`, or from what was saved, to the end: the last state.

    Args:
        step: one chunk: a call of a jitted function, and a check of what comes out, whose error keeps it from being
            saved. Its part is kept in `session.parts`; None where all is in the state.
        start: the state before the first chunk, a pytree of arrays; not called where a state was saved.
        chunks: the chunk that comes next, told from the state alone; None at the end.
        session: an open one.
        part: a part's shapes, from a state.
        watch: given the state from which this session goes on, what reports on each later one, after it was saved.

    Raises `ValueError` for a directory of another computation, `DamagedFileError` for a file that is not as written.
    """
    state = session.restore(start, part)
    tell = None if watch is None or session.session.report is None else watch(state)
    chunk = chunks(state)
    while chunk is not None:
        state, given = step(state, chunk)
        chunk = chunks(state)
        session.save(state, given, last=chunk is None)
        if tell is not None:
            tell(state)
    return state
