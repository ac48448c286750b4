"""What approximations of attention do to its curvature: relative errors of output, gradient and Hessian, by budget.

Five approximations of one softmax head on random data, from cheap to nearly exact; the Hessian is exact and dense. Is
an approximation that is good enough for the outputs good enough for curvature?
"""

import itertools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from rich.progress import Progress
from rich.table import Table

from attnlab.analysis import Analysis, AnalysisConfig, Arrays
from attnlab.expectation import Expectation, at_least, equal

QUANTITIES = ("output", "gradient", "curvature", "score_curvature")


@dataclass(frozen=True)
class Config(AnalysisConfig):
    """Options of the analysis."""

    SMOKE: ClassVar = {"tokens": 8, "seeds": 1, "fractions": (0.5,), "features": (32,)}

    tokens: int = 32
    """Tokens L of a sequence."""
    sequences: int = 4
    """Sequences."""
    width: int = 6
    """Width D of the tokens."""
    key_dim: int = 4
    """Width of queries and keys."""
    seeds: int = 20
    """Random heads and data."""
    fractions: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Share of the tokens that landmarks, projections, top-k and windows keep."""
    features: tuple[int, ...] = (64, 512, 4096)
    """Numbers of random features."""


def builders(config: Config) -> dict[str, list]:
    """For each approximation its budgets: functions of a key that build it."""
    from attnlab.approximation.approximate import low_rank, nystrom, random_features, sliding_window, top_k

    scale, length = config.key_dim**-0.5, config.tokens
    kept = [max(int(fraction * length), 1) for fraction in config.fractions]
    landmarks = [count for count in (length // 8, length // 4, length // 2) if count][: len(kept)]
    return {
        "random features": [lambda key, m=m: random_features(key, config.key_dim, m, scale) for m in config.features],
        "Nyström": [lambda key, m=m: nystrom(m, scale) for m in landmarks],
        "low rank": [lambda key, m=m: low_rank(key, length, m, scale) for m in kept],
        "top-k": [lambda key, m=m: top_k(m, scale) for m in kept],
        "sliding window": [lambda key, m=m: sliding_window(m, scale) for m in kept],
    }


def compute(config: Config, progress: Progress) -> Arrays:
    """Errors of every approximation, (budgets, seeds, quantities)."""
    import jax

    from attnlab.approximation.approximate import exact
    from attnlab.approximation.errors import approximation_errors, head_params

    table = builders(config)
    reference = exact(config.key_dim**-0.5)
    task = progress.add_task("heads", total=sum(map(len, table.values())) * config.seeds, status="")
    arrays: Arrays = {}
    for name, budgets in table.items():
        rows = np.zeros((len(budgets), config.seeds, len(QUANTITIES)))
        for row, build in enumerate(budgets):
            for seed in range(config.seeds):
                keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), seed), 4)
                tokens = jax.random.normal(keys[0], (config.sequences, config.tokens, config.width))
                targets = jax.random.normal(keys[1], (config.sequences, config.tokens, 3))
                params = head_params(keys[2], config.width, config.key_dim, 3)
                rows[row, seed] = approximation_errors(build(keys[3]), reference, params, tokens, targets)
                progress.update(task, advance=1, status=name)
        arrays[name] = rows
    return arrays


def plot(arrays: Arrays, config: Config):
    """Errors of gradient, Hessian and its score block against that of the output, and their ratio."""
    from attnlab.plotting.panels import legend_below, panels

    ratios = {name: excess(rows) for name, rows in arrays.items()}
    most = max(ratios, key=lambda name: np.median(ratios[name]))
    times = float(f"{np.median(ratios[most]):.2g}")
    message = f"{most} attention loses {times:,.0f} times as much score curvature as output"
    titles = ("gradient", "whole Hessian", "score block of the Hessian", "score curvature over output")
    note = f"marks: medians over {config.seeds} heads, bars: quartiles; arrows: towards the larger budget"
    figure, axes = panels(message, titles, note=note)
    for panel, quantity in zip(axes[:3], (1, 2, 3), strict=True):
        plot_errors(panel, arrays, quantity)
    plot_excess(axes[3], ratios)
    legend_below(figure, axes[0], columns=3)
    return figure


MARKERS = "osD^v"


def plot_errors(axes, arrays: Arrays, quantity: int) -> None:
    """One error against that of the output: a mark for each budget, joined by arrows, and the line of equal errors."""
    from attnlab.plotting.panels import log_ticks

    for number, (name, rows) in enumerate(arrays.items()):
        low, middle, high = (np.quantile(rows[..., (0, quantity)], level, axis=1) for level in (0.25, 0.5, 0.75))
        bars = np.stack([middle - low, high - middle])
        color, look = f"C{number}", {"fmt": MARKERS[number], "markersize": 4, "elinewidth": 0.8}
        axes.errorbar(*middle.T, yerr=bars[..., 1], xerr=bars[..., 0], color=color, label=name, **look)
        for start, end in itertools.pairwise(middle):
            axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": color, "shrinkA": 3, "shrinkB": 3})
    axes.set(xscale="log", yscale="log", xlabel="relative error of the output")
    axes.set_ylabel(f"relative error of the {('output', 'gradient', 'Hessian', 'block')[quantity]}")
    ends = np.array(axes.get_xlim())
    axes.plot(ends, ends, "--", color="black", linewidth=0.8, label="equal errors")
    axes.set_xlim(ends)
    log_ticks(axes.xaxis, 0.1, 0.2, 0.5, 1, 2)


def plot_excess(axes, ratios: dict[str, np.ndarray]) -> None:
    """Quartiles of the ratio of the two errors, over heads and budgets."""
    from attnlab.plotting.panels import log_ticks

    for number, values in enumerate(ratios.values()):
        low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
        axes.errorbar(middle, number, xerr=[[middle - low], [high - middle]], fmt=MARKERS[number], color=f"C{number}")
    axes.axvline(1.0, linestyle="--", color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="ratio of the relative errors, all budgets", ylim=(len(ratios) - 0.5, -0.5))
    axes.set_yticks(range(len(ratios)), list(ratios))
    log_ticks(axes.xaxis, 0.1, 1, 10, 100, 1000, 1e4)


def excess(rows: np.ndarray) -> np.ndarray:
    """Error of the score curvature over that of the output, of every budget and head."""
    return (rows[..., 3] / rows[..., 0]).ravel()


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """Surrogate kernels lose more curvature than output; averages of fewer tokens lose both alike."""
    lost = {name: np.log10(rows[..., 3] / rows[..., 0]).mean() for name, rows in arrays.items()}
    what, source = "log10 of relative error of the score curvature over that of the output, mean", "derived here"
    surrogates = [lost.pop(name) for name in ("random features", "Nyström")]
    return [
        at_least(f"{what}: random features, Nyström", surrogates, 0.0, source=source),
        equal(f"{what}: {', '.join(lost)}", list(lost.values()), 0.0, 0.3, because="a factor of 2", source=source),
    ]


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """Medians over seeds."""
    table = Table("approximation", *QUANTITIES, "score curvature / output", title="Median relative errors, by budget")
    for name, rows in arrays.items():
        for middle in np.median(rows, axis=1):
            table.add_row(name, *(f"{value:.3g}" for value in middle), f"{middle[3] / middle[0]:.3g}")
    return [table]


ANALYSIS = Analysis("approximation-errors", Config, compute, plot, tables, findings, __doc__, slow=True)

if __name__ == "__main__":
    ANALYSIS.main()
