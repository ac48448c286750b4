"""Attention as memory: what it can fit, what it stores, and which token it finds.

Above: rank of the Jacobian by heads against the counted and the published capacity; training loss on random labels
against their number over that rank. Below: error of an associative memory under Zipf data against its dimension; signal
strength at which one token among L is detected by pooling and by attention.
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
    dims: tuple[int, ...] = (32, 64, 128, 256, 512)
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

    from attnlab.memory.associative import storage_error, zipf

    rows = []
    for exponent in EXPONENTS:
        probabilities = zipf(config.items, exponent)
        for dim in config.dims:
            one = jax.jit(lambda key, p=probabilities, d=dim: storage_error(key, p, 200, d, d // 8))
            errors = np.array([one(key) for key in jax.random.split(jax.random.key(config.seed), config.draws)])
            rows.append([errors.mean(), errors.std(ddof=1) / config.draws**0.5])
    return {"scaling": np.array(rows).reshape(len(EXPONENTS), len(config.dims), 2)}


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
    """Ranks, fits, scaling, detection."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10.5, 8))
    plot_ranks(axes[0, 0], arrays)
    plot_fits(axes[0, 1], arrays, config)
    plot_scaling(axes[1, 0], arrays, config)
    plot_detection(axes[1, 1], arrays, config)
    return figure


def plot_ranks(axes, arrays: Arrays) -> None:
    random, shared, counted, counted_shared, published = arrays["ranks"].T
    heads = np.arange(1, len(random) + 1)
    axes.plot(heads, counted, color="C0", label="counted, random contexts")
    axes.plot(heads, random, "o", color="C0", markerfacecolor="none", label="rank of the Jacobian")
    axes.plot(heads, counted_shared, color="C1", label="counted, one context")
    axes.plot(heads, shared, "o", color="C1", markerfacecolor="none")
    axes.plot(heads, published, "s--", color="C2", label="published lower bound")
    axes.set(xlabel="heads", ylabel="numbers that can be fitted", xticks=heads, ylim=(0, None))
    axes.set_title("capacity by counting gauges")
    axes.legend(loc="upper left")


def plot_fits(axes, arrays: Arrays, config: Config) -> None:
    fits = np.maximum(arrays["fits"], 1e-20)
    shares = np.array(config.labels)
    axes.semilogy(np.repeat(shares, fits.shape[1]), fits.ravel(), ".", color="C0", alpha=0.5, label="one start")
    axes.semilogy(shares, np.median(fits, axis=1), "o-", color="C0", markerfacecolor="none", label="median")
    axes.axvline(1, color="black", linewidth=0.7, linestyle="--")
    axes.set(xlabel="random labels / rank of the Jacobian", ylabel="training error / variance")
    axes.set_title(f"memorization ends at the rank, {int(arrays['rank'])}")
    axes.legend(loc="lower right")


def plot_scaling(axes, arrays: Arrays, config: Config) -> None:
    from attnlab.memory.scaling import fit_power_law

    dims = np.array(config.dims, float)
    for number, (exponent, rows) in enumerate(zip(EXPONENTS, arrays["scaling"], strict=True)):
        low, high = fit_power_law(dims, *rows.T).interval()
        label = f"Zipf {exponent:g}: slope {low:.3f} to {high:.3f} ({1 - exponent:g})"
        axes.errorbar(dims, rows[:, 0], 2 * rows[:, 1], fmt="o-", capsize=2, color=f"C{number}", label=label)
        guide = rows[-1, 0] * (dims / dims[-1]) ** (1 - exponent)
        axes.loglog(dims, guide, "--", color="black", linewidth=0.6)
    axes.set_xscale("log", base=2)
    axes.set(
        xlabel="dimension $d$", ylabel="error of recall", title=r"associative memory of $d/8$ items: $d^{1-\alpha}$"
    )
    axes.legend(loc="lower left")


def plot_detection(axes, arrays: Arrays, config: Config) -> None:
    lengths = np.array(config.lengths)
    for column, (name, growth) in enumerate((("pooling", r"$2 z \sqrt{L}$"), ("attention", r"$\sim\sqrt{2 \ln L}$"))):
        axes.loglog(lengths, arrays["predicted"][:, column], color=f"C{column}", label=f"{name}: {growth}")
        strengths, errors = arrays["thresholds"][:, column].T
        style = {"fmt": "o", "capsize": 2, "color": f"C{column}", "markerfacecolor": "none"}
        axes.errorbar(lengths, strengths, 2 * errors, **style)
    axes.set_xscale("log", base=4)
    axes.set_yscale("log")
    axes.set(xlabel="tokens $L$", ylabel="strength for 10 % errors", title="finding one token (circles: measured)")
    axes.legend(loc="upper left")


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
        at_most("best error at 0.8 of the rank and less", best[shares <= 0.8], 1e-6, because=fitted, source=gauges),
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


ANALYSIS = Analysis("attention-as-memory", Config, compute, plot, tables, findings, __doc__, slow=True)

if __name__ == "__main__":
    ANALYSIS.main()
