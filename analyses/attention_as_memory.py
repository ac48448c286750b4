"""Attention as memory: labels are fitted up to the rank of its Jacobian, and recall errs by the mass it cannot store.

Rank of the Jacobian by heads against the counted and the published capacity; training loss on random labels against
their number over that rank; error of an associative memory under Zipf data by its dimension, with local slopes against
those of what is not stored; signal strength at which one token among L is detected by pooling and by attention.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from rich.progress import Progress
from rich.table import Table

from attnlab.analysis import Analysis, AnalysisConfig, Arrays
from attnlab.expectation import Expectation, at_least, at_most, equal

EXPONENTS = (1.5, 2.0, 2.5)
ERROR = 0.1
LOGIT_SCALE = 100.0
CLASSES = 200  # of the items that an associative memory recalls


@dataclass(frozen=True)
class Config(AnalysisConfig):
    """Options of the analysis."""

    SMOKE: ClassVar = {
        "heads": 2,
        "labels": (0.5, 1.5),
        "starts": 1,
        "dims": (16, 32),
        "draws": 2,
        "items": 500,
        "lengths": (4, 16),
        "samples": 1000,
    }

    heads: int = 4
    """Numbers of heads, up to this one."""
    width: int = 4
    """Width d of the tokens."""
    head_dim: int = 2
    """Head dimension d_h."""
    labels: tuple[float, ...] = (0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5)
    """Numbers of random labels over the rank."""
    starts: int = 5
    """Random starts of each fit."""
    dims: tuple[int, ...] = (32, 64, 128, 256, 512, 1024)
    """Dimensions of the associative memory."""
    draws: int = 20
    """Random memories."""
    items: int = 4000
    """Items, with Zipf probabilities."""
    lengths: tuple[int, ...] = (4, 16, 64, 256, 1024, 4096)
    """Tokens among which one is sought."""
    samples: int = 20_000
    """Sequences, half of them with a signal."""


def compute(config: Config, progress: Progress) -> Arrays:
    """The four panels."""
    task = progress.add_task("panels", total=4, status="")
    arrays: Arrays = {}
    for part in (ranks, fits, scaling, detection):
        progress.update(task, status=part.__name__)
        arrays |= part(config)
        progress.advance(task)
    return arrays


def ranks(config: Config) -> Arrays:
    """By heads: Jacobian rank with random contexts and with one shared context of four tokens, and the formulas."""
    import jax
    import jax.numpy as jnp

    from attnlab.memory import capacity

    tokens, rows = 4, []
    for heads in range(1, config.heads + 1):
        key = jax.random.fold_in(jax.random.key(config.seed), heads)
        shape = (heads, config.width, config.head_dim)
        counted = capacity.rank_with_random_contexts(*shape), capacity.rank_with_shared_context(*shape, tokens)
        params = capacity.scalar_head_params(key, *shape)
        queries = jax.random.normal(key, (2 * counted[0], config.width))
        contexts = jax.random.normal(jax.random.fold_in(key, 1), (2 * counted[0], tokens, config.width))
        shared = jnp.broadcast_to(contexts[:1], contexts.shape)
        found = [capacity.jacobian_rank(capacity.scalar_heads, params, (queries, x)) for x in (contexts, shared)]
        rows.append([*found, *counted, capacity.published_capacity(heads, tokens, config.head_dim)])
    return {"ranks": np.array(rows)}


def fits(config: Config) -> Arrays:
    """Least mean squared error over the variance of random labels, (labels, starts), by Levenberg-Marquardt."""
    import jax

    from attnlab.memory.capacity import memorization_error, rank_with_random_contexts

    shape = (2, config.width, config.head_dim)
    rank, rows = rank_with_random_contexts(*shape), []
    for number, share in enumerate(config.labels):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), number), config.starts)
        rows.append([memorization_error(key, shape, round(share * rank)) for key in keys])
    return {"fits": np.array(rows), "rank": np.array(rank)}


def scaling(config: Config) -> Arrays:
    """Mean error and its standard error of memories that store d / 8 items, (exponents, dims, 2)."""
    import jax
    import jax.numpy as jnp

    from attnlab.memory.associative import storage_error, zipf

    laws, rows = [zipf(config.items, exponent) for exponent in EXPONENTS], []
    for dim in config.dims:
        # one memory of a draw answers for every law of the items
        one = jax.jit(lambda key, d=dim: jnp.stack([storage_error(key, p, CLASSES, d, d // 8) for p in laws]))
        keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), dim), config.draws)
        errors = np.array([one(key) for key in keys])
        rows.append([errors.mean(axis=0), errors.std(axis=0, ddof=1) / config.draws**0.5])
    return {"scaling": np.moveaxis(np.array(rows), -1, 0)}


def not_stored(exponent: float, dims, config: Config) -> np.ndarray:
    """Error of a memory that recalls all of its d / 8 items and answers at random for the others."""
    from attnlab.memory.associative import zipf

    rest = 1 - np.cumsum(zipf(config.items, exponent))
    return (1 - 1 / CLASSES) * rest[np.asarray(dims) // 8 - 1]


def detection(config: Config) -> Arrays:
    """Strengths at which false alarms and misses are both 10 %, pooling and attention.

    (lengths, 2, 2) measured with their standard errors, (lengths, 2) predicted.
    """
    import jax

    from attnlab.memory.recovery import attention_threshold, detection_threshold, pooling_threshold

    key, found = jax.random.key(config.seed), []
    for length in config.lengths:
        parts = max(config.samples * length // 2**22, 1)  # of at most 4 million tokens
        count = 2 * (config.samples // (2 * parts))
        found.append([detection_threshold(key, length, ERROR, scale, count, parts) for scale in (0.0, LOGIT_SCALE)])
    lengths = np.array(config.lengths)
    return {
        "thresholds": np.array(found),
        "predicted": np.stack([pooling_threshold(lengths, ERROR), attention_threshold(lengths, ERROR)], axis=1),
    }


def plot(arrays: Arrays, config: Config):
    """Ranks, fits, local slopes of the error of recall, thresholds of detection."""
    from attnlab.plotting.panels import panels

    share, rank = fitted_share(arrays, config), int(arrays["rank"])
    slopes = ", ".join(f"{local_slopes(config.dims, rows)[1][-1]:.2f}" for rows in arrays["scaling"])
    figure, axes = panels(
        f"Attention layers fit as many random labels as their Jacobian has rank: {share:g} times {rank}",
        [
            "numbers that $h$ heads can fit",
            f"fitting random labels, rank {rank}",
            f"recall errs with slopes {slopes} in $d$",
            "finding one token among $L$",
        ],
        note=f"(b): median and range over {arrays['fits'].shape[1]} starts. (c): means of {config.draws} memories that "
        f"store $d/8$ items, of Zipf exponent $\\alpha$.\n(d): {config.samples} sequences, half of them with a signal. "
        "Bars in (c), (d): two standard errors (one seed)",
        height=2.9,
    )
    plot_ranks(axes[0], arrays)
    plot_fits(axes[1], arrays, config)
    plot_slopes(axes[2], arrays, config)
    plot_detection(axes[3], arrays, config)
    return figure


def details(arrays: Arrays, config: Config):
    """The errors of recall themselves, and the measured thresholds over the predicted ones."""
    from attnlab.plotting.panels import panels

    apart = np.max(np.abs(arrays["thresholds"][..., 0] / arrays["predicted"] - 1))
    figure, axes = panels(
        f"Recall errs by the mass of what is not stored, within {100 * excess(arrays, config).max():.2g} %;\n"
        f"thresholds of detection are those predicted within {100 * apart:.2g} %",
        ["error of recall", "strength over the predicted one"],
        note=f"(a): means of {config.draws} memories; (b): {config.samples} sequences; bars of two standard errors",
        height=2.9,
    )
    plot_scaling(axes[0], arrays, config)
    plot_ratios(axes[1], arrays, config)
    return figure


def fitted_share(arrays: Arrays, config: Config) -> float:
    """The largest number of labels over the rank up to which the median start fits them to rounding."""
    fits = np.median(arrays["fits"], axis=1) <= FITTED
    return float(np.array(config.labels)[: int(np.argmin([*fits, False]))].max(initial=0.0))


def local_slopes(dims, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Slopes of log error between neighbouring dimensions, with standard errors, at their geometric means."""
    dims, relative = np.asarray(dims, float), rows[:, 1] / rows[:, 0]
    steps = np.diff(np.log(dims))
    errors = np.hypot(relative[1:], relative[:-1]) / steps
    return np.sqrt(dims[1:] * dims[:-1]), np.diff(np.log(rows[:, 0])) / steps, errors


def excess(arrays: Arrays, config: Config) -> np.ndarray:
    """Relative distance of the errors of recall from the mass of what is not stored, (exponents, dims)."""
    laws = np.stack([not_stored(exponent, config.dims, config) for exponent in EXPONENTS])
    return np.abs(arrays["scaling"][..., 0] / laws - 1)


def plot_ranks(axes, arrays: Arrays) -> None:
    random, shared, counted, counted_shared, published = arrays["ranks"].T
    heads = np.arange(1, len(random) + 1)
    for color, marker, found, law, label in (
        ("C0", "o", random, counted, "random contexts"),
        ("C1", "s", shared, counted_shared, "one shared context"),
    ):
        axes.plot(heads, found, marker, color=color, markerfacecolor="none", label=f"rank of the Jacobian, {label}")
        axes.plot(heads, law, ":", color="black", label="law: counted" if color == "C0" else None)
    axes.plot(heads, published, "^--", color="C2", label="published lower bound")
    axes.set(xlabel="heads $h$", ylabel="numbers that can be fitted", xticks=heads)
    axes.set_ylim(0, 1.5 * counted.max())  # room for the legend
    axes.legend(loc="upper left")


FITTED = 1e-6


def plot_fits(axes, arrays: Arrays, config: Config) -> None:
    fits, shares = np.maximum(arrays["fits"], 1e-20), np.array(config.labels)
    middle = np.median(fits, axis=1)
    axes.errorbar(shares, middle, (middle - fits.min(axis=1), fits.max(axis=1) - middle), fmt="o-", capsize=2)
    axes.axvline(1, color="black", linewidth=1, linestyle=":")
    axes.axhspan(1e-20, 1e-14, color="0.93", zorder=-1)
    axes.annotate("rounding", (shares[-1], 1e-19), ha="right", color="0.3", fontsize=8)
    axes.annotate("law: the rank", (1.12, 1e-9), ha="left", fontsize=8)
    axes.set(yscale="log", ylim=(1e-20, 5), xlabel="random labels / rank of the Jacobian")
    axes.set(ylabel="training error / variance")


def plot_slopes(axes, arrays: Arrays, config: Config) -> None:
    for number, (exponent, rows) in enumerate(zip(EXPONENTS, arrays["scaling"], strict=True)):
        places, slopes, errors = local_slopes(config.dims, rows)
        style = {"fmt": "os^"[number], "color": f"C{number}", "capsize": 2}
        axes.errorbar(places, slopes, 2 * errors, label=rf"$\alpha = {exponent:g}$", **style)
        law = not_stored(exponent, config.dims, config)
        _, tail, _ = local_slopes(config.dims, np.stack([law, 0 * law], axis=1))
        axes.plot(places, tail, "--", color=f"C{number}", label="mass not stored" if number == 0 else None)
        ends = config.dims[0], config.dims[-1]
        axes.plot(ends, [1 - exponent] * 2, ":", color="black", label=None if number else r"law: $1 - \alpha$")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="dimension $d$", ylabel="slope of log error in log $d$")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.45 * (high - low))  # room for the legend
    axes.legend(loc="upper left", ncols=2, columnspacing=1.0)


def plot_detection(axes, arrays: Arrays, config: Config) -> None:
    lengths = np.array(config.lengths)
    labels = (r"pooling, law $\propto \sqrt{L}$", r"attention, law $\sim \sqrt{2 \ln L}$")
    for column, label in enumerate(labels):
        axes.loglog(lengths, arrays["predicted"][:, column], ":", color="black", linewidth=1.5, zorder=3)
        strengths, errors = arrays["thresholds"][:, column].T
        style = {"fmt": "os"[column], "capsize": 2, "color": f"C{column}", "markerfacecolor": "none"}
        axes.errorbar(lengths, strengths, 2 * errors, label=label, **style)
    axes.set_xscale("log", base=4)
    axes.set_yscale("log")
    axes.set(xlabel="tokens $L$", ylabel=f"signal strength for {ERROR:.0%} errors".replace("%", " %"))
    axes.legend(loc="upper left")


def plot_scaling(axes, arrays: Arrays, config: Config) -> None:
    dims = np.array(config.dims, float)
    for number, (exponent, rows) in enumerate(zip(EXPONENTS, arrays["scaling"], strict=True)):
        style = {"fmt": "os^"[number], "capsize": 2, "color": f"C{number}", "markerfacecolor": "none"}
        axes.errorbar(dims, rows[:, 0], 2 * rows[:, 1], label=rf"$\alpha = {exponent:g}$", **style)
        label = "law: mass not stored" if number == 0 else None
        axes.loglog(dims, not_stored(exponent, config.dims, config), ":", color="black", linewidth=1.5, label=label)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="dimension $d$", ylabel="probability of a wrong answer")
    axes.legend(loc="lower left")


def plot_ratios(axes, arrays: Arrays, config: Config) -> None:
    for column, name in enumerate(("pooling", "attention")):
        (found, errors), wanted = arrays["thresholds"][:, column].T, arrays["predicted"][:, column]
        style = {"fmt": "os"[column], "capsize": 2, "color": f"C{column}", "markerfacecolor": "none"}
        places = np.array(config.lengths) * 1.15 ** (column - 0.5)
        axes.errorbar(places, found / wanted, 2 * errors / wanted, label=name, **style)
    axes.axhline(1, color="black", linewidth=1, linestyle=":", label="law")
    axes.set_xscale("log", base=4)
    axes.set(xlabel="tokens $L$", ylabel="measured / predicted")
    axes.legend(loc="best")


def exponents(arrays: Arrays, config: Config) -> list[float]:
    """Fitted powers of the dimension in the error of the memory, by Zipf exponent."""
    from attnlab.memory.scaling import fit_power_law

    return [fit_power_law(config.dims, *rows.T).exponent for rows in arrays["scaling"]]


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """Ranks as counted; fits end at the rank; the power of the memory's error; both thresholds of detection."""
    random, shared, counted, counted_shared, _ = arrays["ranks"].T
    shares, best = np.array(config.labels), arrays["fits"].min(axis=1)
    ratios = arrays["thresholds"][..., 0] / arrays["predicted"]
    bars = arrays["thresholds"][..., 1] / arrays["predicted"]
    gauges, memory = "derived here by counting gauges", "Cabannes, Dohmatob, Bietti, arXiv 2310.02984"
    fitted = "1e-6 and 1e-3 stand for fitted and not fitted"
    finite = "the law is that of large dimensions"
    return [
        equal("ranks with random contexts, by heads", random, counted, 0.0, because="whole numbers", source=gauges),
        equal("ranks in one context, by heads", shared, counted_shared, 0.0, because="whole numbers", source=gauges),
        at_most("best error at 0.8 of the rank and less", best[shares <= 0.8], FITTED, because=fitted, source=gauges),
        at_least("best error at 1.25 of the rank and more", best[shares >= 1.25], 1e-3, because=fitted, source=gauges),
        equal(
            f"powers of the memory's error, Zipf {', '.join(map(str, EXPONENTS))}",
            exponents(arrays, config),
            1 - np.array(EXPONENTS),
            0.1,
            because=finite,
            source=memory,
        ),
        equal(
            "thresholds over the predicted ones: pooling, attention, by L",
            ratios,
            1.0,
            4.5,
            standard_error=np.hypot(bars, 0.01),
            because="and 1 % for the grid of the softmax's scale",
            source="derived here",
        ),
    ]


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """Ranks, slopes and thresholds beside their predictions."""
    from attnlab.memory.scaling import fit_power_law

    counts = Table("heads", "rank, random", "counted", "rank, shared", "counted", "published bound")
    for heads, (random, shared, counted, counted_shared, published) in enumerate(arrays["ranks"], 1):
        counts.add_row(*map(str, (heads, random, counted, shared, counted_shared, published)))
    fits = Table("labels / rank", "best error", "median error")
    for share, row in zip(config.labels, arrays["fits"], strict=True):
        fits.add_row(f"{share:g}", f"{row.min():.2g}", f"{np.median(row):.2g}")
    slopes = Table("Zipf exponent", "predicted slope", "fitted slope, 95 % interval")
    for exponent, rows in zip(EXPONENTS, arrays["scaling"], strict=True):
        low, high = fit_power_law(config.dims, *rows.T).interval()
        slopes.add_row(f"{exponent:g}", f"{1 - exponent:g}", f"{low:.3f} to {high:.3f}")
    thresholds = Table("tokens", "pooling", "predicted", "attention", "predicted")
    for length, found, wanted in zip(config.lengths, arrays["thresholds"], arrays["predicted"], strict=True):
        cells = [
            (f"{at:.3f} ± {error:.3f}", f"{number:.3f}") for (at, error), number in zip(found, wanted, strict=True)
        ]
        thresholds.add_row(str(length), *cells[0], *cells[1])
    return [counts, fits, slopes, thresholds]


ANALYSIS = Analysis("attention-as-memory", Config, compute, plot, tables, findings, __doc__, slow=True, details=details)

if __name__ == "__main__":
    ANALYSIS.main()
