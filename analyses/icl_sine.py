"""Sine tasks: an MLP and one linear attention layer, trained together, descend in the features that the MLP learned.

The experiment of von Oswald et al. (arXiv 2212.07677): y = a sin(x + p), a uniform on (0.1, 0.5), p on (0, pi), x on
(-5, 5), ten examples. The trained model is held against one gradient step from a learned start: in features trained for
that step, in its own features with the layer's inner product, and without it; and against theory and regression.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np
from rich.progress import Progress
from rich.table import Table

from attnlab.analysis import Analysis, Arrays, SinglePrecisionConfig
from attnlab.expectation import Expectation, at_least, at_most

AMPLITUDE = (0.1, 0.5)
MEAN_SQUARE = (AMPLITUDE[1] ** 3 - AMPLITUDE[0] ** 3) / (6 * (AMPLITUDE[1] - AMPLITUDE[0]))  # of y: E a^2 / 2
PENALTY = 0.1
FLOOR = "least risk of one step (theory)"
CURVES = {  # label, color, line
    "model": ("MLP and attention, trained", "C0", "-"),
    "learned descent": ("one step, features trained for it", "C1", "--"),
    "own descent": ("one step, the model's features", "C2", ":"),
    "plain descent": ("same, without the layer's inner product", "C3", "-."),
    "untrained": ("one step, untrained features", "C4", ":"),
    "inputs": ("one step on $x$ itself", "C5", "--"),
    "ridge": ("ridge regression, the model's features", "C6", "-."),
    "shuffled": ("trained for it, model shown shuffled labels", "C4", "-."),
    "start": ("the model's start $W_0 m(x)$", "C4", "-."),
}


@dataclass(frozen=True)
class Config(SinglePrecisionConfig):
    """Options of the analysis."""

    SMOKE: ClassVar = {"hidden": 4, "features": 3, "steps": 4, "every": 2, "batch": 4, "prompts": 12, "lengths": (10,)}

    hidden: int = 32
    """Width of the two hidden layers of the MLP."""
    features: int = 16
    """Number of features that it hands to the attention layer."""
    length: int = 10
    """Number N of examples in a training prompt; one of `lengths`."""
    seeds: int = 3
    """Models trained, and as many for one step of gradient descent."""
    steps: int = 3000
    """Training steps of Adam with a cosine schedule; a multiple of `every`."""
    every: int = 150
    """Steps between two measurements."""
    batch: int = 128
    """Fresh prompts a step."""
    learning_rate: float = 0.01
    """Of Adam at the start."""
    prompts: int = 4000
    """Prompts of each measurement, and as many to fit step sizes."""
    lengths: tuple[int, ...] = (2, 5, 10, 20, 40)
    """Context lengths of the prompts that the trained models are shown."""


def compute(config: Config, progress: Progress) -> Arrays:
    """Train descent in features, then features and attention against it, and measure what became of them."""
    import jax
    import jax.numpy as jnp

    from attnlab.icl.learned_features import best_sine_risk, init_feature_attention
    from attnlab.training import probe

    def start(key):
        return init_feature_attention(key, network(config), 1, scale=0.25, spread=5.0)

    keys = jax.random.split(jax.random.key(config.seed), 5)
    draw = jax.jit(sines, static_argnames=("length", "count"))
    fit, test = (draw(key, config.length, config.prompts) for key in keys[:2])
    starts, others = (jax.jit(jax.vmap(start))(jax.random.split(key, config.seeds)) for key in keys[2:4])
    steps = {"features": others["features"], "initial": others["initial"], "step_size": jnp.ones(config.seeds)}
    steps = fitted(config, progress, "one step", one_step, steps, keys[3], test, {}).params
    # the parameters are kept and measured afterwards: as a probe the measurement would compile twice
    trained = fitted(config, progress, "attention", attention, starts, keys[2], test, {"params": probe(lambda _, p: p)})
    reference = jax.tree.map(lambda leaf: leaf[0], steps)
    measure = jax.vmap(partial(along, config=config), in_axes=(0, None, None, None, None))
    arrays = jax.jit(lambda recorded, *rest: jax.lax.map(lambda params: measure(params, *rest), recorded))(
        trained.records.values["params"], reference, fit, test, keys[4]
    )
    arrays |= {"steps": trained.records.steps, "after": {}, "floor": {}}
    task = progress.add_task("context lengths", total=len(config.lengths), status="")
    for length in config.lengths:
        members = jax.jit(
            jax.vmap(partial(after, key=jax.random.fold_in(keys[0], length), length=length, config=config))
        )
        arrays["after"][str(length)] = members(trained.params, starts, steps)
        arrays["floor"][str(length)] = best_sine_risk(length, AMPLITUDE) / MEAN_SQUARE
        progress.advance(task)
    return arrays | jax.jit(partial(shapes, config=config))(trained.params, test)


def sines(key, length: int, count: int):
    from attnlab.icl.tasks import sine_prompts

    return sine_prompts(key, length, count, amplitude=AMPLITUDE)


def network(config: Config):
    from attnlab.models.networks import MLPConfig

    return MLPConfig((config.hidden, config.hidden, config.features), activation="tanh", bias=True)


def attention(params, config: Config):
    from attnlab.icl.learned_features import feature_attention_predict

    return partial(feature_attention_predict, params, config=network(config))


def one_step(params, config: Config, preconditioner=None):
    """One step in the features of `params`; of its own step size if there is no preconditioner."""
    import jax.numpy as jnp

    from attnlab.icl.learned_features import feature_descent_predict

    matrix = params["step_size"] * jnp.eye(config.features) if preconditioner is None else preconditioner
    return partial(feature_descent_predict, params, preconditioner=matrix, config=network(config))


def fitted(config: Config, progress: Progress, name: str, model, starts, key, test, probes):
    """An ensemble trained on fresh prompts; `model(params, config)` predicts."""
    import jax
    import optax

    from attnlab.icl.diagnostics import predictions
    from attnlab.losses import square_loss
    from attnlab.objectives import objective
    from attnlab.training import Session, show_progress, train

    def draw(key, risk):
        prompts = sines(key, config.length, config.batch)
        return replace(risk, inputs=prompts, targets=prompts.target)

    def predict(params, prompts):
        return predictions(model(params, config), prompts)

    return train(
        objective(predict, square_loss, test, test.target),
        starts,
        optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps)),
        jax.random.split(jax.random.fold_in(key, 1), config.seeds),
        steps=config.steps,
        every=config.every,
        resample=draw,
        probes=probes,
        session=Session(report=show_progress(progress, f"training, {name}")),
    )


def best_step(params, matrix, fit, config: Config):
    """One step in the features with the inner product `matrix`, of the best size on the prompts `fit`; that size."""
    from attnlab.icl.learned_features import best_step_size

    size = best_step_size(lambda size: one_step(params, config, size * matrix), fit)
    return one_step(params, config, size * matrix), size


def own(params, fit, config: Config):
    """The model and the best steps in its features; the layer's inner product, its step size, and its kernel's distance
    from that of any step."""
    import jax.numpy as jnp

    from attnlab.icl.learned_features import own_preconditioner

    matrix, distance = own_preconditioner(params, fit.inputs.reshape(-1, 1), config=network(config))
    step, size = best_step(params, matrix, fit, config)
    plain, _ = best_step(params, jnp.eye(config.features), fit, config)
    models = {"model": attention(params, config), "own descent": step, "plain descent": plain}
    return models, matrix, {"step size": size, "kernel distance": distance}


def along(params, reference, fit, test, key, config: Config):
    """Risks, and alignment with one step, along training; inputs are numbers, so that the cosine of two sensitivities
    says whether their signs agree."""
    from attnlab.icl.diagnostics import alignment, risk
    from attnlab.icl.tasks import shuffle_labels

    models, _, found = own(params, fit, config)
    step = one_step(reference, config)
    found["risk"] = {
        name: risk(function, test).value / MEAN_SQUARE for name, function in {**models, "learned descent": step}.items()
    }
    found |= {"difference": {}, "cosine": {}}
    pairs = {
        "learned descent": (step, test),
        "own descent": (models["own descent"], test),
        "shuffled": (step, shuffle_labels(key, test)),
    }
    for name, (algorithm, shown) in pairs.items():
        pair = alignment(models["model"], algorithm, test, shown)
        found["difference"][name] = pair.prediction_difference.value / MEAN_SQUARE**0.5
        found["cosine"][name] = pair.sensitivity_cosine.value
    return found


def after(params, start, descent, key, length: int, config: Config):
    """Risk over E y^2 of every contender on prompts of one length, and its standard error."""
    import jax
    import jax.numpy as jnp

    from attnlab.icl.baselines import baseline, least_squares, ridge
    from attnlab.icl.composition import with_features
    from attnlab.icl.diagnostics import risk
    from attnlab.icl.learned_features import best_step_size, learned_features
    from attnlab.icl.tasks import sine_features

    fit_key, test_key = jax.random.split(key)
    fit, test = sines(fit_key, length, config.prompts), sines(test_key, length, config.prompts)

    def in_inputs(size):
        return baseline("gradient_descent", steps=1, step_size=size)

    models, matrix, _ = own(params, fit, config)
    values, vectors = jnp.linalg.eigh(matrix)
    root = vectors * jnp.sqrt(jnp.maximum(values, 0))[None, :]
    models |= {
        "learned descent": one_step(descent, config),
        "untrained": best_step(start, jnp.eye(config.features), fit, config)[0],
        "inputs": in_inputs(best_step_size(in_inputs, fit)),
        "ridge": with_features(
            lambda x: learned_features(params, x, config=network(config)) @ root, partial(ridge, penalty=PENALTY)
        ),
        "least squares": with_features(sine_features, least_squares),
    }
    return {name: jnp.stack([*risk(function, test)]) / MEAN_SQUARE for name, function in models.items()}


def shapes(params, test, config: Config):
    """Of every model the share of its kernel in the span of sine and cosine; predicted functions of the first."""
    import jax
    import jax.numpy as jnp

    from attnlab.icl.baselines import least_squares
    from attnlab.icl.composition import with_features
    from attnlab.icl.diagnostics import predictions
    from attnlab.icl.learned_features import layer_kernel, learned_features
    from attnlab.icl.tasks import sine_features

    grid = jnp.linspace(-5.0, 5.0, 101)[:, None]
    basis, _ = jnp.linalg.qr(sine_features(grid))

    def share(params):
        features = learned_features(params, grid, config=network(config))
        kernel = features @ layer_kernel(params) @ features.T
        return (jnp.linalg.norm(basis.T @ kernel @ basis) / jnp.linalg.norm(kernel)) ** 2

    first = jax.tree.map(lambda leaf: leaf[0], params)
    functions, *_ = own(first, test, config)
    functions["start"] = one_step(first, config, jnp.zeros((config.features, config.features)))
    functions["task"] = with_features(sine_features, least_squares)
    arrays = {"grid": grid[:, 0], "share of kernel": jax.vmap(share)(params)}
    for number in range(2):
        prompt = jax.tree.map(lambda leaf, at=number: jnp.repeat(leaf[at][None], len(grid), axis=0), test)
        queries = replace(prompt, query=grid)
        arrays[f"task {number}"] = {name: predictions(function, queries) for name, function in functions.items()}
        arrays[f"task {number}"]["context"] = jnp.stack([test.inputs[number, :, 0], test.labels[number]])
    return arrays


def plot(arrays: Arrays, config: Config):
    """Risk along training and by context length, difference of predictions, and one task."""
    from attnlab.plotting.panels import panels

    risks = {name: found[:, 0].mean() for name, found in arrays["after"][str(config.length)].items()}
    apart = {name: 100 * float(np.median(found[-1])) for name, found in arrays["difference"].items()}
    figure, axes = panels(
        "An MLP and a linear attention layer descend once in learned features: their risk is "
        f"{risks['model'] / risks['learned descent']:.2f} times\nthat of a step trained for it, their predictions "
        f"differ by {apart['learned descent']:.1f} % ({apart['shuffled']:.0f} % on shuffled labels)",
        [
            f"risk along training, {config.length} examples",
            f"trained at $N = {config.length}$, shown $N$ examples",
            "predictions of the trained model against",
            "one test prompt, one model",
        ],
        note=f"(a) to (c): lines: medians, bands: range over {config.seeds} seeds; {config.prompts} prompts a point.\n"
        "One step: of gradient descent, of the best size; training step 0: untrained",
        height=3.2,
    )
    plot_training(axes[0], arrays, "risk", ("own descent", "plain descent", "model"))
    label, color, line = CURVES["learned descent"]
    axes[0].axhline(np.median(arrays["risk"]["learned descent"][-1]), color=color, linestyle=line, label=label)
    axes[0].axhline(arrays["floor"][str(config.length)], color="black", linewidth=1, linestyle=":", label=FLOOR)
    axes[0].set(yscale="log", ylabel="risk / mean square of $y$")
    axes[0].set_ylim(top=100 * axes[0].get_ylim()[1])  # room for the legend
    axes[0].legend(loc="upper right", fontsize=7.5)
    plot_lengths(axes[1], arrays, config)
    plot_training(axes[2], arrays, "difference", ("learned descent", "own descent", "shuffled"))
    axes[2].set(yscale="log", ylabel=r"mean $|\hat y - \hat y_{step}|$ / rms of $y$")
    axes[2].set_ylim(top=10 * axes[2].get_ylim()[1])  # room for the legend
    axes[2].legend(loc="upper right")
    plot_task(axes[3], arrays, 0)
    return figure


def details(arrays: Arrays, config: Config):
    """Cosines of sensitivities, and another task."""
    from attnlab.plotting.panels import panels

    cosines = {name: float(np.median(found[-1])) for name, found in arrays["cosine"].items()}
    figure, axes = panels(
        f"Slopes in the query against those of a step trained for: cosine {cosines['learned descent']:.2f} "
        f"(shuffled labels {cosines['shuffled']:.2f})",
        ["slopes of the trained model against", "another test prompt, the same model"],
        note=f"(a): lines: medians, bands: range over {config.seeds} seeds, of means over prompts; $x$ is a number, "
        r"every cosine $\pm 1$",
        height=3.0,
    )
    plot_training(axes[0], arrays, "cosine", ("learned descent", "own descent", "shuffled"))
    axes[0].set(ylabel=r"mean cosine of $\partial \hat y / \partial x_q$")
    axes[0].legend(loc="lower right")
    plot_task(axes[1], arrays, 1)
    return figure


def plot_training(axes, arrays: Arrays, measure: str, names) -> None:
    from attnlab.plotting.curves import range_band

    for name in names:
        label, color, line = CURVES[name]
        range_band(axes, arrays["steps"], arrays[measure][name], color, label, line)
    axes.set_xlabel("training step")


def plot_lengths(axes, arrays: Arrays, config: Config) -> None:
    """All contenders by context length; those that are in the first panel as well are named there."""
    from attnlab.plotting.curves import range_band

    for name, (label, color, line) in list(CURVES.items())[:7]:
        risks = np.stack([arrays["after"][str(length)][name][:, 0] for length in config.lengths])
        range_band(axes, config.lengths, risks, color, label, "." + line)
    axes.plot(config.lengths, [arrays["floor"][str(n)] for n in config.lengths], "k:", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="context length $N$", ylabel="risk / mean square of $y$")
    axes.set_xticks(config.lengths, [str(length) for length in config.lengths])
    axes.minorticks_off()
    axes.set_ylim(bottom=1e-4)  # room for the legend under the curves
    axes.legend(handles=axes.lines[4:7], loc="lower left", title="as in (a), and", title_fontsize=8, alignment="left")


def plot_task(axes, arrays: Arrays, number: int) -> None:
    axes.plot(*arrays[f"task {number}"]["context"], "ko", markerfacecolor="none", label="context")
    axes.plot(arrays["grid"], arrays[f"task {number}"]["task"], color="black", linewidth=1, label="the task")
    for name in ("start", "model", "own descent"):
        label, color, line = CURVES[name]
        axes.plot(arrays["grid"], arrays[f"task {number}"][name], line, color=color, label=label)
    axes.set(xlabel="$x$", ylabel="$y$")
    axes.set_ylim(top=3.2 * axes.get_ylim()[1])  # room for the legend
    axes.legend(loc="upper left")


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """The trained model against one step in learned features, its null, and one step on the input itself."""
    source = "von Oswald et al., arXiv 2212.07677"
    risks = {name: found[:, 0].mean() for name, found in arrays["after"][str(config.length)].items()}
    difference = {name: found[-1].mean() for name, found in arrays["difference"].items()}
    least = risks["learned descent"] / arrays["floor"][str(config.length)]
    ratio, own = risks["model"] / risks["learned descent"], difference["own descent"] / difference["shuffled"]
    return [
        at_least("risk of one step on x over that of the model", risks["inputs"] / risks["model"], 2.0, source=source),
        at_most("risk of the model over that of the step trained for", ratio, 1.2, source=source),
        at_least("risk of the step trained for over the least one", least, 0.9, source="derived here"),
        at_most("difference from a step in its features, over that on shuffled labels", own, 0.5, source="null"),
    ]


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """Risks at every length, and what the last models have in common with one step."""
    risks = Table("risk / mean square of y", *(f"N = {n}" for n in config.lengths))
    names = {name: label for name, (label, *_) in CURVES.items() if name not in ("shuffled", "start")}
    for name, label in (names | {"least squares": r"least squares on $(\sin x, \cos x)$"}).items():
        found = [arrays["after"][str(length)][name].mean(axis=0) for length in config.lengths]
        risks.add_row(label, *(f"{value:.3g} +- {error:.1g}" for value, error in found))
    risks.add_row(FLOOR, *(f"{arrays['floor'][str(length)]:.3g}" for length in config.lengths))
    last = Table("of the trained models", "mean", "least", "largest", "untrained")
    measures = {f"{what}, {name}": found for what in ("difference", "cosine") for name, found in arrays[what].items()}
    for name, found in (measures | {name: arrays[name] for name in ("step size", "kernel distance")}).items():
        values = (found[-1].mean(), found[-1].min(), found[-1].max(), found[0].mean())
        last.add_row(name, *(f"{value:.4f}" for value in values))
    share = arrays["share of kernel"]
    last.add_row("share of kernel in span", *(f"{value:.4f}" for value in (share.mean(), share.min(), share.max())))
    return [risks, last]


ANALYSIS = Analysis("icl-sine", Config, compute, plot, tables, findings, __doc__, slow=True, details=details)

if __name__ == "__main__":
    ANALYSIS.main()
