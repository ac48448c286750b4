"""Is one trained linear attention layer a step of gradient descent? Loss, predictions, sensitivities, and the nulls.

The recipe of von Oswald et al. (arXiv 2212.07677): d = N = 10, x uniform on (-1/2, 1/2), all four matrices trained by
Adam, here on the exact risk over many seeds and on fresh prompts; held against the best step, an untrained layer, and
the trained layer shown shuffled labels.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from rich.progress import Progress
from rich.table import Table

from attnlab.analysis import Analysis, AnalysisConfig, Arrays
from attnlab.expectation import Expectation, at_least, at_most

INPUT_SCALES = np.geomspace(0.5, 2.0, 9)
TASK_SCALES = np.geomspace(0.5, 5.0, 9)
FRACTIONS = np.linspace(0.0, 1.0, 21)
MEASURES = ("prediction_difference", "sensitivity_difference", "sensitivity_cosine")


@dataclass(frozen=True)
class Config(AnalysisConfig):
    """Options of the analysis."""

    SMOKE: ClassVar = {"dimension": 3, "length": 4, "seeds": 2, "steps": 40, "every": 10, "batch": 8, "prompts": 16}

    dimension: int = 10
    """Dimension d of the inputs."""
    length: int = 10
    """Number N of examples in a prompt."""
    seeds: int = 32
    """Layers trained on the exact risk."""
    sampled_seeds: int = 2
    """Layers trained on fresh prompts."""
    batch: int = 256
    """Prompts a step of sampled training."""
    steps: int = 2000
    """Training steps of Adam with a cosine schedule; a multiple of `every`."""
    every: int = 50
    """Steps between two measurements."""
    learning_rate: float = 0.02
    """Of Adam at the start."""
    prompts: int = 512
    """Prompts on which models and algorithm are compared."""


def compute(config: Config, progress: Progress) -> Arrays:
    """Train on the exact risk and on samples, then measure the trained layers and their nulls."""
    import jax
    import jax.numpy as jnp
    import optax

    from attnlab.icl.baselines import baseline
    from attnlab.icl.models import init_layer
    from attnlab.icl.optima import optimal_preconditioner, optimal_risk
    from attnlab.icl.population import population_objective
    from attnlab.icl.tasks import linear_regression, sample_prompts
    from attnlab.training import Session, probe, show_progress, train

    problem = linear_regression(jnp.eye(config.dimension) / 12, inputs="uniform")
    exact = population_objective(problem, config.length, "layer")
    best = optimal_preconditioner(problem, config.length)
    descent = baseline("gradient_descent", steps=1, step_size=best[0, 0])
    keys = jax.random.split(jax.random.key(config.seed), 4)
    prompts = sample_prompts(keys[0], problem, config.length, config.prompts)
    shuffle_key = keys[3]

    def compare(_, layer):
        return nulls(layer, descent, prompts, shuffle_key)

    arrays: Arrays = {"optimum": optimal_risk(problem, config.length) / 2, "step_size": best[0, 0]}
    optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps))
    runs = {
        "exact": (exact, None, config.seeds),
        "sampled": (*on_samples(config, problem, prompts), config.sampled_seeds),
    }
    for number, (name, (risk, resample, seeds)) in enumerate(runs.items()):
        members = jax.random.split(keys[1 + number], seeds)
        starts = jax.vmap(lambda key: init_layer(key, config.dimension + 1, 0.3))(members)
        trained = train(
            risk,
            starts,
            optimizer,
            members,
            steps=config.steps,
            every=config.every,
            resample=resample,
            probes={"risk": probe(lambda _, layer: exact(layer) / 2), "compare": probe(compare)},
            session=Session(report=show_progress(progress, f"training, {name}")),
        )
        values = trained.records.values
        arrays |= {name: {"risk": values["risk"], **values["compare"]}, "steps": trained.records.steps}
        if name == "exact":
            arrays |= robustness(trained.params, starts, best, descent, prompts, problem, config.length)
    return arrays


def on_samples(config: Config, problem, prompts):
    """The empirical half risk as an objective, and the draw of fresh prompts for each step."""
    from dataclasses import replace

    import jax
    import jax.numpy as jnp

    from attnlab.icl.models import stack_predict
    from attnlab.icl.tasks import sample_prompts
    from attnlab.objectives import objective

    def predict(layer, prompts):
        return jax.vmap(lambda prompt: stack_predict([layer], prompt))(prompts)

    def draw(key, risk):
        fresh = sample_prompts(key, problem, config.length, config.batch)
        return replace(risk, inputs=fresh, targets=fresh.target)

    first = jax.tree.map(lambda leaf: jnp.resize(leaf, (config.batch, *leaf.shape[1:])), prompts)
    return objective(predict, lambda found, wanted: jnp.mean((found - wanted) ** 2) / 2, first, first.target), draw


def nulls(layer, descent, prompts, key):
    """The three measures of alignment with the best step: of the layer, and of the layer shown shuffled labels."""
    from functools import partial

    from attnlab.icl.diagnostics import alignment
    from attnlab.icl.models import stack_predict
    from attnlab.icl.tasks import shuffle_labels

    model = partial(stack_predict, [layer])
    shown = {"model": alignment(model, descent, prompts)}
    shown["shuffled"] = alignment(model, descent, prompts, shuffle_labels(key, prompts))
    return {who: {name: getattr(found, name).value for name in MEASURES} for who, found in shown.items()}


def robustness(layers, starts, best, descent, prompts, problem, length):
    """Risks on scaled prompts, and along the line from trained and from untrained weights to the construction."""
    from functools import partial

    import jax
    import jax.numpy as jnp

    from attnlab.icl.diagnostics import interpolate, scaled_risks
    from attnlab.icl.models import effective_weights, stack_predict
    from attnlab.icl.population import population_risk, reduced_weights

    scaled: Arrays = {}
    for what, scales in (("inputs", INPUT_SCALES), ("tasks", TASK_SCALES)):

        def of_layer(layer, what=what, scales=scales):
            return scaled_risks(partial(stack_predict, [layer]), prompts, scales, what).value

        many, found = jax.jit(jax.vmap(of_layer)), scaled_risks(descent, prompts, scales, what)
        scaled[what] = {"trained": many(layers), "untrained": many(starts)}
        scaled[what]["descent"] = jnp.stack([found.value, found.standard_error])

    def to_construction(layer):
        weights = effective_weights(layer)
        # One head has a free scale between value and query_key: fix it by the label's value, 1 in the construction.
        scale = weights["value"][0, -1]
        fixed = {"value": weights["value"] / scale, "query_key": weights["query_key"] * scale}
        target = reduced_weights({"preconditioner": best})
        return jax.vmap(lambda f: population_risk(interpolate(fixed, target, f), problem, length) / 2)(
            jnp.asarray(FRACTIONS, scale.dtype)
        )

    line = jax.jit(jax.vmap(to_construction))
    return {"scaled": scaled, "interpolated": {"trained": line(layers), "untrained": line(starts)}}


def plot(arrays: Arrays, config: Config):
    """Risk and sensitivities along training, scaled inputs, and the way to the constructed weights."""
    from attnlab.plotting.panels import panels

    seeds, sampled = (arrays[name]["risk"].shape[1] for name in ("exact", "sampled"))
    above, fresh = (100 * abs(risk_above(arrays, name)) for name in ("exact", "sampled"))
    shuffled = np.median(arrays["exact"]["shuffled"]["sensitivity_cosine"][-1])
    cosine = np.median(arrays["exact"]["model"]["sensitivity_cosine"][-1])
    figure, axes = panels(
        f"A trained linear attention layer is one step of gradient descent: risk within {above:.0e} %\n"
        f"(on fresh prompts {fresh:.1g} %), cosine of sensitivities {cosine:.3f} (shuffled labels {shuffled:.2f})",
        [
            "risk above that of the best step",
            "sensitivities to the query",
            "tested on scaled inputs",
            "on the line to the constructed weights",
        ],
        note=f"lines: medians, bands: range over {seeds} starts trained on the exact risk ((a): and {sampled} on fresh "
        f"prompts);\n(b), (c): {config.prompts} prompts; circles in (c): bars of two standard errors",
        height=2.8,
    )
    plot_loss(axes[0], arrays)
    plot_alignment(axes[1], arrays, "sensitivity_cosine")
    plot_scaled(axes[2], arrays, "inputs", INPUT_SCALES)
    plot_interpolated(axes[3], arrays)
    return figure


def details(arrays: Arrays, config: Config):
    """The differences in prediction and in sensitivity along training, and tasks of another scale."""
    from attnlab.plotting.panels import panels

    last = {name: np.median(arrays["exact"]["model"][name][-1]) for name in MEASURES[:2]}
    figure, axes = panels(
        f"After training predictions differ from the best step's by {last['prediction_difference']:.1g}, "
        f"sensitivities by {last['sensitivity_difference']:.1g} (medians)",
        [
            r"predictions, mean $|\hat y - \hat y_{GD}|$",
            r"sensitivities $\partial \hat y / \partial x_q$, norm of the difference",
            "tested on scaled tasks",
        ],
        note=f"lines: medians, bands: range over {arrays['exact']['risk'].shape[1]} starts trained on the exact risk; "
        f"{config.prompts} prompts; GD: the best step of gradient descent",
        height=2.8,
    )
    for panel, measure in zip(axes, MEASURES[:2], strict=False):
        plot_alignment(panel, arrays, measure)
    plot_scaled(axes[2], arrays, "tasks", TASK_SCALES)
    return figure


def risk_above(arrays: Arrays, name: str) -> float:
    """Largest relative distance of the trained risks above that of the best step."""
    return float(np.max(arrays[name]["risk"][-1] / arrays["optimum"] - 1))


def plot_loss(axes, arrays: Arrays) -> None:
    from attnlab.plotting.curves import range_band

    optimum = float(arrays["optimum"])
    rounding = np.finfo(arrays["exact"]["risk"].dtype).eps
    labels = {"exact": ("C0", "exact gradient", "-"), "sampled": ("C1", "fresh prompts", "--")}
    for name, style in labels.items():
        range_band(axes, arrays["steps"], np.maximum(arrays[name]["risk"] / optimum - 1, rounding / 10), *style)
    axes.axhspan(rounding / 10, 10 * rounding, color="0.9", linewidth=0, label="rounding")
    axes.set_yscale("log")
    axes.set(xlabel="training step", ylabel="risk / that of the best step - 1")
    axes.set_ylim(rounding / 10, 1e5)  # room for the legend
    axes.legend(loc="upper right")


def plot_alignment(axes, arrays: Arrays, measure: str) -> None:
    """A measure of distance from the best step: of the trained layer, and of it on shuffled labels."""
    from attnlab.plotting.curves import range_band

    cosine = measure == "sensitivity_cosine"
    for who, style in {"shuffled": ("C1", "shuffled labels", "--"), "model": ("C0", "the layer", "-")}.items():
        values = arrays["exact"][who][measure]
        distance = 1 - values if cosine else values
        range_band(axes, arrays["steps"], np.maximum(distance, np.finfo(distance.dtype).eps / 10), *style)
    start = np.median(distance[0])
    rounding = np.finfo(distance.dtype).eps
    axes.axhspan(rounding / 10, 10 * rounding, color="0.9", linewidth=0, label="rounding", zorder=0)
    axes.plot(arrays["steps"][0], start, "o", color="C0", markersize=6, clip_on=False, label="the untrained layer")
    axes.set(
        yscale="log",
        xlabel="training step",
        ylabel="1 - cosine with the best step's" if cosine else "mean over prompts",
    )
    axes.legend(loc="center right", bbox_to_anchor=(1.0, 0.62))


def plot_scaled(axes, arrays: Arrays, what: str, scales) -> None:
    from attnlab.plotting.curves import range_band

    range_band(axes, scales, arrays["scaled"][what]["untrained"].T, "C1", "untrained layer", "--")
    range_band(axes, scales, arrays["scaled"][what]["trained"].T, "C0", "trained layer")
    value, error = arrays["scaled"][what]["descent"]
    axes.errorbar(scales, value, 2 * error, fmt="o", color="black", markerfacecolor="none", label="best gradient step")
    axes.set_xscale("log")
    ticks = [tick for tick in (0.5, 1, 2, 5) if tick <= scales[-1] * 1.001]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, 1.8 * max(value.max(), 1))
    axes.set(xlabel=f"scale of the {what} (training: 1)", ylabel="risk / mean squared target")
    axes.legend(loc="upper left")


def plot_interpolated(axes, arrays: Arrays) -> None:
    from attnlab.plotting.curves import range_band

    for color, name, style in (("C1", "untrained", "--"), ("C0", "trained", "-")):
        values = arrays["interpolated"][name].T / arrays["optimum"]
        range_band(axes, FRACTIONS, values, color, f"from the {name} layer", style)
    axes.axhline(1, color="black", linewidth=1, linestyle=":", label="best gradient step")
    axes.set(yscale="log", xlabel="fraction of the construction's weights", ylabel="risk / that of the best step")
    axes.set_ylim(top=axes.get_ylim()[1] ** 1.7)  # room for the legend
    axes.legend(loc="upper right")


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """The trained layer has the risk of the best step and its sensitivities; its nulls do not."""
    source = "von Oswald et al., arXiv 2212.07677; nulls as Shen, Mishra, Khashabi, arXiv 2311.07772, ask for"
    above = {name: risk_above(arrays, name) for name in ("exact", "sampled")}
    cosines = {who: arrays["exact"][who]["sensitivity_cosine"] for who in ("model", "shuffled")}
    trained, shuffled, untrained = (
        float(np.median(1 - values)) for values in (cosines["model"][-1], cosines["shuffled"][-1], cosines["model"][0])
    )
    return [
        at_most("risk above that of the best step, relative: exact gradient", above["exact"], 1e-4, source=source),
        at_most("the same: fresh prompts", above["sampled"], 0.02, source=source),
        at_most("1 - cosine of the sensitivities, median over seeds", trained, 1e-4, source=source),
        at_least("the same on shuffled labels", shuffled, 0.3, source="null"),
        at_least("the same of the untrained layer", untrained, 0.3, source="null"),
    ]


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """Final losses beside theory, and the measures beside their nulls."""
    losses = Table("half the risk", "value", title="One layer against one step of gradient descent")
    losses.add_row("best gradient step (theory)", f"{float(arrays['optimum']):.6f}")
    for name in ("exact", "sampled"):
        last = arrays[name]["risk"][-1]
        losses.add_row(
            f"trained, {name}: mean, largest deviation",
            f"{last.mean():.6f}, {np.abs(last - arrays['optimum']).max():.1e}",
        )
    measures = Table("measure (median over seeds)", "trained", "trained, shuffled labels", "untrained")
    for measure in MEASURES:
        trained, shuffled = (arrays["exact"][who][measure] for who in ("model", "shuffled"))
        values = (trained[-1], shuffled[-1], trained[0])
        measures.add_row(measure.replace("_", " "), *(f"{np.median(value):.3g}" for value in values))
    return [losses, measures]


ANALYSIS = Analysis(
    "icl-gradient-descent", Config, compute, plot, tables, findings, __doc__, slow=True, details=details
)

if __name__ == "__main__":
    ANALYSIS.main()
