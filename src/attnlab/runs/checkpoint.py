"""A run on disk: what was measured, appended part by part, and the newest state, replaced whole.

The state is written after the part it belongs to, and names how many parts it stands behind: a run that is killed
between the two repeats the last interval. What is measured at the end stands in a file of its own, which a run that
goes on leaves behind. Every file holds the run's identity and a digest of what is in it.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from attnlab.runs.files import DamagedFileError, read_archive, write_archive
from attnlab.types import PyTree

SEPARATOR = "//"
"""Between the components of a leaf's name on disk: names of probes and of parameters may hold a single slash."""


def _as_array(leaf: PyTree) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _is_key(leaf: PyTree) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _named_arrays(tree: PyTree) -> dict[str, np.ndarray]:
    """The leaves by number and path, all of dtypes that NumPy reads back (it knows no bfloat16, nor float8)."""
    arrays = {}
    for number, (path, leaf) in enumerate(jax.tree.leaves_with_path(tree)):
        array = _as_array(leaf)
        name = f"{number}:{jax.tree_util.keystr(path, simple=True, separator=SEPARATOR)}"
        arrays[name] = array.astype(np.float32) if array.dtype.kind == "V" else array
    return arrays


def _like(template: PyTree, arrays: list[np.ndarray]) -> PyTree:
    leaves, structure = jax.tree.flatten(template)
    wrapped = [
        jax.random.wrap_key_data(jax.numpy.asarray(a), impl=leaf.dtype)
        if _is_key(leaf)
        else jax.numpy.asarray(a, dtype=leaf.dtype)
        for leaf, a in zip(leaves, arrays, strict=True)
    ]
    return jax.tree.unflatten(structure, wrapped)


def fingerprint(tree: PyTree) -> str:
    """A digest of all values, shapes and dtypes of a pytree."""
    digest = hashlib.sha256()
    for array in map(_as_array, jax.tree.leaves(tree)):
        digest.update(f"{array.shape}{array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


STATE = "state.npz"
END = "end.npz"


def _part(number: int) -> str:
    return f"part_{number:06d}.npz"


class Saved(NamedTuple):
    """One file: the identity of its run, how many parts there were when it was written, and arrays by name."""

    identity: str
    parts: int
    arrays: dict[str, np.ndarray]


def _read(path: Path) -> Saved:
    arrays = read_archive(path)
    if not {"identity", "parts"} <= arrays.keys():
        raise DamagedFileError(path, "is no file of a run: it holds no identity")
    return Saved(str(arrays.pop("identity")), int(arrays.pop("parts")), arrays)


def _read_part(directory: Path, number: int, identity: str) -> dict[str, np.ndarray]:
    found = _read(directory / _part(number))
    if (found.identity, found.parts) != (identity, number + 1):
        raise DamagedFileError(directory / _part(number), "belongs to another run than the files around it")
    return found.arrays


def _read_end(directory: Path, state: Saved) -> dict[str, np.ndarray] | None:
    """What was measured at the end, if the run stands there."""
    if not (directory / END).exists():
        return None
    found = _read(directory / END)
    return found.arrays if (found.identity, found.parts) == (state.identity, state.parts) else None


def saved_parts(directory: Path) -> tuple[list[dict[str, np.ndarray]], DamagedFileError | None]:
    """The records of all parts of the run in `directory`, arrays by the path of their leaf joined by `SEPARATOR`, up
    to the first file that is damaged, and what is wrong with that.

    Raises `FileNotFoundError` where nothing was saved.
    """
    if not (directory / STATE).exists() and not (directory / _part(1)).exists():
        raise FileNotFoundError(
            f"{directory} holds no saved run; expected the directory that was given to train, after its first part."
        )
    parts: list[dict[str, np.ndarray]] = []
    try:
        state = _read(directory / STATE)
    except DamagedFileError as error:
        return _parts_without_state(directory), error
    try:
        for number in range(state.parts):
            parts.append(_by_path(_read_part(directory, number, state.identity)))
        end = _read_end(directory, state)
    except DamagedFileError as error:
        return parts, error
    return parts if end is None else [*parts, _by_path(end)], None


def _parts_without_state(directory: Path) -> list[dict[str, np.ndarray]]:
    """The parts from the first on that are of one run."""
    parts: list[dict[str, np.ndarray]] = []
    try:
        identity = _read(directory / _part(0)).identity
        while True:
            parts.append(_by_path(_read_part(directory, len(parts), identity)))
    except DamagedFileError:
        return parts


def _by_path(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.split(":", 1)[1]: array for name, array in arrays.items()}


def saved_state(directory: Path) -> dict[str, np.ndarray]:
    """The leaves of the newest state by their path. Raises `FileNotFoundError` where nothing was saved."""
    if not (directory / STATE).exists():
        raise FileNotFoundError(
            f"{directory} holds no saved run; expected the directory that was given to train, after its first part."
        )
    return _by_path(_read(directory / STATE).arrays)


class Restored(NamedTuple):
    """A run as it was saved; `end` is what was measured at its end, None if it has not come to one."""

    parts: list[PyTree]
    end: PyTree | None
    state: PyTree


class Checkpoint:
    """The directory of one run. `identity` is a digest of everything that decides its numbers."""

    def __init__(self, directory: Path, identity: str):
        self.directory, self.identity = directory, identity

    def exists(self) -> bool:
        """Whether anything was saved."""
        return (self.directory / STATE).exists()

    def save(self, number: int, records: PyTree, state: PyTree) -> None:
        """Append the records of part `number`, then replace the state."""
        self._write(_part(number), number + 1, records)
        self._write(STATE, number + 1, state)

    def save_end(self, parts: int, records: PyTree) -> None:
        """Add what was measured behind the last of so many parts."""
        self._write(END, parts, records)

    def restore(self, records: PyTree, state: PyTree) -> Restored | None:
        """What was saved, shaped like the templates; None where nothing was.

        Raises `ValueError` if the directory holds a run of another identity, `DamagedFileError` for a file that is
        not as it was written.
        """
        if not self.exists():
            return None
        found = _read(self.directory / STATE)
        if found.identity != self.identity:
            raise ValueError(
                f"{self.directory} holds another run (other data, parameters, key, model, optimizer or probes, down to "
                "their options, or another version of JAX); expected one of the same to resume. Name another "
                "directory, or delete this one."
            )
        parts = [_read_part(self.directory, number, self.identity) for number in range(found.parts)]
        end = _read_end(self.directory, found)
        return Restored(
            [_like(records, list(part.values())) for part in parts],
            None if end is None else _like(records, list(end.values())),
            _like(state, list(found.arrays.values())),
        )

    def _write(self, name: str, parts: int, tree: PyTree) -> None:
        write_archive(self.directory / name, {"identity": self.identity, "parts": parts, **_named_arrays(tree)})
