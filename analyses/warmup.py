"""Why warm-up works: a transformer that starts far above the edge of stability blows up, or walks down to it.

Gradient descent on two pre-norm blocks on digits, at a rate more than six times the stable one of the starting point,
at several seeds. Without warm-up the loss overflows within some steps; with a linear warm-up the sharpness falls ahead
of the edge 2 / eta(t), which comes down on it, and settles there. Control: a LayerNorm at the end bounds the outputs,
and the same excess does no lasting harm; not at every seed: at 1 and 2 that run stays finite, at 3 it overflows too.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from rich.progress import Progress
from rich.table import Table

from attnlab.analysis import Analysis, Arrays, SinglePrecisionConfig
from attnlab.expectation import Expectation, at_least, between, equal

RUNS = {"no warm-up": (False, False), "warm-up": (True, False), "no warm-up, final LayerNorm": (False, True)}
"""Name of the run: whether it warms up, whether its model has a final LayerNorm."""


@dataclass(frozen=True)
class Config(SinglePrecisionConfig):
    """Options of the analysis."""

    SMOKE: ClassVar = {"steps": 20, "warmup": 10, "every": 10, "images": 16, "runs": ("warm-up",), "seeds": 2}

    excess: float = 6.7
    """Learning rate over the stable one, 2 / sharpness, at the start."""
    steps: int = 1200
    """Steps, a multiple of `every`."""
    warmup: int = 400
    """Steps over which the rate rises from zero."""
    every: int = 10
    """Steps between measurements."""
    images: int = 128
    """Digits to train on."""
    seeds: int = 3
    """How many seeds; the first has the number `--seed`."""
    runs: tuple[str, ...] = tuple(RUNS)
    """Which of the runs."""


def compute(config: Config, progress: Progress) -> Arrays:
    """Train every run from its start at every seed, at `excess` times the edge there: (seeds, ...) by name."""
    from attnlab.checks import check_names

    check_names("run", config.runs, RUNS)
    seeds = range(config.seed, config.seed + config.seeds)
    arrays: Arrays = {}
    for name in config.runs:
        parts = [one_run(config, name, seed, progress) for seed in seeds]
        arrays[name] = {field: np.stack([part[field] for part in parts]) for field in parts[0]}
    return arrays


def one_run(config: Config, name: str, seed: int, progress: Progress) -> dict[str, np.ndarray]:
    """Losses, sharpness and its ratio to the edge of one run, NaN from where it broke off; how many losses were not
    finite, and the rate."""
    import jax
    import optax

    from attnlab.dynamics.rules import update_rule
    from attnlab.dynamics.sharpness import stability
    from attnlab.risks.digits import digits_transformer
    from attnlab.training import DivergenceError, Session, show_progress, train

    warm, final_norm = RUNS[name]
    key = jax.random.key(seed)
    risk, params = digits_transformer(key, key, config.images, final_norm=final_norm)
    rate = config.excess * 2 / initial_sharpness(risk, params, key)
    schedule = optax.linear_schedule(0.0, rate, config.warmup) if warm else rate
    # a step of a warm-up counts from one: at rate zero there is no edge
    optimizer = update_rule("gd", (lambda count, rise=schedule: rise(count + 1)) if warm else schedule)
    options = {"steps": config.steps, "every": config.every, "probes": {"edge": stability(optimizer)}}
    try:
        session = Session(report=show_progress(progress, f"{name}, seed {seed}"))
        records = train(risk, params, optimizer.transformation, key, session=session, **options).records
    except DivergenceError as error:
        records = error.records
    losses, edge = np.asarray(records.losses), records.values["edge"]
    measurements = config.steps // config.every + 1
    return {
        "rate": np.asarray(rate),
        "broken": np.sum(~np.isfinite(losses)),
        "losses": padded(losses, config.steps),
        "sharpness": padded(edge["values"][:, -1], measurements),
        "ratio": padded(edge["ratio"], measurements),
    }


def padded(values, length: int) -> np.ndarray:
    """The values with NaN up to `length`."""
    values = np.asarray(values, float)
    return np.concatenate([values, np.full(length - len(values), np.nan)])


def initial_sharpness(risk, params, key) -> float:
    """The highest eigenvalue of the Hessian at the start."""
    from attnlab.curvature import eigenpairs, hessian

    return float(eigenpairs(hessian(risk, params), key, count=1).values[-1])


def plot(arrays: Arrays, config: Config):
    """The walk down along 2 / eta(t), what is left of it over the edge, the loss, and the control."""
    from attnlab.plotting.panels import panels

    titles = [
        r"warm-up: the sharpness follows the edge $2 / \eta(t)$",
        "the same, over the edge",
        "training loss of all runs",
        "control: a final LayerNorm, by seed",
    ]
    note = f"lines: medians, bands: range over {config.seeds} seeds, or a line a seed; cross: the loss overflows next"
    figure, (walk, over, loss, control) = panels(message(arrays, config), titles, note=note)
    steps = np.arange(0, config.steps + 1, config.every)
    for number, name in enumerate(RUNS):
        if name not in config.runs:
            continue
        look, run = (f"C{number}", ("-.", "-", "--")[number], name), arrays[name]
        draw(loss, 1 + np.arange(config.steps), run["losses"], look, 1e5)
        if name == "warm-up":
            plot_walk(walk, over, steps, run, look)
        elif name != "no warm-up":
            for seed, ratio in enumerate(run["ratio"], config.seed):
                marker = "o^sv"[(seed - config.seed) % 4]
                draw(control, 1 + steps, ratio[None], (f"C{2 + seed - config.seed}", "-", f"seed {seed}"), 1e5, marker)
            control.legend(loc="lower left", ncols=config.seeds)
    walk.set(xlabel="step", ylabel=r"$\lambda_1(H) \,/\, \lambda_1(H)$ at step 0")
    for axes in (over, control):
        axes.axhline(1, color="black", ls=":", lw=1)
        axes.set_ylabel(r"$\lambda_1(H)\, \eta(t) \,/\, 2$")
    over.set(xlabel="step", ylim=(0, 2))
    control.set(xscale="log", yscale="log", xlabel="step + 1", ylim=(0.1, 10))
    loss.set(xscale="log", yscale="log", xlabel="step + 1", ylabel="training loss", ylim=(1e-2, 1e6))
    loss.legend(loc=(0.34, 0.5), handlelength=1.6)
    return figure


def plot_walk(walk, over, steps: np.ndarray, run: Arrays, look: tuple[str, str, str]) -> None:
    """The sharpness over that of the start, where the edge is one curve for all seeds, and over the edge."""
    start = run["sharpness"][:, :1]
    draw(walk, steps, run["sharpness"] / start, (*look[:2], "sharpness"))
    draw(over, steps, run["ratio"], look)
    law = np.median(run["sharpness"] / run["ratio"] / start, axis=0)
    walk.plot(steps, law, ":", color="black", label=r"the edge, $2 \,/\, \eta(t)$", zorder=3)
    walk.set(yscale="log", ylim=(0.6 * law.min(), 3))
    walk.legend(loc="upper right")


def message(arrays: Arrays, config: Config) -> str:
    """What became of the run that warms up, and of the one that does not."""
    words = []
    if "warm-up" in config.runs:
        words.append(f"With warm-up sharpness ends at {np.median(settled(arrays)):.2f} times the edge")
    if "no warm-up" in config.runs:
        broken = int(np.sum(arrays["no warm-up"]["broken"] > 0))
        words.append(f"without, {broken} of {config.seeds} seeds overflow")
    return "; ".join(words) or f"A final LayerNorm, from {config.excess:g} times the edge"


def draw(
    axes, abscissae: np.ndarray, values: np.ndarray, look: tuple[str, str, str], top: float = np.inf, marker: str = ""
) -> None:
    """Median and range over the seeds (seeds, points); where one breaks off, each by itself, with a cross at its last
    finite value, or at `top` where that is higher."""
    from attnlab.plotting.curves import range_band

    color, line, label = look
    if np.isfinite(values).all() and len(values) > 1:
        range_band(axes, abscissae, values.T, color, label, line)
        return
    for seed, each in enumerate(values):
        last = int(np.argmin(np.append(np.isfinite(each), False)))
        shown = {"color": color, "ls": line, "lw": 1, "marker": marker, "ms": 3, "markevery": 0.1}
        axes.plot(abscissae[:last], each[:last], label=None if seed else label, **shown)
        if 0 < last < len(each):
            axes.plot(abscissae[last - 1], min(each[last - 1], top), "x", color=color, ms=8, mew=2, zorder=4)


def settled(arrays: Arrays) -> np.ndarray:
    """Sharpness over the edge of the run that warms up, mean over its last third, (seeds,)."""
    ratio = arrays["warm-up"]["ratio"]
    return ratio[:, -ratio.shape[1] // 3 :].mean(axis=1)


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """Overflow without warm-up, the edge with it, survival with a final LayerNorm, at every seed."""
    source, found = "Gilmer et al., arXiv 2110.04369", []
    for name in config.runs:
        broken, what = arrays[name]["broken"], f"{name}: steps with a loss that is not finite"
        if name == "no warm-up":
            what = f"{what}, the fewest of a seed"
            found.append(at_least(what, broken.min(), 1, because="one suffices", source=source))
        elif name == "warm-up":
            at = settled(arrays)
            worst = at[np.argmax(np.abs(np.nan_to_num(at, nan=np.inf) - 1.025))]
            what = f"{name}: sharpness over the edge, last third, the farthest seed"
            because = "it hovers at the edge, and swings above it more than below"
            found.append(between(what, worst, 0.95, 1.1, because=because, source=source))
        else:
            what, control = f"{what}, the most of a seed", "negative control"
            found.append(equal(what, broken.max(), 0, 0.0, because="a count", source=control))
    return found


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """Rate, start and end of every run."""
    table = Table("run", "seed", "learning rate", "sharpness at the start", "loss at the start", "loss at the end")
    for name in config.runs:
        run = arrays[name]
        for row, losses in enumerate(run["losses"]):
            finite = np.isfinite(losses)
            end = f"{losses[-1]:.3g}" if finite.all() else f"not finite at step {int(np.argmin(finite))}"
            rate, start = f"{run['rate'][row]:.4g}", f"{run['sharpness'][row, 0]:.4g}"
            table.add_row(name, str(config.seed + row), rate, start, f"{losses[0]:.3g}", end)
    return [table]


ANALYSIS = Analysis("warmup", Config, compute, plot, tables, findings, __doc__, slow=True)

if __name__ == "__main__":
    ANALYSIS.main()
