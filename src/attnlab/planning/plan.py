"""The plan of a spectral density of a language model: memory and cost on each device, and what to change."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from attnlab.checks import check_number, check_whole, unknown_name
from attnlab.curvature.operators import PARTS
from attnlab.models.pretrained.loading import load_config
from attnlab.models.transformer import LanguageModelConfig
from attnlab.planning.programs import Case, Footprint, footprint

GIB = 2**30


@dataclass(frozen=True)
class Rates:
    """What one device does in a second.

    Attributes:
        flops: operations of matrix products.
        traffic: bytes of its own memory.
        received: bytes from other devices.
    """

    flops: float
    traffic: float
    received: float

    def __post_init__(self) -> None:
        for name, rate in vars(self).items():
            check_number(name, rate, 1, 1e30, "It is a rate, in operations or bytes a second of one device.")

    def seconds(self, found: Footprint) -> float:
        """The time of a product, at least: arithmetic and memory at once, other devices waited for."""
        return max(found.flops / self.flops, found.traffic / self.traffic) + found.received / self.received


@dataclass(frozen=True)
class Plan:
    """What a case takes of each device, and where that is more than its memory, what changes of the case would.

    Attributes:
        case: what is planned.
        found: what it takes.
        memory: bytes of a device; None where none was stated.
        changes: by what is changed, the plan of that.
    """

    case: Case
    found: Footprint
    memory: float | None = None
    changes: dict[str, "Plan"] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """Whether it fits; true where no memory was stated."""
        return self.memory is None or self.found.peak <= self.memory

    @property
    def products(self) -> int:
        """Products of the whole density."""
        return self.case.probes * self.case.steps


def plan(
    model: LanguageModelConfig | str | Path,
    *,
    sequences: int,
    length: int,
    dtype: str | None = None,
    product: str = "hessian",
    devices: int = 1,
    sharded: bool = True,
    afresh: bool = False,
    probes: int = 10,
    steps: int = 64,
    memory: float | None = None,
) -> Plan:
    """Compile a spectral density of a language model for `devices` devices, and say what it would take of each.

    The programs are those of `hessian` (or `ggn`) and `spectral_density`, compiled from shapes alone: no weights are
    read or made. With no more devices than this process has they are compiled for those, otherwise for simulated
    devices of a CPU in a process of its own. Temporaries are what that compiler needs: on a CPU bfloat16 is widened to
    float32 for matrix products, and fusions are others than on an accelerator. Loops are counted as often as they run.
    What the process itself takes (Python, JAX, compiled programs: about half a GiB) comes on top.

    Args:
        model: a config, or a path that `attnlab.models.pretrained.load` reads, of which only the settings are: blocks
            are then scanned, their elementwise parts computed again, and the logits factored.
        sequences, length: of the data; sequences are spread over the devices.
        dtype: of the parameters; None is the config's, and float32 of a path.
        product: the curvature, `hessian`, `ggn` or `functional`.
        devices: how many.
        sharded: whether parameters are spread over the devices as by `shard_parameters`; otherwise each holds all.
        afresh: whether nothing is kept between two products (`hessian(..., budget=0)`).
        probes, steps: of the density.
        memory: of one device, in bytes; where it does not suffice, changes are compiled too, at their price in time.

    Raises `ValueError` for numbers that do not fit, an unknown product or settings that are not implemented,
    `TypeError` for a model that is none, `FileNotFoundError` for a path that does not exist, `RuntimeError` where the
    process that compiles fails.
    """
    config = _config(model)
    config = config if dtype is None else replace(config, dtype=dtype)
    _ = config.parameter_dtype  # raises for one that is none
    check_whole(sequences=sequences, length=length, devices=devices, probes=probes, steps=steps)
    if memory is not None:
        check_number("memory", memory, 1, 1e30, "It is in bytes, of one device.")
    if product not in PARTS:
        raise unknown_name("product", product, PARTS)
    if sequences % devices:
        raise ValueError(
            f"sequences is {sequences}; expected a multiple of devices, which is {devices}: data are spread over them "
            "by sequences. Change one of them."
        )
    if length > config.length:
        raise ValueError(
            f"length is {length}; expected at most {config.length}, the longest sequence of the model. Shorten it."
        )
    case = Case(config, sequences, length, product, devices, sharded, afresh, probes, steps)
    first = Plan(case, footprint(case), memory)
    if first.fits:
        return first
    others = {name: Plan(other, footprint(other), memory) for name, other in _changes(case)}
    return replace(first, changes=others)


def _config(model: Any) -> LanguageModelConfig:
    if isinstance(model, LanguageModelConfig):
        return model
    if not isinstance(model, (str, Path)):
        raise TypeError(f"model is a {type(model).__name__}; expected a LanguageModelConfig or a path.")
    config = load_config(model)
    if not isinstance(config, LanguageModelConfig):
        raise ValueError(f"{model} is a text encoder, without a loss of its own; expected a language model.")
    blocks = replace(config.transformer, scan=True, remat="elementwise")
    return replace(config, transformer=blocks, factored=True)


def _changes(case: Case) -> Iterator[tuple[str, Case]]:
    """What may make a case smaller, one change at a time, the cheapest first."""
    config = case.model
    if not config.factored:
        yield "factored=True", replace(case, model=replace(config, factored=True))
    if case.devices > 1 and not case.sharded:
        yield "sharded parameters", replace(case, sharded=True)
    for remat in ("elementwise", "block"):
        if config.transformer.remat not in (remat, "block"):
            blocks = replace(config.transformer, remat=remat)
            yield f"remat='{remat}'", replace(case, model=replace(config, transformer=blocks))
    if not case.afresh:
        yield "nothing saved (budget=0)", replace(case, afresh=True)
    if config.dtype != "bfloat16":
        yield "bfloat16", replace(case, model=replace(config, dtype="bfloat16"))
    if case.sequences % (2 * case.devices) == 0:
        yield "half the sequences", replace(case, sequences=case.sequences // 2)
        yield "twice the devices", replace(case, devices=2 * case.devices, sharded=True)


def plans_table(plans: Iterable[Plan], rates: Rates) -> Table:
    """A row a plan, of each device. In GiB: parameters and data, what is saved between products, temporaries, the most
    at once. Of a product: operations, bytes of memory read and written, bytes from other devices; its time, and that of
    all products."""
    memory, cost = ("held", "saved", "temp.", "peak"), ("Gflop", "GB", "GB in")
    table = Table("devices", *memory, *cost, "product", "all", title="of each device: GiB | a product | time")
    for each in plans:
        found, seconds = each.found, rates.seconds(each.found)
        sizes = (found.parameters, found.saved, found.temporaries, found.peak)
        counts = (found.flops, found.traffic, found.received)
        cells = [*(f"{size / GIB:.3g}" for size in sizes), *(f"{count / 1e9:.3g}" for count in counts)]
        table.add_row(str(each.case.devices), *cells, _time(seconds), _time(seconds * each.products))
    return table


def unfitting_table(unfit: Plan) -> Table:
    """What changes would make of the memory of each device, for a plan that does not fit."""
    assert unfit.memory is not None
    title = f"{unfit.found.peak / GIB:.3g} GiB do not fit {unfit.memory / GIB:.3g} GiB"
    table = Table("with", "peak GiB", "fits", title=title)
    for name, change in unfit.changes.items():
        table.add_row(name, f"{change.found.peak / GIB:.3g}", "yes" if change.fits else "no")
    return table


def _time(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
