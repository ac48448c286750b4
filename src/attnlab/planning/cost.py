"""What a compiled program costs on each device: read from its text, where loops say how often they run.

XLA's own cost analysis counts the body of a loop once, however often it runs: of a scan over thirty layers, one layer.
Here every computation is counted as often as it is called. Counted are multiplications and additions of matrix products
(two each a term), bytes that instructions read and write (a fusion as one instruction, of a slice what it takes), and
bytes that a device receives from others.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

BYTES = {"pred": 1, "s4": 1, "u4": 1, "bf16": 2, "token": 0, "opaque": 0}
"""Of the dtypes whose names do not end in their number of bits."""
FREE = {
    "parameter", "constant", "bitcast", "tuple", "get-tuple-element", "while", "call", "conditional", "iota",
    "after-all", "partition-id", "replica-id", "optimization-barrier",
}  # fmt: skip
"""Instructions that move nothing themselves."""
SLICES = {"dynamic-slice", "slice", "gather"}
EXCHANGES: dict[str, Callable[[int, int], int]] = {
    "all-gather": lambda read, written: written - read,
    "all-reduce": lambda read, written: 2 * written,
    "reduce-scatter": lambda read, written: read - written,
    "all-to-all": lambda read, written: written,
    "collective-permute": lambda read, written: written,
}
"""What a device receives, from the bytes that the instruction reads and writes."""

_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclass(frozen=True)
class Cost:
    """Of one device: operations of matrix products, bytes read and written, bytes received from other devices."""

    flops: float
    traffic: float
    received: float

    def __add__(self, other: "Cost") -> "Cost":
        """The cost of both."""
        return Cost(self.flops + other.flops, self.traffic + other.traffic, self.received + other.received)

    def __mul__(self, times: float) -> "Cost":
        """The cost of so many."""
        return Cost(times * self.flops, times * self.traffic, times * self.received)


NOTHING = Cost(0.0, 0.0, 0.0)


class Instruction(NamedTuple):
    """One line of a program."""

    name: str
    shape: str
    kind: str
    operands: tuple[str, ...]
    rest: str
    root: bool


Computation = dict[str, Instruction]


def program_cost(text: str) -> Cost:
    """The cost of a compiled program from its text, `jax.stages.Compiled.as_text()`.

    A loop that does not say how often it runs is counted once. Raises `ValueError` for a text that is no program.
    """
    computations, entry = _parse(text)

    @cache
    def of(name: str, fused: bool) -> Cost:
        computation = computations[name]
        return sum((_cost(line, computation, computations, of, fused) for line in computation.values()), NOTHING)

    return of(entry, False)


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    computations: dict[str, Computation] = {}
    entry, current = None, {}
    for line in text.splitlines():
        if (instruction := _INSTRUCTION.match(line)) is not None:
            name, parsed = instruction[2], _instruction(instruction)
            current[name] = parsed
        elif (start := _COMPUTATION.match(line)) is not None:
            current = computations[start[2]] = {}
            entry = start[2] if start[1] else entry
    if entry is None:
        raise ValueError(f"text begins with {text[:40]!r}; expected a compiled program, of Compiled.as_text().")
    return computations, entry


def _instruction(match: re.Match[str]) -> Instruction:
    root, name, line = match.groups()
    end = _closing(line) + 1 if line.startswith("(") else line.index(" ")
    shape, call = line[:end], line[end:].lstrip()
    kind, _, after = call.partition("(")
    close = _closing("(" + after) - 1
    operands = tuple(re.findall(r"%([\w.\-]+)", after[:close]))
    return Instruction(name, shape, kind, operands, after[close:], root is not None)


def _closing(text: str) -> int:
    """The place of the parenthesis that closes the one at the start."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place
    raise ValueError(f"{text[:80]!r} does not close its parenthesis.")


def _cost(
    line: Instruction,
    computation: Computation,
    computations: dict[str, Computation],
    of: Callable[[str, bool], Cost],
    fused: bool,
) -> Cost:
    total = NOTHING if fused else Cost(0.0, _traffic(line, computation, computations), _received(line, computation))
    if line.kind == "dot":
        total += Cost(_dot_flops(line, computation), 0.0, 0.0)
    if line.kind in ("reduce", "scatter", "sort", "map", "reduce-window", *EXCHANGES):
        return total  # what they call is for single numbers
    trips = _TRIPS.search(line.rest)
    times = float(trips[1]) if trips is not None else 1.0
    for name in _called(line):
        total += of(name, fused or line.kind == "fusion") * times
    return total


def _called(line: Instruction) -> Iterator[str]:
    for match in _CALLED.finditer(line.rest):
        yield match[1]
    for match in _BRANCHES.finditer(line.rest):
        yield from re.findall(r"%([\w.\-]+)", match[1])


def _dot_flops(line: Instruction, computation: Computation) -> float:
    (_, left), *_ = _arrays(computation[line.operands[0]].shape)
    (_, out), *_ = _arrays(line.shape)
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.rest)
    axes = [int(axis) for axis in contracted[1].split(",") if axis] if contracted is not None else []
    return 2.0 * math.prod(out) * math.prod(left[axis] for axis in axes)


def _arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    return [(dtype, tuple(int(n) for n in sizes.split(",") if n)) for dtype, sizes in _SHAPE.findall(shape)]


def _size(shape: str) -> int:
    """The bytes of an array, or of a tuple of them."""
    return sum(math.prod(sizes) * _width(dtype) for dtype, sizes in _arrays(shape))


def _width(dtype: str) -> int:
    if dtype in BYTES:
        return BYTES[dtype]
    bits = re.match(r"[a-z]+(\d+)", dtype)  # f32, s8, c64, f8e4m3fn
    return max(1, int(bits[1]) // 8) if bits is not None else 0


def _received(line: Instruction, computation: Computation) -> float:
    kind = line.kind.removesuffix("-start")
    if kind not in EXCHANGES:
        return 0.0
    read = sum(_size(computation[name].shape) for name in line.operands)
    written = _size(line.shape) - (read if line.kind.endswith("-start") else 0)
    return float(EXCHANGES[kind](read, written))


def _traffic(line: Instruction, computation: Computation, computations: dict[str, Computation]) -> float:
    if line.kind in FREE or line.kind.endswith("-done"):
        return 0.0
    if line.kind == "fusion":
        inside = computations[next(_called(line))]
        return _read_by_fusion(inside) + _written_by(next(each for each in inside.values() if each.root), inside)
    read = sum(_part_read(line, place, computation[name]) for place, name in enumerate(line.operands))
    return read + _written_by(line, computation)


def _part_read(line: Instruction, place: int, operand: Instruction) -> float:
    """The bytes of one operand that an instruction reads."""
    if place == 0 and line.kind in SLICES:
        return min(_size(line.shape), _size(operand.shape))
    return 0 if place == 0 and line.kind == "dynamic-update-slice" else _size(operand.shape)


def _read_by_fusion(inside: Computation) -> float:
    users: dict[str, list[tuple[Instruction, int]]] = {}
    for line in inside.values():
        for place, name in enumerate(line.operands):
            users.setdefault(name, []).append((line, place))

    def read(line: Instruction) -> float:
        parts = [
            read(user) if user.kind == "bitcast" else _part_read(user, place, line)
            for user, place in users.get(line.name, ())
        ]
        return min(sum(parts), _size(line.shape))

    return sum(read(line) for line in inside.values() if line.kind == "parameter")


def _written_by(line: Instruction, computation: Computation) -> float:
    if line.kind == "bitcast" and line.operands:
        return _written_by(computation[line.operands[0]], computation)
    if line.kind == "tuple":
        return sum(_written_by(computation[name], computation) for name in line.operands)
    if line.kind == "dynamic-update-slice":
        return _size(computation[line.operands[1]].shape)
    return _size(line.shape)
