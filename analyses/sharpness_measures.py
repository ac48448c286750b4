"""Cheap measures of sharpness beside the highest eigenvalue: which to trust, and when.

Attention on digits, trained by gradient descent through its edge of stability, by Adam, and, as a control, by gradient
descent far below the edge. At each measured step the highest eigenvalue of the (preconditioned) Hessian over the
threshold, and beside it what costs forward passes or a product or two: the critical sharpness along the next update,
Rayleigh quotients of the gradient and of the update with its share within matrices, batch sharpness, and the noise of
the gradient. Three seeds.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from rich.progress import Progress
from rich.table import Table

from attnlab.analysis import Analysis, Arrays, SinglePrecisionConfig
from attnlab.expectation import Expectation, at_most, between

RUNS = {
    "GD 0.2": ("gd", 0.2, 1200),
    "Adam 0.003": ("adam", 3e-3, 1200),
    "control: GD 0.02": ("gd", 0.02, 1200),
}
"""Name of the run: rule, learning rate and steps."""
MEASURES = {
    "highest eigenvalue": "top",
    "critical sharpness": "critical",
    "Rayleigh quotient of the gradient": "gradient",
    "Rayleigh quotient of the update": "update",
    "batch sharpness": "batch",
}
MEASUREMENTS = 24


@dataclass(frozen=True)
class Config(SinglePrecisionConfig):
    """Options of the analysis."""

    SMOKE: ClassVar = {"runs": ("GD 0.2",), "seeds": 1, "shorten": 50, "batches": 2}

    runs: tuple[str, ...] = tuple(RUNS)
    """Which of the runs."""
    seeds: int = 3
    """How many seeds; the first has the number `--seed`."""
    shorten: int = 1
    """Divide the number of steps of every run by this."""
    batches: int = 16
    """Batches of 16 examples that batch sharpness is a mean over."""


def compute(config: Config, progress: Progress) -> Arrays:
    """Every run at every seed with all measures inside the scan: (seeds, measurements) by name."""
    import jax

    from attnlab.checks import check_names
    from attnlab.dynamics.directional import critical_sharpness, directional_sharpness
    from attnlab.dynamics.gradients import batch_sharpness, gradient_noise
    from attnlab.dynamics.rules import update_rule
    from attnlab.dynamics.sharpness import stability, top_eigenvalues
    from attnlab.risks.digits import digits_attention
    from attnlab.training import Session, minibatches, show_progress, train

    check_names("run", config.runs, RUNS)
    arrays = {}
    for name in config.runs:
        kind, rate, steps = RUNS[name]
        rule = update_rule(kind, rate)
        optimizer, steps, parts = rule.transformation, steps // config.shorten, []
        probes = {
            "edge": stability(rule),
            "top": top_eigenvalues(),
            "critical": critical_sharpness(optimizer),
            "along": directional_sharpness(optimizer),
            "batch": batch_sharpness(minibatches(16), config.batches),
            "noise": gradient_noise(),
        }
        for seed in range(config.seed, config.seed + config.seeds):
            key = jax.random.key(seed)
            risk, params = digits_attention(key, key)
            folder, title = config.scratch() / f"{name}-{seed}", f"{name}, seed {seed}"
            session = Session(directory=folder, report=show_progress(progress, title))
            every = max(1, steps // MEASUREMENTS)
            records = train(
                risk, params, optimizer, key, steps=steps, every=every, probes=probes, session=session
            ).records
            parts.append(summary(records))
        arrays[name] = {field: np.stack([part[field] for part in parts]) for field in parts[0]}
    return arrays


def summary(records) -> dict[str, np.ndarray]:
    """One number a measurement of each measure."""
    values = records.values
    along = values["along"]
    found = {
        "ratio": values["edge"]["ratio"],
        "top": values["top"]["values"][:, -1],
        "critical": values["critical"]["sharpness"],
        "passes": values["critical"]["passes"],
        "quadratic": along["critical"],
        "gradient": along["gradient"],
        "update": along["update"],
        "within": along["within"] / along["update"],
        "batch": values["batch"]["mean"],
        "noise": values["noise"]["noise_scale"],
        "steps": records.steps,
        "losses": records.losses,
    }
    return {name: np.asarray(value, float) for name, value in found.items()}


def relative(arrays: Arrays, name: str, measure: str) -> np.ndarray:
    """A measure over the quantity that it stands for, (seeds, measurements): of the critical sharpness 2 times the
    ratio of the edge, of the others the highest eigenvalue."""
    each = arrays[name]
    return each["critical"] / (2 * each["ratio"]) if measure == "critical" else each[measure] / each["top"]


LOOKS = {"GD 0.2": ("C0", "o"), "Adam 0.003": ("C1", "s"), "control: GD 0.02": ("C2", "^")}
"""Colour and marker of each run where all are in one panel."""


def plot(arrays: Arrays, config: Config):
    """The edge and the critical sharpness of each run; and each measure over what it stands for, late in training."""
    from attnlab.plotting.curves import range_band
    from attnlab.plotting.panels import panels

    titles = [f"{name}: critical {whole(arrays, name, 'critical'):.2g} of it" for name in config.runs]
    note = f"lines: medians, bands: range over {config.seeds} seeds; (last) the same of the medians of the second half"
    figure, shown = panels(message(arrays, config), [*titles, "each measure over what it stands for"], note=note)
    for axes, name in zip(shown, config.runs, strict=False):
        each = arrays[name]
        steps = each["steps"][0]
        range_band(axes, steps, each["ratio"].T, "black", r"highest eigenvalue $\cdot\, \eta / 2$")
        range_band(axes, steps, each["critical"].T / 2, "C1", "critical sharpness / 2", "--")
        axes.axhline(1, color="black", ls=":", lw=1)
        axes.set(xlabel="step", ylabel="sharpness / threshold", ylim=(0, 2))
        axes.legend(loc="upper right")
    plot_measures(shown[-1], arrays, config)
    return figure


def plot_measures(axes, arrays: Arrays, config: Config) -> None:
    """A row for each measure, in it a dot for each run."""
    names = list(MEASURES.items())[1:]
    for number, run in enumerate(config.runs):
        color, marker = LOOKS[run]
        for row, (_, measure) in enumerate(names):
            seeds = np.maximum(np.median(late(relative(arrays, run, measure)), axis=1), LEAST)
            place, label = row + 0.22 * (number - 1), run.removeprefix("control: ") if row == 0 else None
            axes.hlines(place, seeds.min(), seeds.max(), color=color, lw=1)
            axes.plot(np.median(seeds), place, marker, color=color, ms=5, label=label)
    axes.axvline(1, color="black", ls=":", lw=1)
    axes.set_yticks(range(len(names)), [label.replace(" of", "\nof") for label, _ in names], fontsize=8)
    axes.set(xscale="log", xlim=(LEAST / 1.5, 3), ylim=(len(names) + 1.0, -0.6))
    axes.set_xlabel("measure / what it stands for")
    axes.legend(loc="lower left", ncols=2, fontsize=7.5, columnspacing=0.8, handletextpad=0.2)


LEAST = 1e-3
"""Where the axis of the shares ends."""


def whole(arrays: Arrays, name: str, measure: str) -> float:
    """Median over seeds and the second half of a measure over what it stands for."""
    return float(np.median(late(relative(arrays, name, measure))))


def message(arrays: Arrays, config: Config) -> str:
    """What the critical sharpness of gradient descent is at the edge and below it."""
    at = {name: f"{whole(arrays, name, 'critical'):.2g}" for name in config.runs}
    where = {"GD 0.2": "at the edge", "control: GD 0.02": "far below it"}
    words = [f"{at[name]} {where[name]}" for name in where if name in at]
    return "Critical sharpness over the highest eigenvalue: " + (", ".join(words) or ", ".join(at.values()))


def details(arrays: Arrays, config: Config):
    """Each measure over what it stands for, along training, by run; and whether it follows that."""
    from attnlab.plotting.curves import range_band
    from attnlab.plotting.panels import legend_below, panels

    note = f"lines: medians, bands: range over {config.seeds} seeds; axis linear below 0.1"
    ranks = [rank for run in config.runs for rank in following(arrays, run).values()]
    message = f"Cheap measures follow the eigenvalue with rank correlations of {min(ranks):.2f} to {max(ranks):.2f}"
    figure, shown = panels(message, [*config.runs, "rank correlation with what it stands for"], note=note)
    for axes, name in zip(shown, config.runs, strict=False):
        for number, (label, measure) in enumerate(list(MEASURES.items())[1:], 1):
            line = ("-", "--", "-.", ":")[number - 1]
            range_band(axes, arrays[name]["steps"][0], relative(arrays, name, measure).T, f"C{number}", label, line)
        axes.axhline(1, color="black", ls=":", lw=1)
        axes.set_yscale("symlog", linthresh=0.1)
        axes.set(xlabel="step", ylabel="measure / what it stands for", ylim=(-0.03, 3))
    for number, run in enumerate(config.runs):
        color, marker = LOOKS[run]
        found = list(following(arrays, run).values())
        shown[-1].plot(found, np.arange(len(found)) + 0.2 * (number - 1), marker, color=color, label=run)
    shown[-1].axvline(1, color="black", ls=":", lw=1)
    labels = [label.replace(" of", "\nof") for label in following(arrays, config.runs[0])]
    shown[-1].set_yticks(range(len(labels)), labels, fontsize=8)
    shown[-1].set(xlim=(-1.05, 1.05), ylim=(len(labels) + 0.8, -0.6), xlabel="Spearman's, mean over the seeds")
    shown[-1].legend(loc="lower left", fontsize=7.5)
    legend_below(figure, shown[0], columns=2)
    return figure


def following(arrays: Arrays, run: str) -> dict[str, float]:
    """Rank correlation along training of each measure with what it stands for, mean over the seeds."""
    found = {}
    for label, measure in list(MEASURES.items())[1:]:
        stood = arrays[run]["ratio" if measure == "critical" else "top"]
        pairs = zip(arrays[run][measure], stood, strict=True)
        found[label] = float(np.mean([rank_correlation(*pair) for pair in pairs]))
    return found


def late(values: np.ndarray) -> np.ndarray:
    """The second half of the measurements."""
    return values[:, values.shape[1] // 2 :]


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """What bounds what, and what the critical sharpness says at the edge and far from it."""
    paper = "arXiv 2601.16979"
    found = []
    for name in config.runs:
        each = arrays[name]
        near = each["quadratic"] >= 0.5  # farther than four steps away the loss is no quadratic
        if near.any():
            error = np.median(np.abs(each["critical"] / each["quadratic"] - 1)[near])
            because = "half of the points within a fifth: bisection is good to 2 %, the rest is the third derivative"
            what = f"{name}: critical against <u, Hu> / -<g, u>, within four steps"
            found.append(at_most(what, error, 0.2, because=because, source=paper))
        passes = np.median(each["passes"])
        found.append(at_most(f"{name}: forward passes a measurement, median", passes, 10, source=paper))
        highest = np.max(relative(arrays, name, "gradient"))
        because, what = "the eigenvalue is certified to 1 %", f"{name}: gradient's over the eigenvalue"
        found.append(at_most(what, highest, 1.02, because=because, source="a Rayleigh quotient"))
    if "GD 0.2" in config.runs:
        edge, critical = (late(arrays["GD 0.2"][field]).mean() for field in ("ratio", "critical"))
        found.append(between("GD 0.2: eigenvalue / threshold, settled", edge, 0.98, 1.1, source="arXiv 2103.00065"))
        because = "along the highest direction alone it is 2; the rest of the gradient has less curvature"
        what = "GD 0.2: critical sharpness in steps, settled"
        found.append(between(what, critical, 1.0, 2.2, because=because, source=paper))
    if "control: GD 0.02" in config.runs:
        control = np.max(arrays["control: GD 0.02"]["critical"])
        found.append(at_most("control: critical sharpness in steps", control, 1.0, source="negative control"))
    if "Adam 0.003" in config.runs:
        share = np.mean(late(arrays["Adam 0.003"]["update"] / arrays["Adam 0.003"]["top"]))
        because, what = (
            "preconditioned steps lie off the sharpest directions",
            "Adam 0.003: update's over the eigenvalue",
        )
        found.append(at_most(what, share, 0.5, because=because, source="Pan, Li, arXiv 2306.00204"))
    return found


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """How far each measure is from what it stands for, early and late, and whether it follows it."""
    table = Table("run", "measure", "over it, first half", "second half", "rank correlation", "cost")
    costs = {"gradient": "1 product", "update": "1 product", "batch": f"{config.batches} small products"}
    for name in config.runs:
        for label, measure in list(MEASURES.items())[1:]:
            share = relative(arrays, name, measure)
            middle = share.shape[1] // 2
            cost = costs.get(measure, f"{np.median(arrays[name]['passes']):.0f} passes")
            halves = (f"{np.median(share[:, :middle]):.3g}", f"{np.median(share[:, middle:]):.3g}")
            table.add_row(name, label, *halves, f"{following(arrays, name)[label]:.2f}", cost)
    return [table]


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's."""
    ranks = [np.argsort(np.argsort(values)) for values in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1])


ANALYSIS = Analysis("sharpness-measures", Config, compute, plot, tables, findings, __doc__, slow=True, details=details)

if __name__ == "__main__":
    ANALYSIS.main()
