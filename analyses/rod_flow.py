"""The rod flow of Adam at the edge of stability: two consecutive iterates as the ends of a rod that turns in time.

From a point of training at Adam's edge, the mean of consecutive iterates, the rod flow and the stable flow, which is
the same without the rod's length, run for the same time, at several seeds. Of the rod's length Adam's part is the
oscillation of its iterates, a second difference, which holds nothing of the way that they travel.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from rich.progress import Progress
from rich.table import Table

from attnlab.analysis import Analysis, AnalysisConfig, Arrays
from attnlab.expectation import Expectation, at_least, at_most, between

FLOWS = ("rod flow", "stable flow")


@dataclass(frozen=True)
class Config(AnalysisConfig):
    """Options of the analysis."""

    SMOKE: ClassVar = {"after": 8, "steps": 8, "images": 8, "seeds": 2}

    seeds: int = 5
    """How many seeds; the first has the number `--seed`."""
    learning_rate: float = 0.005
    """Of Adam."""
    b2: float = 0.99
    """Decay of Adam's second moment."""
    after: int = 500
    """Start so many steps into training, at the edge."""
    steps: int = 240
    """Steps to compare; a multiple of `every`."""
    every: int = 1
    """Steps between records."""
    images: int = 128
    """Digits to train on."""


def compute(config: Config, progress: Progress) -> Arrays:
    """Adam, and both flows from one pair of its iterates, at every seed: (seeds, records)."""
    import jax
    import optax

    from attnlab.dynamics.rules import update_rule
    from attnlab.training import Probe

    rule = update_rule("adam", config.learning_rate, b2=config.b2)
    optimizer = optax.adam(config.learning_rate, b2=config.b2)
    states = Probe(lambda risk, state, memory, key: ((state.params, state.optimizer_state, risk(state.params)), memory))
    seeds = range(config.seed, config.seed + config.seeds)
    task = progress.add_task("seeds", total=len(seeds), status="")
    parts = []
    for seed in seeds:
        parts.append(one_seed(config, seed, rule, optimizer, states))
        progress.advance(task)
    every_seed = jax.tree.map(lambda *values: np.stack([np.asarray(value) for value in values]), *parts)
    return {"steps": np.arange(0, config.steps + 1, config.every), **every_seed}


def one_seed(config: Config, seed: int, rule, optimizer, states) -> Arrays:
    """Loss, length of the rod and distance from Adam, by what it is of."""
    import jax
    import jax.numpy as jnp

    from attnlab.dynamics.rods import rod_between, rod_flow
    from attnlab.risks.digits import digits_attention
    from attnlab.training import train
    from attnlab.trees import ravel

    key = jax.random.key(seed)
    risk, params = digits_attention(key, key, config.images)
    steps = config.after + config.steps + 3
    path = train(risk, params, optimizer, key, steps=steps, probes={"states": states}).records.values["states"]
    late = jax.tree.map(lambda leaf: leaf[config.after : config.after + config.steps + 3], path)
    points, _, losses = late
    iterates = jax.vmap(ravel)(points)
    centres = (iterates[:-2] + iterates[1:-1]) / 2
    # d_t = (w_t - w_t+1) / 2 holds half a step of the drift; half of d_t - d_t+1 has the oscillation alone
    halves = (iterates[:-2] - 2 * iterates[1:-1] + iterates[2:]) / 4
    start = rod_between(rule, *(jax.tree.map(lambda leaf, i=i: leaf[i], late[:2]) for i in (0, 1)))
    arrays: Arrays = {
        "loss": {"Adam": (losses[:-2] + losses[1:-1])[:: config.every] / 2},
        "length": {"Adam": jnp.linalg.norm(halves, axis=1)[:: config.every]},
        "distance": {},
    }
    starts = dict(zip(FLOWS, (start, start._replace(half=jnp.zeros_like(start.half))), strict=True))
    for name, rod in starts.items():
        flow = rod_flow(risk, params, rod, rule, steps=config.steps, every=config.every)
        away = jax.vmap(ravel)(flow.params) - centres[:: config.every]
        arrays["loss"][name], arrays["distance"][name] = flow.loss, jnp.linalg.norm(away, axis=1)
        arrays["length"][name] = jnp.linalg.norm(flow.half, axis=1)
    return arrays


LOOKS = {"Adam": ("black", "-"), "rod flow": ("C0", "--"), "stable flow": ("C1", "-.")}
"""Colour and line."""


def plot(arrays: Arrays, config: Config):
    """Distance and loss over the steps compared, and the rod's length, at one seed and its mean square over all."""
    from attnlab.plotting.curves import range_band
    from attnlab.plotting.panels import panels

    nearer = distance_ratio(arrays)
    rod, stable = late_loss(arrays)
    message = (
        f"The rod flow stays {nearer.min():.0f} to {nearer.max():.0f} times nearer to Adam than the flow without a rod"
    )
    titles = [
        "distance from the mean of two iterates",
        f"loss / Adam's: rod {np.median(rod):.3f}, stable {np.median(stable):.3f}",
        f"half-length $\\|D\\|$ of the rod, seed {config.seed}",
        f"its mean square: {np.median(late_square(arrays)):.2f} times Adam's",
    ]
    note = f"lines: medians, bands: range over {config.seeds} seeds; (c) one seed; (d) from step {SHED} on"
    figure, (away, loss, length, square) = panels(message, titles, note=note)
    steps = arrays["steps"]
    for name in FLOWS:
        color, line = LOOKS[name]
        range_band(away, steps[1:], arrays["distance"][name][:, 1:].T, color, name, line)
        ratio = averaged(arrays["loss"][name]) / averaged(arrays["loss"]["Adam"])
        range_band(loss, steps, ratio.T, color, name, line)
    loss.axhline(1, color="black", lw=1, label="Adam")
    shed = steps >= SHED
    for name in ("Adam", "rod flow"):
        color, line = LOOKS[name]
        length.plot(steps, 1e3 * arrays["length"][name][0], line, color=color, lw=1)
        squares = averaged(arrays["length"][name][:, shed] ** 2)
        range_band(square, steps[shed], 1e6 * squares.T, color, {"Adam": "Adam's oscillation"}.get(name, name), line)
    away.set(yscale="log", ylabel="distance of parameters")
    loss.set(ylabel="mean loss so far / Adam's")
    length.set(ylabel=r"$\|D\|$ [$10^{-3}$]", ylim=(0, None))
    square.set(ylabel=r"mean of $\|D\|^2$ [$10^{-6}$]", ylim=(0, None))
    for axes, place in ((away, "lower right"), (loss, "lower left"), (square, "lower right")):
        axes.legend(loc=place)
    for axes in (away, loss, length, square):
        axes.set_xlabel("step")
    return figure


SHED = 4
"""The step by which a rod has lost the drift that the half difference of two iterates holds."""


def averaged(values: np.ndarray) -> np.ndarray:
    """The mean of all records so far, (seeds, records)."""
    return np.cumsum(values, axis=1) / np.arange(1, values.shape[1] + 1)


def distance_ratio(arrays: Arrays) -> np.ndarray:
    """Distance of Adam to the stable flow over that to the rod flow, at the end, by seed."""
    rod, stable = (arrays["distance"][name][:, -1] for name in FLOWS)
    return stable / rod


def late_loss(arrays: Arrays) -> list[np.ndarray]:
    """Mean loss of the rod flow and of the stable flow over that of Adam, in the second half, by seed."""
    late = slice(len(arrays["steps"]) // 2, None)
    loss = {name: arrays["loss"][name][:, late].mean(axis=1) for name in ("Adam", *FLOWS)}
    return [loss[name] / loss["Adam"] for name in FLOWS]


def late_square(arrays: Arrays) -> np.ndarray:
    """Mean square of the rod's length over that of Adam's oscillation, by seed."""
    shed = arrays["steps"] >= SHED
    rod, adam = ((arrays["length"][name][:, shed] ** 2).mean(axis=1) for name in ("rod flow", "Adam"))
    return rod / adam


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """Adam stays with the rod flow, in place and in mean loss, at every seed."""
    source = "Regis, Chewi, arXiv 2605.06821"
    rod, stable = late_loss(arrays)
    farthest = rod[np.argmax(np.abs(rod - 1))]
    left, ratio = "negative control: it leaves the edge", distance_ratio(arrays).min()
    nearer, mean = (
        "distance of Adam to the stable flow over that to the rod flow, end, least",
        "mean loss of the rod flow",
    )
    parted, swings = "both part from Adam with time, the one far less", "their swings do not come at the same steps"
    without = "without an oscillation the loss is lower, by more than the rod flow errs"
    return [
        at_least(nearer, ratio, 3, because=parted, source=source),
        between(f"{mean} over that of Adam, 2nd half, farthest", farthest, 0.9, 1.1, because=swings, source=source),
        at_most("the same of the stable flow, highest", stable.max(), 0.99, because=without, source=left),
    ]


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """The numbers of every seed."""
    table = Table(
        "seed", "distance, stable / rod flow", "loss of the rod flow / Adam", "of the stable flow", "rod's square"
    )
    columns = (distance_ratio(arrays), *late_loss(arrays), late_square(arrays))
    for row, values in enumerate(zip(*columns, strict=True)):
        table.add_row(str(config.seed + row), *(f"{value:.4g}" for value in values))
    return [table]


ANALYSIS = Analysis("rod-flow", Config, compute, plot, tables, findings, __doc__)

if __name__ == "__main__":
    ANALYSIS.main()
