"""Checkpoints from a folder with `config.json` and safetensors, in one file or several, or from one GGUF file."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from attnlab.models.pretrained.checkpoint import Checkpoint, Stored
from attnlab.models.pretrained.gguf_files import gguf_checkpoint
from attnlab.models.pretrained.settings import needed
from attnlab.models.pretrained.tokenizers import tokenizer_of_folder

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
INSTALL = 'pip install "attnlab[pretrained]"'
FORMATS = ("F64", "F32", "F16", "BF16")
"""The floating-point formats of safetensors that are read; what is no parameter may have another."""


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint in a folder, beside a safetensors file, or of a GGUF file; tensors are read when they are taken.

    Raises `FileNotFoundError` where a file is missing, `ValueError` for one that is cut short or of another format,
    `ModuleNotFoundError` without the package that reads it.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"path is {str(path)!r}, which does not exist; expected a folder, or a file, of weights."
        )
    if path.is_dir():
        return _folder(path, path)
    if path.suffix == ".gguf":
        return gguf_checkpoint(path)
    if path.suffix == ".safetensors" or path.name == INDEX:
        return _folder(path.parent, path)
    raise ValueError(
        f"path is {str(path)!r}; expected a folder with config.json and safetensors, a .safetensors or a .gguf file."
    )


def _folder(folder: Path, path: Path) -> Checkpoint:
    settings = read_json(folder / "config.json")
    tensors: dict[str, Stored] = {}
    for file, names in _weight_files(folder, path).items():
        held = _safetensors(file)
        absent = sorted((names or set()) - set(held))
        if absent:
            raise ValueError(f"{file} does not hold {', '.join(absent[:3])}; expected what {INDEX} says is in it.")
        tensors |= held if names is None else {name: held[name] for name in names}
        beside = sorted(set(held) - names) if names is not None else []
        if beside:
            raise ValueError(f"{file} holds {', '.join(beside[:3])}; expected only what {INDEX} says is in it.")
    return Checkpoint(path, settings, tensors, tokenizer_of_folder(folder))


def _weight_files(folder: Path, path: Path) -> dict[Path, set[str] | None]:
    """The files, each with the names that the index gives it."""
    if path.suffix == ".safetensors":
        return {path: None}
    if (folder / INDEX).exists() and (path.name == INDEX or not (folder / SINGLE).exists()):
        files: dict[Path, set[str] | None] = {}
        for name, file in needed(read_json(folder / INDEX), "weight_map").items():
            files.setdefault(folder / file, set()).add(name)  # type: ignore[union-attr]
        return files
    if not (folder / SINGLE).exists():
        held = ", ".join(sorted(file.name for file in folder.iterdir())) or "nothing"
        raise FileNotFoundError(
            f"{folder} holds {held}; expected {SINGLE}, or {INDEX} with its files. Name a GGUF file by its own path."
        )
    return {folder / SINGLE: None}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `FileNotFoundError`, or `ValueError` where it holds something else."""
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; expected it beside the weights. Name a GGUF file by its own path."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); is it cut short?") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected an object with named values.")
    return content


def _safetensors(path: Path) -> Mapping[str, Stored]:
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{path} is read by the package safetensors; run {INSTALL}.") from error
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected every file that {INDEX} names.")
    try:
        file = safe_open(path, framework="numpy")
        views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}); is it cut short?") from error
    return {
        name: Stored(tuple(view.get_shape()), view.get_dtype(), partial(_values, path, file, name, view.get_dtype()))
        for name, view in views.items()
    }


def _values(path: Path, file: Any, name: str, dtype: str) -> np.ndarray:
    if dtype not in FORMATS:
        raise ValueError(f"{path}: {name} is stored as {dtype}; expected one of {', '.join(FORMATS)}.")
    return np.asarray(file.get_tensor(name)).astype(np.float32)
