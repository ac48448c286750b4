"""A checkpoint: the settings and the tensors of a file, and the check that a model takes every tensor there is."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

Take = Callable[..., np.ndarray]
"""`take(name, *shape)`: the tensor with a published name, which must have that shape, in float32."""

WRAPPERS = ("module.", "_orig_mod.")
"""What training wrappers of torch put before every name."""
LISTED = 6
"""The most names that an error lists of each kind."""


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: its shape and format there, and a function that reads it as float32."""

    shape: tuple[int, ...]
    format: str
    read: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Checkpoint:
    """What a folder or file holds.

    Attributes:
        source: the folder or file.
        settings: as in `config.json`, whatever the format.
        tensors: by their published names.
        tokenizer: a function that makes the tokenizer; None where the file has none.
    """

    source: Path
    settings: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    tokenizer: Callable[[], Any] | None = None

    @property
    def formats(self) -> str:
        """What the weights were stored as, such as `210 tensors Q4_1, 61 F32`."""
        counts = Counter(tensor.format for tensor in self.tensors.values()).most_common()
        (first, count), *others = counts
        return ", ".join([f"{count} tensors {first}", *(f"{number} {name}" for name, number in others)])


def bare_names(tensors: Mapping[str, Stored], prefixes: Iterable[str], renamed: Mapping[str, str]) -> dict[str, Stored]:
    """The tensors by their names without the prefixes of wrappers and of the family, of several names the first one.

    Raises `ValueError` where two names become one.
    """
    known = (*WRAPPERS, *prefixes)
    found: dict[str, Stored] = {}
    origin: dict[str, str] = {}
    for name, tensor in tensors.items():
        bare = name
        while prefix := next((prefix for prefix in known if bare.startswith(prefix)), ""):
            bare = bare.removeprefix(prefix)
        bare = renamed.get(bare, bare)
        if bare in found:
            raise ValueError(
                f"the file holds {origin[bare]!r} and {name!r}, which are one tensor; expected one of them."
            )
        found[bare], origin[bare] = tensor, name
    return found


def fill(checkpoint: Checkpoint, convert: Callable[[Take], Any], passed_over: Iterable[str]) -> Any:
    """`convert(take)` once every tensor is known to be taken, each with the shape that the file has.

    `passed_over` are patterns of names that are no parameters of the model. Raises `ValueError`, with all tensors that
    are missing, left over or misshapen.
    """
    wanted: dict[str, tuple[int, ...]] = {}

    def note(name: str, *shape: int) -> np.ndarray:
        if name in wanted:
            raise AssertionError(f"{name} is taken twice")
        wanted[name] = shape
        return np.broadcast_to(np.float32(0), shape)

    convert(note)
    _check(checkpoint, wanted, tuple(passed_over))
    return convert(lambda name, *shape: _read(checkpoint, name))


def _read(checkpoint: Checkpoint, name: str) -> np.ndarray:
    values = checkpoint.tensors[name].read()
    if not np.isfinite(values).all():
        raise ValueError(
            f"{checkpoint.source}: {name} has entries that are not finite; expected the weights of a model."
        )
    return values


def _check(checkpoint: Checkpoint, wanted: Mapping[str, tuple[int, ...]], passed_over: tuple[str, ...]) -> None:
    held = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    missing = [name for name in wanted if name not in held]
    left = [name for name in held if name not in wanted and not any(re.fullmatch(p, name) for p in passed_over)]
    misshapen = [name for name in wanted if name in held and held[name] != wanted[name]]
    if not (missing or left or misshapen):
        return
    shapes = [f"{name} {held[name]} where the settings say {wanted[name]}" for name in misshapen]
    near = [_with_nearest(name, left or list(held)) for name in missing]
    lists = (("missing", near), ("left over", left), ("misshapen", shapes))
    found = "; ".join(f"{kind}: {_listed(names)}" for kind, names in lists if names)
    raise ValueError(
        f"{checkpoint.source} does not hold the tensors of its settings. {found}. {_layers(held, wanted)}Expected each "
        "tensor of the model exactly once: compare the settings with the file."
    )


def _with_nearest(name: str, held: list[str]) -> str:
    near = get_close_matches(name, held, n=1)
    return f"{name} (nearest: {near[0]})" if near else name


def _listed(names: list[str]) -> str:
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")


def _layers(held: Iterable[str], wanted: Iterable[str]) -> str:
    """How many layers there are, where it is not what the settings say."""
    counts = [_count_layers(names) for names in (held, wanted)]
    return "" if counts[0] == counts[1] else f"The file holds {counts[0]} layers, the settings say {counts[1]}. "


def _count_layers(names: Iterable[str]) -> int:
    numbers = {int(match[1]) for name in names if (match := re.search(r"\.(\d+)\.", f".{name}"))}
    return len(numbers)
