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
    """Above: loss, differences, cosine along training; below: scaled inputs, scaled tasks, interpolated weights."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12.5, 6.8))
    plot_loss(axes[0, 0], arrays)
    for panel, pair in ((axes[0, 1], MEASURES[:2]), (axes[0, 2], MEASURES[2:])):
        plot_alignment(panel, arrays, pair)
    plot_scaled(axes[1, 0], arrays, "inputs", INPUT_SCALES)
    plot_scaled(axes[1, 1], arrays, "tasks", TASK_SCALES)
    plot_interpolated(axes[1, 2], arrays)
    return figure


def plot_loss(axes, arrays: Arrays) -> None:
    from attnlab.plotting.curves import range_band

    seeds, sampled = (arrays[name]["risk"].shape[1] for name in ("exact", "sampled"))
    optimum = float(arrays["optimum"])
    labels = {
        "exact": ("C0", f"exact gradient, {seeds} seeds", "-"),
        "sampled": ("C1", f"fresh prompts, {sampled} seeds", "--"),
    }
    for name, style in labels.items():
        # the difference is exact to rounding only: draw zeros at the bottom
        range_band(axes, arrays["steps"], np.maximum(arrays[name]["risk"] - optimum, 1e-17), *style)
    axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="half the risk minus that of the best step")
    axes.set_title(f"distance to the best gradient step, {optimum:.5f}")
    axes.legend(loc="best")


LABELS = {
    "prediction_difference": r"$|\hat y - \hat y_{GD}|$",
    "sensitivity_difference": r"$\|\partial \hat y / \partial x_q - \partial \hat y_{GD} / \partial x_q\|$",
    "sensitivity_cosine": r"cosine of $\partial \hat y / \partial x_q$",
}


def plot_alignment(axes, arrays: Arrays, measures) -> None:
    from attnlab.plotting.curves import range_band

    for number, measure in enumerate(measures):
        color = f"C{2 * number}"
        range_band(axes, arrays["steps"], arrays["exact"]["model"][measure], color, LABELS[measure])
        range_band(
            axes,
            arrays["steps"],
            arrays["exact"]["shuffled"][measure],
            f"C{2 * number + 1}",
            f"{LABELS[measure]}, shuffled labels",
            ":",
        )
    cosine = measures == MEASURES[2:]
    axes.set_yscale("linear" if cosine else "log")
    if not cosine:
        axes.set_ylim(top=1e9)  # room for the legend above the curves
    axes.set(xlabel="step (step 0 is the untrained layer)", ylabel="mean over prompts")
    axes.set_title("alignment with the best gradient step" if cosine else "difference from the best gradient step")
    axes.legend(loc="best" if cosine else "upper right")


def plot_scaled(axes, arrays: Arrays, what: str, scales) -> None:
    from attnlab.plotting.curves import range_band

    range_band(axes, scales, arrays["scaled"][what]["untrained"].T, "C1", "untrained", ":")
    range_band(axes, scales, arrays["scaled"][what]["trained"].T, "C0", "trained layer")
    value, error = arrays["scaled"][what]["descent"]
    axes.errorbar(scales, value, 2 * error, fmt="o", color="black", markerfacecolor="none", label="best gradient step")
    axes.set_xscale("log")
    ticks = [tick for tick in (0.5, 1, 2, 5) if tick <= scales[-1] * 1.001]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, 1.6 * max(value.max(), 1))
    axes.set(xlabel=f"scale of the {what}", ylabel="risk / mean squared target")
    axes.set_title(f"out of distribution: scaled {what}")
    axes.legend(loc="best")


def plot_interpolated(axes, arrays: Arrays) -> None:
    from attnlab.plotting.curves import range_band

    for color, name, style in (("C0", "trained", "-"), ("C1", "untrained", ":")):
        range_band(axes, FRACTIONS, arrays["interpolated"][name].T, color, name, style)
    axes.axhline(float(arrays["optimum"]), color="black", linewidth=0.8, linestyle="--", label="best gradient step")
    axes.set_yscale("log")
    axes.set(xlabel="fraction of the construction", ylabel="half the exact risk")
    axes.set_title("from the layer's weights to the constructed ones")
    axes.legend(loc="best")


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """The trained layer has the risk of the best step and its sensitivities; its nulls do not."""
    source = "von Oswald et al., arXiv 2212.07677; nulls as Shen, Mishra, Khashabi, arXiv 2311.07772, ask for"
    above = {name: float(np.max(arrays[name]["risk"][-1] / arrays["optimum"] - 1)) for name in ("exact", "sampled")}
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


ANALYSIS = Analysis("icl-gradient-descent", Config, compute, plot, tables, findings, __doc__, slow=True)

if __name__ == "__main__":
    ANALYSIS.main()
