"""How unlike the blocks of an attention layer's Hessian are at initialisation, and which statistic sees it.

One layer on five-digit addition with softmax attention, linear attention, and softmax behind a LayerNorm, over the
scale of the embeddings: ratio of the value and the query block, and the mean over pairs of blocks of two distances of
their exact spectra, Jensen-Shannon on 64 linear bins and Wasserstein-1 of log10 |eigenvalue|.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from rich.progress import Progress
from rich.table import Table

from attnlab.analysis import Analysis, AnalysisConfig, Arrays, log_mean
from attnlab.expectation import Expectation, at_least, at_most, between, equal

BLOCKS = ("key", "output", "query", "value")
POWERS = {"softmax": (2, 5), "linear": (6, 6), "pre-LN": (0, 0)}
"""Of small embeddings in the norms of the value and the query block; of softmax's query block H_f outgrows H_o."""


@dataclass(frozen=True)
class Config(AnalysisConfig):
    """Options of the analysis."""

    SMOKE: ClassVar = {"sequences": 4, "starts": 2, "scales": (0.2, 1.0), "kinds": ("softmax", "linear")}

    sequences: int = 64
    """How many additions."""
    starts: int = 3
    """Random data and initialisations."""
    scales: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5, 1.0)
    """Standard deviations of the embeddings."""
    kinds: tuple[str, ...] = ("softmax", "linear", "pre-LN")
    """Kinds of attention layer."""


def compute(config: Config, progress: Progress) -> Arrays:
    """Exact spectra of the diagonal blocks, (starts, scales, n) by kind, the ratio of norms, and both distances."""
    import jax
    import jax.numpy as jnp

    from attnlab.curvature import hessian
    from attnlab.risks.addition import addition_attention

    @jax.jit
    def spectra(risk, params):
        blocks = {name: hessian(risk, params, block=f"attention/{name}").dense() for name in BLOCKS}
        return jax.tree.map(jnp.linalg.eigvalsh, blocks)

    keys = jax.random.split(jax.random.key(config.seed), config.starts)
    task = progress.add_task("curvature", total=len(config.kinds) * config.starts * len(config.scales), status="")
    arrays: Arrays = {kind: {} for kind in config.kinds}
    for kind in config.kinds:
        points: dict[str, list[np.ndarray]] = {}
        for key in keys:
            risk, params = addition_attention(key, kind, config.sequences)
            for scale in config.scales:
                for name, value in statistics(spectra(risk, with_embeddings(params, scale))).items():
                    points.setdefault(name, []).append(value)
                progress.update(task, advance=1, status=kind)
        for name, values in points.items():
            stacked = np.array(values)
            arrays[kind][name] = stacked.reshape(config.starts, len(config.scales), *stacked.shape[1:])
    return arrays


def with_embeddings(params, scale: float):
    """The parameters with both embeddings multiplied by `scale`."""
    tables = ("token_embedding", "position_embedding")
    return {name: scale * leaf if name in tables else leaf for name, leaf in params.items()}


def statistics(spectra) -> dict[str, np.ndarray]:
    """The spectra of one point, the ratio of the value and the query block's norms, and the two distances, mean over
    pairs of blocks."""
    from itertools import combinations

    from attnlab.dynamics.heterogeneity import jensen_shannon, log_wasserstein

    pairs = list(combinations(spectra.values(), 2))
    found = {name: np.asarray(values) for name, values in spectra.items()}
    found["ratio"] = np.linalg.norm(spectra["value"]) / np.linalg.norm(spectra["query"])
    found["jensen_shannon"] = np.mean([jensen_shannon(*pair) for pair in pairs])
    found["wasserstein"] = np.mean([log_wasserstein(*pair) for pair in pairs])
    return found


SHOWN = 0.2
"""Standard deviation of the embeddings whose spectra are shown."""
LINES = {"softmax": ("#332288", "-", "o"), "linear": ("0.4", "--", "s"), "pre-LN": ("0.65", "-.", "^")}
"""Colour, line and marker of each kind of layer; colours are for the blocks."""


def plot(arrays: Arrays, config: Config):
    """Spectra of the blocks of softmax attention; the ratio of two blocks, and two distances of all, over the scale."""
    from attnlab.plotting.curves import range_band
    from attnlab.plotting.panels import panels

    kind, position = config.kinds[0], shown_scale(config)
    ratio, bits = (float(np.median(arrays[kind][name][:, position])) for name in ("ratio", "jensen_shannon"))
    message = (
        f"{kind[:1].upper()}{kind[1:]}, $\\sigma = {config.scales[position]:g}$: value block {ratio:.0f} times "
        f"the query block; linear bins show {bits:.2f} bits of it"
    )
    titles = [
        f"{kind}: spectra of the blocks, $\\sigma = {config.scales[position]:g}$",
        "value block over query block",
        "Jensen-Shannon distance on linear bins",
        "Wasserstein-1 distance of logarithms",
    ]
    note = f"lines: medians, bands: range over {config.starts} starts; distances: mean over the six pairs of blocks"
    figure, (spectra, *shown) = panels(message, titles, note=note)
    plot_spectra(spectra, arrays[kind], position)
    spectra.legend(loc="lower left")
    labels = {
        "ratio": r"$\|H_{VV}\| \,/\, \|H_{QQ}\|$",
        "jensen_shannon": "distance [bits]",
        "wasserstein": "distance [decades]",
    }
    for axes, (name, label) in zip(shown, labels.items(), strict=True):
        for each in config.kinds:
            color, line, marker = LINES[each]
            range_band(axes, np.array(config.scales), arrays[each][name].T, color, None, line)
            median = np.median(arrays[each][name], axis=0)
            axes.plot(config.scales, median, marker, ls=line, color=color, label=each)
        axes.set(xscale="log", xlabel=r"standard deviation $\sigma$ of the embeddings", ylabel=label)
    value, query = POWERS[kind]
    scales = np.array([scale for scale in config.scales if scale <= 0.5])
    start = np.median(arrays[kind]["ratio"][:, 0])
    law = start * (scales / scales[0]) ** (value - query)
    shown[0].plot(scales, law, ":", color="black", label=rf"law of small $\sigma$, $\sigma^{{{value - query}}}$")
    shown[0].set_yscale("log")
    shown[1].set_ylim(0, 1)
    shown[0].legend(loc="upper right")
    shown[1].legend(loc="upper right")
    shown[2].set_ylim(bottom=0)
    return figure


def shown_scale(config: Config) -> int:
    """Where the scale is whose spectra are shown."""
    return int(np.argmin(np.abs(np.array(config.scales) - SHOWN)))


def plot_spectra(axes, part: Arrays, position: int) -> None:
    """|Eigenvalues| of the four blocks by rank; key and query nearly coincide, so do output and value."""
    from attnlab.plotting.curves import range_band
    from attnlab.plotting.style import BLOCKS as LOOKS

    tops = []
    for name in BLOCKS:
        sizes = np.sort(np.abs(part[name][:, position]), axis=-1)[:, ::-1]
        line = "--" if name in ("query", "value") else "-"
        sizes = np.maximum(sizes, np.finfo(float).tiny)
        range_band(axes, np.arange(1, sizes.shape[1] + 1), sizes.T, LOOKS[name][0], name, line)
        tops.append(sizes.max())
    axes.set(yscale="log", ylim=(1e-9 * max(tops), 3 * max(tops)), xlabel="rank", ylabel=r"$|$eigenvalue$|$")


def details(arrays: Arrays, config: Config):
    """The spectra of the blocks of the other kinds of layer."""
    from attnlab.plotting.panels import panels

    position, others = shown_scale(config), config.kinds[1:] or config.kinds
    note = f"lines: medians, bands: range over {config.starts} starts; embeddings of standard deviation "
    ratios = [float(np.median(arrays[kind]["ratio"][:, position])) for kind in others]
    message = "The value block over the query block: " + ", ".join(
        f"{ratio:.2g} times ({kind})" for kind, ratio in zip(others, ratios, strict=True)
    )
    figure, shown = panels(message, list(others), note=f"{note}{config.scales[position]:g}")
    for axes, kind in zip(shown, others, strict=True):
        plot_spectra(axes, arrays[kind], position)
        axes.legend(loc="lower left")
    return figure


def at_scale(arrays: Arrays, config: Config, kind: str, name: str, scale: float) -> np.ndarray:
    """The values of all starts at one scale of the embeddings."""
    return arrays[kind][name][:, config.scales.index(scale)]


def exponents(arrays: Arrays, config: Config, kind: str) -> list[float]:
    """Powers of the scale with which the norms of the value and the query block grow from 0.05 to 0.1."""
    norms = [
        [log_mean(np.linalg.norm(at_scale(arrays, config, kind, block, scale), axis=-1))[0] for scale in (0.05, 0.1)]
        for block in ("value", "query")
    ]
    return [float(np.log2(large / small)) for small, large in norms]


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """The ratio of the blocks by kind, how both grow, and how both distances rank the kinds."""
    growth, adam = "Ormaniec et al., arXiv 2410.10986", "Zhang et al., arXiv 2402.16788"
    alike = "no power of the scale between them: a factor of 3 either way"
    expected = {
        ("softmax", 0.2): (30, 200, "scale^-3 is 125: the law's constant is of order one"),
        ("linear", 0.2): (0.3, 3, alike),
        ("pre-LN", 0.2): (1, 6, "no power of the scale between them: a constant of order one"),
        ("softmax", 1.0): (0.3, 3, alike),
    }
    found, order = [], "the next order in the scale"
    for (kind, scale), (low, high, because) in expected.items():
        if kind in config.kinds and scale in config.scales:
            ratio = float(log_mean(at_scale(arrays, config, kind, "ratio", scale))[0])
            what = f"{kind}, std {scale:g}: ||H_VV|| / ||H_QQ||"
            found.append(between(what, ratio, low, high, because=because, source=growth))
    if {0.05, 0.1} <= set(config.scales):
        found += [
            equal(f"{kind}: exponent of ||H_{name}|| in the scale", measured, power, 0.02, because=order, source=growth)
            for kind in config.kinds
            for name, measured, power in zip(("VV", "QQ"), exponents(arrays, config, kind), POWERS[kind], strict=True)
        ]
    if 0.2 in config.scales and {"softmax"} < set(config.kinds):
        means = {
            name: {kind: float(at_scale(arrays, config, kind, name, 0.2).mean()) for kind in config.kinds}
            for name in ("wasserstein", "jensen_shannon")
        }
        decades, bits = means["wasserstein"], means["jensen_shannon"]["softmax"]
        excess = decades["softmax"] / max(decades[kind] for kind in config.kinds if kind != "softmax")
        what, because = "std 0.2: Wasserstein-1 of log10, softmax over the next kind", "more than the range over starts"
        found.append(at_least(what, excess, 1.5, because=because, source=adam))
        what, because = "softmax, std 0.2: Jensen-Shannon, of at most 1 bit", "most eigenvalues share the lowest bin"
        found.append(at_most(what, bits, 0.15, because=because, source=adam))
    return found


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """The statistics by kind and scale, with standard errors over the starts."""
    table = Table("layer", "std", "||H_VV|| / ||H_QQ|| (x/ error)", "Jensen-Shannon [bits]", "Wasserstein-1 [decades]")
    for kind in config.kinds:
        for position, scale in enumerate(config.scales):
            ratio, factor = (part[position] for part in log_mean(arrays[kind]["ratio"]))
            cells = []
            for name in ("jensen_shannon", "wasserstein"):
                values = arrays[kind][name][:, position]
                cells.append(f"{values.mean():.3f} ± {values.std(ddof=1) / len(values) ** 0.5:.3f}")
            table.add_row(kind, f"{scale:g}", f"{ratio:.3g} x/ {factor:.2f}", *cells)
    return [table]


ANALYSIS = Analysis("block-heterogeneity", Config, compute, plot, tables, findings, __doc__, slow=True, details=details)

if __name__ == "__main__":
    ANALYSIS.main()
