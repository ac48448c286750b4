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
    from attnlab.plotting.panels import legend_below, panels

    titles = ["sharpness falls ahead of the edge", "sharpness over the edge", "training loss", "the control, by seed"]
    note = f"lines: medians, bands: range over {config.seeds} seeds; cross: the loss overflows there, at one seed"
    figure, (walk, over, loss, control) = panels(message(arrays, config), titles, note=note)
    steps = np.arange(0, config.steps + 1, config.every)
    for number, name in enumerate(RUNS):
        if name not in config.runs:
            continue
        look, run = (f"C{number}", ("-.", "-", "--")[number], name), arrays[name]
        draw(loss, np.arange(config.steps), run["losses"], look)
        if name == "warm-up":
            draw(walk, steps, run["sharpness"] / run["sharpness"][:, :1], look)
            draw(over, steps, run["ratio"], look)
            law = np.median(run["sharpness"] / run["ratio"] / run["sharpness"][:, :1], axis=0)
            walk.plot(steps, law, ":", color="black", label=r"the edge, $2 \,/\, \eta(t)$", zorder=3)
            walk.set(yscale="log", ylim=(0.3 * law.min(), 3))
        elif name != "no warm-up":
            for seed, ratio in enumerate(run["ratio"], config.seed):
                dashes = ("-", "--", ":", "-.")[(seed - config.seed) % 4]
                draw(control, steps, ratio[None], (look[0], dashes, None))
                control.plot([], [], dashes, color=look[0], label=f"seed {seed}")
    for axes in (walk, over, control):
        axes.set(xlabel="step")
    for axes in (over, control):
        axes.axhline(1, color="black", ls=":", lw=1)
        axes.set(ylabel=r"$\lambda_1(H)\, \eta(t) \,/\, 2$", ylim=(0, 2))
    walk.set(ylabel=r"$\lambda_1(H) \,/\, \lambda_1(H)$ at step 0")
    loss.set(yscale="log", xlabel="step", ylabel="training loss", ylim=(1e-2, 1e3))
    if control.has_data():
        control.legend(loc="upper right", ncols=3)
    legend_below(figure, [walk, loss])
    return figure


def message(arrays: Arrays, config: Config) -> str:
    """What became of the run that warms up, and of the one that does not."""
    words = []
    if "warm-up" in config.runs:
        at = np.median(settled(arrays))
        words.append(f"Warm-up walks the sharpness down to {at:.2f} of the edge")
    if "no warm-up" in config.runs:
        broken = int(np.sum(arrays["no warm-up"]["broken"] > 0))
        words.append(f"without it the loss overflows at {broken} of {config.seeds} seeds")
    return "; ".join(words) or f"A final LayerNorm, from {config.excess:g} times the edge"


def draw(axes, abscissae: np.ndarray, values: np.ndarray, look: tuple[str, str, str | None]) -> None:
    """Median and range over the seeds (seeds, points); each seed by itself, with a cross at its last finite value,
    where one of them breaks off."""
    from attnlab.plotting.curves import range_band

    color, line, label = look
    if np.isfinite(values).all():
        range_band(axes, abscissae, values.T, color, label, line)
        return
    for each in values:
        last = int(np.argmin(np.append(np.isfinite(each), False)))
        axes.plot(abscissae[:last], each[:last], line, color=color, label=label)
        if 0 < last < len(each):
            axes.plot(abscissae[last - 1], min(each[last - 1], CROSS), "x", color=color, ms=7, mew=1.8, zorder=4)


CROSS = 1.0
"""Highest place of a cross."""


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
            found.append(at_least(f"{what}, the fewest of a seed", broken.min(), 1, source=source))
        elif name == "warm-up":
            at = settled(arrays)
            worst = at[np.argmax(np.abs(np.nan_to_num(at, nan=np.inf) - 1.025))]
            what = f"{name}: sharpness over the edge, last third, the farthest seed"
            found.append(between(what, worst, 0.95, 1.1, source=source))
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
