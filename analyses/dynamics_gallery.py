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

from attnlab.analysis import Analysis, AnalysisConfig, Arrays, configure_jax
from attnlab.cli import analysis_scripts, load_script
from attnlab.expectation import Expectation

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
    first = seed == config.seed
    output = config.output if first else config.scratch() / f"seed-{seed}"
    figures = config.figures if first else None
    member = script.ANALYSIS.config(seed=seed, output=output, figures=figures, smoke=config.smoke)
    member, arrays, _ = script.ANALYSIS.produce(member, progress)
    found = script.ANALYSIS.findings(arrays, member)
    columns = {field: np.array([getattr(each, field) for each in found]) for field in FIELDS}
    return columns | {"analysis": np.full(len(found), name), "seconds": np.array([time.perf_counter() - started])}


FIELDS = ("what", "measured", "relation", "reference", "unit", "tolerance", "because", "source")
"""Of a finding of the members: each measures one number, and its unit is absolute."""


def rows(arrays: Arrays) -> list[list[Expectation]]:
    """Every finding again, at each seed."""
    what, measured, *others = (arrays[field].tolist() for field in FIELDS)
    return [
        [Expectation(name, value, *rest) for value in values]
        for name, values, *rest in zip(what, measured, *others, strict=True)
    ]


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """Every finding of the members, at all seeds in one."""
    what, measured, *others = (arrays[field].tolist() for field in FIELDS)
    owners = arrays["analysis"].tolist()
    return [
        Expectation(f"{owner}: {name}", values, *rest)
        for owner, name, values, *rest in zip(owners, what, measured, *others, strict=True)
    ]


def place(finding: Expectation) -> float:
    """Where the measurement lies in its interval, 0 to 1 within. One that is open above is entered at 0 and ends at 1,
    one that is open below the other way round."""
    reference, tolerance = float(finding.reference), finding.allowed
    if finding.relation == "equal":
        offset = float(finding.measured) - reference
        inside = 0.5 + offset / (2 * tolerance) if tolerance else 0.5 if offset == 0 else 1.15
        return float(np.clip(inside, -0.15, 1.15))
    side = 1 if finding.relation == "at least" else -1
    reach = side * (float(finding.measured) - reference) + tolerance
    inside = 1 - np.exp(-reach / max(abs(reference), 1e-12)) if reach >= 0 else -0.15
    return float(inside if side == 1 else 1 - inside)


def plot(arrays: Arrays, config: Config):
    """Every finding on its own interval, drawn from 0 to 1, with a mark for each seed."""
    import matplotlib.pyplot as plt

    found, owners = rows(arrays), arrays["analysis"].tolist()
    colors = {name: f"C{index}" for index, name in enumerate(dict.fromkeys(owners))}
    ends = 1.22 + 0.15 * np.arange(config.seeds)  # of the columns of numbers
    figure, axes = plt.subplots(figsize=(10 + config.seeds, 0.9 + 0.27 * len(found)))
    axes.axvspan(0, 1, color="0.92", zorder=0)
    for row, (seeds, owner) in enumerate(zip(found, owners, strict=True)):
        heights = row + 0.22 * (np.arange(config.seeds) - (config.seeds - 1) / 2)
        for finding, height, end in zip(seeds, heights, ends, strict=True):
            marker = "o" if finding.passed else "x"
            axes.plot(place(finding), height, marker, color=colors[owner], ms=7 / config.seeds**0.5, mew=1.5)
            axes.text(end, row, f"{finding.measured:.3g}", va="center", ha="right", fontsize="small")
        axes.text(ends[-1] + 0.03, row, seeds[0].expected, va="center", fontsize="small", color="0.35")
    axes.set_yticks(range(len(found)), [seeds[0].what for seeds in found], fontsize="small")
    for label, owner in zip(axes.get_yticklabels(), owners, strict=True):
        label.set_color(colors[owner])
    for seed, end in zip(config.all_seeds(), ends, strict=True):
        axes.text(end, -1, f"seed {seed}", ha="right", fontsize="small")
    axes.text(ends[-1] + 0.03, -1, "expected", fontsize="small", color="0.35")
    axes.set(xlim=(-0.2, ends[-1] + 0.25), ylim=(len(found) - 0.4, -1.6), xticks=(0, 1))
    axes.set_xticklabels(("low end", "high end"))
    axes.set_xlabel("place of the measurement in the expected interval (cross: outside; seeds from top to bottom)")
    return figure


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """The time that each member took, and how many of its findings are reproduced, over all seeds."""
    table = Table("analysis", *(f"seed {seed} [s]" for seed in config.all_seeds()), "reproduced")
    found = list(zip(arrays["analysis"].tolist(), rows(arrays), strict=True))
    for name, seconds in zip(config.members, arrays["seconds"], strict=True):
        own = [each.passed for owner, row in found if owner == name for each in row]
        table.add_row(name, *(f"{second:.0f}" for second in seconds), f"{sum(own)} of {len(own)}")
    return [table]


ANALYSIS = Analysis("dynamics-gallery", Config, compute, plot, tables, findings, __doc__, slow=True)

if __name__ == "__main__":
    ANALYSIS.main()
