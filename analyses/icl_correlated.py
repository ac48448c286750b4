"""Risk of one layer when examples, tasks and the query are correlated: attention, state-space layers, adaptation.

Attention against a state-space layer (H3) under drifting tasks, contexts retrieved by the query, inputs aligned with
the task, and low-rank adaptation to a new task covariance: exact risks beside layers trained on fresh prompts, and a
map of how far the published approximations are off.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from rich.progress import Progress
from rich.table import Table

from attnlab.analysis import Analysis, AnalysisConfig, Arrays
from attnlab.expectation import Expectation, equal

FORGETTING = (0.7, 0.9, 0.97)
ALIGNMENTS = np.linspace(0.0, 0.6, 25)
TRAINED_ALIGNMENTS = (0.0, 0.2, 0.4, 0.6)
LAWS = {"retrieval": "contexts retrieved by the query", "alignment": "inputs aligned with the task"}
READ_OFF = (0.1, 0.2, 0.3)
# Of every layer that is trained on prompts: drifting tasks, then the alignments of each law.
SETTINGS = [f"drift {rate}" for rate in FORGETTING] + [f"{law} {a}" for law in LAWS for a in TRAINED_ALIGNMENTS]


@dataclass(frozen=True)
class Config(AnalysisConfig):
    """Options of the analysis."""

    SMOKE: ClassVar = {"dimension": 3, "length": 4, "steps": 4, "batch": 8, "prompts": 32, "lengths": 3}

    dimension: int = 20
    """Dimension d of the inputs under retrieval and alignment."""
    length: int = 20
    """Context length N."""
    noise_variance: float = 0.1
    """Of the labels under drifting tasks and in adaptation."""
    steps: int = 1000
    """Steps of Adam with a cosine schedule, on fresh prompts."""
    batch: int = 256
    """Prompts a step."""
    learning_rate: float = 0.02
    """Of Adam at the start."""
    prompts: int = 10_000
    """Prompts on which trained layers are tested."""
    lengths: int = 12
    """Context lengths at which drifting tasks are drawn."""


def compute(config: Config, progress: Progress) -> Arrays:
    """Exact risks and trained layers for the three laws, adaptation by rank, errors of the approximations."""
    task = progress.add_task("laws", total=len(LAWS) + 3, status="")
    arrays = drifting(config)
    progress.advance(task)
    for name in LAWS:
        arrays |= correlated(name, config)
        progress.advance(task)
    arrays |= adaptation(config)
    progress.advance(task)
    arrays |= error_map(config)
    progress.advance(task)
    return arrays


def lengths_of(config: Config) -> np.ndarray:
    return np.unique(np.geomspace(2, 4 * config.length, config.lengths).astype(int))


def drifting(config: Config) -> Arrays:
    """Risks of both layers for tasks with correlation rate^|i - j|, d = 10: over lengths, and trained at one."""
    import jax
    import jax.numpy as jnp

    from attnlab.icl.correlated import state_space_risk, unweighted_risk
    from attnlab.icl.models import state_space_predict
    from attnlab.icl.tasks import drifting_prompts

    d, noise = 10, config.noise_variance
    lengths, curves = lengths_of(config), {}
    for rate in FORGETTING:
        rows = [[f(forgetting(rate, int(n)), d, noise) for f in (state_space_risk, unweighted_risk)] for n in lengths]
        curves[str(rate)] = np.array(rows, float)
    found = trained(
        jax.vmap(state_space_predict, (None, 0)),
        {"filter": jnp.full(config.length, 0.01), "preconditioner": jnp.eye(d)},
        lambda key, batch, rate: drifting_prompts(key, d, forgetting(rate, config.length), batch, noise),
        FORGETTING,
        config,
    )
    return {"lengths": lengths, "drifting": {"curves": curves, "trained": found}}


def forgetting(rate: float, length: int):
    """Correlations rate^|i - j| of N + 1 tasks."""
    import jax.numpy as jnp

    places = jnp.arange(length + 1.0)
    return rate ** jnp.abs(places[:, None] - places[None, :])


def trained(predict, start, draw, settings, config: Config) -> np.ndarray:
    """Risks on prompts with standard errors, (settings, 2), of models trained on fresh prompts.

    `draw(key, batch, setting)` draws prompts; all settings train side by side.
    """
    from dataclasses import replace

    import jax
    import jax.numpy as jnp
    import optax

    from attnlab.icl.diagnostics import estimate
    from attnlab.objectives import objective
    from attnlab.training import train

    def resample(key, risk):
        setting, _ = risk.inputs
        fresh = draw(key, config.batch, setting)
        return replace(risk, inputs=(setting, fresh), targets=fresh.target)

    def mean_square(found, wanted):
        return jnp.mean((found - wanted) ** 2)

    keys = jax.random.split(jax.random.key(config.seed), (2, len(settings)))
    settings = jnp.asarray(settings)
    many = jax.jit(jax.vmap(lambda key, setting: draw(key, config.prompts, setting)))
    first = jax.tree.map(lambda leaf: leaf[:, : config.batch], many(keys[0], settings))
    risks = jax.vmap(lambda *data: objective(lambda params, inputs: predict(params, inputs[1]), mean_square, *data))(
        (settings, first), first.target
    )
    starts = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], len(settings), axis=0), start)
    optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps))
    options = {"steps": config.steps, "every": config.steps, "resample": resample, "own_risks": True}
    params = train(risks, starts, optimizer, keys[0], **options).params
    test = many(keys[1], settings)
    errors = jax.jit(jax.vmap(predict))(params, test) - test.target
    return np.stack(jax.vmap(estimate)(errors**2), axis=1)


def correlated(name: str, config: Config) -> Arrays:
    """Exact and approximate risks over the alignment, and the whole layer trained at some."""
    import jax
    import jax.numpy as jnp

    from attnlab.icl import correlated as laws
    from attnlab.icl import tasks
    from attnlab.icl.models import layer_predict

    d, length = config.dimension, config.length
    exact, approximation = (getattr(laws, f"{name}_{kind}") for kind in ("moments", "risk_approximation"))
    draw = {"retrieval": tasks.retrieval_prompts, "alignment": tasks.aligned_prompts}[name]
    curves = [[exact(d, length, a).risk, approximation(d, length, a)] for a in ALIGNMENTS]
    start = {
        "value": jnp.zeros((1, d + 1)).at[0, -1].set(0.5),
        "query_key": jnp.pad(0.5 * jnp.eye(d), ((0, 1), (0, 0)))[None],
    }

    points = trained(
        jax.vmap(layer_predict, (None, 0)),
        start,
        lambda key, batch, alignment: draw(key, d, length, batch, alignment),
        TRAINED_ALIGNMENTS,
        config,
    )
    return {name: {"curves": np.array(curves), "trained": points}}


def adaptation(config: Config) -> Arrays:
    """Risk by rank of the update, from the preconditioner of an old task covariance; factors trained to each rank."""
    import jax
    import jax.numpy as jnp

    from attnlab.icl.optima import adapted_risks, optimal_preconditioner
    from attnlab.icl.tasks import linear_regression

    d, length = 8, config.length
    key = jax.random.key(config.seed)
    spectrum = jnp.arange(1.0, d + 1) ** -1.0
    basis, _ = jnp.linalg.qr(jax.random.normal(key, (d, d)))
    rotated = (basis * spectrum[None, :]) @ basis.T
    old_law, new_law = (
        linear_regression(jnp.eye(d), (omega + omega.T) / 2, noise_variance=config.noise_variance)
        for omega in (jnp.diag(spectrum), rotated)
    )
    old = optimal_preconditioner(old_law, length)
    exact = adapted_risks(new_law, length, old)
    found = trained_factors(new_law, length, old, config)
    return {"adapted": {"exact": exact, "trained": found}}


def trained_factors(problem, length: int, old, config: Config) -> np.ndarray:
    """Exact risks of old + U V^T for ranks 1 to d, trained by Adam on them side by side from U random, V = 0."""
    import jax
    import jax.numpy as jnp
    import optax

    from attnlab.icl.population import population_risk, reduced_weights
    from attnlab.objectives import objective
    from attnlab.training import train

    d = problem.dimension
    size = jnp.asarray(length, old.dtype)

    def adapted(factors, rank):
        # The other columns of the factors count for nothing.
        kept = jnp.where(jnp.arange(d, dtype=old.dtype) < rank, 1.0, 0.0)
        return reduced_weights({"preconditioner": old + (factors["left"] * kept[None, :]) @ factors["right"].T})

    def risk_of(rank):
        return objective(adapted, lambda effective, law: population_risk(effective, law, size), rank, problem)

    keys = jax.random.split(jax.random.key(config.seed), d)
    start = {"left": jax.random.normal(keys[0], (d, d, d)) / d**0.5, "right": jnp.zeros((d, d, d))}
    risks = jax.vmap(risk_of, out_axes=0)(jnp.arange(1.0, d + 1))
    optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps))
    end = train(risks, start, optimizer, keys, steps=config.steps, every=config.steps, own_risks=True).params
    return np.asarray(jax.jit(jax.vmap(lambda risk, factors: risk(factors)))(risks, end))


def error_map(config: Config) -> Arrays:
    """Relative errors of both approximations over the alignment and the dimension, N = d."""
    from attnlab.icl import correlated as laws

    dimensions = np.unique(np.geomspace(2, 100, 24).astype(int))

    def relative(name, d, n, a):
        exact, approximation = (getattr(laws, f"{name}_{kind}") for kind in ("moments", "risk_approximation"))
        return approximation(d, n, a) / exact(d, n, a).risk - 1

    errors = {name: [[relative(name, int(d), int(d), a) for a in ALIGNMENTS] for d in dimensions] for name in LAWS}
    read_off = {name: [relative(name, 20, 20, a) for a in READ_OFF] for name in LAWS}
    return {"dimensions": dimensions, "errors": errors, "read_off": read_off}


def plot(arrays: Arrays, config: Config):
    """Risks under drift, retrieval and alignment, and the error of the published approximation under alignment."""
    from attnlab.plotting.panels import panels

    exact, (risks, _) = exact_risks(config), trained_risks(arrays).T
    apart, worst = 100 * np.max(np.abs(risks / exact - 1)), 100 * arrays["read_off"]["alignment"][-1]
    size = f"$d = {config.dimension}$, $N = {config.length}$"
    figure, axes = panels(
        f"Layers trained on correlated prompts have the exact risks of theory within {apart:.1f} %;\n"
        f"the published approximation is off by {worst:.0f} % at alignment {READ_OFF[-1]:g}, $d = N = 20$",
        [
            "tasks that drift, $d = 10$",
            f"contexts retrieved by the query, {size}",
            f"inputs aligned with the task, {size}",
            "error of the approximation in (c), $N = d$",
        ],
        note=f"lines: theory; circles: trained layers (one seed) on {config.prompts} prompts, bars of two standard "
        "errors.\nAlignment: (b) correlation of inputs and query, (c) the inputs' mean, as a multiple of the task",
        height=2.9,
    )
    plot_drift(axes[0], arrays, config)
    for panel, name in zip(axes[1:], LAWS, strict=False):
        plot_law(panel, arrays, name)
    image = plot_errors(axes[3], arrays, "alignment")
    figure.colorbar(image, ax=axes[3], label="approximate / exact risk - 1 (%)")
    return figure


def details(arrays: Arrays, config: Config):
    """Low-rank adaptation, the error of the approximation under retrieval, and trained over exact risks."""
    from attnlab.plotting.panels import panels

    apart = 100 * np.max(np.abs(arrays["adapted"]["trained"] / arrays["adapted"]["exact"][1:] - 1))
    figure, axes = panels(
        f"Trained factors of every rank reach the least risk within {apart:.1g} %;\n"
        f"under retrieval the published approximation is off by {100 * arrays['read_off']['retrieval'][-1]:.1f} % "
        f"at alignment {READ_OFF[-1]:g}",
        [
            "low-rank adaptation to new tasks, $d = 8$",
            "error of the approximation under retrieval",
            "trained over exact risk",
        ],
        note=f"(a): exact risks, one seed; (c): {config.prompts} prompts, bars of two standard errors; settings: "
        "correlation\nof neighbouring tasks under drift, alignment under the other laws",
        height=2.9,
    )
    plot_adaptation(axes[0], arrays)
    image = plot_errors(axes[1], arrays, "retrieval")
    figure.colorbar(image, ax=axes[1], label="approximate / exact risk - 1 (%)")
    plot_trained(axes[2], arrays, config)
    return figure


def plot_drift(axes, arrays: Arrays, config: Config) -> None:
    for number, rate in enumerate(FORGETTING):
        weighed, unweighed = arrays["drifting"]["curves"][str(rate)].T
        axes.semilogx(arrays["lengths"], weighed, "-", color=f"C{number}", label=f"correlation ${rate}^{{|i-j|}}$")
        axes.semilogx(arrays["lengths"], unweighed, "--", color=f"C{number}")
    for number, (mean, error) in enumerate(arrays["drifting"]["trained"]):
        axes.errorbar(config.length, mean, 2 * error, label=None if number else "trained state-space layer", **MARKS)
    axes.plot([], [], "-", color="0.4", label="state-space layer")
    axes.plot([], [], "--", color="0.4", label="linear attention")
    ticks = arrays["lengths"][:: max(len(arrays["lengths"]) // 5, 1)]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel="context length $N$", ylabel="risk")
    low, high = axes.get_ylim()
    axes.set_ylim(bottom=low - 0.9 * (high - low))  # room for the legend under the curves
    axes.legend(loc="lower left", labelspacing=0.3)


MARKS = {"fmt": "o", "capsize": 2, "color": "black", "markerfacecolor": "none"}


def plot_law(axes, arrays: Arrays, name: str) -> None:
    exact, approximation = arrays[name]["curves"].T
    axes.plot(ALIGNMENTS, exact, color="C0", label="exact, one step")
    axes.plot(ALIGNMENTS, approximation, "--", color="C1", label="published approximation")
    mean, error = arrays[name]["trained"].T
    axes.errorbar(TRAINED_ALIGNMENTS, mean, 2 * error, label="trained layer", **MARKS)
    axes.set(xlabel=r"alignment $\alpha$", ylabel="risk")
    axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
    axes.legend(loc="upper right")


def plot_adaptation(axes, arrays: Arrays) -> None:
    exact = arrays["adapted"]["exact"]
    axes.semilogy(np.arange(len(exact) - 1), exact[:-1] - exact[-1], "k:", label="law of Eckart and Young")
    excess = arrays["adapted"]["trained"][:-1] - exact[-1]  # at full rank nothing is left
    axes.semilogy(np.arange(1, len(exact) - 1), excess, "s", color="C0", markerfacecolor="none", label="trained")
    axes.set(xlabel="rank of the update", ylabel="risk above the optimum")
    axes.legend(loc="lower left")


def plot_errors(axes, arrays: Arrays, name: str):
    errors = 100 * arrays["errors"][name]
    colors = {"vmin": -100, "vmax": 100, "cmap": "RdBu_r", "rasterized": True}
    image = axes.pcolormesh(ALIGNMENTS, arrays["dimensions"], errors, **colors)
    for alignment, value in zip(READ_OFF, 100 * arrays["read_off"][name], strict=True):
        axes.plot(alignment, 20, ".", color="black")
        axes.annotate(f"{value:.1f}", (alignment, 20), (0, 5), textcoords="offset points", ha="center", fontsize=8)
    axes.set(yscale="log", xlabel=r"alignment $\alpha$", ylabel="dimension $d = N$")
    axes.set_yticks([2, 5, 10, 20, 50, 100], ["2", "5", "10", "20", "50", "100"])
    axes.set_yticks([], minor=True)
    return image


def plot_trained(axes, arrays: Arrays, config: Config) -> None:
    """Risks of trained layers over the exact ones, by setting."""
    exact, (risks, errors) = exact_risks(config), trained_risks(arrays).T
    places = -np.arange(len(SETTINGS))
    axes.errorbar(risks / exact, places, xerr=2 * errors / exact, **MARKS)
    axes.axvline(1, color="black", linewidth=1, linestyle=":")
    axes.set_yticks(places, SETTINGS, fontsize=7.5)
    axes.set_xlabel("risk on prompts / exact risk")


def exact_risks(config: Config) -> np.ndarray:
    """Of the layers in the `SETTINGS`."""
    from attnlab.icl import correlated as laws

    drifts = [laws.state_space_risk(forgetting(rate, config.length), 10, config.noise_variance) for rate in FORGETTING]
    moments = (getattr(laws, f"{name}_moments") for name in LAWS)
    others = [each(config.dimension, config.length, a).risk for each in moments for a in TRAINED_ALIGNMENTS]
    return np.array([*drifts, *others], float)


def trained_risks(arrays: Arrays) -> np.ndarray:
    """The risks that these layers came to, with standard errors, (layers, 2)."""
    return np.concatenate([arrays[name]["trained"] for name in ("drifting", *LAWS)])


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """Trained layers come to the exact risks, factors to the least ones; the errors of the published approximation."""
    source = "the laws are those of Li, Rawat, Oymak, arXiv 2407.10005; exact risks derived here"
    exact, (risks, errors) = exact_risks(config), trained_risks(arrays).T
    ranks = arrays["adapted"]["trained"] / arrays["adapted"]["exact"][1:]
    bars, near = np.hypot(errors / exact, 0.005), "a sample of prompts, and 0.5 % for what training leaves"
    read_off, digits = [-0.0203, -0.1072, -0.3143], "to the digits given"
    return [
        equal("trained over exact risk", risks / exact, 1.0, 4.5, standard_error=bars, because=near, source=source),
        equal("trained over least risk, by rank", ranks, 1.0, 0.01, because="what training leaves", source=source),
        equal("error under alignment", arrays["read_off"]["alignment"], read_off, 1e-4, because=digits, source=source),
    ]


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """Trained layers beside theory, and the errors of the approximations at d = N = 20."""
    points = Table("law", "exact", "trained, on prompts", title="Layers trained on fresh prompts")
    for name, exact, (mean, error) in zip(SETTINGS, exact_risks(config), trained_risks(arrays), strict=True):
        points.add_row(name, f"{exact:.4g}", f"{mean:.4g} +- {error:.2g}")
    for rank, value in enumerate(arrays["adapted"]["trained"], 1):
        points.add_row(f"adapted, rank {rank}", f"{arrays['adapted']['exact'][rank]:.6g}", f"{value:.6g}")
    errors = Table("alignment", *LAWS, title="Error of the published approximations, d = N = 20 (%)")
    for number, alignment in enumerate(READ_OFF):
        errors.add_row(str(alignment), *(f"{100 * arrays['read_off'][name][number]:+.1f}" for name in LAWS))
    return [points, errors]


ANALYSIS = Analysis("icl-correlated", Config, compute, plot, tables, findings, __doc__, slow=True, details=details)

if __name__ == "__main__":
    ANALYSIS.main()
