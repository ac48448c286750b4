"""How long one layer takes to learn: a logistic curve with merged keys and queries, a staircase with separate ones.

Gradient descent with a small step on the exact risk, beside the closed forms of gradient flow: the growth from small
balanced starts, the plateaus at the best preconditioners of every rank, and when each direction is learned.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from rich.progress import Progress
from rich.table import Table

from attnlab.analysis import Analysis, AnalysisConfig, Arrays
from attnlab.expectation import Expectation, at_most, equal

SPECTRUM = (4.0, 2.0, 1.0, 0.5)


@dataclass(frozen=True)
class Config(AnalysisConfig):
    """Options of the analysis."""

    SMOKE: ClassVar = {"starts": (0.3,), "merged_starts": (0.1,), "time": 2.0, "merged_time": 0.5}

    length: int = 31
    """Context length N."""
    starts: tuple[float, ...] = (0.3, 0.2, 0.1, 0.05)
    """Balanced starts value = |key| = |query| of the heads along every eigenvector."""
    merged_starts: tuple[float, ...] = (0.3, 0.1, 0.03, 0.01)
    """Balanced starts value = |query-key| of the merged layer."""
    time: float = 100.0
    """Time of the staircase: steps times learning rate."""
    merged_time: float = 2.0
    """Time of the merged layer."""
    learning_rate: float = 5e-4
    """Step of gradient descent."""
    every: int = 10
    """Steps between two measurements."""


def compute(config: Config, progress: Progress) -> Arrays:
    """Descend from every start, side by side, for both parametrisations."""
    task = progress.add_task("descents", total=2, status="")
    arrays = merged(config)
    progress.advance(task)
    arrays |= staircase(config)
    progress.advance(task)
    return arrays


def problem():
    """Inputs with the spectrum above, tasks N(0, I), no noise."""
    import jax.numpy as jnp

    from attnlab.icl.tasks import linear_regression

    return linear_regression(jnp.diag(jnp.array(SPECTRUM)))


def descend(risk, starts, time: float, config: Config):
    """Records of gradient descent from a stack of starts: times (r,), exact risks and parameters (r, starts, ...)."""
    import jax
    import optax

    from attnlab.training import probe, train

    count = len(jax.tree.leaves(starts)[0])
    intervals = round(time / config.learning_rate / config.every)
    keys = jax.random.split(jax.random.key(config.seed), count)
    probes = {"risk": probe(lambda risk, params: risk(params)), "params": probe(lambda risk, params: params)}
    options = {"steps": intervals * config.every, "every": config.every, "probes": probes}
    records = train(risk, starts, optax.sgd(config.learning_rate), keys, **options).records
    return np.asarray(records.steps) * config.learning_rate, records.values


def merged(config: Config) -> Arrays:
    """g(t) of the whole layer for isotropic d = 4 inputs, measured and in theory, (starts, r)."""
    import jax.numpy as jnp

    from attnlab.icl.population import population_objective
    from attnlab.icl.tasks import isotropic
    from attnlab.icl.training_time import merged_growth

    d, sizes = 4, jnp.array(config.merged_starts)
    value = jnp.zeros((len(sizes), 1, d + 1)).at[:, 0, -1].set(sizes)
    query_key = jnp.zeros((len(sizes), 1, d + 1, d)).at[:, 0, :d].set(sizes[:, None, None] / d**0.5 * jnp.eye(d)[None])
    risk = population_objective(isotropic(d), config.length)
    times, values = descend(risk, {"value": value, "query_key": query_key}, config.merged_time, config)
    params = values["params"]
    growth = params["value"][:, :, 0, -1] * params["query_key"][:, :, 0, 0, 0]
    theory = [merged_growth(jnp.asarray(times), size**2 / d**0.5, d, config.length) for size in config.merged_starts]
    return {"merged": {"times": times, "growth": growth.T, "theory": theory}}


def staircase(config: Config) -> Arrays:
    """Risks and steps along every eigenvector for aligned heads, plateaus, and times of half the way."""
    import jax.numpy as jnp

    from attnlab.icl.optima import adapted_risks
    from attnlab.icl.population import population_objective
    from attnlab.icl.training_time import direction_forces, staircase_times

    law, sizes = problem(), jnp.array(config.starts)
    d = law.dimension
    vectors = sizes[:, None, None] * jnp.eye(d)[None]
    start = {"value": sizes[:, None] * jnp.ones((1, d)), "key": vectors, "query": vectors}
    times, values = descend(population_objective(law, config.length, "rank_one"), start, config.time, config)
    gain, curvature = direction_forces(law, config.length)
    halves = 0.5 * gain / curvature
    theory = [
        [float(staircase_times(half, size**3, a, c)) for half, a, c in zip(halves, gain, curvature, strict=True)]
        for size in config.starts
    ]
    levels = np.asarray(values["params"]["value"]) ** 3  # (r, starts, d)
    shown = np.unique(np.geomspace(1, len(times) - 1, 300).astype(int))
    return {
        "times": times[shown],
        "risks": np.asarray(values["risk"])[shown],
        "plateaus": np.asarray(adapted_risks(law, config.length)),
        "half_times": {
            "measured": [[crossing(times, levels[:, s, m], halves[m]) for m in range(d)] for s in range(len(sizes))],
            "theory": theory,
        },
    }


def crossing(times, levels, wanted) -> float:
    """When ascending levels pass the wanted one, by linear interpolation; NaN if they never do."""
    after = int(np.searchsorted(levels, float(wanted)))
    if not 0 < after < len(levels):
        return float("nan")
    low, high = levels[after - 1], levels[after]
    return float(times[after - 1] + (times[after] - times[after - 1]) * (float(wanted) - low) / (high - low))


def plot(arrays: Arrays, config: Config):
    """Logistic growth, the staircase of risks, the times of its steps, and how near these are to the closed forms."""
    from attnlab.plotting.panels import panels

    measured, theory = (arrays["half_times"][name] for name in ("measured", "theory"))
    apart = 100 * np.nanmax(np.abs(measured / theory - 1))
    rows = np.isfinite(measured).all(axis=1)
    last = int(np.flatnonzero(rows)[-1]) if rows.any() else 0
    figure, axes = panels(
        "With separate keys and queries a layer learns direction after direction, at the times of a closed\n"
        f"form within {apart:.1g} %: {measured[last, 0]:.2g} for the strongest input, {measured[last, -1]:.2g} for the "
        f"weakest, from a start of {config.starts[last]:g}",
        [
            "separate keys and queries: a staircase",
            "when each direction is learned",
            "merged keys and queries: logistic growth",
            "times beyond those of the closed form",
        ],
        note="lines in (a) and marks: gradient descent on the exact risk; other lines: closed forms of gradient flow.\n"
        "All is deterministic. Time: steps × learning rate; start: common size of the first weights. $d = 4$, "
        f"$N = {config.length}$;\n(a), (b), (d): inputs of spectrum ({', '.join(f'{value:g}' for value in SPECTRUM)}), "
        "(c): isotropic",
        height=2.9,
    )
    plot_staircase(axes[0], arrays, config)
    plot_times(axes[1], arrays, config)
    plot_growth(axes[2], arrays, config)
    plot_ratios(axes[3], arrays, config)
    return figure


LINES = ("-", "--", "-.", (0, (4, 1, 1, 1, 1, 1)))


def plot_growth(axes, arrays: Arrays, config: Config) -> None:
    times = arrays["merged"]["times"]
    every = slice(None, None, max(len(times) // 25, 1))
    for number, size in enumerate(config.merged_starts):
        color, marker = f"C{number % 7}", "os^v"[number % 4]
        axes.plot(times, arrays["merged"]["theory"][number], color=color, linewidth=1)
        found = arrays["merged"]["growth"][number][every]
        axes.plot(times[every], found, marker, color=color, markerfacecolor="none", label=f"start {size:g}")
    axes.set(xlabel="time $t$", ylabel="step size $g(t)$ of the layer")
    axes.legend(loc="upper left")
    axes.set_ylim(top=1.35 * arrays["merged"]["theory"].max())  # room for the legend


def plot_staircase(axes, arrays: Arrays, config: Config) -> None:
    for number, size in enumerate(config.starts):
        style = {"color": f"C{number % 7}", "linestyle": LINES[number % 4], "label": f"start {size:g}"}
        axes.loglog(arrays["times"], arrays["risks"][:, number], **style)
    for rank, plateau in enumerate(arrays["plateaus"]):
        label = f"best of rank 0 to {len(SPECTRUM)}" if rank == 0 else None
        axes.axhline(plateau, color="black", linewidth=1, linestyle=":", label=label, zorder=0)
    axes.set(xlabel="time $t$", ylabel="exact risk")
    axes.set_ylim(0.3 * arrays["plateaus"][-1])  # room for the legend
    axes.set_yticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axes.set_yticks([], minor=True)
    axes.legend(loc="lower left", ncols=2, columnspacing=1.0)


def plot_times(axes, arrays: Arrays, config: Config) -> None:
    starts = np.array(config.starts)
    for number, eigenvalue in enumerate(SPECTRUM):
        theory, found = (arrays["half_times"][kind][:, number] for kind in ("theory", "measured"))
        axes.loglog(starts, theory, color=f"C{number}", linewidth=1)
        style = {"color": f"C{number}", "markerfacecolor": "none", "label": rf"eigenvalue {eigenvalue:g}"}
        axes.loglog(starts, found, "os^v"[number], **style)
    size_ticks(axes, starts)
    axes.set(ylabel="time until half of it is learned")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.45)  # room for the legend
    axes.legend(loc="upper right", ncols=2, columnspacing=1.0)


def size_ticks(axes, sizes: np.ndarray) -> None:
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("start (common size of the first weights)")


def plot_ratios(axes, arrays: Arrays, config: Config) -> None:
    """Measured times over those of the closed form, side by side for the eigenvalues; what the step size leaves."""
    ratios = arrays["half_times"]["measured"] / arrays["half_times"]["theory"]
    starts = np.array(config.starts)
    for number, eigenvalue in enumerate(SPECTRUM):
        style = {"color": f"C{number}", "markerfacecolor": "none", "label": rf"eigenvalue {eigenvalue:g}"}
        places = starts * 1.05 ** (number - 1.5)
        axes.semilogx(places, 100 * (ratios[:, number] - 1), "os^v"[number], **style)
    axes.axhline(0, color="black", linewidth=1, linestyle=":", label="closed form")
    size_ticks(axes, starts)
    axes.set_ylabel("beyond the closed form (%)")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.4 * (high - low))  # room for the legend
    axes.legend(loc="upper right", ncols=2, columnspacing=1.0)


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """Descent with a small step on the logistic curve, and the times of the staircase."""
    source, step = "Zhang, Singh, Latham, Saxe, arXiv 2501.16265", "descent with a small step in place of the flow"
    growth, theory = arrays["merged"]["growth"], arrays["merged"]["theory"]
    measured, times = (arrays["half_times"][name] for name in ("measured", "theory"))
    reached = np.isfinite(measured)
    what = "time to half of a step over that of the closed form, where it is reached"
    end = arrays["risks"][-1] / arrays["plateaus"][-1]
    return [
        equal("g(t) of the merged layer", growth, theory, 0.01, unit="relative", because=step, source=source),
        equal(what, measured[reached] / times[reached], 1.0, 0.01, because=step, source=source),
        at_most(
            "risk at the end over the last plateau, by start", end, 1.05, because="what time leaves", source=source
        ),
    ]


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """Plateaus, and measured times beside the closed form."""
    plateaus = Table("rank", "risk", title="Plateaus of the staircase")
    for rank, value in enumerate(arrays["plateaus"]):
        plateaus.add_row(str(rank), f"{value:.4f}")
    times = Table("start", *(f"eigenvalue {value:g}" for value in SPECTRUM), title="Half times: descent (closed form)")
    for size, found, theory in zip(config.starts, *arrays["half_times"].values(), strict=True):
        times.add_row(f"{size:g}", *(f"{t:.3f} ({e:.3f})" for t, e in zip(found, theory, strict=True)))
    apart = np.abs(arrays["merged"]["growth"] - arrays["merged"]["theory"]).max()
    growth = Table("merged layer: largest distance from the logistic curve", title="Growth")
    growth.add_row(f"{apart:.2e}")
    return [plateaus, times, growth]


ANALYSIS = Analysis("icl-training-time", Config, compute, plot, tables, findings, __doc__, slow=True)

if __name__ == "__main__":
    ANALYSIS.main()
