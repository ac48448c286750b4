"""Entries of a transformer block's Hessian, parameter by parameter, with softmax and with linear attention.

One causal head and its MLP on the five-digit addition task, at initialisation (figure 1 of Ormaniec, Dangel, Singh,
arXiv 2410.10986): the entries and eigenvalues of the value block are about ten times those of the query block under
softmax, and the two hardly differ under linear attention. Beyond the paper: the key and output blocks, exact spectra,
and, in the table, the norms of H_o.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from rich.progress import Progress
from rich.table import Table

from attnlab.analysis import Analysis, AnalysisConfig, Arrays
from attnlab.expectation import Expectation, at_least, equal

KINDS = ("softmax", "linear")
SHOWN = {"value": "V", "query": "Q", "key": "K", "output": "O"}
CAPTIONS = {
    "key": "K",
    "output": "O",
    "query": "Q",
    "value": "V",
    "down": "down",
    "up": "up",
}


@dataclass(frozen=True)
class Config(AnalysisConfig):
    """Options of the analysis."""

    SMOKE: ClassVar = {"width": 4, "sequences": 4}

    width: int = 16
    """Model and head width; the MLP is four times as wide."""
    sequences: int = 64
    """How many additions."""
    embedding_std: float = 0.3
    """Standard deviation of the token and position embeddings."""


def compute(config: Config, progress: Progress) -> Arrays:
    """Dense Hessian and Gauss-Newton matrix of the block's parameters, for both kinds of attention."""
    import jax

    from attnlab.curvature import ggn, hessian

    data_key, init_key = jax.random.split(jax.random.key(config.seed))
    task = progress.add_task("curvature", total=2 * len(KINDS), status="")
    arrays: Arrays = {kind: {} for kind in KINDS}
    for kind in KINDS:
        risk, params = problem(config, kind, data_key, init_key)
        for part, build in (("hessian", hessian), ("ggn", ggn)):
            operator = build(risk, params, block="layer_0")
            matrix = np.asarray(operator.dense())
            blocks = {name: matrix[rows, rows] for name, rows in slices(operator.point).items()}
            arrays[kind][part] = {
                "matrix": matrix.astype(np.float32),
                "norm": {name: np.linalg.norm(block) for name, block in blocks.items()},
                "eigenvalues": {name: np.linalg.eigvalsh(block) for name, block in blocks.items()},
            }
            progress.advance(task)
        arrays["sizes"] = np.array([rows.stop - rows.start for rows in slices(operator.point).values()])
    return arrays


def slices(point) -> dict[str, slice]:
    """Where each parameter matrix of the block stands."""
    from attnlab.trees import block_slices

    return {name.rpartition("/")[2]: rows for name, rows in block_slices(point).items()}


def problem(config: Config, kind: str, data_key, init_key):
    """The paper's model at depth one, with weights N(0, 0.64 / width) and without biases, on its task."""
    from attnlab.data.addition import addition, answer_positions
    from attnlab.losses import cross_entropy
    from attnlab.models.adapters import at_positions, from_linen
    from attnlab.models.attention import AttentionConfig
    from attnlab.models.transformer import LanguageModel, LanguageModelConfig, TransformerConfig
    from attnlab.objectives import objective

    width, scheme = config.width, {"init": "normal", "gain": 0.8 * config.width**-0.5}
    attention = AttentionConfig(width, width, causal=True, output_dim=width, weights=kind, **scheme)
    blocks = TransformerConfig(attention, 1, 4 * width, activation="relu", norm=None, **scheme)
    model = LanguageModel(
        LanguageModelConfig(blocks, 12, 18, width, embedding_std=config.embedding_std, dtype=config.dtype, **scheme)
    )
    tokens, answers = addition(data_key, config.sequences)
    params = model.init(init_key, tokens)["params"]
    predict = at_positions(from_linen(model), answer_positions())
    return objective(predict, cross_entropy, tokens, answers), params


def plot(arrays: Arrays, config: Config):
    """Entries of the Hessian and spectra of its diagonal blocks, softmax beside linear attention."""
    from attnlab.plotting.panels import panels

    leads = [value_over_query(arrays, kind) for kind in KINDS]
    message = (
        rf"$\|H_{{VV}}\| / \|H_{{QQ}}\|$ is {leads[0]:.3g} under {KINDS[0]} "
        f"and {leads[1]:.2g} under {KINDS[1]} attention, at initialisation"
    )
    titles = [
        f"{kind}: {what}" for what in ("entries of the block's Hessian", "attention's own blocks") for kind in KINDS
    ]
    figure, axes = panels(message, titles, note="one draw of weights and data; entries and eigenvalues are exact")
    for kind, entries, spectra in zip(KINDS, axes[:2], axes[2:], strict=True):
        plot_grid(figure, entries, arrays, kind)
        plot_spectra(spectra, arrays, kind)
    return figure


def details(arrays: Arrays, config: Config):
    """How the entries of attention's diagonal blocks are distributed."""
    from attnlab.plotting.panels import panels

    medians = {kind: {name: np.median(block_entries(arrays, kind, name)) for name in SHOWN} for kind in KINDS}
    apart = [np.log10(max(now.values()) / min(now.values())) for now in medians.values()]
    message = f"Medians of the entries lie {apart[0]:.1f} ({KINDS[0]}) and {apart[1]:.1f} ({KINDS[1]}) decades apart"
    figure, axes = panels(message, [f"entries of the diagonal blocks, {kind}" for kind in KINDS])
    for panel, kind in zip(axes, KINDS, strict=True):
        plot_entries(panel, arrays, kind)
    return figure


def block_sizes(arrays: Arrays) -> dict[str, int]:
    return dict(zip(CAPTIONS, arrays["sizes"].tolist(), strict=True))


def block_entries(arrays: Arrays, kind: str, name: str) -> np.ndarray:
    """|entries| of one diagonal block, without exact zeros."""
    sizes = block_sizes(arrays)
    ends = dict(zip(sizes, np.cumsum(list(sizes.values())), strict=True))
    rows = slice(ends[name] - sizes[name], ends[name])
    entries = np.abs(arrays[kind]["hessian"]["matrix"][rows, rows]).ravel()
    return entries[entries > 0]


def plot_grid(figure, axes, arrays: Arrays, kind: str) -> None:
    from attnlab.plotting.matrices import block_grid

    matrix = arrays[kind]["hessian"]["matrix"]
    top = np.ceil(np.log10(np.abs(matrix).max()))
    image = block_grid(axes, matrix, block_sizes(arrays), (top - 8, top), CAPTIONS)
    figure.colorbar(image, ax=axes, label=r"$\log_{10}|\mathrm{entry}|$", shrink=0.85, extend="min")


def plot_entries(axes, arrays: Arrays, kind: str) -> None:
    from attnlab.plotting.style import BLOCKS as LOOKS

    for (name, label), line in zip(SHOWN.items(), ("-", "--", "-.", ":"), strict=False):
        decades, look = np.log10(block_entries(arrays, kind, name)), {"color": LOOKS[name][0], "linestyle": line}
        axes.hist(decades, bins=80, range=(-9, -1), histtype="step", density=True, label=f"{label}{label}", **look)
    axes.set(xlabel=r"$\log_{10}|\mathrm{entry}|$ (zeros left out)", ylabel="density per decade", xlim=(-9, -1))
    axes.legend(loc="upper left")


def plot_spectra(axes, arrays: Arrays, kind: str) -> None:
    from attnlab.plotting.matrices import signed_spectrum
    from attnlab.plotting.style import BLOCKS as LOOKS

    top = 0.0
    for name, label in SHOWN.items():
        eigenvalues = arrays[kind]["hessian"]["eigenvalues"][name]
        top = max(top, np.abs(eigenvalues).max())
        signed_spectrum(axes, eigenvalues, LOOKS[name][0], f"{label}{label}")
    axes.plot([], [], "v", color="gray", markerfacecolor="none", label="negative")
    axes.set(ylim=(1e-9 * top, 3 * top), xlabel="rank", ylabel="|eigenvalue|")
    axes.legend(loc="upper right")


def value_over_query(arrays: Arrays, kind: str) -> float:
    """Norm of the value block over that of the query block."""
    norms = arrays[kind]["hessian"]["norm"]
    return float(norms["value"] / norms["query"])


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """The value block's lead under softmax, which linear attention does not have."""
    source, ratio = "Ormaniec, Dangel, Singh, arXiv 2410.10986, figure 1", "||H_VV|| / ||H_QQ||"
    linear = np.log10(value_over_query(arrays, "linear"))
    return [
        at_least(f"{ratio}, softmax", value_over_query(arrays, "softmax"), 5.0, source=source),
        equal(f"log10 of {ratio}, linear attention", linear, 0.0, 0.5, because="a factor of 3", source=source),
    ]


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """Norms of the diagonal blocks and the share of negative eigenvalues."""
    table = Table(
        "block", *(f"{word}, {kind}" for kind in KINDS for word in ("norm of H", "norm of H_o", "negative share"))
    )
    for name, caption in CAPTIONS.items():
        cells = []
        for kind in KINDS:
            cells += [f"{float(arrays[kind][part]['norm'][name]):.3g}" for part in ("hessian", "ggn")]
            eigenvalues = arrays[kind]["hessian"]["eigenvalues"][name]
            cells.append(f"{np.mean(eigenvalues < -1e-10 * np.abs(eigenvalues).max()):.0%}")
        table.add_row(caption, *cells)
    ratios = []
    for kind in KINDS:
        ratios += [f"{value_over_query(arrays, kind):.3g}", "", ""]
    table.add_row("V over Q", *ratios)
    return [table]


ANALYSIS = Analysis("attention-blocks", Config, compute, plot, tables, findings, __doc__, slow=True, details=details)

if __name__ == "__main__":
    ANALYSIS.main()
