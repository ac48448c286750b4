"""The rod flow of Adam at the edge of stability: two consecutive iterates as the ends of a rod that turns in time.

From a point of training at Adam's edge, the mean of consecutive iterates, the rod flow and the stable flow, which is
the same without the rod's length, run for the same time.
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

    SMOKE: ClassVar = {"after": 8, "steps": 8, "images": 8}

    learning_rate: float = 0.005
    """Of Adam."""
    b2: float = 0.99
    """Decay of Adam's second moment."""
    after: int = 500
    """Start so many steps into training, at the edge."""
    steps: int = 240
    """Steps to compare; a multiple of `every`."""
    every: int = 4
    """Steps between records."""
    images: int = 128
    """Digits to train on."""


def compute(config: Config, progress: Progress) -> Arrays:
    """Adam, and both flows from one pair of its iterates."""
    import jax
    import jax.numpy as jnp
    import optax

    from attnlab.dynamics.rods import rod_between, rod_flow
    from attnlab.dynamics.rules import update_rule
    from attnlab.risks.digits import digits_attention
    from attnlab.training import Probe, Session, show_progress, train
    from attnlab.trees import ravel

    key = jax.random.key(config.seed)
    risk, params = digits_attention(key, key, config.images)
    rule = update_rule("adam", config.learning_rate, b2=config.b2)
    states = Probe(lambda risk, state, memory, key: ((state.params, state.optimizer_state, risk(state.params)), memory))
    path = train(
        risk,
        params,
        optax.adam(config.learning_rate, b2=config.b2),
        key,
        steps=config.after + config.steps + 2,
        probes={"states": states},
        session=Session(report=show_progress(progress, "Adam")),
    ).records.values["states"]
    late = jax.tree.map(lambda leaf: leaf[config.after : config.after + config.steps + 2], path)
    points, _, losses = late
    iterates = jax.vmap(ravel)(points)
    centres, halves = (iterates[:-1] + iterates[1:]) / 2, (iterates[:-1] - iterates[1:]) / 2
    start = rod_between(rule, *(jax.tree.map(lambda leaf, i=i: leaf[i], late[:2]) for i in (0, 1)))

    task = progress.add_task("flows", total=2, status="")
    arrays: Arrays = {
        "steps": np.arange(0, config.steps + 1, config.every),
        "loss": {"Adam": (losses[:-1] + losses[1:])[:: config.every] / 2},
        "length": {"Adam": jnp.linalg.norm(halves, axis=1)[:: config.every]},
        "distance": {},
    }
    starts = dict(zip(FLOWS, (start, start._replace(half=jnp.zeros_like(start.half))), strict=True))
    for name, rod in starts.items():
        flow = rod_flow(risk, params, rod, rule, steps=config.steps, every=config.every)
        away = jax.vmap(ravel)(flow.params) - centres[:: config.every]
        arrays["loss"][name], arrays["distance"][name] = flow.loss, jnp.linalg.norm(away, axis=1)
        arrays["length"][name] = jnp.linalg.norm(flow.half, axis=1)
        progress.advance(task)
    return arrays


def plot(arrays: Arrays, config: Config):
    """Loss, distance and length over the steps compared."""
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6))
    steps = arrays["steps"]
    left.plot(steps, arrays["loss"]["Adam"], color="0.6", label="Adam, two steps")
    for position, name in enumerate(FLOWS):
        style = {"color": f"C{position}", "ls": ("-", "--")[position], "label": name}
        left.plot(steps, arrays["loss"][name], **style)
        middle.semilogy(steps[1:], arrays["distance"][name][1:], **style)
    right.semilogy(steps, arrays["length"]["Adam"], color="0.6", label="Adam, with its drift")
    right.semilogy(steps, arrays["length"]["rod flow"], color="C0", label="rod flow")
    left.set(xlabel="step", ylabel="mean training loss", title="loss")
    middle.set(xlabel="step", ylabel="distance", title="distance from the mean of two iterates of Adam")
    right.set(xlabel="step", ylabel="half distance of two iterates", title="length of the rod")
    for axes in (left, middle, right):
        axes.legend()
    return figure


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """Adam stays with the rod flow, in place and in mean loss."""
    source = "Regis, Chewi, arXiv 2605.06821"
    ratio = float(arrays["distance"]["stable flow"][-1] / arrays["distance"]["rod flow"][-1])
    late = slice(len(arrays["steps"]) // 2, None)
    loss = {name: float(arrays["loss"][name][late].mean()) for name in ("Adam", *FLOWS)}
    rod, stable = (loss[name] / loss["Adam"] for name in FLOWS)
    left = "negative control: it leaves the edge"
    return [
        at_least("distance of Adam to the stable flow over that to the rod flow, end", ratio, 3, source=source),
        between("mean loss of the rod flow over that of Adam, 2nd half", rod, 0.9, 1.1, source=source),
        at_most("the same of the stable flow", stable, 0.99, source=left),
    ]


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """None but the findings."""
    return []


ANALYSIS = Analysis("rod-flow", Config, compute, plot, tables, findings, __doc__)

if __name__ == "__main__":
    ANALYSIS.main()
