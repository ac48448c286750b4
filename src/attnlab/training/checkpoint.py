"""A training run on disk: what was measured, appended part by part, and the newest state, replaced whole.

The state is written after the part it belongs to, and names how many parts it stands behind: a run that is killed
between the two repeats the last interval.
"""

import hashlib
from pathlib import Path

import jax
import numpy as np

from attnlab.runs import replace_file
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


def _part(directory: Path, number: int) -> Path:
    return directory / f"part_{number:06d}.npz"


def _state(directory: Path) -> Path:
    return directory / "state.npz"


def saved_parts(directory: Path) -> list[dict[str, np.ndarray]]:
    """The records of all parts of the run in `directory`: arrays by the path of their leaf, joined by `SEPARATOR`.

    Raises `FileNotFoundError` where nothing was saved.
    """
    path = _state(directory)
    if not path.exists():
        raise FileNotFoundError(
            f"{directory} holds no saved run; expected the directory that was given to train, after its first part."
        )
    with np.load(path, allow_pickle=False) as archive:
        count = int(archive["parts"])
    parts = []
    for number in range(count):
        with np.load(_part(directory, number), allow_pickle=False) as archive:
            parts.append({name.split(":", 1)[1]: archive[name] for name in archive.files if ":" in name})
    return parts


class Checkpoint:
    """The directory of one run. `identity` is a digest of everything that decides its numbers."""

    def __init__(self, directory: Path, identity: str):
        self.directory, self.identity = directory, identity

    def exists(self) -> bool:
        """Whether anything was saved."""
        return _state(self.directory).exists()

    def save(self, number: int, records: PyTree, state: PyTree) -> None:
        """Append the records of part `number`, then replace the state."""
        for path, tree in ((_part(self.directory, number), records), (_state(self.directory), state)):
            with replace_file(path) as partial:
                named = _named_arrays(tree)
                np.savez(partial, allow_pickle=False, identity=self.identity, parts=number + 1, **named)

    def restore(self, records: PyTree, state: PyTree) -> tuple[list[PyTree], PyTree] | None:
        """The records of all parts and the state, shaped like the templates; None where nothing was saved.

        Raises `ValueError` if the directory holds a run of another identity.
        """
        if not self.exists():
            return None
        count, arrays = self._read(_state(self.directory))
        parts = [_like(records, self._read(_part(self.directory, number))[1]) for number in range(count)]
        return parts, _like(state, arrays)

    def _read(self, path: Path) -> tuple[int, list[np.ndarray]]:
        with np.load(path, allow_pickle=False) as archive:
            if str(archive["identity"]) != self.identity:
                raise ValueError(
                    f"{self.directory} holds another run (other data, parameters, key, step counts, model, "
                    "optimizer or probes, down to their options, or another version of JAX); "
                    "expected one of the same to resume. Name another directory, or delete this one."
                )
            return int(archive["parts"]), [archive[name] for name in archive.files if ":" in name]
