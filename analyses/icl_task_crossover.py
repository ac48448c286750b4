"""Few training tasks draw a micro transformer towards discrete Bayes, many towards ridge; it reaches neither optimum.

The crossover of Raventos et al. (arXiv 2306.15063) at micro size: d = 3, eight examples, a two-layer softmax
transformer of 9,600 parameters. Trained on M tasks it is tested on its own tasks and on fresh ones, and its predictions
are held against the posterior mean over the M tasks, which is optimal in training, and against ridge regression, which
is optimal for fresh tasks; an untrained model and shuffled labels are the nulls. After so short a training its risk on
its own tasks is still a multiple of the least one.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from rich.progress import Progress
from rich.table import Table

from attnlab.analysis import Analysis, AnalysisConfig, Arrays
from attnlab.expectation import Expectation, at_least, at_most

TASKS = ("own", "fresh")
RISKS = {"model": "transformer", "bayes": "discrete Bayes", "ridge": "ridge"}
NULLS = {"untrained": "untrained", "shuffled": "shuffled labels"}
DISTANCES = {"model_bayes": "to discrete Bayes", "model_ridge": "to ridge", "bayes_ridge": "discrete Bayes to ridge"}


@dataclass(frozen=True)
class Config(AnalysisConfig):
    """Options of the analysis."""

    SMOKE: ClassVar = {"tasks": (2, 4), "seeds": 1, "width": 4, "layers": 1, "steps": 4, "batch": 8, "prompts": 32}

    dimension: int = 3
    """Dimension d of inputs and tasks, both N(0, I)."""
    length: int = 8
    """Examples N in a prompt."""
    noise_variance: float = 0.25
    """Of the labels."""
    tasks: tuple[int, ...] = (2, 4, 8, 16, 64, 256)
    """Numbers M of training tasks; each divides the largest."""
    seeds: int = 8
    """Sets of tasks, and transformers, for each number."""
    width: int = 24
    """Width of the residual stream; two heads of half of it, MLPs of twice."""
    layers: int = 2
    """Transformer blocks."""
    steps: int = 3000
    """Steps of Adam in float32: a warm-up of a twentieth, then a cosine schedule to zero."""
    batch: int = 64
    """Fresh prompts a step."""
    learning_rate: float = 5e-3
    """Of Adam at its highest."""
    prompts: int = 4000
    """Prompts on which everything is compared."""


def compute(config: Config, progress: Progress) -> Arrays:
    """Train all transformers side by side, and compare them with both estimators."""
    import jax
    import jax.numpy as jnp

    from attnlab.models.attention import AttentionConfig
    from attnlab.models.transformer import TransformerConfig

    width = config.width
    attention = AttentionConfig(key_dim=width // 2, value_dim=width // 2, heads=2, output_dim=width)
    model = TransformerConfig(attention, layers=config.layers, mlp_width=2 * width, final_norm=True)
    shape = (len(config.tasks), config.seeds)
    task_keys, *keys = jax.random.split(jax.random.key(config.seed), (3, *shape))
    tasks = jnp.concatenate(
        [draw_tasks(keys, count, config) for keys, count in zip(task_keys, config.tasks, strict=True)]
    )
    starts, ends, losses = train_models(keys[0].ravel(), tasks, model, config, progress)
    task = progress.add_task("comparing", total=1, status="")
    found = compared(keys[1].ravel(), starts, ends, tasks, model, config)
    progress.advance(task)
    return jax.tree.map(lambda array: np.reshape(array, (*shape, 2)), found) | {"losses": losses}


def draw_tasks(keys, count: int, config: Config):
    """`count` tasks N(0, I) for each key, repeated to the largest number: the same law, and one shape for all."""
    import jax
    import jax.numpy as jnp

    tasks = jax.vmap(lambda key: jax.random.normal(key, (count, config.dimension), jnp.float32))(keys)
    return jnp.tile(tasks, (1, max(config.tasks) // count, 1))


def problem_of(tasks, config: Config):
    """Isotropic regression with the given tasks, in their dtype."""
    import jax.numpy as jnp

    from attnlab.icl.tasks import linear_regression

    identity = jnp.eye(config.dimension, dtype=tasks.dtype)
    return linear_regression(identity, tasks=tasks, noise_variance=config.noise_variance)


def train_models(keys, tasks, model, config: Config, progress: Progress):
    """Starts, ends and losses of one transformer for each key and set of tasks, on fresh prompts."""
    from dataclasses import replace
    from functools import partial

    import jax
    import jax.numpy as jnp
    import optax

    from attnlab.icl.models import init_transformer, transformer_predict
    from attnlab.icl.tasks import sample_prompts
    from attnlab.objectives import objective
    from attnlab.training import Session, show_progress, train

    def draw(key, tasks):
        return sample_prompts(key, problem_of(tasks, config), config.length, config.batch)

    def first(key, tasks):
        prompts = draw(key, tasks)
        return objective(predict_all, mean_square, (tasks, prompts), prompts.target)

    def predict_all(params, inputs):
        return jax.vmap(partial(transformer_predict, params, config=model))(inputs[1])

    def mean_square(found, wanted):
        return jnp.mean((found - wanted) ** 2)

    def resample(key, risk):
        prompts = draw(key, risk.inputs[0])
        return replace(risk, inputs=(risk.inputs[0], prompts), targets=prompts.target)

    def start(key):
        params = init_transformer(key, model, config.dimension, config.width)
        return jax.tree.map(lambda leaf: leaf.astype(tasks.dtype), params)

    starts = jax.jit(jax.vmap(start))(keys)
    risks = jax.jit(jax.vmap(first))(keys, tasks)
    schedule = optax.warmup_cosine_decay_schedule(0, config.learning_rate, config.steps // 20, config.steps)
    options = {"steps": config.steps, "every": max(config.steps // 50, 1), "resample": resample, "own_risks": True}
    session = Session(report=show_progress(progress, "training"), directory=config.scratch() / "training")
    trained = train(risks, starts, optax.adam(schedule), keys, session=session, **options)
    return starts, trained.params, trained.records.losses


def compared(keys, starts, ends, tasks, model, config: Config):
    """Risks, distances and nulls per dimension, means and standard errors over prompts: (members, 2) each."""
    from functools import partial

    import jax

    from attnlab.icl.baselines import baseline
    from attnlab.icl.diagnostics import estimate, predictions
    from attnlab.icl.models import transformer_predict
    from attnlab.icl.tasks import isotropic, sample_prompts, shuffle_labels
    from attnlab.statistics import Estimate

    noise = config.noise_variance

    def compare(member):
        key, start, end, tasks = member
        key_own, key_fresh, key_labels = jax.random.split(key, 3)
        laws = {"own": problem_of(tasks, config), "fresh": isotropic(config.dimension, noise, tasks.dtype)}
        found = {}
        for (name, law), sample_key in zip(laws.items(), (key_own, key_fresh), strict=True):
            prompts = sample_prompts(sample_key, law, config.length, config.prompts)
            models = {
                "model": partial(transformer_predict, end, config=model),
                "bayes": baseline("discrete_bayes", tasks=tasks, noise_variance=noise),
                "ridge": baseline("ridge", penalty=noise),
                "untrained": partial(transformer_predict, start, config=model),
            }
            outputs = {who: predictions(function, prompts) for who, function in models.items()}
            outputs["shuffled"] = predictions(models["model"], shuffle_labels(key_labels, prompts))
            squares = {"risk": {who: (output - prompts.target) ** 2 for who, output in outputs.items()}, "distance": {}}
            for pair in (*DISTANCES, *(f"{null}_{who}" for null in NULLS for who in ("bayes", "ridge"))):
                one, two = pair.split("_")
                squares["distance"][pair] = (outputs[one] - outputs[two]) ** 2
            found[name] = jax.tree.map(lambda square: estimate(square / config.dimension), squares)
        return found

    # one member after the other: the posterior over the tasks of all prompts takes memory
    found = jax.jit(lambda members: jax.lax.map(compare, members))((keys, starts, ends, tasks))
    return jax.tree.map(lambda one: np.stack(one, axis=-1), found, is_leaf=lambda one: isinstance(one, Estimate))


def series(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over seeds for every number of tasks, and their standard errors: over prompts and between seeds; of
    (numbers, seeds, 2)."""
    seeds = rows.shape[1]
    between = rows[:, :, 0].var(axis=1, ddof=1) / seeds if seeds > 1 else 0.0
    return rows[:, :, 0].mean(axis=1), np.sqrt((rows[:, :, 1] ** 2).sum(axis=1) / seeds**2 + between)


def plot(arrays: Arrays, config: Config):
    """Distances on fresh tasks, risks on own and on fresh tasks, and these over the least ones, by number of tasks."""
    from attnlab.plotting.panels import panels

    (few, near), *_, (many, far) = zip(config.tasks, nearness(arrays), strict=True)
    own = excess(arrays, "own", "bayes")[0]
    figure, axes = panels(
        f"Squared distance of a micro transformer from discrete Bayes over that from ridge: {near:.2g} with\n"
        f"{few} training tasks, {far:.2g} with {many}; its risk on its own tasks is "
        f"{own.min():#.2g} to {own.max():.2g} times the least",
        [
            "distance of predictions, fresh tasks",
            "risk on its own tasks",
            "risk on fresh tasks",
            "risk over the least one",
        ],
        note=f"lines: means over {config.seeds} seeds (tasks and starts), bands: two standard errors. Discrete Bayes: "
        "posterior mean over\nthe training tasks, the least risk on these; ridge: the least risk on fresh tasks",
        height=2.9,
    )
    styles = (("o-", "C0"), ("s--", "C1"), (":", "black"))
    for (name, label), (style, color) in zip(DISTANCES.items(), styles, strict=True):
        draw_series(axes[0], series(arrays["fresh"]["distance"][name]), config, style, color, label)
    axes[0].set_ylabel("mean squared distance / $d$")
    for panel, where in zip(axes[1:], TASKS, strict=False):
        plot_risks(panel, arrays[where]["risk"], config)
    for where, least, style, color in (("own", "bayes", "o-", "C0"), ("fresh", "ridge", "s--", "C1")):
        label = f"{where} tasks, over {RISKS[least]}"
        draw_series(axes[3], excess(arrays, where, least), config, style, color, label)
    axes[3].axhline(1, color="black", linewidth=1, linestyle=":", label="optimal")
    axes[3].set_ylabel("risk / least risk")
    for panel in axes:
        panel.set(xscale="log", yscale="log", xlabel="number $M$ of training tasks")
        panel.set_xticks(config.tasks, [str(count) for count in config.tasks])
        panel.minorticks_off()
    for panel, place in ((axes[0], "lower left"), (axes[3], "upper right")):
        low, high = panel.get_ylim()
        panel.set_ylim(*((low / 10, high) if place == "lower left" else (low, 10 * high)))  # room for the legend
        panel.legend(loc=place)
    axes[1].set_ylim(1e-5, 5)
    axes[2].set_ylim(1e-2, 5)
    axes[1].legend(loc="lower right", ncols=2, columnspacing=1.0)
    return figure


def plot_risks(panel, risks: Arrays, config: Config) -> None:
    """Of the transformer, of both estimators and of the nulls."""
    for (name, label), (style, color) in zip(RISKS.items(), (("^-", "C2"), ("o-", "C0"), ("s--", "C1")), strict=True):
        draw_series(panel, series(risks[name]), config, style, color, label)
    for (name, label), style in zip(NULLS.items(), (":", "-."), strict=True):
        draw_series(panel, series(risks[name]), config, style, "0.5", label)
    panel.set(ylabel="risk / $d$")


def nearness(arrays: Arrays) -> np.ndarray:
    """Squared distance from discrete Bayes over that from ridge on fresh tasks, by number of training tasks."""
    bayes, ridge = (series(arrays["fresh"]["distance"][f"model_{who}"])[0] for who in ("bayes", "ridge"))
    return bayes / ridge


def excess(arrays: Arrays, where: str, least: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean risk of the transformer over that of the optimal estimator, and its standard error, by number of tasks."""
    (risk, error), (best, bar) = (series(arrays[where]["risk"][who]) for who in ("model", least))
    return risk / best, risk / best * np.hypot(error / risk, bar / best)


def draw_series(axes, found: tuple[np.ndarray, np.ndarray], config: Config, style: str, color: str, label: str) -> None:
    """Means over seeds with a band of two standard errors."""
    mean, error = found
    low = np.maximum(mean - 2 * error, mean / 10)
    axes.fill_between(config.tasks, low, mean + 2 * error, color=color, alpha=0.2, linewidth=0)
    axes.plot(config.tasks, mean, style, color=color, label=label)


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """On fresh tasks nearer to discrete Bayes with the fewest training tasks, to ridge with the most; and the nulls."""
    source = "Raventos et al., arXiv 2306.15063"
    ratios = nearness(arrays)
    risks = {name: series(arrays["fresh"]["risk"][name])[0] for name in (*RISKS, *NULLS)}
    few, many = config.tasks[0], config.tasks[-1]
    return [
        at_most(f"distance to discrete Bayes over that to ridge, {few} tasks", ratios[0], 0.5, source=source),
        at_most(f"distance to ridge over that to discrete Bayes, {many} tasks", 1 / ratios[-1], 1.0, source=source),
        at_least(
            "risk on shuffled labels over that of the model, most tasks",
            risks["shuffled"][-1] / risks["model"][-1],
            2.0,
            source="null",
        ),
        at_least(
            "risk of the untrained model over that of the trained one, most tasks",
            risks["untrained"][-1] / risks["model"][-1],
            2.0,
            source="null",
        ),
    ]


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """Distances on fresh tasks and risks on both kinds of tasks."""
    distances = Table("M", *DISTANCES.values(), title="Squared distance / d on fresh tasks")
    risks = Table("M", *(f"{where}, {label}" for where in TASKS for label in RISKS.values()), title="Risk / d")
    found = {name: series(arrays["fresh"]["distance"][name]) for name in DISTANCES}
    scored = [series(arrays[where]["risk"][who]) for where in TASKS for who in RISKS]
    for row, count in enumerate(config.tasks):
        distances.add_row(str(count), *(f"{m[row]:.4f} +- {e[row]:.4f}" for m, e in found.values()))
        risks.add_row(str(count), *(f"{mean[row]:.4f}" for mean, _ in scored))
    nulls = Table("null, fresh tasks, mean over M", "risk / d", title="Nulls")
    for name, label in NULLS.items():
        nulls.add_row(label, f"{series(arrays['fresh']['risk'][name])[0].mean():.4f}")
    return [distances, risks, nulls]


ANALYSIS = Analysis("icl-task-crossover", Config, compute, plot, tables, findings, __doc__, slow=True)

if __name__ == "__main__":
    ANALYSIS.main()
