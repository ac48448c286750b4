"""Whether the code that a figure came from has changed since it was made."""

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from attnlab.runs import source_digests
from attnlab.runs.provenance import in_frame


class Staleness(NamedTuple):
    """`changed` names the files that differ; None where it cannot be told, for the reason in `note`."""

    changed: tuple[str, ...] | None
    note: str


def staleness(record: Mapping[str, Any], script: Path | None) -> Staleness:
    """Compare the manifest `record` of a figure with the code as it stands, and `script`, which makes the figure.

    By the digests in the manifest, where it has them: no git needed. An older manifest is compared by its commit.
    """
    if script is None:
        return Staleness(None, "no script makes this figure any more")
    current = source_digests(script)
    if "sources" in record:
        made_from = record["sources"]
        differ = [name for name in current | made_from if current.get(name) != made_from.get(name)]
        changed = [name for name in differ if not in_frame(name)]  # a manifest of before may count one of the frame
        return Staleness(tuple(sorted(changed)), "")
    return _by_commit(record.get("git_commit"), script, set(current))


def seconds_taken(record: Mapping[str, Any]) -> float | None:
    """How long a figure took: the run of the manifest `record`, with the parts that it found made; None where it was
    resumed, or may have been, and its manifest does not say what those had cost.

    Raises `KeyError` where there are no seconds.
    """
    if record.get("resumed", True) and "parts" not in record:
        return None
    return max(float(record["seconds"]), float(record.get("parts", {}).get("seconds", 0.0)))


def _by_commit(commit: str | None, script: Path, names: set[str]) -> Staleness:
    unknown = "its manifest has no digests of the code, and its commit is not in this repository"
    if commit is None:
        return Staleness(None, unknown)
    command = ["git", "-C", str(script.parent), "diff", "--name-only", commit, "--"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return Staleness(None, unknown)
    changed = {line.removeprefix("src/") for line in lines} & names
    return Staleness(tuple(sorted(changed)), "compared by its commit")
