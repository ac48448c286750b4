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


def _as_arrays(tree: PyTree) -> list[np.ndarray]:
    leaves = jax.tree.leaves(tree)
    return [np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf) for leaf in leaves]


def _is_key(leaf: jax.Array) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _like(template: PyTree, arrays: list[np.ndarray]) -> PyTree:
    leaves, structure = jax.tree.flatten(template)
    wrapped = [
        jax.random.wrap_key_data(jax.numpy.asarray(a)) if _is_key(leaf) else jax.numpy.asarray(a, dtype=leaf.dtype)
        for leaf, a in zip(leaves, arrays, strict=True)
    ]
    return jax.tree.unflatten(structure, wrapped)


def fingerprint(tree: PyTree) -> str:
    """A digest of all values, shapes and dtypes of a pytree."""
    digest = hashlib.sha256()
    for array in _as_arrays(tree):
        digest.update(f"{array.shape}{array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


class Checkpoint:
    """The directory of one run. `identity` is a digest of everything that decides its numbers."""

    def __init__(self, directory: Path, identity: str):
        self.directory, self.identity = directory, identity

    def _part(self, number: int) -> Path:
        return self.directory / f"part_{number:06d}.npz"

    def save(self, number: int, records: PyTree, state: PyTree) -> None:
        """Append the records of part `number`, then replace the state."""
        for path, tree in ((self._part(number), records), (self.directory / "state.npz", state)):
            with replace_file(path) as partial:
                arrays = {f"leaf_{i}": array for i, array in enumerate(_as_arrays(tree))}
                np.savez(partial, allow_pickle=False, identity=self.identity, parts=number + 1, **arrays)

    def restore(self, records: PyTree, state: PyTree) -> tuple[list[PyTree], PyTree] | None:
        """The records of all parts and the state, shaped like the templates; None where nothing was saved.

        Raises `ValueError` if the directory holds a run of another identity.
        """
        path = self.directory / "state.npz"
        if not path.exists():
            return None
        count, arrays = self._read(path)
        parts = [_like(records, self._read(self._part(number))[1]) for number in range(count)]
        return parts, _like(state, arrays)

    def _read(self, path: Path) -> tuple[int, list[np.ndarray]]:
        with np.load(path, allow_pickle=False) as archive:
            if str(archive["identity"]) != self.identity:
                raise ValueError(
                    f"{self.directory} holds another run (other data, parameters, key, step counts, model, "
                    "optimizer or probes, down to their options, or another version of JAX); "
                    "expected one of the same to resume. Name another directory, or delete this one."
                )
            count = sum(name.startswith("leaf_") for name in archive.files)
            return int(archive["parts"]), [archive[f"leaf_{i}"] for i in range(count)]
