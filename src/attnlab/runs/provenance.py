"""Provenance: a manifest that says how a result came about."""

import ast
import hashlib
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

PACKAGES = ("attnlab", "jax", "jaxlib", "flax", "optax", "numpy", "scipy", "scikit-learn", "matplotlib")


def manifest(config: Any, seconds: float | None = None, script: Path | None = None) -> dict[str, Any]:
    """What a reader needs to make the result again: the config, the command, versions, git state, device and dtype.

    `config` is a dataclass or a mapping of JSON values (folders of results are left out); `seconds` is the wall time
    that this session took. With a `script`, also the digests of all code that it imports, by which a reader sees
    whether that changed since.
    """
    fields = asdict(config) if is_dataclass(config) and not isinstance(config, type) else dict(config)
    return {
        "config": {name: value for name, value in fields.items() if name not in FOLDERS},
        "command": _command(sys.argv),
        "seconds": None if seconds is None else round(seconds, 1),
        "versions": {"python": platform.python_version(), **_versions()},
        **git_state(),
        **_jax_state(),
        **({} if script is None else {"sources": source_digests(script)}),
    }


FOLDERS = ("output", "figures")
"""Where results go, which no number depends on."""


def _command(words: Sequence[str]) -> str:
    """What was typed, without the folders that results go to."""
    flags = {f"--{folder}" for folder in FOLDERS}
    kept = [word for before, word in pairwise(["", *words[1:]]) if word not in flags and before not in flags]
    return " ".join([Path(words[0]).name, *kept])


RUNS = ("runs/__init__", "runs/files", "runs/provenance")
FRAME = (
    *("analysis", "cli", "checks", "compiled", "display", "expectation", "report", "types", "verification"),
    *("training/report", *RUNS),
)
"""Modules and packages that no number depends on."""


def in_frame(name: str) -> bool:
    """Whether no number depends on the module in the file `name`."""
    module = name.partition("/")[2].removesuffix(".py")
    return module in FRAME or module.partition("/")[0] in FRAME


def source_digests(script: Path) -> dict[str, str]:
    """The start of the SHA-256 of what a script and every module of attnlab that it imports, directly or not, do: of
    their code without comments and docstrings, by path.

    Paths are relative to the folder that holds the package, or to the script's folder's parent; found by reading the
    imports, without running anything.
    """
    files = {f"{script.parent.name.lstrip('_')}/{script.name}": script} | _imported(script)
    return {name: _digest(path) for name, path in sorted(files.items())}


def _digest(path: Path) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            # Strings by themselves: docstrings, and what stands below an attribute or a constant.
            node.body = [line for line in node.body if not _is_string(line)] or [ast.Pass()]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]


def _is_string(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str)


def _imported(script: Path) -> dict[str, Path]:
    root, waiting = Path(__file__).parents[2], [script]
    found: dict[str, Path] = {}
    while waiting:
        for module in _imports_of(waiting.pop()):
            parts = module.split(".")
            # A module, and the packages around it: the front door, which names them all, where it is what is imported.
            for length in range(min(2, len(parts)), len(parts) + 1):
                path = _file_of(root.joinpath(*parts[:length]))
                name = "" if path is None else path.relative_to(root).as_posix()
                if path is not None and name not in found and not in_frame(name):
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


def git_state() -> dict[str, Any]:
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
