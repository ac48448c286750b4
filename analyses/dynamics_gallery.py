"""All phenomena of training dynamics in one go: every figure, and one table of what was measured beside expected.

Runs the analyses of training dynamics one after another, each as `attnlab run NAME` would, writes their figures, and
draws where every measured number lies in the interval that was expected of it. `--seeds 3` does so for three seeds: the
table has a column for each, the members' figures are those of the first. A seed takes about ten minutes; a run that was
stopped resumes.
"""

import time
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from rich.progress import Progress
from rich.table import Table

from attnlab.analysis import Analysis, AnalysisConfig, Arrays, Finding, configure_jax
from attnlab.cli import analysis_scripts, load_script

MEMBERS = (
    "token-identities",
    "block-heterogeneity",
    "edge-of-stability",
    "warmup",
    "central-flow",
    "rod-flow",
    "adam-on-linear-attention",
    "class-imbalance",
)
"""The analyses of the gallery, in the order in which they run."""


@dataclass(frozen=True)
class Config(AnalysisConfig):
    """Options of the analysis. Every member runs in its own precision."""

    SMOKE: ClassVar = {"members": ("rod-flow",), "seeds": 2}

    members: tuple[str, ...] = MEMBERS
    """Which analyses."""
    seeds: int = 1
    """How many seeds; the first has the number `--seed`."""

    def all_seeds(self) -> range:
        """The seeds by number."""
        return range(self.seed, self.seed + self.seeds)


def compute(config: Config, progress: Progress) -> Arrays:
    """Every member at every seed: its findings column by column, `measured` (findings, seeds) and the others
    (findings,), the `analysis` of each, and the `seconds` that members took, (members, seeds)."""
    from attnlab.checks import check_names
    from attnlab.runs import stored_arrays

    check_names("member", config.members, MEMBERS)
    if config.seeds < 1:
        raise ValueError(f"seeds is {config.seeds}; expected at least 1.")
    task = progress.add_task("gallery", total=config.seeds * len(config.members), status="")
    columns = []
    for seed in config.all_seeds():
        parts = []
        for name in config.members:
            progress.update(task, status=f"seed {seed}: {name}")
            path = config.scratch() / f"{name}-{seed}.npz"
            parts.append(stored_arrays(path, lambda n=name, s=seed: measure(config, n, s, progress)))
            for bar in set(progress.task_ids) - {task}:  # those of the member
                progress.remove_task(bar)
            progress.advance(task)
        columns.append({field: np.concatenate([part[field] for part in parts]) for field in parts[0]})
    configure_jax(config.dtype)
    return columns[0] | {
        field: np.stack([column[field] for column in columns], axis=1) for field in ("measured", "seconds")
    }


def measure(config: Config, name: str, seed: int, progress: Progress) -> Arrays:
    """Run one member at one seed; its figure is written beside the gallery's for the first seed only."""
    started = time.perf_counter()
    script = load_script(analysis_scripts()[name])
    output = config.output if seed == config.seed else config.scratch() / f"seed-{seed}"
    member = script.ANALYSIS.config(seed=seed, output=output, smoke=config.smoke)
    member, arrays, _ = script.ANALYSIS.produce(member, progress)
    fields = zip(*script.findings(arrays, member), strict=True)
    found = {name: np.array(column) for name, column in zip(Finding._fields, fields, strict=True)}
    owner = np.full(len(found["what"]), name)
    return found | {"analysis": owner, "seconds": np.array([time.perf_counter() - started])}


def findings(arrays: Arrays) -> list[list[Finding]]:
    """Every finding again, at each seed."""
    columns = (arrays[field] for field in Finding._fields)
    return [
        [Finding(str(what), value, float(low), float(high), str(source)) for value in values.tolist()]
        for what, values, low, high, source in zip(*columns, strict=True)
    ]


def place(finding: Finding) -> float:
    """Where the measurement lies in its interval, 0 to 1 within; an open interval is entered at 0 and ends at 1."""
    if np.isinf(finding.high):
        size = max(abs(finding.low), 1e-12)
        return float(1 - np.exp(-max(finding.measured - finding.low, 0) / size)) if finding.reproduced else -0.15
    if finding.high == finding.low:
        return 0.5 if finding.reproduced else 1.15
    return float(np.clip((finding.measured - finding.low) / (finding.high - finding.low), -0.15, 1.15))


def plot(arrays: Arrays, config: Config):
    """Every finding on its own interval, drawn from 0 to 1, with a mark for each seed."""
    import matplotlib.pyplot as plt

    rows, owners = findings(arrays), arrays["analysis"].tolist()
    colors = {name: f"C{index}" for index, name in enumerate(dict.fromkeys(owners))}
    ends = 1.22 + 0.15 * np.arange(config.seeds)  # of the columns of numbers
    figure, axes = plt.subplots(figsize=(10 + config.seeds, 0.9 + 0.27 * len(rows)))
    axes.axvspan(0, 1, color="0.92", zorder=0)
    for row, (seeds, owner) in enumerate(zip(rows, owners, strict=True)):
        heights = row + 0.22 * (np.arange(config.seeds) - (config.seeds - 1) / 2)
        for finding, height, end in zip(seeds, heights, ends, strict=True):
            marker = "o" if finding.reproduced else "x"
            axes.plot(place(finding), height, marker, color=colors[owner], ms=7 / config.seeds**0.5, mew=1.5)
            axes.text(end, row, f"{finding.measured:.3g}", va="center", ha="right", fontsize="small")
        axes.text(ends[-1] + 0.03, row, seeds[0].expected, va="center", fontsize="small", color="0.35")
    axes.set_yticks(range(len(rows)), [seeds[0].what for seeds in rows], fontsize="small")
    for label, owner in zip(axes.get_yticklabels(), owners, strict=True):
        label.set_color(colors[owner])
    for seed, end in zip(config.all_seeds(), ends, strict=True):
        axes.text(end, -1, f"seed {seed}", ha="right", fontsize="small")
    axes.text(ends[-1] + 0.03, -1, "expected", fontsize="small", color="0.35")
    axes.set(xlim=(-0.2, ends[-1] + 0.25), ylim=(len(rows) - 0.4, -1.6), xticks=(0, 1))
    axes.set_xticklabels(("low end", "high end"))
    axes.set_xlabel("place of the measurement in the expected interval (cross: outside; seeds from top to bottom)")
    return figure


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """All findings at every seed, and the time that each member took."""
    seeds = [f"seed {seed}" for seed in config.all_seeds()]
    found = Table("what", "expected", *seeds, "reproduced", "source")
    times = Table("analysis", *(f"{seed} [s]" for seed in seeds), "reproduced")
    rows, reproduced = findings(arrays), {name: [] for name in config.members}
    for row, owner in zip(rows, arrays["analysis"].tolist(), strict=True):
        verdicts = [finding.reproduced for finding in row]
        reproduced[owner] += verdicts
        measured = (f"{f.measured:.4g}" if f.reproduced else f"[red]{f.measured:.4g}[/red]" for f in row)
        found.add_row(row[0].what, row[0].expected, *measured, f"{sum(verdicts)} of {len(row)}", row[0].source)
    for name, seconds in zip(config.members, arrays["seconds"], strict=True):
        own = reproduced[name]
        times.add_row(name, *(f"{second:.0f}" for second in seconds), f"{sum(own)} of {len(own)}")
    return [found, times]


ANALYSIS = Analysis("dynamics-gallery", Config, compute, plot, tables, __doc__)

if __name__ == "__main__":
    ANALYSIS.main()
