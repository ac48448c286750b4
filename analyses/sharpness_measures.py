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


def plot(arrays: Arrays, config: Config):
    """Each measure over what it stands for, along training, by seed; and the edge above."""
    import matplotlib.pyplot as plt

    figure, rows = plt.subplots(2, len(config.runs), figsize=(4.4 * len(config.runs), 6), sharex="col", squeeze=False)
    for column, name in enumerate(config.runs):
        upper, lower = rows[:, column]
        steps = arrays[name]["steps"][0]
        for number, (label, values) in enumerate(
            {"highest eigenvalue": arrays[name]["ratio"], "critical sharpness": arrays[name]["critical"] / 2}.items()
        ):
            upper.plot(steps, values.T, color=f"C{number}", lw=0.9)[0].set_label(label)
        upper.set_ylim(-0.05, 1.6)  # Adam starts far above
        upper.axhline(1, color="0.4", ls=":")
        upper.set_title(name)
        for number, (label, measure) in enumerate(MEASURES.items()):
            if measure == "top":
                continue
            lines = lower.plot(steps, relative(arrays, name, measure).T, color=f"C{number}", lw=0.9)
            lines[0].set_label(label)
        lower.axhline(1, color="0.4", ls=":")
        lower.set_yscale("symlog", linthresh=0.1)
        lower.set_xlabel("step")
    rows[0, 0].set_ylabel("sharpness / threshold")
    rows[0, -1].legend(fontsize="small")
    rows[1, 0].set_ylabel("measure / what it stands for")
    rows[1, 0].legend(fontsize="small")
    return figure


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
            stood = arrays[name]["ratio" if measure == "critical" else "top"]
            follows = np.mean([rank_correlation(a, b) for a, b in zip(arrays[name][measure], stood, strict=True)])
            cost = costs.get(measure, f"{np.median(arrays[name]['passes']):.0f} passes")
            halves = (f"{np.median(share[:, :middle]):.3g}", f"{np.median(share[:, middle:]):.3g}")
            table.add_row(name, label, *halves, f"{follows:.2f}", cost)
    return [table]


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's."""
    ranks = [np.argsort(np.argsort(values)) for values in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1])


ANALYSIS = Analysis("sharpness-measures", Config, compute, plot, tables, findings, __doc__, slow=True)

if __name__ == "__main__":
    ANALYSIS.main()
