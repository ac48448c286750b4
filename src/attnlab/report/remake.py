"""Making again the figures whose code has changed: what there is to do, how long it will take, one after another."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from attnlab.checks import check_names
from attnlab.report.staleness import seconds_taken, staleness


class Job(NamedTuple):
    """One figure: the script that makes it, why it is to be made (empty where it is up to date), and the seconds that
    its last run took, parts of earlier sessions included; None where there was none."""

    name: str
    script: Path
    reason: str
    seconds: float | None


def jobs(folder: Path, scripts: Mapping[str, Path], names: Sequence[str] = ()) -> list[Job]:
    """What the figures in `folder` need: those of all `scripts`, or of `names` alone.

    Raises `ValueError` for an unknown name and a manifest that cannot be read.
    """
    check_names("analysis", names, scripts)
    return [_job(folder / f"{name}.json", name, scripts[name]) for name in names or scripts]


def _job(path: Path, name: str, script: Path) -> Job:
    if not path.exists():
        return Job(name, script, "not made yet", None)
    try:
        record = json.loads(path.read_text())
        seconds = seconds_taken(record)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no manifest of a figure: {error!r}. Delete it, to make it again.") from error
    changed, note = staleness(record, script)
    if changed is None:
        return Job(name, script, note, seconds)
    dirty = "made from code that was not committed" if record.get("git_dirty") else ""
    return Job(name, script, f"{len(changed)} files changed: {changed[0]} ..." if changed else dirty, seconds)


def jobs_table(found: Sequence[Job]) -> Table:
    """Figure, state and seconds, with the time of all that is to be made in the caption."""
    table = Table("figure", "state", "seconds, last time", caption=_prospect(to_make(found)))
    for job in found:
        table.add_row(job.name, job.reason or "up to date", "" if job.seconds is None else f"{job.seconds:.0f}")
    return table


def to_make(found: Sequence[Job]) -> list[Job]:
    """Those that are not up to date, the quick ones first."""
    return sorted((job for job in found if job.reason), key=lambda job: (job.seconds is None, job.seconds))


def _prospect(rest: Sequence[Job], pace: float = 1.0) -> str:
    """How many are left and how long they will take where they go at `pace` times the seconds of the last time."""
    unknown = sum(job.seconds is None for job in rest)
    minutes = pace * sum(job.seconds or 0.0 for job in rest) / 60
    return f"{len(rest)} to make, about {minutes:.0f} minutes" + (f" and {unknown} of unknown time" if unknown else "")


def remake(found: Sequence[Job], folder: Path, say: Callable[[str], None]) -> list[str]:
    """Make what is not up to date, each in a process of its own; the names of those that failed.

    A run that is stopped goes on where it was: what is made is up to date, and long analyses resume. The time left is
    told by the pace of those that were made before.
    """
    rest, failed, taken, expected = to_make(found), [], 0.0, 0.0
    say(_prospect(rest))
    while rest:
        job, started = rest.pop(0), time.perf_counter()
        ended = subprocess.run([sys.executable, job.script, "--figures", folder], check=False)
        seconds = time.perf_counter() - started
        if ended.returncode:
            failed.append(job.name)
        elif job.seconds is not None:
            taken, expected = taken + seconds, expected + job.seconds
        outcome = f"failed with status {ended.returncode}" if ended.returncode else f"took {seconds:.0f} s"
        say(f"{job.name} {outcome}; {_prospect(rest, taken / expected if expected else 1.0)}")
    return failed
