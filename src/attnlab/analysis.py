"""The frame of an analysis script: its config is its command line; compute gives arrays, plot gives the figure.

No heavy import at the top: `--help` answers at once. Scripts import JAX inside `compute` and matplotlib inside `plot`.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from attnlab.compiled import keep_compiled_programs
from attnlab.expectation import Expectation, expectations_table

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

Arrays = dict[str, Any]
"""NumPy arrays by name, in dicts within dicts; on disk a name is the path to its array, parted by "/"."""


@dataclass(frozen=True)
class AnalysisConfig:
    """Options that every analysis has. Subclasses add theirs, and the sizes that `--smoke` puts in their place."""

    SMOKE: ClassVar[Mapping[str, Any]] = {}

    seed: int = 1
    """Seed of all random numbers."""
    dtype: Literal["float64", "float32"] = "float64"
    """Precision of the computation."""
    smoke: bool = False
    """Tiny sizes, in seconds, to see that it runs; the files' names then end in -smoke."""
    output: Path = Path()
    """Folder under which results/ is written."""
    figures: Path | None = None
    """Folder of the figure and its manifest; beside the arrays, in results/NAME/, if none is named."""

    def scratch(self) -> Path:
        """Where a long run of this very config keeps what it needs to resume; removed when the analysis is done."""
        options = {**dataclasses.asdict(self), "kind": type(self).__qualname__, "module": type(self).__module__}
        del options["figures"]  # no number depends on it
        digest = hashlib.sha256(json.dumps(options, default=str, sort_keys=True).encode()).hexdigest()[:16]
        return self.output / "results" / ".running" / digest

    def parts(self) -> Iterable[Path]:
        """The files of finished parts that a run of this very config goes on from."""
        return sorted(self.scratch().glob("*.npz"))

    def resumes(self) -> bool:
        """Whether there is work of an earlier run to go on from."""
        return self.scratch().exists() or any(path.exists() for path in self.parts())


@dataclass(frozen=True)
class SinglePrecisionConfig(AnalysisConfig):
    """Options of an analysis that is computed in single precision unless told otherwise."""

    dtype: Literal["float64", "float32"] = "float32"


def log_mean(values: "np.ndarray", axis: int = 0) -> tuple["np.ndarray", "np.ndarray"]:
    """Geometric mean over random starts, which lie along `axis`, and its standard error as a factor."""
    import numpy as np

    logs = np.log(values)
    return np.exp(logs.mean(axis=axis)), np.exp(logs.std(axis=axis, ddof=1) / logs.shape[axis] ** 0.5)


@dataclass(frozen=True)
class Analysis:
    """One figure of the lab.

    Attributes:
        name: of the command and the files.
        config: a subclass of `AnalysisConfig`.
        compute: `compute(config, progress) -> arrays`, under a rich progress display.
        plot: `plot(arrays, config) -> Figure`, from the arrays alone: one message, at most four panels.
        tables: `tables(arrays, config) -> rich tables` for the terminal.
        findings: `findings(arrays, config) -> expectations` that the analysis puts to the test: shown behind the tables
            and kept in the manifest.
        description: what the command's help says first.
        slow: whether it compiles for many seconds even at smoke size: the quick tests leave it to the nightly ones.
        details: what more there is to see, a second figure NAME-details; None where one suffices.
        documents: `documents(arrays, config) -> texts` by the ending of their files (".md"), written beside the figure.
    """

    name: str
    config: type[AnalysisConfig]
    compute: Callable[[Any, Progress], Arrays]
    plot: Callable[[Arrays, Any], "Figure"]
    tables: Callable[[Arrays, Any], Sequence[Table]]
    findings: Callable[[Arrays, Any], Sequence[Expectation]]
    description: str
    slow: bool = False
    details: Callable[[Arrays, Any], "Figure"] | None = None
    documents: Callable[[Arrays, Any], Mapping[str, str]] | None = None

    def main(self, arguments: Sequence[str] | None = None) -> None:
        """Parse the command line, compute, and write the arrays to results/NAME and the figure NAME.{png,pdf,json}.

        Ends with status 1 and one line on standard error when the input or the training is at fault.
        """
        config = tyro.cli(
            self.config, prog=f"attnlab run {self.name}", description=self.description, args=arguments, config=()
        )
        console = Console(markup=False)
        try:
            self.run(config, console)
        except (ValueError, ArithmeticError, ModuleNotFoundError, OSError) as error:
            Console(stderr=True).print(Text.assemble(("error:", "red"), f" {error}"))
            raise SystemExit(1) from error

    def run(self, config: AnalysisConfig, console: Console) -> Arrays:
        """Compute, write and show the analysis for one config; returns the arrays.

        `console` takes text as it is (`markup=False`). Raises `OSError` at once where there is no place to write to.
        """
        with progress_display(console) as progress:
            config, arrays, written = self.produce(config, progress)
        for table in (*self.tables(arrays, config), expectations_table(self.findings(arrays, config))):
            console.print(table)
        for path in written:
            console.print(f"wrote {path}", highlight=False, soft_wrap=True, markup=False)
        return arrays

    def produce(self, config: AnalysisConfig, progress: Progress) -> tuple[AnalysisConfig, Arrays, list[Path]]:
        """Compute and write, under a progress display that is there already: the config with the sizes that were
        used, the arrays, and what was written."""
        from attnlab.runs import check_writable

        for place in (config.output / "results" / self.name, config.figures):
            if place is not None:
                check_writable(place)
        configure_jax(config.dtype)
        config = dataclasses.replace(config, **config.SMOKE) if config.smoke else config
        resumed, started = config.resumes(), time.perf_counter()
        arrays = as_numpy(self.compute(config, progress))
        written = self._write(arrays, config, time.perf_counter() - started, resumed)
        shutil.rmtree(config.scratch(), ignore_errors=True)
        return config, arrays, written

    def _write(self, arrays: Arrays, config: AnalysisConfig, seconds: float, resumed: bool) -> list[Path]:
        from attnlab.plotting.style import save_figure, style
        from attnlab.runs import manifest, parts_record, save_result, write_json

        name = self.name + ("-smoke" if config.smoke else "")
        record = {"analysis": self.name, "resumed": resumed, **manifest(config, seconds, self._script())}
        parts = parts_record(config.parts())
        if parts["parts"]:  # of a resumed run the seconds above are those of its last session alone
            record["parts"] = parts
        record["findings"] = [finding.record() for finding in self.findings(arrays, config)]
        results = config.output / "results" / name
        save_result(results, arrays, record)  # first: it is what took the time
        place = (config.figures or results) / name
        with style():
            figures = self.draw(arrays, config)
            written = [
                file
                for ending, figure in figures.items()
                for file in save_figure(figure, place.with_name(name + ending))
            ]
        written += self._write_documents(arrays, config, place)
        record["message"] = figures[""].get_suptitle().removesuffix(misses(self.findings(arrays, config)))
        write_json(place.with_suffix(".json"), record)
        return [*written, results]

    def _write_documents(self, arrays: Arrays, config: AnalysisConfig, place: Path) -> list[Path]:
        from attnlab.runs import replace_file

        texts = {} if self.documents is None else self.documents(arrays, config)
        for ending, text in texts.items():
            with replace_file(place.with_name(place.name + ending)) as partial:
                partial.write_text(text, encoding="utf-8")
        return [place.with_name(place.name + ending) for ending in texts]

    def draw(self, arrays: Arrays, config: AnalysisConfig) -> dict[str, "Figure"]:
        """The figures by the ending of their names: the first says above it how many expectations were missed."""
        figures = {"": self.plot(arrays, config)}
        missed = misses(self.findings(arrays, config))
        if missed:
            figures[""].suptitle((figures[""].get_suptitle() + missed).strip(), fontsize=10.5)
        if self.details is not None:
            figures["-details"] = self.details(arrays, config)
        return figures

    def _script(self) -> Path:
        return Path(str(sys.modules[self.config.__module__].__file__))


def misses(findings: Sequence[Expectation]) -> str:
    """The line under a figure's message that says how many expectations were missed; empty where none was."""
    missed = sum(not finding.passed for finding in findings)
    return f"\n{missed} of {len(findings)} expectations missed" if missed else ""


def as_numpy(arrays: Mapping[str, Any]) -> Arrays:
    """The same dicts, their leaves NumPy arrays. Raises `ValueError` for a name that no path on disk can hold."""
    import numpy as np

    for name in arrays:
        if "/" in name or not name:
            raise ValueError(f"an array is named {name!r}; expected a name without '/': put it into a dict within.")
    return {
        name: as_numpy(value) if isinstance(value, Mapping) else np.asarray(value) for name, value in arrays.items()
    }


def progress_display(console: Console) -> Progress:
    """A progress bar with counts, time taken and time left; `status` is a free text field of each task."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}", markup=False),
        console=console,
    )


def configure_jax(dtype: str) -> None:
    """Set the precision, keep compiled programs between runs in the user's cache folder, and make the cores of the CPU
    devices, over which independent products spread.

    For commands, which own their process; a library call never does this.
    """
    import jax

    jax.config.update("jax_enable_x64", dtype == "float64")
    keep_compiled_programs()
    make_cores_devices()


def make_cores_devices() -> None:
    """Make the cores of the CPU devices, unless `JAX_NUM_CPU_DEVICES` or `XLA_FLAGS` says how many there are, or JAX
    has computed something."""
    import jax

    if "JAX_NUM_CPU_DEVICES" not in os.environ and "device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # once JAX has computed something its devices stay what they are
            jax.config.update("jax_num_cpu_devices", cores())


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
