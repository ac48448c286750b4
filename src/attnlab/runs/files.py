"""Files of results and of runs, written whole or not at all, and directories that one run at a time writes to."""

import hashlib
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from attnlab.runs.provenance import git_state

try:
    import fcntl
except ModuleNotFoundError:  # no POSIX: nothing tells a live run from a killed one there
    fcntl = None  # type: ignore[assignment]


@contextmanager
def replace_directory(path: Path) -> Iterator[Path]:
    """A new directory to fill, which takes the place of `path` when the block ends; an error leaves `path` alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.mkdir()
    former = path.with_name(f".{path.name}.{os.getpid()}.former")
    try:
        with _naming(path):
            yield partial
    except BaseException:
        shutil.rmtree(partial)
        raise
    if path.exists():
        path.rename(former)
    partial.rename(path)
    shutil.rmtree(former, ignore_errors=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Puts the file's name into an error of the system that has none, as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def check_writable(path: Path) -> None:
    """Raise `OSError`, which names `path`, unless a file or a folder can be made there; leaves nothing behind."""
    place = path if path.is_dir() else path.parent
    place = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; expected a place to write to", str(path)) from None


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """A new file to write, which takes the place of `path` when the block ends; an error leaves `path` as it was.

    Its name ends like `path`'s, for writers that look at the suffix.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        with _naming(path):
            yield partial
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def owned_directory(path: Path) -> Iterator[None]:
    """`path` as a directory that no other run writes to within the block; it is made if it is not there.

    The lock goes with its process, so that a killed run does not stand in the way of its resumption. Raises
    `BlockingIOError` while another run, of this process or another, holds it, and `NotADirectoryError` or
    `PermissionError` where `path` cannot be a directory to write to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise NotADirectoryError(f"{path} is, or lies in, a file; expected a directory to save to.") from None
    with (path / ".lock").open("a") as file:
        _lock(file, path)
        yield


def _lock(file: io.IOBase, path: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BlockingIOError(
            f"{path} belongs to a run that is still going on; expected a directory that no other run writes to. "
            "Wait for its end, or name another directory."
        ) from None
    except OSError:  # a file system without locks
        return


class DamagedFileError(ValueError):
    """A file that is not as it was written: cut short, changed, missing or another run's. `path` says which; of a
    training run `records` is what was read before it, or None."""

    def __init__(self, path: Path, problem: str, records: Any = None, remedy: str = "Delete it, to make it again."):
        super().__init__(f"{path} {problem}; expected it as it was written. {remedy}")
        self.path, self.problem, self.records = path, problem, records


def write_archive(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write named arrays (npz, no pickle), sealed with a digest of the file, whole or not at all."""
    written = io.BytesIO()
    np.savez(written, allow_pickle=False, **{name: np.asarray(array) for name, array in arrays.items()})
    content = written.getvalue()
    with replace_file(path) as partial:
        partial.write_bytes(content[:-2] + _seal(content))


def _seal(content: bytes) -> bytes:
    """The digest of a zip file without a comment as its comment, behind its length, which other readers pass over."""
    digest = hashlib.sha256(content).hexdigest().encode()
    return len(digest).to_bytes(2, "little") + digest


SEAL = len(_seal(b""))


def read_archive(path: Path, *, sealed: bool = True) -> dict[str, np.ndarray]:
    """The arrays of an npz file.

    Raises `DamagedFileError` for one that is missing, cannot be read, or is not the one that `write_archive` `sealed`.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DamagedFileError(path, "is missing") from None
    if not content:
        raise DamagedFileError(path, "is damaged: it is empty")
    if sealed and _seal(content[:-SEAL] + bytes(2)) != content[-SEAL:]:
        raise DamagedFileError(path, "is damaged: it does not match its digest, as one that is cut short or changed")
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            return dict(archive)
    except Exception as error:  # a flipped bit may break any part of the format
        raise DamagedFileError(path, "is damaged: it is cut short or changed") from error


def stored_arrays(path: Path, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """The arrays at `path` (npz), made by `make()` and written there if they are not: parts of a run that resumes.

    Raises `DamagedFileError` for a file that is not as it was written.
    """
    if not path.exists():
        started, arrays = time.perf_counter(), make()
        made = {"seconds": time.perf_counter() - started, "git_commit": git_state()["git_commit"] or ""}
        write_archive(path, flat({"arrays": arrays, "made": made}))
    return nested(read_archive(path))["arrays"]


def parts_record(paths: Iterable[Path]) -> dict[str, Any]:
    """How the parts of a run came about, those of `stored_arrays` that are there: `parts`, their number, `seconds` in
    all, and the `git_commits` that they were made at."""
    archives = (nested(read_archive(path, sealed=False)) for path in paths if path.exists())
    made = [archive["made"] for archive in archives if "made" in archive]  # others are a session's own
    return {
        "parts": len(made),
        "seconds": round(sum(float(each["seconds"]) for each in made), 1),
        "git_commits": sorted({str(each["git_commit"]) for each in made}),
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as indented JSON, whole or not at all."""
    with replace_file(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")


def flat(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Arrays in dicts within dicts by their paths, parted by "/"."""
    found: dict[str, np.ndarray] = {}
    for name, value in arrays.items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{path}": array for path, array in flat(value).items()}
        else:
            found[name] = np.asarray(value)
    return found


def nested(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What `flat` made one dict of."""
    found: dict[str, Any] = {}
    for path, array in arrays.items():
        *folders, name = path.split("/")
        place = found
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = array
    return found


def save_result(path: Path, arrays: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Fill the directory `path` with `arrays.npz` (no pickle) and `manifest.json`, replacing what was there."""
    with replace_directory(path) as partial:
        np.savez(partial / "arrays.npz", allow_pickle=False, **flat(arrays))
        write_json(partial / "manifest.json", record)


def load_arrays(path: Path) -> dict[str, Any]:
    """The arrays of a result directory written by `save_result`."""
    return nested(read_archive(path / "arrays.npz", sealed=False))
