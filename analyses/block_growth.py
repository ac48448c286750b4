"""Growth of the Hessian's blocks with the scale of the embeddings, on five-digit addition.

Embeddings are drawn N(0, sigma^2) and every block of H, H_o and H_f of an attention layer is measured for sigma from
1e-2 to 10, untrained: transformers of depth 1 to 5 without and with pre-LN (cross-entropy of the answer's digits),
stacks of linear attention and linear MLPs (square loss). After figure 3 of Ormaniec, Dangel, Singh, arXiv 2410.10986,
whose norms were estimated from random samples: those of the last attention layer are exact here, by the closed form;
those of the first layer at depth 2 and more are estimates with standard errors. Slopes are fitted seed by seed and set
beside the predicted exponents.

A seed takes about six minutes of one core; a run resumes where it was stopped, and more seeds add to those that are
there. The scales of linear attention begin at 0.1, where the slopes of H_f are not yet those of
sigma -> 0: they come out above 3.
"""

import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from rich.progress import Progress
from rich.table import Table

from attnlab.analysis import Analysis, AnalysisConfig, Arrays
from attnlab.expectation import Expectation, at_least, at_most, equal

PARTS = {"hessian": "H", "ggn": "H_o", "functional": "H_f"}


@dataclass(frozen=True)
class Variant:
    """One family of models: its name in the figure, its norm, kind of attention, range of sigma and depths."""

    label: str
    norm: str | None
    weights: str
    sigmas: tuple[float, float]
    depths: int


VARIANTS = {
    "softmax": Variant("transformer, no norm", None, "softmax", (1e-2, 1e1), 5),
    "pre_norm": Variant("transformer, pre-LN", "pre", "softmax", (1e-2, 1e1), 5),
    "linear": Variant("linear attention", None, "linear", (1e-1, 1e0), 3),
    "mlp": Variant("linear MLP", None, "none", (1e-2, 1e1), 5),
}


@dataclass(frozen=True)
class Config(AnalysisConfig):
    """Options of the analysis."""

    SMOKE: ClassVar = {
        "seeds": 2,
        "sequences": 2,
        "digits": 1,
        "width": 4,
        "points": 4,
        "depth": 2,
        "samples": 2,
        "precision": "float64",
    }

    seeds: int = 8
    """Independent draws of data and weights; the first has the number `--seed`."""
    sequences: int = 64
    """Sums in the batch."""
    digits: int = 5
    """Digits of the summands."""
    width: int = 128
    """Width of the model, of its one head and, four times, of the MLP."""
    points: int = 10
    """Values of sigma: three to a decade."""
    depth: int = 5
    """Largest depth (3 at most for linear attention)."""
    samples: int = 4
    """Random samples for each norm of the first layer."""
    precision: str = "float32"
    """Of the transformers; linear attention and MLPs are taken in the precision of `--dtype`."""

    def parts(self) -> list[Path]:
        """Those of these seeds, which are kept when the analysis is done."""
        return [path for seed in seeds(self) for path in sorted(parts_folder(self).glob(f"*-{seed}.npz"))]


def seeds(config: Config) -> range:
    """Numbers of the draws."""
    return range(config.seed, config.seed + config.seeds)


def sigmas(config: Config, variant: str) -> np.ndarray:
    """The scales of the embeddings."""
    low, high = VARIANTS[variant].sigmas
    return np.geomspace(low, high, config.points)


def depths(config: Config, variant: str) -> range:
    """The numbers of layers."""
    return range(1, min(config.depth, VARIANTS[variant].depths) + 1)


def compute(config: Config, progress: Progress) -> Arrays:
    """All norms, part by part: what a stopped run had finished is read from disk."""
    import jax

    from attnlab.runs import stored_arrays

    if config.dtype != "float64":
        raise ValueError(
            "dtype is float32, where the blocks of deep linear attention underflow (they grow like sigma^54); "
            "expected float64. --precision float32 is for the transformers alone."
        )
    tasks = [
        (seed, variant, depth) for seed in seeds(config) for variant in VARIANTS for depth in depths(config, variant)
    ]
    bar = progress.add_task("block norms", total=len(tasks), status="")
    folder = parts_folder(config)
    found: Arrays = {variant: {str(depth): [] for depth in depths(config, variant)} for variant in VARIANTS}
    for seed, variant, depth in tasks:
        progress.update(bar, status=f"seed {seed}: {VARIANTS[variant].label}, depth {depth}")
        path = folder / f"{variant}-{depth}-{seed}.npz"
        part = stored_arrays(path, lambda s=seed, v=variant, d=depth: measure(config, s, v, d))
        found[variant][str(depth)].append(part)
        progress.advance(bar)
    arrays = {
        variant: {
            "sigma": sigmas(config, variant),
            "norms": {depth: jax.tree.map(lambda *seeds: np.stack(seeds), *parts) for depth, parts in models.items()},
        }
        for variant, models in found.items()
    }
    return arrays | {
        "precision": stored_arrays(folder / f"precision-{config.seed}.npz", lambda: precision_errors(config))
    }


def parts_folder(config: Config) -> Path:
    """Where finished parts wait for the rest: one folder for each choice of all that decides their numbers."""
    names = ("sequences", "digits", "width", "points", "samples", "precision", "dtype")
    identity = json.dumps({"layout": 2} | {name: getattr(config, name) for name in names}, sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return config.output / "results" / "block-growth-parts" / digest


def network(config: Config, variant: str, depth: int):
    """The network of a variant; transformers in `config.precision`."""
    from attnlab.risks.addition_networks import AdditionNetwork

    kind = VARIANTS[variant]
    dtype = config.precision if kind.weights == "softmax" else config.dtype
    return AdditionNetwork(kind.weights, kind.norm, depth, config.width, config.digits, config.sequences, dtype)


def measure(config: Config, seed: int, variant: str, depth: int) -> Arrays:
    """Norms of one model at every sigma, (points,), by place, part and pair of the block."""
    import jax

    from attnlab.risks.addition_networks import (
        first_layer_norms,
        last_layer_norms,
        linear_mlp_norms,
        with_embedding_scale,
    )

    key, scales = jax.random.key(seed), sigmas(config, variant)
    if variant == "mlp":
        norms = linear_mlp_norms(network(config, "linear", 1), depth, key)
        return {place: {"hessian": {"VV": float(norm) * scales**2}} for place, norm in norms.items()}
    model = network(config, variant, depth)
    params, data = model.draw(key)
    names = None if depth == 1 else ("value", "query", "key")  # of the projection's blocks one layer is enough
    points = []
    for index, sigma in enumerate(scales):
        scaled = with_embedding_scale(params, sigma)
        norms = {"last": last_layer_norms(model, scaled, data, names)}
        if depth > 1:
            draw = jax.random.fold_in(jax.random.fold_in(key, depth), index)
            norms |= first_layer_norms(model, scaled, data, draw, samples=config.samples)
        points.append(norms)
    return jax.tree.map(lambda *values: np.array(values), *points)


def precision_errors(config: Config) -> Arrays:
    """Largest relative error of the transformers' norms against float64 at depth 1, for three values of sigma."""
    import jax

    from attnlab.risks.addition_networks import precision_error

    key, arrays = jax.random.key(config.seed), {}
    for variant in ("softmax", "pre_norm"):
        chosen = sigmas(config, variant)[[0, config.points // 2, -1]]
        errors = [precision_error(network(config, variant, 1), key, sigma) for sigma in chosen]
        arrays[variant] = {"error": np.array(errors), "sigma": chosen}
    return arrays


def fit_range(variant: str) -> tuple[float, float]:
    """Where slopes are fitted: the lowest decade, or half of it for linear attention, which has but one."""
    low, high = VARIANTS[variant].sigmas
    return low, low * (high / low) ** (1 / 3 if variant != "linear" else 1 / 2)


def predicted(variant: str, depth: int, place: str, part: str, pair: str) -> float | None:
    """The predicted exponent of a block; None where there is none or the block is zero."""
    from attnlab.risks.growth import network_exponent

    return network_exponent(VARIANTS[variant].weights, VARIANTS[variant].norm, depth, place, part, pair)


def norms_of(arrays: Arrays, variant: str, depth: int, place: str, part: str) -> Arrays:
    """Norms by pair, (seeds, points) each; none where they were not measured."""
    return arrays[variant]["norms"][str(depth)].get(place, {}).get(part, {})


def crossover(arrays: Arrays, variant: str, depth: int, place: str, part: str) -> np.ndarray:
    """Sigma of every seed at which the query block first overtakes the value block; NaN where it never does."""
    from attnlab.risks.growth import crossings

    norms = norms_of(arrays, variant, depth, "last" if depth == 1 else place, part)
    return crossings(norms["QQ"], norms["VV"], arrays[variant]["sigma"])


def measured_depths(arrays: Arrays, variant: str) -> list[int]:
    """The depths that the arrays hold."""
    return sorted(map(int, arrays[variant]["norms"]))


def plot(arrays: Arrays, config: Config):
    """One layer without norms, with pre-LN, and where queries overtake values."""
    from attnlab.plotting.panels import panels
    from attnlab.risks.growth import geometric_mean

    depths_here = measured_depths(arrays, "softmax")
    where = [geometric_mean(crossover(arrays, "softmax", depth, "last", "hessian")) for depth in depths_here]
    fitted = {row[2]: row[3] for row in slopes(arrays, config) if row[:2] == ("softmax", 1)}
    shown = " and ".join(rf"$\sigma^{{{fitted[f'last ggn {pair}']:.1f}}}$" for pair in ("VV", "QQ"))
    message = (
        rf"$H_o$ of values and queries grows like {shown}; queries overtake values"
        "\n"
        rf"at $\sigma$ = {where[0]:.2g} with one layer, {where[-1]:.2g} with {depths_here[-1]}"
    )
    titles = ("one layer, no norm", "one layer, pre-LN", "queries overtake")
    note = f"lines: geometric means over {config.seeds} seeds, bands: one standard deviation; dots: seeds"
    figure, axes = panels(message, titles, note=note, columns=3, height=2.9)
    for panel, variant, part in zip(axes[:2], ("softmax", "pre_norm"), ("ggn", "hessian"), strict=True):
        plot_values_and_queries(panel, arrays, variant, 1, part)
    plot_crossovers(axes[2], arrays)
    return figure


def plot_values_and_queries(axes, arrays: Arrays, variant: str, depth: int, part: str) -> None:
    """The value and the query block of the last layer; triangles of the predicted slopes in the range of the fit."""
    from attnlab.plotting.curves import geometric_band
    from attnlab.plotting.exponents import slope_triangle
    from attnlab.plotting.style import BLOCKS as LOOKS
    from attnlab.risks.growth import geometric_mean

    scales, (low, high) = arrays[variant]["sigma"], fit_range(variant)
    for name, pair in (("value", "VV"), ("query", "QQ")):
        norms = norms_of(arrays, variant, depth, "last", part)[pair]
        geometric_band(axes, scales, norms, LOOKS[name][0], {"VV": "-", "QQ": "--"}[pair], label=pair)
        exponent = predicted(variant, depth, "last", part, pair)
        if exponent is not None:
            slope_triangle(axes, low, high, geometric_mean(norms[:, 0]), exponent)
    axes.axvspan(low, high, color="0.93", zorder=-2)
    axes.set(
        xscale="log", yscale="log", xlabel=r"embeddings' scale $\sigma$", ylabel=rf"$\|{PARTS[part]}\|_F$ of the block"
    )
    axes.legend(loc="best")


CROSSINGS = (("softmax", "hessian", "last"), ("softmax", "ggn", "last"), ("softmax", "hessian", "first"))


def plot_crossovers(axes, arrays: Arrays) -> None:
    """Sigma at which the query block overtakes the value block, of every seed, in H and in H_o of the last layer."""
    from attnlab.plotting.style import PARTS as LOOKS
    from attnlab.risks.growth import geometric_mean

    for place, (variant, part, layer) in enumerate(CROSSINGS[:2]):
        found = {depth: crossover(arrays, variant, depth, layer, part) for depth in measured_depths(arrays, variant)}
        color, marker, label = LOOKS[part]
        shift = 0.16 * (2 * place - 1)
        for depth, values in found.items():
            axes.plot(np.full(len(values), depth + shift), values, ".", color=color, alpha=0.4, markersize=3)
        middles = [geometric_mean(values) for values in found.values()]
        axes.plot(np.array(list(found)) + shift, middles, f"{marker}-", color=color, linewidth=0.8, label=label)
    axes.set(yscale="log", xlabel="layers", ylabel=r"$\sigma$ where $\|QQ\| = \|VV\|$")
    axes.set_xticks(measured_depths(arrays, "softmax"))
    axes.legend(loc="best")


def details(arrays: Arrays, config: Config):
    """A forest plot of the slopes of values and queries, and linear models; the tables have every slope."""
    import matplotlib.pyplot as plt

    from attnlab.plotting.panels import name_panels, say

    rows = [row for row in slopes(arrays, config) if np.isfinite(row[3])]
    within = np.mean([abs(row[3] - row[5]) <= max(row[4], 0.2) for row in rows])
    figure, axes = plt.subplot_mosaic(
        [["forest", "linear"], ["forest", "mlp"]],
        figsize=(7.2, 8.5),
        width_ratios=(1.25, 1),
    )
    shown = [row for row in rows if row[2].split()[1] == main_part(row[0]) and row[2][-2:] in ("VV", "QQ")]
    plot_forest(axes["forest"], shown)
    plot_values_and_queries(axes["linear"], arrays, "linear", max(measured_depths(arrays, "linear")), "ggn")
    plot_linear_models(axes["mlp"], arrays)
    titles = ("fitted exponents (bars) and predicted (line)", "linear attention, deepest", "linear MLP, first layer")
    name_panels(axes.values(), titles)
    say(
        figure,
        f"{within:.0%} of {len(rows)} exponents lie within .2, or their interval, of the prediction",
        f"bars: 95 % intervals over {config.seeds} seeds; grey: the range of the fit, "
        r"which for linear attention is half a decade, not yet $\sigma \to 0$",
    )
    return figure


def main_part(variant: str) -> str:
    """The part whose exponents are shown: linear attention's H_o has a prediction at every depth."""
    return "ggn" if variant == "linear" else "hessian"


def plot_forest(axes, rows: list[tuple]) -> None:
    """Fitted minus predicted exponent, one row each, named by model, depth and block."""
    from attnlab.plotting.exponents import forest

    names = []
    for variant, depth, block, _, _, exponent in rows:
        place, part, pair = block.split()
        model = VARIANTS[variant].label.removeprefix("transformer, ")
        names.append(f"{model} {depth}, {place} ${PARTS[part]}$ {pair}: {exponent:g}")
    groups = [list(VARIANTS).index(row[0]) for row in rows]
    forest(axes, [row[3] - row[5] for row in rows], [row[4] for row in rows], names, groups)
    axes.set_xlabel("fitted minus predicted")


def plot_linear_models(axes, arrays: Arrays) -> None:
    """The first layer's value block of linear MLPs of every depth."""
    import matplotlib as mpl

    from attnlab.plotting.curves import geometric_band

    for depth in measured_depths(arrays, "mlp"):
        norms = norms_of(arrays, "mlp", depth, "first", "hessian")["VV"]
        color = mpl.colormaps["viridis"](0.9 * (depth - 1) / 4)
        geometric_band(axes, arrays["mlp"]["sigma"], norms, color, label=f"depth {depth}")
    axes.set(xscale="log", yscale="log", xlabel=r"embeddings' scale $\sigma$", ylabel=r"$\|H\|_F$")
    axes.legend(loc="best", fontsize=7.5)


def slopes(arrays: Arrays, config: Config):
    """(variant, depth, name, fitted, half-width, predicted) of every block with a prediction."""
    from attnlab.risks.growth import fitted_exponent

    for variant in VARIANTS:
        scales, window = arrays[variant]["sigma"], fit_range(variant)
        for depth, place, part in itertools.product(measured_depths(arrays, variant), ("last", "first"), PARTS):
            for pair, norms in norms_of(arrays, variant, depth, place, part).items():
                exponent = predicted(variant, depth, place, part, pair)
                if exponent is not None:
                    block = f"{place} {part} {pair}"
                    yield variant, depth, block, *fitted_exponent(norms, scales, *window), exponent


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """The exponents of one layer and of linear MLPs, the crossing of queries and values, and the lower precision."""
    source, order = "Ormaniec, Dangel, Singh, arXiv 2410.10986, section 4", "the next order in the scale"
    rows = [row for row in slopes(arrays, config) if np.isfinite(row[3])]
    found = []
    for variant, part, tolerance in (("softmax", "ggn", 0.2), ("pre_norm", "hessian", 0.2), ("mlp", "hessian", 1e-6)):
        named = [row for row in rows if row[:2] == (variant, 1) and part in row[2]]
        if named:
            fitted, exponents = ([row[place] for row in named] for place in (3, 5))
            what = f"{VARIANTS[variant].label}, one layer: exponents of the blocks of {PARTS[part]}"
            found.append(equal(what, fitted, exponents, tolerance, because=order, source=source))
    crossed = np.isfinite(crossover(arrays, "softmax", 1, "last", "hessian")).mean()
    largest = max(np.max(arrays["precision"][variant]["error"]) for variant in arrays["precision"])
    return [
        *found,
        at_least("share of seeds in which the query block of H overtakes the value block", crossed, 0.9, source=source),
        at_most("largest relative error of a norm in the lower precision", largest, 0.05, source="float64"),
    ]


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """Slopes, crossings, and how exact the numbers are."""
    fitted = Table("model", "depth", "block", "fitted", "predicted", title="exponents of sigma, 95 % intervals")
    for variant, depth, name, slope, width, exponent in slopes(arrays, config):
        fitted.add_row(VARIANTS[variant].label, str(depth), name, f"{slope:.3f} +- {width:.3f}", f"{exponent:g}")
    from attnlab.risks.growth import crossing_summary

    crossings = Table("block of", "layer", "depth", "sigma", title="where |QQ| = |VV|, transformer without norm")
    for variant, part, place in CROSSINGS:
        for depth in measured_depths(arrays, variant):
            layer = "last" if depth == 1 else place
            found = crossover(arrays, variant, depth, place, part)
            crossings.add_row(PARTS[part], layer, str(depth), crossing_summary(found))
    return [fitted, crossings, accuracy_table(arrays)]


def accuracy_table(arrays: Arrays) -> Table:
    """Errors of the lower precision, and the standard errors of the estimated norms."""
    table = Table("norms of", "at", "largest relative error", title="accuracy")
    for variant in ("softmax", "pre_norm"):
        now, label = arrays["precision"][variant], VARIANTS[variant].label
        for scale, errors in zip(now["sigma"], now["error"], strict=True):
            table.add_row(f"last layer, {label}", f"sigma {scale:.2g}", f"{np.max(errors):.1e} against float64")
    shares = [
        errors / np.maximum(norms_of(arrays, variant, depth, "first", part)[pair], 1e-300)
        for variant in VARIANTS
        for depth, part in itertools.product(measured_depths(arrays, variant), PARTS)
        for pair, errors in norms_of(arrays, variant, depth, "first error", part).items()
    ]
    if shares:
        share = np.concatenate([share.ravel() for share in shares])
        known = np.isfinite(share)  # the variance of a large norm may overflow in float32
        of_all, median = f"median of {known.sum()} of {known.size}", np.median(share[known])
        table.add_row("first layer, depth 2 and more", of_all, f"{median:.1%} standard error")
    return table


ANALYSIS = Analysis("block-growth", Config, compute, plot, tables, findings, __doc__, slow=True, details=details)

if __name__ == "__main__":
    ANALYSIS.main()
