"""Why warm-up works: a transformer that starts far above the edge of stability blows up, or walks down to it.

Gradient descent on two pre-norm blocks on digits, at a rate more than six times the stable one of the starting point.
Without warm-up the loss overflows within some steps; with a linear warm-up the sharpness falls ahead of the rising edge
and settles there. Control: a LayerNorm at the end bounds the outputs, and the same excess does no lasting harm; not at
every seed: at 1 and 2 that run stays finite, at 3 it overflows too.
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

    SMOKE: ClassVar = {"steps": 20, "warmup": 10, "every": 10, "images": 16, "runs": ("warm-up",)}

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
    runs: tuple[str, ...] = tuple(RUNS)
    """Which of the runs."""


def compute(config: Config, progress: Progress) -> Arrays:
    """Train every run from its start, at `excess` times the edge there."""
    import jax
    import optax

    from attnlab.checks import check_names
    from attnlab.dynamics.rules import update_rule
    from attnlab.dynamics.sharpness import stability
    from attnlab.risks.digits import digits_transformer
    from attnlab.training import DivergenceError, Session, show_progress, train

    check_names("run", config.runs, RUNS)
    key, arrays = jax.random.key(config.seed), {}
    for name in config.runs:
        warm, final_norm = RUNS[name]
        risk, params = digits_transformer(key, key, config.images, final_norm=final_norm)
        rate = config.excess * 2 / initial_sharpness(risk, params, key)
        schedule = optax.linear_schedule(0.0, rate, config.warmup) if warm else rate
        # a step of a warm-up counts from one: at rate zero there is no edge
        optimizer = update_rule("gd", (lambda count, rise=schedule: rise(count + 1)) if warm else schedule)
        probes = {"edge": stability(optimizer)}
        options = {"steps": config.steps, "every": config.every, "probes": probes}
        try:
            report = show_progress(progress, name)
            records = train(
                risk, params, optimizer.transformation, key, session=Session(report=report), **options
            ).records
        except DivergenceError as error:
            records = error.records
        arrays[name] = {
            "rate": rate,
            "steps": records.steps,
            "losses": records.losses,
            "sharpness": records.values["edge"]["values"][:, -1],
            "ratio": records.values["edge"]["ratio"],
        }
    return arrays


def initial_sharpness(risk, params, key) -> float:
    """The highest eigenvalue of the Hessian at the start."""
    from attnlab.curvature import eigenpairs, hessian

    return float(eigenpairs(hessian(risk, params), key, count=1).values[-1])


def plot(arrays: Arrays, config: Config):
    """Loss, sharpness, and sharpness over the edge."""
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8))
    for position, name in enumerate(config.runs):
        losses, steps = arrays[name]["losses"], arrays[name]["steps"]
        finite = np.isfinite(losses)
        color = f"C{position}"
        left.semilogy(np.flatnonzero(finite), losses[finite], color=color, label=name)
        if not finite.all():
            left.semilogy(0, losses[0], "x", color=color, ms=9, mew=2)
            for axes, what in ((middle, "sharpness"), (right, "ratio")):  # of which there is the start alone
                axes.plot(0, arrays[name][what][0], "x", color=color, ms=9, mew=2)
        middle.semilogy(steps, arrays[name]["sharpness"], ".-", color=color, ms=3)
        right.plot(steps, arrays[name]["ratio"], ".-", color=color, ms=3)
    left.set(xlabel="step", ylabel="training loss", title="loss (cross: overflow follows)", ylim=(1e-2, 1e3))
    left.legend()
    middle.set(xlabel="step", ylabel=r"$\lambda_1(H)$", title="sharpness")
    right.axhline(1, color="0.4", ls=":")
    right.set(xlabel="step", ylabel=r"$\lambda_1(H) \, \eta / 2$", title="sharpness over the edge", ylim=(0, None))
    return figure


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """Overflow without warm-up, the edge with it, survival with a final LayerNorm."""
    source, found = "Gilmer et al., arXiv 2110.04369", []
    for name in config.runs:
        losses, ratio = arrays[name]["losses"], arrays[name]["ratio"]
        broken = int(np.sum(~np.isfinite(losses)))
        if name == "no warm-up":
            found.append(at_least(f"{name}: steps with a loss that is not finite", broken, 1, source=source))
        elif name == "warm-up":
            settled = float(ratio[-len(ratio) // 3 :].mean())
            found.append(between(f"{name}: sharpness over the edge, last third", settled, 0.95, 1.1, source=source))
        else:
            what, control = f"{name}: steps with a loss that is not finite", "negative control"
            found.append(equal(what, broken, 0, 0.0, because="a count", source=control))
    return found


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """Rate, start and end of every run."""
    table = Table("run", "learning rate", "sharpness at the start", "loss at the start", "loss at the end")
    for name in config.runs:
        losses = arrays[name]["losses"]
        finite = np.isfinite(losses)
        end = f"{losses[-1]:.3g}" if finite.all() else f"not finite at step {int(np.argmin(finite))}"
        sharpness = arrays[name]["sharpness"][0]
        table.add_row(name, f"{arrays[name]['rate']:.4g}", f"{sharpness:.4g}", f"{losses[0]:.3g}", end)
    return [table]


ANALYSIS = Analysis("warmup", Config, compute, plot, tables, findings, __doc__, slow=True)

if __name__ == "__main__":
    ANALYSIS.main()
