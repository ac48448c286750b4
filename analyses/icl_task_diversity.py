"""How many tasks one layer needs: the best preconditioner for M of them has the risk 1 - M/d, a whole layer more.

On fresh tasks the preconditioner that is best for M training tasks follows the law, and so does one trained on them
from zero. A whole layer trained from a small random start fits the same tasks as well, but does not follow the law:
with up to d / 2 tasks it errs by more on fresh ones than predicting zero would. The preconditioner fitted to n sampled
prompts has a risk that peaks where n reaches the number d^2 of its entries.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from rich.progress import Progress
from rich.table import Table

from attnlab.analysis import Analysis, AnalysisConfig, Arrays
from attnlab.expectation import Expectation, at_least, between, equal

MODELS = {"reduced": "preconditioner, trained from zero", "full": "whole layer, from a small random start"}
# Up to so many tasks over the dimension the law holds; beyond, the condition number of M random tasks counts.
FEW = 0.75


@dataclass(frozen=True)
class Config(AnalysisConfig):
    """Options of the analysis."""

    SMOKE: ClassVar = {
        "dimension": 3,
        "lengths": (20,),
        "draws": 3,
        "trained": (1, 4),
        "steps": 20,
        "dimensions": (2,),
        "fits": 3,
        "ratios": 4,
    }

    dimension: int = 8
    """Dimension d of inputs and tasks."""
    lengths: tuple[int, ...] = (20, 100, 1000)
    """Context lengths N of the curves in M/d."""
    draws: int = 200
    """Random sets of tasks for each number of tasks."""
    trained: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Numbers of tasks at which layers are trained, at the longest context; each divides the largest."""
    seeds: int = 16
    """Layers trained for each number of tasks, each on tasks of its own."""
    steps: int = 3000
    """Steps of Adam on the exact risk of the training tasks, with a cosine schedule."""
    learning_rate: float = 0.01
    """Of Adam at the start."""
    dimensions: tuple[int, ...] = (4, 6, 8)
    """Dimensions of the fits to sampled prompts; contexts hold 4 d examples."""
    fits: int = 40
    """Fits for each number of prompts."""
    ratios: int = 15
    """Numbers of prompts n between d^2 / 4 and 4 d^2."""


def compute(config: Config, progress: Progress) -> Arrays:
    """Risks over the number of tasks, trained layers, and risks of fits over the number of prompts."""
    task = progress.add_task("task diversity", total=2 + len(config.dimensions), status="")
    arrays = diversity(config)
    progress.advance(task)
    arrays |= trained_on_tasks(config)
    progress.advance(task)
    arrays["fits"] = {}
    for dimension in config.dimensions:
        arrays["fits"][str(dimension)] = fitted_risks(dimension, config)
        progress.advance(task)
    return arrays


def counts_of(config: Config) -> np.ndarray:
    return np.arange(1, 2 * config.dimension + 1)


def diversity(config: Config) -> Arrays:
    """Risk on fresh tasks over d, means and standard errors over random sets of tasks, (lengths, numbers, 2)."""
    import jax
    import jax.numpy as jnp

    from attnlab.icl.diagnostics import estimate
    from attnlab.icl.optima import optimal_risk, task_diversity_risk
    from attnlab.icl.tasks import isotropic

    d, largest = config.dimension, 2 * config.dimension
    problem = isotropic(d)

    def risk(key, count, length):
        # M tasks as `largest` rows of the same second moment, all that counts here: one shape for every M
        kept = jnp.where(jnp.arange(largest) < count, jnp.sqrt(largest / count), 0.0)
        return task_diversity_risk(problem, kept[:, None] * jax.random.normal(key, (largest, d)), length) / d

    @jax.jit
    def row(count, length):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), count), config.draws)
        return estimate(jax.vmap(risk, (0, None, None))(keys, count, length))

    lengths = jnp.array([float(n) for n in config.lengths])
    found = [[np.stack(row(count, length)) for count in counts_of(config)] for length in lengths]
    return {"diversity": np.array(found), "least": np.array([float(optimal_risk(problem, n)) / d for n in lengths])}


def trained_on_tasks(config: Config) -> Arrays:
    """Risks over d of models trained on M tasks, (numbers, seeds), for both `MODELS`: on fresh tasks, and on theirs."""
    import jax
    import jax.numpy as jnp
    import optax

    from attnlab.icl.models import init_effective
    from attnlab.icl.population import population_objective
    from attnlab.icl.tasks import isotropic, with_tasks
    from attnlab.training import train

    d, length, largest = config.dimension, max(config.lengths), max(config.trained)
    fresh = isotropic(d)
    keys = jax.random.split(jax.random.key(config.seed), (len(config.trained), config.seeds)).ravel()
    counts = jnp.repeat(jnp.array(config.trained), config.seeds)

    def tasks_of(key, count):
        # repeated to the largest number: the same law, and one shape for all
        return jax.random.normal(key, (largest, d))[jnp.arange(largest) % count]

    starts = {
        "reduced": {"preconditioner": jnp.zeros((len(keys), d, d))},
        "full": jax.jit(jax.vmap(lambda key: init_effective(key, d, 0.1)))(keys),
    }
    optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps))
    risks: Arrays = {"trained": {}, "own": {}}
    for name, start in starts.items():
        kind = "reduced" if name == "reduced" else "merged"
        build = jax.jit(
            jax.vmap(
                lambda key, count, kind=kind: population_objective(
                    with_tasks(fresh, tasks_of(key, count)), length, kind
                )
            )
        )
        options = {"steps": config.steps, "every": config.steps, "own_risks": True}
        objectives = build(keys, counts)
        params = train(objectives, start, optimizer, keys, **options).params
        tested = jax.jit(jax.vmap(population_objective(fresh, length, kind)))(params) / d
        own = jax.jit(jax.vmap(lambda risk, params: risk(params)))(objectives, params) / d
        for where, found in (("trained", tested), ("own", own)):
            risks[where][name] = np.reshape(found, (-1, config.seeds))
    return risks


def fit_sizes(dimension: int, config: Config) -> np.ndarray:
    return np.unique(np.round(dimension**2 * np.geomspace(0.25, 4, config.ratios)).astype(int))


def fitted_risks(dimension: int, config: Config) -> np.ndarray:
    """Exact risks over d of preconditioners fitted to n prompts, (numbers, fits)."""
    import jax
    import jax.numpy as jnp

    from attnlab.icl.optima import fit_preconditioner, reduced_risk
    from attnlab.icl.tasks import Prompt, isotropic, sample_prompts

    problem, length = isotropic(dimension), 4 * dimension
    sizes = fit_sizes(dimension, config)

    @jax.jit
    @jax.vmap
    def risks(key):
        prompts = sample_prompts(key, problem, length, int(sizes[-1]))

        def risk(size):
            # prompts beyond the first n count for nothing in the fit of least norm
            kept = jnp.where(jnp.arange(sizes[-1]) < size, 1.0, 0.0)
            labels, target = kept[:, None] * prompts.labels, kept * prompts.target
            return reduced_risk(
                fit_preconditioner(Prompt(prompts.inputs, labels, prompts.query, target)), problem, length
            )

        return jax.lax.map(risk, jnp.asarray(sizes)) / dimension

    return np.asarray(risks(jax.random.split(jax.random.key(config.seed), config.fits))).T


def plot(arrays: Arrays, config: Config):
    """The law in M/d, the trained layers against it, on fresh tasks and on theirs, and the double descent."""
    from attnlab.plotting.panels import panels

    longest = max(config.lengths)
    figure, axes = panels(
        message(arrays, config),
        [
            "best preconditioner for $M$ tasks",
            f"trained on $M$ tasks: fresh tasks ($N = {longest}$)",
            f"the same, on the $M$ training tasks ($N = {longest}$)",
            "preconditioner fitted to $n$ prompts ($N = 4d$)",
        ],
        note=f"$d = {config.dimension}$ in (a) to (c). (a): means with two standard errors over {config.draws} sets "
        f"of tasks. (b), (c): median and range\nover {config.seeds} sets of tasks and starts. "
        f"(d): median and middle half of {config.fits} fits",
        height=3.0,
    )
    plot_best(axes[0], arrays, config)
    plot_trained(axes[1], arrays, config)
    plot_own(axes[2], arrays, config)
    plot_fits(axes[3], arrays, config)
    return figure


def message(arrays: Arrays, config: Config) -> str:
    """How near the best preconditioner comes to the law, and how far above it whole layers are."""
    ratios = counts_of(config) / config.dimension
    longest, few = int(np.argmax(config.lengths)), ratios <= FEW
    apart = np.max(np.abs(arrays["diversity"][longest, few, 0] - (1 - ratios[few])))
    above = above_law(arrays, config)
    verdict = "is above it" if above.min() > 1 else "is not always above it"
    return (
        f"The best preconditioner for $M$ tasks has the risk $1 - M/d$ within {apart:.2g} ($M \\leq {FEW:g}\\,d$);\n"
        f"a whole layer trained on them {verdict}: {above.min():.2g} to {above.max():.2g} times (medians)"
    )


def above_law(arrays: Arrays, config: Config) -> np.ndarray:
    """Median risk of trained whole layers on fresh tasks over the law, for the numbers of tasks where the law holds."""
    ratios = np.array(config.trained) / config.dimension
    few = ratios <= FEW
    return np.median(arrays["trained"]["full"], axis=1)[few] / (1 - ratios[few])


def plot_best(axes, arrays: Arrays, config: Config) -> None:
    ratios = counts_of(config) / config.dimension
    for number, length in enumerate(config.lengths):
        mean, error = arrays["diversity"][number].T
        style = {"fmt": "o^s"[number % 3] + "-", "color": f"C{number}", "markersize": 3.5}
        axes.errorbar(ratios, mean, 2 * error, label=f"$N = {length}$", **style)
        label = "same $N$, all tasks" if number == 0 else None
        axes.axhline(arrays["least"][number], color=f"C{number}", linewidth=1, linestyle=":", label=label)
    plot_law(axes, "law, $N \\to \\infty$: $(1 - M/d)_+$")
    axes.set(ylabel="risk on fresh tasks / $d$", ylim=(-0.03, 1.03))
    axes.legend(loc="upper right")


def plot_law(axes, label: str) -> None:
    ratios = np.array([0, 1, 2])
    axes.plot(ratios, np.maximum(1 - ratios, 0), "--", color="black", linewidth=1, label=label, zorder=1)
    axes.set(xlabel="training tasks $M$ / dimension $d$", xlim=(0, 2.1))


STYLES = {"reduced": ("C0", "o", 0.985), "full": ("C1", "s", 1.015)}


def median_and_range(axes, places, risks, name: str) -> None:
    """Medians over the seeds with bars from the least to the largest."""
    color, marker, shift = STYLES[name]
    middle = np.median(risks, axis=1)
    bars = middle - risks.min(axis=1), risks.max(axis=1) - middle
    axes.errorbar(places * shift, middle, bars, fmt=marker + "-", color=color, capsize=2, label=MODELS[name])


def plot_trained(axes, arrays: Arrays, config: Config) -> None:
    places = np.array(config.trained) / config.dimension
    for name in MODELS:
        median_and_range(axes, places, arrays["trained"][name], name)
    plot_law(axes, "law, $(1 - M/d)_+$")
    axes.axhline(1, color="0.4", linewidth=1, linestyle=":", label="predicting zero")
    axes.set(ylabel="risk on fresh tasks / $d$")
    axes.set_ylim(-0.1, 1.6 * max(arrays["trained"][name].max() for name in MODELS))  # room for the legend
    axes.legend(loc="upper right")


def plot_own(axes, arrays: Arrays, config: Config) -> None:
    places = np.array(config.trained) / config.dimension
    for name in MODELS:
        median_and_range(axes, places, arrays["own"][name], name)
    axes.set(xlabel="training tasks $M$ / dimension $d$", ylabel="risk on the training tasks / $d$", yscale="log")
    axes.set_xlim(0, 2.1)
    axes.legend(loc="best")


def plot_fits(axes, arrays: Arrays, config: Config) -> None:
    for number, dimension in enumerate(config.dimensions):
        ratios = fit_sizes(dimension, config) / dimension**2
        low, middle, high = np.quantile(arrays["fits"][str(dimension)], (0.25, 0.5, 0.75), axis=1)
        axes.fill_between(ratios, low, high, color=f"C{number}", alpha=0.2, linewidth=0)
        style = "o^s"[number % 3] + ("-", "--", "-.")[number % 3]
        axes.loglog(ratios, middle, style, color=f"C{number}", markersize=3.5, label=f"$d = {dimension}$")
    axes.axvline(1, color="black", linewidth=1, linestyle=":", label="$n = d^2$")
    ticks = (0.25, 0.5, 1, 2, 4)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axes.set(xlabel="prompts $n$ / $d^2$", ylabel="risk on fresh prompts / $d$")
    axes.legend(loc="upper left")


def peaks(arrays: Arrays, config: Config) -> list[float]:
    """Number of prompts at which the median risk of the fits is the highest, over d^2, by dimension."""
    medians = {dim: np.median(arrays["fits"][str(dim)], axis=1) for dim in config.dimensions}
    return [float(fit_sizes(dim, config)[np.argmax(median)] / dim**2) for dim, median in medians.items()]


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """The law in M / d at the longest context, layers trained on M tasks, and where the risk of the fits peaks."""
    ratios, trained = counts_of(config) / config.dimension, np.array(config.trained) / config.dimension
    longest = int(np.argmax(config.lengths))
    law, learned = (np.maximum(1 - x, 0) for x in (ratios, trained))
    source, why = "the best preconditioner acts on the span of the tasks; derived here", "of order d / N"
    few = ratios <= FEW
    mean = arrays["diversity"][longest, few, 0]
    return [
        equal(
            "risk over d, by M up to 3 d / 4",
            mean,
            law[few],
            0.06,
            because=why,
            source=source,
        ),
        equal(
            "risk over d of preconditioners trained on M tasks, median",
            np.median(arrays["trained"]["reduced"], axis=1)[trained <= FEW],
            learned[trained <= FEW],
            0.15,
            because=f"of order d / N, and {config.seeds} random sets of tasks",
            source=source,
        ),
        at_least(
            "risk of whole layers over the law, median, by M up to 3 d / 4",
            above_law(arrays, config),
            1.0,
            source="nothing is learned along directions that no task has; derived here",
        ),
        between(
            "prompts at the highest risk over d^2, by dimension",
            peaks(arrays, config),
            0.7,
            1.4,
            because="neighbouring sizes",
            source="double descent; derived here",
        ),
    ]


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """The law at the longest context beside what was found, and where the risk of the fits peaks."""
    law = Table("M", "1 - M/d", *(f"N = {n}" for n in config.lengths), title="Risk on fresh tasks / d")
    for number, count in enumerate(counts_of(config)):
        found = (f"{m:.4f} +- {e:.4f}" for m, e in arrays["diversity"][:, number])
        law.add_row(str(count), f"{max(1 - count / config.dimension, 0):.3f}", *found)
    trained = Table("M", *MODELS.values(), title="Trained on M tasks: risk on fresh tasks / d, range over seeds")
    for number, count in enumerate(config.trained):
        rows = (arrays["trained"][name][number] for name in MODELS)
        trained.add_row(str(count), *(f"{row.min():.4f} to {row.max():.4f}" for row in rows))
    peaks = Table("d", "d^2", "n of the highest median", "risk / d there", "at 4 d^2", title="Double descent")
    for dimension in config.dimensions:
        median = np.median(arrays["fits"][str(dimension)], axis=1)
        peak = fit_sizes(dimension, config)[np.argmax(median)]
        peaks.add_row(*map(str, (dimension, dimension**2, peak)), f"{median.max():.3g}", f"{median[-1]:.3g}")
    return [law, trained, peaks]


ANALYSIS = Analysis("icl-task-diversity", Config, compute, plot, tables, findings, __doc__, slow=True)

if __name__ == "__main__":
    ANALYSIS.main()
