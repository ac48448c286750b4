"""Results with provenance: arrays and a manifest that says how they came about, written whole or not at all."""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = ("attnlab", "jax", "jaxlib", "flax", "optax", "numpy", "scipy", "scikit-learn", "matplotlib")


def manifest(config: Any, seconds: float | None = None) -> dict[str, Any]:
    """What a reader needs to make the result again: the config, the command, versions, git state, device and dtype.

    `config` is a dataclass or a mapping of JSON values (paths become strings); `seconds` is the wall time taken.
    """
    fields = asdict(config) if is_dataclass(config) and not isinstance(config, type) else dict(config)
    return {
        "config": {name: str(value) if isinstance(value, Path) else value for name, value in fields.items()},
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "seconds": None if seconds is None else round(seconds, 1),
        "versions": {"python": platform.python_version(), **_versions()},
        **_git_state(),
        **_jax_state(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _git_state() -> dict[str, Any]:
    """Commit and dirty flag of the checkout that the code runs from; both None outside one."""

    def git(*words: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {"git_commit": None, "git_dirty": None}


def _jax_state() -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    device = jax.devices()[0]
    return {
        "device": f"{device.platform}: {device.device_kind}",
        "device_count": jax.device_count(),
        "dtype": jnp.zeros(()).dtype.name,
    }


@contextmanager
def replace_directory(path: Path) -> Iterator[Path]:
    """A new directory to fill, which takes the place of `path` when the block ends; an error leaves `path` alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial)
        raise
    if path.exists():
        shutil.rmtree(path)
    partial.rename(path)


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """A new file to write, which takes the place of `path` when the block ends; an error leaves `path` as it was.

    Its name ends like `path`'s, for writers that look at the suffix.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as indented JSON, whole or not at all."""
    with replace_file(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")


def save_result(path: Path, arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> None:
    """Fill the directory `path` with `arrays.npz` (no pickle) and `manifest.json`, replacing what was there."""
    with replace_directory(path) as partial:
        np.savez(partial / "arrays.npz", allow_pickle=False, **{name: np.asarray(a) for name, a in arrays.items()})
        write_json(partial / "manifest.json", record)


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a result directory written by `save_result`."""
    with np.load(path / "arrays.npz", allow_pickle=False) as archive:
        return dict(archive)
