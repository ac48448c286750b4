"""The central flow through the edge of stability: gradient descent against it and against gradient flow.

From a point of training at the edge, all three run for the same time. Gradient descent oscillates around the central
flow, which keeps the sharpness at 2 / learning rate; gradient flow goes where the sharpness takes it.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from rich.progress import Progress
from rich.table import Table

from attnlab.analysis import Analysis, AnalysisConfig, Arrays
from attnlab.expectation import Expectation, at_least, at_most, between


@dataclass(frozen=True)
class Config(AnalysisConfig):
    """Options of the analysis."""

    SMOKE: ClassVar = {"after": 20, "steps": 8, "images": 8}

    learning_rate: float = 0.1
    """Of gradient descent."""
    after: int = 720
    """Start so many steps into training, when the first instability is over."""
    steps: int = 240
    """Steps to compare; a multiple of `every`."""
    every: int = 4
    """Steps between records."""
    images: int = 128
    """Digits to train on."""
    count: int = 3
    """Eigenvalues that the central flow may hold at the edge."""


def compute(config: Config, progress: Progress) -> Arrays:
    """Gradient descent up to the edge, then all three from one point."""
    import jax
    import jax.numpy as jnp
    import optax

    from attnlab.dynamics.flows import central_flow, gradient_flow, smoothed
    from attnlab.dynamics.rules import update_rule
    from attnlab.dynamics.sharpness import Tracking, top_eigenvalues
    from attnlab.risks.digits import digits_attention
    from attnlab.training import Session, probe, show_progress, train
    from attnlab.trees import ravel

    key, rate = jax.random.key(config.seed), config.learning_rate
    risk, params = digits_attention(key, key, config.images)
    optimizer = optax.sgd(rate)
    reached = train(
        risk,
        params,
        optimizer,
        key,
        steps=config.after,
        every=config.after,
        session=Session(report=show_progress(progress, "before")),
    ).params
    probes = {"point": probe(lambda risk, params: params), "top": top_eigenvalues(Tracking(config.count))}
    iterates = train(
        risk,
        reached,
        optimizer,
        key,
        steps=config.steps + 2,
        probes=probes,
        session=Session(report=show_progress(progress, "descent")),
    ).records
    smooth = jax.tree.map(lambda w: w[:: config.every], smoothed(iterates.values["point"]))
    start = jax.tree.map(lambda w: w[0], smooth)

    task = progress.add_task("flows", total=2, status="central")
    rule, options = update_rule("gd", rate), {"steps": config.steps, "every": config.every, "count": config.count}
    central = central_flow(risk, start, rule, key, **options)
    progress.update(task, advance=1, status="gradient flow")
    times = jnp.asarray(rate * np.arange(0, config.steps + 1, config.every), dtype=float)
    flow = gradient_flow(risk, start, times, tolerance=1e-6)
    progress.update(task, advance=1, status="")

    points = {"descent": smooth, "central": central.params, "gradient flow": flow}
    flat = {name: jax.vmap(ravel)(path) for name, path in points.items()}
    losses = {name: jax.vmap(risk)(path) for name, path in points.items()}
    return {
        "steps": np.arange(0, config.steps + 1, config.every),
        "loss": losses | {"iterates": iterates.losses[: config.steps + 1], "predicted": central.predicted_loss},
        "distance": {
            name: jnp.linalg.norm(flat["descent"] - flat[name], axis=1) for name in ("central", "gradient flow")
        },
        "sharpness": {
            "descent": iterates.values["top"]["values"][: config.steps + 1] * rate / 2,
            "central": central.sharpness * rate / 2,
        },
        "variance": central.variance,
        "residual": central.residual,
    }


def plot(arrays: Arrays, config: Config):
    """Sharpness, loss and distance over the steps compared."""
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6))
    steps, dense = arrays["steps"], np.arange(config.steps + 1)
    left.plot(dense, arrays["sharpness"]["descent"][:, -1], color="0.7", label=r"gradient descent, $\lambda_1$")
    for i, eigenvalues in enumerate(arrays["sharpness"]["central"].T[::-1]):
        left.plot(
            steps, eigenvalues, ("-", "--", "-.")[i % 3], color=f"C{i}", label=rf"central flow, $\lambda_{i + 1}$"
        )
    left.axhline(1, color="0.4", ls=":")
    left.set(xlabel="step", ylabel=r"$\lambda \, \eta / 2$", title="sharpness over the edge")
    left.legend()
    middle.plot(dense, arrays["loss"]["iterates"], color="0.7", label="gradient descent")
    # at the start, which may lie above the edge, the oscillation that would bring it down has no bound
    middle.plot(steps[1:], arrays["loss"]["predicted"][1:], label="central flow, predicted mean")
    middle.plot(steps, arrays["loss"]["central"], label="central flow")
    middle.plot(steps, arrays["loss"]["gradient flow"], "--", label="gradient flow")
    middle.set(xlabel="step", ylabel="training loss", title="loss")
    middle.legend()
    right.semilogy(steps[1:], arrays["distance"]["central"][1:], label="to the central flow")
    right.semilogy(steps[1:], arrays["distance"]["gradient flow"][1:], "--", label="to gradient flow")
    right.set(xlabel="step", ylabel="distance", title="distance of smoothed gradient descent")
    right.legend()
    return figure


def held_off_edge(arrays: Arrays) -> float:
    """Largest distance of the flow's sharpness over the edge from 1 while its oscillation is active."""
    active = (arrays["variance"][:, -1] > 0) & (arrays["steps"] > 0)  # the start itself may lie above the edge
    return float(np.abs(arrays["sharpness"]["central"][active, -1] - 1).max()) if active.any() else float("nan")


def distance_ratio(arrays: Arrays) -> np.ndarray:
    """Distance of descent from gradient flow over that from the central flow."""
    return arrays["distance"]["gradient flow"][1:] / arrays["distance"]["central"][1:]


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """The edge is held; descent is nearer to the central flow; gradient flow leaves the edge."""
    source = "Cohen et al., arXiv 2410.24206"
    ratio, edge = distance_ratio(arrays), held_off_edge(arrays)
    # without the start, which may lie above the edge
    mean, predicted = arrays["loss"]["iterates"][config.every :].mean(), arrays["loss"]["predicted"][1:].mean()
    return [
        at_most("|sharpness / edge - 1| of the central flow while active", edge, 1e-4, source=source),
        at_least("distance to gradient flow over that to the central flow, end", ratio[-1], 10, source=source),
        between("mean loss of gradient descent over that predicted", mean / predicted, 0.9, 1.1, source=source),
        at_most("residual of the complementarity problem", arrays["residual"].max(), 1e-7, source="rounding"),
    ]


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """The median of the distances."""
    ratio = distance_ratio(arrays)
    table = Table("what", "value")
    table.add_row(
        "distance to gradient flow over distance to the central flow, median of 2nd half",
        f"{np.median(ratio[len(ratio) // 2 :]):.3g}",
    )
    return [table]


ANALYSIS = Analysis("central-flow", Config, compute, plot, tables, findings, __doc__, slow=True)

if __name__ == "__main__":
    ANALYSIS.main()
