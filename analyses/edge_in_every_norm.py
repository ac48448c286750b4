"""The edge of stability in the optimizer's own norm: sign descent, Muon, Lion and spectral descent settle at theirs.

Attention on digits, softmax and linear, and the matrices of a small transformer on text, trained by rules whose step is
the steepest in a norm. At each measured step the largest curvature in the unit ball of that norm, as a bracket
(attained from below, certified from above), over the rule's threshold at the effective rate of the very step; without
momentum and with, where the law is that of the critical ray. Findings that fail: signs with momentum and descent by
blocks had not settled by the end, signs on text swing further above, and Muon with a plain average stays below. As a
control a rate too low to reach the edge. Three seeds.

The rates on text, of Lion and of blocks were chosen on seed 0. There Muon on text swung higher at larger rates (to 1.27
times its threshold at 0.01, to 1.75 at 0.03) and, with Nesterov momentum at 0.01, had not settled (0.7 to 1.6); Lion at
0.0003 had just come to its edge; blocks diverged at 0.2 and stood at half their edge at 0.05.
"""

import os
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from rich.progress import Progress
from rich.table import Table

from attnlab.analysis import Analysis, Arrays, SinglePrecisionConfig
from attnlab.expectation import Expectation, at_most, between

# The scheduler that lets operations of one program overlap stands still in this analysis: all threads wait, none works
# (jaxlib 0.10.2, two cores, many decompositions at once). Read when the first program is compiled.
ONE_AFTER_ANOTHER = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {ONE_AFTER_ANOTHER}".strip()

MUON = {"momentum": 0.0, "nesterov": False, "exact": True}
RUNS = {
    "sign 0.001": ("softmax", "sign", 1e-3, 960, {}),
    "Muon 0.01": ("softmax", "muon", 1e-2, 640, MUON),
    "Muon 0.01, linear": ("linear", "muon", 1e-2, 640, MUON),
    "sign 0.001, text": ("text", "sign", 1e-3, 640, {}),
    "Muon 0.003, text": ("text", "muon", 3e-3, 640, MUON),
    "spectral 0.005": ("softmax", "spectral", 5e-3, 1920, {}),
    "block coordinate 0.1": ("softmax", "block_coordinate", 0.1, 1920, {}),
    "sign 0.0003, b = 0.9": ("softmax", "sign", 3e-4, 960, {"momentum": 0.9}),
    "Lion 0.001": ("softmax", "lion", 1e-3, 960, {"weight_decay": 0.0}),
    "Muon 0.01, b = 0.9": ("softmax", "muon", 1e-2, 640, MUON | {"momentum": 0.9}),
    "Muon 0.01, Nesterov 0.95": ("softmax", "muon", 1e-2, 640, {}),
    "control: sign 0.00003": ("softmax", "sign", 3e-5, 960, {}),
}
"""Name of the run: kind of attention on digits or text, rule, learning rate, steps and options."""
MOMENTUM = ("sign 0.0003, b = 0.9", "Lion 0.001", "Muon 0.01, b = 0.9", "Muon 0.01, Nesterov 0.95")
PANELS = {
    "sign descent: norm of the largest entry": ("sign 0.001", "sign 0.001, text", "control: sign 0.00003"),
    "Muon: norm of the largest matrix": ("Muon 0.01", "Muon 0.01, linear", "Muon 0.003, text"),
    "spectral descent: the same; blocks: their sum": ("spectral 0.005", "block coordinate 0.1"),
    "with momentum": MOMENTUM,
}
LINES = ("-", "--", "-.", ":")
MEASUREMENTS = 16


@dataclass(frozen=True)
class Config(SinglePrecisionConfig):
    """Options of the analysis."""

    SMOKE: ClassVar = {"runs": ("sign 0.001",), "seeds": 1, "shorten": 60, "restarts": 2, "rounds": 3, "products": 4}

    runs: tuple[str, ...] = tuple(RUNS)
    """Which of the runs."""
    seeds: int = 3
    """How many seeds; the first has the number `--seed`."""
    shorten: int = 1
    """Divide the number of steps of every run by this."""
    restarts: int = 12
    """Starts of the ascent, and directions of the relaxed problem."""
    rounds: int = 30
    """Rounds of each, at most, at each measurement; the next one goes on from there."""
    products: int = 40
    """Of the upper bound."""


def compute(config: Config, progress: Progress) -> Arrays:
    """Every run at every seed, with its bracket measured inside the scan: (seeds, measurements) by name."""
    import jax

    from attnlab.checks import check_names
    from attnlab.dynamics.generalized import Search, generalized_stability
    from attnlab.dynamics.rules import update_rule
    from attnlab.risks.digits import digits_attention
    from attnlab.risks.matrices import matrices_alone
    from attnlab.risks.networks import text_model
    from attnlab.training import Session, show_progress, train

    check_names("run", config.runs, RUNS)
    search, arrays = Search(config.restarts, config.rounds, 1e-3, config.products), {}
    for name in config.runs:
        problem, kind, rate, steps, options = RUNS[name]
        rule = update_rule(kind, rate, **options)
        steps = steps // config.shorten
        probes, parts = {"edge": generalized_stability(rule, search)}, []
        for seed in range(config.seed, config.seed + config.seeds):
            key = jax.random.key(seed)
            text = problem == "text"
            risk, params = matrices_alone(*text_model(key)) if text else digits_attention(key, key, weights=problem)
            folder, title = config.scratch() / f"{name}-{seed}", f"{name}, seed {seed}"
            session = Session(directory=folder, report=show_progress(progress, title))
            every = max(1, steps // MEASUREMENTS)
            records = train(
                risk, params, rule.transformation, key, steps=steps, every=every, probes=probes, session=session
            ).records
            parts.append({"losses": records.losses, "steps": records.steps, **records.values["edge"]})
        arrays[name] = {field: np.stack([np.asarray(part[field]) for part in parts]) for field in parts[0]}
    return arrays


def settled(arrays: Arrays, name: str) -> np.ndarray:
    """Lower bound over threshold in the second half of the run, (seeds,): the mean over the measurements at which the
    step was one of the rule's."""
    ratio = arrays[name]["ratio"]
    return np.nanmean(ratio[:, ratio.shape[1] // 2 :], axis=1)


def plot(arrays: Arrays, config: Config):
    """The lower bound of the sharpness over the threshold, by rule, and how far above it the truth may be."""
    from attnlab.plotting.panels import panels

    note = f"lines: lower bounds, medians of {config.seeds} seeds, dark: their range; light: up to the upper bound"
    held = held_panels(config)
    figure, shown = panels(message(arrays, config), list(held), note=note)
    for axes, names in zip(shown, held.values(), strict=True):
        for number, name in enumerate(names):
            each, color = arrays[name], f"C{number}"
            steps, ratio = each["steps"][0], each["ratio"]
            low, middle, high = (np.nanquantile(ratio, share, axis=0) for share in (0, 0.5, 1))
            bound = np.nanmedian(each["upper"] / each["threshold"], axis=0)
            axes.fill_between(steps, middle, np.maximum(bound, middle), color=color, alpha=0.1, lw=0)
            axes.fill_between(steps, low, high, color=color, alpha=0.3, lw=0)
            axes.plot(steps, middle, color=color, ls=LINES[number], label=name)
        axes.axhline(1, color="black", ls=":", lw=1)
        axes.set(ylim=(0, 2.8), xlabel="step", ylabel="sharpness in the norm / threshold")
        axes.legend(loc="upper left", fontsize=7.5)
    return figure


def held_panels(config: Config) -> dict[str, list[str]]:
    """The runs of each panel that has any."""
    shown = {title: [name for name in names if name in config.runs] for title, names in PANELS.items()}
    return {title: names for title, names in shown.items() if names}


def message(arrays: Arrays, config: Config) -> str:
    """Where the runs without momentum settle, those with it and the control, mean over the seeds."""
    plain = [name for name in config.runs if name not in MOMENTUM and not name.startswith("control")]
    groups = {
        "": plain,
        "momentum ": [name for name in MOMENTUM if name in config.runs],
        "control ": [name for name in config.runs if name.startswith("control")],
    }
    words = []
    for title, names in groups.items():
        at = [settled(arrays, name).mean() for name in names]
        if at:
            low, high = (f"{value:.2f}" for value in (min(at), max(at)))
            words.append(title + (low if low == high else f"{low} to {high}"))
    return "Own-norm sharpness over its threshold: " + ", ".join(words)


def details(arrays: Arrays, config: Config):
    """The losses of the same runs."""
    from attnlab.plotting.curves import range_band
    from attnlab.plotting.panels import panels

    note = f"lines: medians, bands: range over {config.seeds} seeds"
    held = held_panels(config)
    falls = [np.median(arrays[name]["losses"][:, 0] / arrays[name]["losses"][:, -1]) for name in config.runs]
    message = f"The losses fall by {min(falls):.2g} to {max(falls):.2g} times along the same runs (medians)"
    figure, shown = panels(message, list(held), note=note)
    for axes, names in zip(shown, held.values(), strict=True):
        for number, name in enumerate(names):
            losses = arrays[name]["losses"].T
            range_band(axes, np.arange(len(losses)), losses, f"C{number}", name, LINES[number])
        axes.set(yscale="log", xlabel="step", ylabel="training loss")
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** 0.4)  # room for the legend
        axes.legend(loc="upper right", fontsize=7.5)
    return figure


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """Where each run settles, at every seed, and that the control stays below."""
    paper, law = "arXiv 2603.05002: at or a little above 2/eta", "derived here: the momentum law on the critical ray"
    found = []
    for name in config.runs:
        what = f"{name}: sharpness / threshold, by seed"
        if name.startswith("control"):
            found.append(at_most(what, settled(arrays, name), 0.9, source="negative control"))
            continue
        momentum = name in MOMENTUM
        because = "the edge, with the swings of large rates above it; what is measured is a lower bound"
        seeds = settled(arrays, name)
        found.append(between_each(what, seeds, 0.8, 1.25, because, law if momentum else paper))
    return found


def between_each(what: str, values: np.ndarray, low: float, high: float, because: str, source: str) -> Expectation:
    """That every value lies in the interval."""
    worst = values[np.argmax(np.abs(np.nan_to_num(values, nan=np.inf) - (low + high) / 2))]
    return between(f"{what} (the farthest)", worst, low, high, because=because, source=source)


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """Where each run settles, and how tight the bracket is."""
    table = Table("run", "sharpness / threshold, settled", "spread over seeds", "upper / lower at the end", "loss")
    for name in config.runs:
        each, late = arrays[name], settled(arrays, name)
        tight = (each["upper"] / each["lower"])[:, -1].mean()
        table.add_row(
            name, f"{late.mean():.3f}", f"{np.ptp(late):.3f}", f"{tight:.3g}", f"{each['losses'][:, -1].mean():.3g}"
        )
    return [table]


ANALYSIS = Analysis("edge-in-every-norm", Config, compute, plot, tables, findings, __doc__, slow=True, details=details)

if __name__ == "__main__":
    ANALYSIS.main()
