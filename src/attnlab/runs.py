"""Results with provenance: arrays and a manifest that says how they came about, written whole or not at all."""

import ast
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = ("attnlab", "jax", "jaxlib", "flax", "optax", "numpy", "scipy", "scikit-learn", "matplotlib")


def manifest(config: Any, seconds: float | None = None, script: Path | None = None) -> dict[str, Any]:
    """What a reader needs to make the result again: the config, the command, versions, git state, device and dtype.

    `config` is a dataclass or a mapping of JSON values (paths become strings); `seconds` is the wall time that this
    session took. With a `script`, also the digests of all code that it imports, by which a reader sees whether that
    changed since.
    """
    fields = asdict(config) if is_dataclass(config) and not isinstance(config, type) else dict(config)
    return {
        "config": {name: str(value) if isinstance(value, Path) else value for name, value in fields.items()},
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "seconds": None if seconds is None else round(seconds, 1),
        "versions": {"python": platform.python_version(), **_versions()},
        **_git_state(),
        **_jax_state(),
        **({} if script is None else {"sources": source_digests(script)}),
    }


FRAME = ("analysis", "cli", "checks", "report", "runs", "types", "verification")
"""Modules that no number depends on."""


def source_digests(script: Path) -> dict[str, str]:
    """The start of the SHA-256 of a script and of every module of attnlab that it imports, directly or not, by path.

    Paths are relative to the folder that holds the package, or to the script's folder's parent; found by reading the
    imports, without running anything.
    """
    files = {f"{script.parent.name.lstrip('_')}/{script.name}": script} | _imported(script)
    return {name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for name, path in sorted(files.items())}


def _imported(script: Path) -> dict[str, Path]:
    root, waiting = Path(__file__).parents[1], [script]
    found: dict[str, Path] = {}
    while waiting:
        for module in _imports_of(waiting.pop()):
            parts = module.split(".")
            for length in range(1, len(parts) + 1):  # a module, and the packages around it
                path = _file_of(root.joinpath(*parts[:length]))
                name = "" if path is None else path.relative_to(root).as_posix()
                if path is not None and name not in found and name.split("/")[1].removesuffix(".py") not in FRAME:
                    found[name] = path
                    waiting.append(path)
    return found


def _imports_of(path: Path) -> Iterator[str]:
    """Names of the modules of attnlab that a file imports anywhere, with the names it takes from them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "attnlab":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "attnlab")


def _file_of(path: Path) -> Path | None:
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _git_state() -> dict[str, Any]:
    """Commit and dirty flag of the checkout that the code runs from; both None outside one. Figures, which runs make
    and do not read, leave it clean."""

    def git(*words: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--", ":/", ":(top,exclude)figures")
        return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": bool(changes)}
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


def stored_arrays(path: Path, make: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays at `path` (npz), made by `make()` and written there if they are not: parts of a run that resumes."""
    if not path.exists():
        arrays = make()
        with replace_file(path) as partial:
            np.savez(partial, allow_pickle=False, **arrays)
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


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
