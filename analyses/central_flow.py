"""The central flow through the edge of stability: gradient descent against it and against gradient flow.

From a point of training at the edge, all three run for the same time, at several seeds. Gradient descent oscillates
around the central flow, which keeps the sharpness at 2 / learning rate; gradient flow goes where the sharpness takes
it. What the flow predicts of the oscillation, its variance and the loss that it adds, is held against running means of
gradient descent.
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

    SMOKE: ClassVar = {"after": 20, "steps": 8, "images": 8, "seeds": 2}

    seeds: int = 3
    """How many seeds; the first has the number `--seed`."""
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
    """Gradient descent up to the edge, then all three from one point, at every seed: (seeds, records)."""
    import jax
    import optax

    from attnlab.dynamics.sharpness import Tracking, top_eigenvalues
    from attnlab.training import probe

    optimizer = optax.sgd(config.learning_rate)
    probes = {"point": probe(lambda risk, params: params), "top": top_eigenvalues(Tracking(config.count))}
    parts = [
        one_seed(config, seed, optimizer, probes, progress) for seed in range(config.seed, config.seed + config.seeds)
    ]
    every_seed = jax.tree.map(lambda *values: np.stack([np.asarray(value) for value in values]), *parts)
    return {"steps": np.arange(0, config.steps + 1, config.every), **every_seed}


def one_seed(config: Config, seed: int, optimizer, probes, progress: Progress) -> Arrays:
    """All three of one seed: losses, distances, sharpness over the edge, and the variance of the oscillation."""
    import jax
    import jax.numpy as jnp

    from attnlab.dynamics.flows import central_flow, gradient_flow, smoothed
    from attnlab.dynamics.rules import update_rule
    from attnlab.risks.digits import digits_attention
    from attnlab.training import Session, show_progress, train
    from attnlab.trees import ravel

    def session(what: str) -> Session:
        return Session(report=show_progress(progress, f"{what}, seed {seed}"))

    key, rate = jax.random.key(seed), config.learning_rate
    risk, params = digits_attention(key, key, config.images)
    options = {"steps": config.after, "every": config.after, "session": session("before")}
    reached = train(risk, params, optimizer, key, **options).params
    options = {"steps": config.steps + 2, "probes": probes, "session": session("descent")}
    iterates = train(risk, reached, optimizer, key, **options).records
    points = iterates.values["point"]
    smooth = jax.tree.map(lambda w: w[:: config.every], smoothed(points))
    start = jax.tree.map(lambda w: w[0], smooth)

    task = progress.add_task(f"flows, seed {seed}", total=2, status="central")
    rule, options = update_rule("gd", rate), {"steps": config.steps, "every": config.every, "count": config.count}
    central = central_flow(risk, start, rule, key, **options)
    progress.update(task, advance=1, status="gradient flow")
    times = jnp.asarray(rate * np.arange(0, config.steps + 1, config.every), dtype=float)
    flow = gradient_flow(risk, start, times, tolerance=1e-6)
    progress.update(task, advance=1, status="")

    paths = {"descent": smooth, "central": central.params, "gradient flow": flow}
    flat = {name: jax.vmap(ravel)(path) for name, path in paths.items()}
    losses = {name: jax.vmap(risk)(path) for name, path in paths.items()}
    away = {name: jnp.linalg.norm(flat["descent"] - flat[name], axis=1) for name in ("central", "gradient flow")}
    every_point = jax.vmap(ravel)(points)[: config.steps + 3]
    swing = (every_point[:-2] - 2 * every_point[1:-1] + every_point[2:]) / 4
    return {
        "loss": losses | {"iterates": iterates.losses[: config.steps + 1], "predicted": central.predicted_loss},
        "distance": away,
        "sharpness": {
            "descent": iterates.values["top"]["values"][: config.steps + 1] * rate / 2,
            "central": central.sharpness * rate / 2,
        },
        "swing": jnp.sum(swing**2, axis=1),
        "variance": central.variance,
        "residual": central.residual,
    }


def mean_so_far(values: np.ndarray) -> np.ndarray:
    """The mean of all values until each, along the last axis."""
    return np.cumsum(values, axis=-1) / np.arange(1, values.shape[-1] + 1)


def plot(arrays: Arrays, config: Config):
    """Sharpness at one seed; the oscillation's variance and loss, measured and predicted; and distances."""
    from attnlab.plotting.curves import range_band
    from attnlab.plotting.panels import panels

    spread, ratio = variance_ratio(arrays, config), distance_ratio(arrays)[:, -1]
    message = (
        f"Gradient descent swings about the central flow with {spread.min():.2f} to {spread.max():.2f} "
        "of the variance predicted"
    )
    titles = [
        f"sharpness over the edge, seed {config.seed}",
        "mean variance of the oscillation",
        "mean loss that it adds",
        f"distances: {np.median(ratio):.0f} times apart at the end",
    ]
    note = f"(a) one seed; (b), (c) colours are {config.seeds} seeds; (d) median and range over them"
    figure, (edge, variance, loss, away) = panels(message, titles, note=note)
    plot_edge(edge, arrays, config)
    steps, dense = arrays["steps"], np.arange(config.steps + 1)
    pairs = (
        (variance, arrays["swing"], arrays["variance"].sum(axis=-1)),
        (loss, added_loss(arrays, config), arrays["loss"]["predicted"] - arrays["loss"]["central"]),
    )
    for axes, measured, predicted in pairs:
        for seed in range(config.seeds):
            # without the start: it may lie above the edge, and the oscillation that would bring it down has no bound
            axes.plot(dense[config.every :], 1e3 * mean_so_far(measured[seed, config.every :]), color=f"C{seed}")
            axes.plot(steps[1:], 1e3 * mean_so_far(predicted[seed, 1:]), ":", color=f"C{seed}")
        axes.plot([], [], color="black", label="gradient descent")
        axes.plot([], [], ":", color="black", label="predicted by the central flow")
        late = mean_so_far(measured[:, config.every :])[:, config.steps // 2 :].max()
        axes.set(xlabel="step", ylim=(0, 2e3 * late))  # what starts above the edge comes from outside
        axes.legend(loc="upper right")
    variance.set(ylabel=r"mean variance so far [$10^{-3}$]")
    loss.set(ylabel=r"mean loss above the flow so far [$10^{-3}$]")
    for name, color, line in (("gradient flow", "C4", "--"), ("central", "black", "-")):
        label = {"central": "to the central flow"}.get(name, f"to {name}")
        range_band(away, steps[1:], arrays["distance"][name][:, 1:].T, color, label, line)
    away.set(yscale="log", xlabel="step", ylabel="distance of parameters")
    away.legend(loc="lower right")
    return figure


def plot_edge(axes, arrays: Arrays, config: Config) -> None:
    """Eigenvalues over the edge at the first seed: of descent the highest, of the central flow those that it tracks."""
    descent, dense = arrays["sharpness"]["descent"][0, :, -1], np.arange(config.steps + 1)
    axes.plot(dense, descent, color="0.7", lw=1, label=r"descent, $\lambda_1$")
    axes.plot(dense, mean_so_far(descent), color="0.35", label="its mean so far")
    for i, eigenvalues in enumerate(arrays["sharpness"]["central"][0].T[::-1]):
        line = ("-", "--", "-.")[i % 3]
        axes.plot(arrays["steps"], eigenvalues, line, color="C5", label=rf"flow, $\lambda_{i + 1}$")
    axes.axhline(1, color="black", ls=":", lw=1)
    axes.set(xlabel="step", ylabel=r"$\lambda\, \eta \,/\, 2$")
    axes.legend(loc="center left", bbox_to_anchor=(0, 0.55), ncols=2, fontsize=7.5, columnspacing=1)


def added_loss(arrays: Arrays, config: Config) -> np.ndarray:
    """The loss of descent above that of the central flow, between its records interpolated, (seeds, steps)."""
    dense = np.arange(config.steps + 1)
    central = np.array([np.interp(dense, arrays["steps"], each) for each in arrays["loss"]["central"]])
    return arrays["loss"]["iterates"] - central


def held_off_edge(arrays: Arrays) -> float:
    """Largest distance of the flow's sharpness over the edge from 1 while its oscillation is active, of all seeds."""
    active = (arrays["variance"][..., -1] > 0) & (arrays["steps"] > 0)  # the start itself may lie above the edge
    return float(np.abs(arrays["sharpness"]["central"][active, -1] - 1).max()) if active.any() else float("nan")


def distance_ratio(arrays: Arrays) -> np.ndarray:
    """Distance of descent from gradient flow over that from the central flow, (seeds, records)."""
    return arrays["distance"]["gradient flow"][:, 1:] / arrays["distance"]["central"][:, 1:]


def variance_ratio(arrays: Arrays, config: Config) -> np.ndarray:
    """Mean square of the oscillation over the variance predicted, all but the start, by seed."""
    predicted = arrays["variance"][:, 1:].sum(axis=-1).mean(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):  # a run that is short of the edge has no oscillation
        return arrays["swing"][:, config.every :].mean(axis=1) / predicted


def farthest(values: np.ndarray) -> float:
    """Of the ratios of all seeds the one that is farthest from 1."""
    return float(values[np.argmax(np.abs(np.nan_to_num(values, nan=np.inf) - 1))])


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """The edge is held; descent is nearer to the central flow, and its mean is the predicted one, at every seed."""
    source = "Cohen et al., arXiv 2410.24206"
    ratio, edge = distance_ratio(arrays)[:, -1].min(), held_off_edge(arrays)
    # without the start, which may lie above the edge
    mean = arrays["loss"]["iterates"][:, config.every :].mean(axis=1)
    loss = farthest(mean / arrays["loss"]["predicted"][:, 1:].mean(axis=1))
    spread, because = farthest(variance_ratio(arrays, config)), "few swings, each of another height"
    what, apart = (
        "|sharpness / edge - 1| of the central flow while active",
        "distance to gradient flow over that to the",
    )
    imposed, decade = "imposed at the end of each substep, to the accuracy of eigenvalues", "an order of magnitude"
    return [
        at_most(what, edge, 1e-4, because=imposed, source=source),
        at_least(f"{apart} central flow, end, least", ratio, 10, because=decade, source=source),
        between(
            "mean loss of gradient descent over that predicted, farthest",
            loss,
            0.9,
            1.1,
            because=because,
            source=source,
        ),
        between(
            "variance of the oscillation over that predicted, farthest",
            spread,
            0.7,
            1.4,
            because=because,
            source=source,
        ),
        at_most(
            "residual of the complementarity problem",
            arrays["residual"].max(),
            1e-7,
            because="the tolerance of its solver",
            source="rounding",
        ),
    ]


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """The medians of the distances, and the variance, by seed."""
    ratio = distance_ratio(arrays)
    table = Table("seed", "distance, gradient flow / central flow, median of 2nd half", "variance over that predicted")
    late = np.median(ratio[:, ratio.shape[1] // 2 :], axis=1)
    for row, values in enumerate(zip(late, variance_ratio(arrays, config), strict=True)):
        table.add_row(str(config.seed + row), *(f"{value:.3g}" for value in values))
    return [table]


ANALYSIS = Analysis("central-flow", Config, compute, plot, tables, findings, __doc__, slow=True)

if __name__ == "__main__":
    ANALYSIS.main()
