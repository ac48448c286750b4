"""The step that one layer takes under anisotropic inputs: between one step size for all and the inverse covariance.

What a full linear attention layer, trained on the exact risk, does along every eigenvector of the inputs' covariance,
beside the optimum of theory; what it gains on plain descent at every context length; and what it loses when it is
tested on inputs of another covariance than it was trained on.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from rich.progress import Progress
from rich.table import Table

from attnlab.analysis import Analysis, AnalysisConfig, Arrays
from attnlab.expectation import Expectation, at_most, equal

STEPS = {
    "best": "best preconditioner",
    "scalar": "best single step size",
    "inverse": r"inverse covariance $\Lambda^{-1}$",
}
SHIFTS = np.linspace(0.0, 2.0, 21)


@dataclass(frozen=True)
class Config(AnalysisConfig):
    """Options of the analysis."""

    SMOKE: ClassVar = {"dimension": 3, "seeds": 2, "steps": 40, "prompts": 64, "lengths": (5, 40)}

    dimension: int = 6
    """Dimension d of the inputs."""
    power: float = 1.0
    """The covariance has the spectrum i^-power, scaled to trace d."""
    noise_variance: float = 0.1
    """Of the labels."""
    lengths: tuple[int, ...] = (5, 20, 80, 320)
    """Context lengths N at which layers are trained."""
    seeds: int = 8
    """Layers trained at each length."""
    steps: int = 3000
    """Steps of Adam with a cosine schedule."""
    learning_rate: float = 0.02
    """Of Adam at the start."""
    prompts: int = 20_000
    """Sampled prompts on which a trained layer is tested."""


def compute(config: Config, progress: Progress) -> Arrays:
    """Train layers at every length; exact risks over lengths and over shifts of the covariance."""
    import jax
    import jax.numpy as jnp
    import optax

    from attnlab.icl.tasks import linear_regression

    key = jax.random.key(config.seed)
    # one optimizer for all lengths, so that they share a compiled loop
    optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps))
    spectrum = power_spectrum(config.dimension, config.power)
    problem = linear_regression(jnp.diag(spectrum), noise_variance=config.noise_variance)
    arrays: Arrays = {"spectrum": spectrum, "trained": {}}
    task = progress.add_task("training", total=len(config.lengths), status="")
    for number, length in enumerate(config.lengths):
        member_key = jax.random.fold_in(key, number)
        arrays["trained"][str(length)] = trained_layers(problem, length, optimizer, config, member_key)
        progress.advance(task)
    return arrays | risk_curves(problem, config) | shifted_risks(problem, config)


def power_spectrum(dimension: int, power: float):
    """i^-power for i = 1, ..., d, scaled to sum d."""
    import jax.numpy as jnp

    spectrum = jnp.arange(1.0, dimension + 1) ** -power
    return dimension * spectrum / jnp.sum(spectrum)


def trained_layers(problem, length: int, optimizer, config: Config, key) -> Arrays:
    """Preconditioners of trained layers (seeds, d, d), their exact risks, one layer's on prompts; the optimum."""
    from functools import partial

    import jax
    import jax.numpy as jnp

    from attnlab.icl.diagnostics import risk
    from attnlab.icl.models import layer_predict
    from attnlab.icl.optima import optimal_preconditioner, optimal_risk
    from attnlab.icl.population import population_objective
    from attnlab.icl.tasks import sample_prompts
    from attnlab.training import train

    d = problem.dimension

    def start(key):
        # no swapped path, which gradient flow cannot leave: from other starts some layers end in bad local minima
        factor = 0.1 * jax.random.normal(key, (d, d))
        query_key = jnp.pad(0.05 * jnp.eye(d) + factor @ factor.T, ((0, 1), (0, 0)))[None]
        return {"value": 0.3 * jnp.eye(d + 1)[-1:], "query_key": query_key}

    exact = population_objective(problem, length)
    keys = jax.random.split(key, config.seeds)
    layers = train(
        exact, jax.jit(jax.vmap(start))(keys), optimizer, keys, steps=config.steps, every=config.steps
    ).params
    prompts = sample_prompts(jax.random.fold_in(key, 1), problem, length, config.prompts)
    first = jax.tree.map(lambda leaf: leaf[0], layers)
    on_prompts = jax.jit(lambda layer, prompts: risk(partial(layer_predict, layer), prompts))(first, prompts)
    return {
        "steps": np.asarray(layers["value"][:, 0, -1, None, None] * layers["query_key"][:, 0, :-1]),
        "risks": np.asarray(jax.vmap(exact)(layers)),
        "on_prompts": np.asarray(on_prompts),
        "best": np.asarray(optimal_preconditioner(problem, length)),
        "least": np.asarray(optimal_risk(problem, length)),
    }


def candidates(problem, length):
    """The preconditioners of `STEPS` at one length; the single step size minimises its own quadratic risk."""
    import jax.numpy as jnp

    from attnlab.icl.optima import optimal_preconditioner, step_curvature

    covariance = problem.covariance
    gain = jnp.sum((covariance @ problem.task_moment) * covariance)  # tr(L O L)
    size = gain / jnp.sum(step_curvature(problem, length) * covariance)
    return jnp.stack(
        [
            optimal_preconditioner(problem, length),
            size * jnp.eye(problem.dimension, dtype=covariance.dtype),
            jnp.linalg.inv(covariance),
        ]
    )


def risk_curves(problem, config: Config) -> Arrays:
    """Exact risks of the three steps over context lengths, (lengths, 3)."""
    import jax
    import jax.numpy as jnp

    from attnlab.icl.optima import reduced_risk

    lengths = np.geomspace(min(config.lengths) / 2, 4 * max(config.lengths), 25)

    def risks(length):
        return jax.vmap(lambda gamma: reduced_risk(gamma, problem, length))(candidates(problem, length))

    return {"lengths": lengths, "risks": np.asarray(jax.jit(jax.vmap(risks))(jnp.asarray(lengths)))}


def shifted_risks(problem, config: Config) -> Arrays:
    """Risks under test covariances Lambda^t, scaled to trace d, of what was best at t = 1 and of what is best at t."""
    import jax
    import jax.numpy as jnp

    from attnlab.icl.optima import optimal_risk, reduced_risk
    from attnlab.icl.tasks import LinearRegression

    length = max(config.lengths)
    fixed = candidates(problem, length)[:2]

    def risks(shift):
        spectrum = power_spectrum(config.dimension, config.power * shift)
        test = LinearRegression(
            jnp.diag(jnp.sqrt(spectrum)), problem.task_moment, None, problem.noise_variance, problem.inputs
        )
        kept = jax.vmap(lambda gamma: reduced_risk(gamma, test, length))(fixed)
        return jnp.append(kept, optimal_risk(test, length)) / test.signal

    return {"shifted": np.asarray(jax.jit(jax.vmap(risks))(jnp.asarray(SHIFTS)))}


def plot(arrays: Arrays, config: Config):
    """Steps by eigenvalue, what training leaves of the way to them, risks by length, and under a shifted covariance."""
    from attnlab.plotting.panels import panels

    (few, low), (many, high) = ((n, exponent(arrays, n)) for n in (min(config.lengths), max(config.lengths)))
    figure, axes = panels(
        "One layer steps between one size for all inputs and the inverse of their covariance:\n"
        rf"steps go as $\lambda^{{{low:.2f}}}$ in contexts of {few} examples, "
        rf"as $\lambda^{{{high:.2f}}}$ in contexts of {many}",
        [
            "theory, and trained layers (marks)",
            "risk by length of the context",
            "what training leaves",
            f"tested on another covariance, $N = {many}$",
        ],
        note=f"marks in (a), (c): {config.seeds} trained layers, lines: theory (exact); (b): one layer on "
        f"{config.prompts} prompts,\nbars of two standard errors. Covariance $\\Lambda$: $d = {config.dimension}$, "
        f"eigenvalues $\\lambda \\propto i^{{-{config.power:g}}}$",
        height=2.9,
    )
    plot_steps(axes[0], arrays, config)
    plot_risks(axes[1], arrays, config)
    plot_excess(axes[2], arrays, config)
    plot_shifts(axes[3], arrays, config)
    return figure


def exponent(arrays: Arrays, length: int) -> float:
    """Power of the eigenvalue in the steps of trained layers, fitted to their mean."""
    steps = np.mean([np.diag(layer) for layer in arrays["trained"][str(length)]["steps"]], axis=0)
    return float(np.polyfit(np.log(arrays["spectrum"]), np.log(np.abs(steps)), 1)[0])


def plot_steps(axes, arrays: Arrays, config: Config) -> None:
    spectrum = arrays["spectrum"]
    for number, length in enumerate(config.lengths):
        best, steps = (arrays["trained"][str(length)][name] for name in ("best", "steps"))
        style = {"color": f"C{number}", "markerfacecolor": "none", "linewidth": 1}
        axes.loglog(spectrum, np.diag(best), color=f"C{number}", label=f"$N = {length}$", marker="os^v"[number % 4])
        for layer in steps:
            axes.loglog(spectrum, np.diag(layer), "os^v"[number % 4], markersize=6, **style)
    axes.loglog(spectrum, 1 / spectrum, ":", color="black", label=r"$1 / \lambda$, $N \to \infty$")
    axes.set(xlabel=r"eigenvalue $\lambda$ of the inputs' covariance", ylabel="step size along its eigenvector")
    plain_ticks(axes.xaxis, (0.25, 0.5, 1, 2))
    plain_ticks(axes.yaxis, (0.1, 0.2, 0.5, 1, 2))
    axes.legend(loc="lower left")


def plain_ticks(axis, ticks) -> None:
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)


def plot_risks(axes, arrays: Arrays, config: Config) -> None:
    for number, label in enumerate(STEPS.values()):
        line = ("-", "--", "-.")[number]
        axes.loglog(arrays["lengths"], arrays["risks"][:, number], line, color=f"C{number}", label=label)
    for length in config.lengths:
        mean, error = arrays["trained"][str(length)]["on_prompts"]
        label = "trained layer on prompts" if length == config.lengths[0] else None
        axes.errorbar(length, mean, 2 * error, fmt="o", capsize=2, color="black", markerfacecolor="none", label=label)
    low, high = arrays["risks"][:, 0].min(), arrays["risks"][:, 1].max()
    axes.set_ylim(low / 2, 3 * high)
    axes.set(xlabel="context length $N$", ylabel="risk")
    axes.legend(loc="lower left")


def plot_excess(axes, arrays: Arrays, config: Config) -> None:
    """Relative excess of every trained layer's risk, and its largest error of a step."""
    floor = np.finfo(arrays["spectrum"].dtype).eps
    for number, length in enumerate(config.lengths):
        now, labels = arrays["trained"][str(length)], ("excess of the risk", "largest error of a step")
        excess = np.maximum(now["risks"] / now["least"] - 1, floor)
        errors = np.abs(now["steps"] - now["best"]).max(axis=(1, 2)) / np.abs(now["best"]).max()
        for values, color, marker, label, shift in zip(
            (excess, np.maximum(errors, floor)), ("C0", "C1"), "os", labels, (0.93, 1.07), strict=True
        ):
            places = np.full(len(values), length * shift)
            axes.plot(places, values, marker, color=color, markerfacecolor="none", label=None if number else label)
    axes.axhspan(floor / 2, 10 * floor, color="0.9", linewidth=0, label="rounding", zorder=0)
    axes.set(xscale="log", yscale="log", xlabel="context length $N$", ylabel="relative to theory")
    axes.set_xticks(config.lengths, [str(length) for length in config.lengths])
    axes.minorticks_off()
    axes.set_ylim(floor / 2, 1e2)  # room for the legend
    axes.legend(loc="upper left")


def plot_shifts(axes, arrays: Arrays, config: Config) -> None:
    labels = ("preconditioner best for $t = 1$", "single step size best for $t = 1$", "best for each $t$")
    for number, (label, style) in enumerate(zip(labels, ("C0-", "C1--", "k:"), strict=True)):
        axes.semilogy(SHIFTS, arrays["shifted"][:, number], style, label=label)
    axes.set_ylim(top=6 * arrays["shifted"].max())  # room for the legend
    axes.set(xlabel=r"test inputs with covariance $\propto \Lambda^t$", ylabel="risk / mean squared target")
    axes.legend(loc="upper left")


def deviations(now: Arrays) -> tuple[float, float]:
    """Largest error of a step, over the largest step, and largest relative excess of the risk, of trained layers."""
    off = np.abs(now["steps"] - now["best"]).max() / np.abs(now["best"]).max()
    return float(off), float((now["risks"] / now["least"] - 1).max())


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """Trained layers take the optimal step, with the least risk, also on prompts."""
    source = "Zhang, Frei, Bartlett, arXiv 2306.09927, theorem 4.1; Ahn et al., arXiv 2306.00297, theorem 1"
    trained = arrays["trained"].values()
    steps, excess = zip(*map(deviations, trained), strict=True)
    means, errors = np.array([now["on_prompts"] / now["least"] for now in trained]).T
    enough = {"because": "what 3,000 steps of Adam leave", "source": source}
    sample = {"standard_error": errors, "because": "a sample of prompts", "source": source}
    return [
        at_most("largest error of a step over the largest step, by length", steps, 0.01, **enough),
        at_most("largest excess over the least risk, by length", excess, 1e-4, **enough),
        equal("risk on prompts over the least one, by length", means, 1.0, 4.5, **sample),
    ]


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """Trained layers beside theory at every length."""
    table = Table(
        "N", "least risk", "trained: largest excess", "on prompts", "largest error of a step", title="One trained layer"
    )
    for length in config.lengths:
        now = arrays["trained"][str(length)]
        (mean, error), least = now["on_prompts"], now["least"]
        off, excess = deviations(now)
        table.add_row(str(length), f"{least:.6g}", f"{excess:.1e}", f"{mean:.4g} +- {error:.2g}", f"{off:.1e}")
    return [table]


ANALYSIS = Analysis("icl-preconditioner", Config, compute, plot, tables, findings, __doc__, slow=True)

if __name__ == "__main__":
    ANALYSIS.main()
