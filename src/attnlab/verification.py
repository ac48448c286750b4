"""Claims checked in parallel, shown in a live table, and their verdicts as JSON and JUnit."""

import hashlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from attnlab.claims import Verdict, claim_by_name
from attnlab.expectation import Expectation, shown
from attnlab.runs import manifest, replace_file, write_json
from attnlab.runs.session import AT_ONCE, OpenSession, Session, fold

COLUMNS = ("expected", "measured", "error", "seconds", "verdict")
STRICT_SIZE = 2


@dataclass(frozen=True)
class Check:
    """What to verify: claims by name, on which seeds, and at which size (1, or `STRICT_SIZE`); `files` hold the claims
    of one's own."""

    names: Sequence[str]
    seeds: Sequence[int]
    size: int = 1
    files: Sequence[Path] = ()

    def identity(self) -> str:
        """A digest of all that decides the verdicts: what is asked for, and all code."""
        digest = hashlib.sha256(json.dumps([list(self.names), list(self.seeds), self.size]).encode())
        for path in [*sorted(Path(__file__).parent.rglob("*.py")), *self.files]:
            digest.update(path.read_bytes())
        return digest.hexdigest()


def verify_all(
    check: Check,
    console: Console,
    workers: int,
    prepare: Callable[[], Any],
    keep: Callable[[list[Verdict]], Any] = lambda verdicts: None,
    session: Session = AT_ONCE,
) -> list[Verdict]:
    """The verdicts on every claim and seed, in the order asked for; shows them as they come, on a terminal in a live
    table and at the end all in one, elsewhere in a line each. `keep` is given all that there are at every new claim.

    Each claim is one task: its seeds share what was compiled. With one worker the claims run in this process, which has
    called `prepare` (it configures JAX and loads the claims); each of several worker processes calls it first. With a
    directory, a verification that was stopped goes on behind the last claim that was done.

    Raises `ValueError` for the directory of another verification, or of the same one before a change of the code.
    """
    found: dict[str, list[Verdict]] = {}

    def in_order() -> list[Verdict]:
        return [verdict for name in check.names for verdict in found.get(name, [])]

    with session.open(check.identity) as opened, closing(_arriving(check, console, workers, prepare, opened)) as coming:

        def step(count: np.ndarray, left: int) -> tuple[np.ndarray, np.ndarray]:
            name, found[name] = next(coming)
            keep(in_order())
            return np.asarray(count) + 1, _packed(name, found[name])

        def chunks(count: np.ndarray) -> int | None:
            return len(set(check.names)) - int(count) or None

        fold(step, lambda: np.zeros((), int), chunks, opened, part=lambda count: np.zeros(0, np.uint8))
        next(coming, None)  # ends the table
        found |= map(_unpacked, opened.parts)
    keep(in_order())
    if console.is_terminal:
        console.print(table_of(in_order()))
    console.print(f"\n{count_of(in_order())}", markup=False, highlight=False)
    return in_order()


def _arriving(
    check: Check, console: Console, workers: int, prepare: Callable[[], Any], opened: OpenSession
) -> Generator[tuple[str, list[Verdict]]]:
    """What an earlier session has not left, as it comes, and shown."""
    done = {_unpacked(part)[0] for part in opened.parts}
    left = replace(check, names=[name for name in dict.fromkeys(check.names) if name not in done])
    if done:
        console.print(f"{len(done)} of {len(set(check.names))} claims were done before", highlight=False)
    yield from _shown(_verdicts(left, min(workers, len(left.names)), prepare), left, console)


def _packed(name: str, verdicts: Sequence[Verdict]) -> np.ndarray:
    """The verdicts on a claim as bytes, which a session can save: exact, in JSON."""
    rows = [{**asdict(replace(verdict, claim=None)), "claim": name} for verdict in verdicts]  # type: ignore[arg-type]
    return np.frombuffer(json.dumps(rows, default=np.ndarray.tolist).encode(), np.uint8)


def _unpacked(part: Any) -> tuple[str, list[Verdict]]:
    rows = json.loads(bytes(np.asarray(part)))
    found = [
        Verdict(**{**row, "claim": claim_by_name(row["claim"]), "parts": tuple(Expectation(**p) for p in row["parts"])})
        for row in rows
    ]
    return rows[0]["claim"], found


def count_of(verdicts: Sequence[Verdict]) -> str:
    """How many passed, and how many could not be tried for want of a package."""
    skipped = sum(verdict.skipped for verdict in verdicts)
    passed = f"{sum(verdict.passed for verdict in verdicts)} of {len(verdicts)} passed"
    return f"{passed}, {skipped} skipped" if skipped else passed


Named = Iterator[tuple[str, list[Verdict]]]


def _shown(found: Named, check: Check, console: Console) -> Named:
    """The same, each shown when it comes."""
    if not console.is_terminal:
        for name, verdicts in found:
            for verdict in verdicts:
                console.print(line_of(verdict), markup=False, highlight=False, soft_wrap=True)
            yield name, verdicts
        return
    progress = Progress(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[newest]}"))
    task = progress.add_task("claims", total=len(check.names), newest="")
    recent: list[list[Verdict]] = []
    with Live(progress, console=console, transient=True) as live:
        for name, verdicts in found:
            recent = [*recent[-2:], verdicts]
            progress.update(task, advance=1, newest=name)
            live.update(Group(table_of([verdict for group in recent for verdict in group]), progress))
            yield name, verdicts


def line_of(verdict: Verdict) -> str:
    """One verdict in plain text, with its worst part."""
    start = f"{verdict.claim.name} seed {verdict.seed}: {word_of(verdict)}: "
    part = verdict.worst
    if part is None:
        return f"{start}{verdict.reason}"
    others = f"the worst of {len(verdict.parts)} parts, " if len(verdict.parts) > 1 else ""
    return f"{start}{said(part)} ({others}{verdict.seconds:.1f} s)"


def said(part: Expectation) -> str:
    """What was expected and measured, and by how much it is off."""
    numbers = f"expected {part.expected}, measured {shown(part.measured)}"
    return f"{part.what}: {numbers}, error {part.error:.1e} of the allowed"


def word_of(verdict: Verdict) -> str:
    """Passed, failed or skipped."""
    return "skipped" if verdict.skipped else "passed" if verdict.passed else "failed"


def _verdicts(check: Check, workers: int, prepare: Callable[[], Any]) -> Named:
    """Name and verdicts of every claim, as they are done."""
    if workers <= 1:
        for name in check.names:
            yield name, [_with_claim(verdict, name) for verdict in _check_one(name, check.seeds, check.size)]
        return
    # JAX keeps threads, which a forked process would not have: spawn.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=prepare) as pool:
        # An interruption is this process's to handle: the workers, which begin here, inherit that they do not hear it.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        futures = {pool.submit(_check_one, name, check.seeds, check.size): name for name in check.names}
        signal.signal(signal.SIGINT, handler)
        try:
            for future in as_completed(futures):
                name = futures[future]
                yield name, [_with_claim(verdict, name) for verdict in _result(future, check.seeds)]
        except BaseException:
            for worker in multiprocessing.active_children():
                worker.terminate()
            pool.shutdown(cancel_futures=True)
            raise


def _result(future: Future, seeds: Sequence[int]) -> list[Verdict]:
    try:
        return future.result()
    except BrokenProcessPool:
        return [_failure(seed, "its worker process ended before it was done", 0.0) for seed in seeds]


def _check_one(name: str, seeds: Sequence[int], size: int) -> list[Verdict]:
    """The verdicts on one claim, without the claim itself, whose function another process could not take over."""
    import jax

    verdicts = []
    for seed in seeds:
        started = time.perf_counter()
        try:
            verdict = replace(claim_by_name(name).verify(seed, size), claim=None)  # type: ignore[arg-type]
        except ModuleNotFoundError as error:
            verdict = replace(_failure(seed, str(error), time.perf_counter() - started), skipped=True)
        except Exception as error:
            verdict = _failure(seed, f"{type(error).__name__}: {error}", time.perf_counter() - started)
        verdicts.append(verdict)
    jax.clear_caches()  # thousands of compiled programs in one process exhaust its memory maps
    return verdicts


def _failure(seed: int, reason: str, seconds: float) -> Verdict:
    return Verdict(None, seed, (), seconds, reason)  # type: ignore[arg-type]


def _with_claim(verdict: Verdict, name: str) -> Verdict:
    return replace(verdict, claim=claim_by_name(name))


def table_of(verdicts: Sequence[Verdict]) -> Table:
    """One row a part of a verdict, under one that names its claim; errors in units of the tolerance."""
    table = Table(Column("claim, source and what is measured", overflow="fold", ratio=2), *COLUMNS)
    for verdict in verdicts:
        for row in rows_of(verdict):
            table.add_row(*row)
        table.add_section()
    return table


STYLES = {"passed": "green", "failed": "red", "skipped": "yellow"}


def rows_of(verdict: Verdict) -> Iterator[tuple[str | Text, ...]]:
    """The rows of a verdict in the table."""
    word, claim = word_of(verdict), verdict.claim
    reason = (f"\n{verdict.reason}" if verdict.reason else "", STYLES[word])
    name = Text.assemble(f"{claim.name}, seed {verdict.seed}\n", (claim.source, "dim"), reason)
    yield name, "", "", "", f"{verdict.seconds:.1f}", Text(word, style=STYLES[word])
    for part in verdict.parts:
        style = "" if part.passed else STYLES["failed"]
        numbers = (part.expected, shown(part.measured), f"{part.error:.1e}")
        yield Text(f"  {part.what}", style=style), *(Text(number, style=style) for number in numbers)


def record(verdict: Verdict) -> dict[str, Any]:
    """A verdict and its claim in values of JSON; numbers that are not finite become null."""
    claim, worst = verdict.claim, verdict.worst
    return {
        "claim": claim.name,
        "strand": claim.measure.__module__.rpartition(".")[2],
        "statement": claim.statement,
        "source": claim.source,
        "disagrees_with": claim.disagrees_with,
        "instance": (claim.measure.__doc__ or "").strip(),
        "seed": verdict.seed,
        "parts": [part.record() for part in verdict.parts],
        "error": verdict.error if np.isfinite(verdict.error) else None,
        "worst": None if worst is None else worst.what,
        "passed": verdict.passed,
        "skipped": verdict.skipped,
        "reason": verdict.reason,
        "seconds": round(verdict.seconds, 3),
    }


def write_verdicts(path: Path, verdicts: Sequence[Verdict], check: Check, seconds: float) -> None:
    """All verdicts and how they came about as JSON: what `attnlab report` reads."""
    config = {"seeds": list(check.seeds), "size": check.size}
    write_json(path, {**manifest(config, seconds), "verdicts": [record(verdict) for verdict in verdicts]})


def write_junit(path: Path, verdicts: Sequence[Verdict], seconds: float) -> None:
    """The verdicts as JUnit XML, which continuous-integration services read: one test case a claim and seed."""
    skipped = sum(verdict.skipped for verdict in verdicts)
    failed = sum(not verdict.passed for verdict in verdicts) - skipped
    counts = {"tests": str(len(verdicts)), "failures": str(failed), "skipped": str(skipped), "time": f"{seconds:.3f}"}
    suites = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(suites, "testsuite", {"name": "attnlab", **counts})
    for verdict in verdicts:
        row = record(verdict)
        names = {"classname": f"attnlab.{row['claim']}", "name": f"seed {row['seed']}", "time": str(row["seconds"])}
        case = ElementTree.SubElement(suite, "testcase", names)
        if verdict.skipped:
            ElementTree.SubElement(case, "skipped", {"message": row["reason"]})
        elif not verdict.passed:
            message = row["reason"] or "; ".join(said(part) for part in verdict.parts if not part.passed)
            ElementTree.SubElement(case, "failure", {"message": message}).text = f"{row['statement']}\n{row['source']}"
    ElementTree.indent(suites)
    with replace_file(path) as partial:
        ElementTree.ElementTree(suites).write(partial, encoding="utf-8", xml_declaration=True)


class Files:
    """The files of verdicts, written anew at every claim, so that nothing is lost to what stops a verification."""

    def __init__(self, check: Check, as_json: Path | None, as_junit: Path | None):
        self._check, self._json, self._junit = check, as_json, as_junit
        self._began, self._error = time.perf_counter(), None  # type: tuple[float, OSError | None]
        self.count = 0

    def write(self, verdicts: Sequence[Verdict]) -> None:
        """All verdicts so far; a file that cannot be written, on a full disk say, does not stop the rest."""
        seconds = time.perf_counter() - self._began
        try:
            if self._json:
                write_verdicts(self._json, verdicts, self._check, seconds)
            if self._junit:
                write_junit(self._junit, verdicts, seconds)
            self.count, self._error = len(verdicts), None
        except OSError as error:
            self._error = error

    def check_written(self) -> None:
        """Raise the `OSError` that kept the last verdicts from a file."""
        if self._error is not None:
            raise self._error


def default_workers() -> int:
    """The processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
