"""An attention layer of a pretrained language model in closed form: what data, weights and moments make of its Hessian.

SmolLM2's last layer (rotary positions, three queries to a key; weights dequantised from 4 bits) on real text. Behind it
every token goes by itself, so that its value, output and query blocks are exact sums of Kronecker products over tokens,
term by term; a key's block keeps no such form under rotation, and is measured with products, as all are for a check.
`--model` is for your weights.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
from rich.progress import Progress
from rich.table import Table

from attnlab.analysis import Analysis, Arrays, SinglePrecisionConfig
from attnlab.cli import analysis_scripts, load_script
from attnlab.expectation import Expectation, at_least, at_most

PARTS = {"hessian": "H", "ggn": "H_o", "functional": "H_f"}
EXACT = ("value", "output", "query")
"""Parameters whose blocks are taken in closed form."""
MEASURED = (*EXACT, "key")
"""And those whose diagonal blocks are also measured with products."""


@dataclass(frozen=True)
class Config(SinglePrecisionConfig):
    """Options of the analysis."""

    SMOKE: ClassVar = {"length": 6, "samples": 4, "tiny": True}

    model: Path | None = None
    """A folder or file of pretrained weights of a language model; the packaged SmolLM2 if none is named."""
    length: int = 64
    """Tokens that are predicted, of the longest paragraph."""
    samples: int = 24
    """Random vectors for each norm that is measured with products."""
    tiny: bool = False
    """A random model of two small layers in place of the pretrained one."""


def compute(config: Config, progress: Progress) -> Arrays:
    """Norms of blocks and of their terms in closed form, norms by products, and singular values of the factors."""
    from attnlab.attention.hessian import layer_curvature

    (model, risk), task = model_and_risk(config), progress.add_task("closed form", total=2, status="derivatives")
    path = f"transformer/layer_{model.config.transformer.layers - 1}/attention"
    network = layer_curvature(risk, model.params, path)
    progress.update(task, advance=1, status="blocks")
    formulas, terms = norms_of_terms(network)
    arrays: Arrays = {
        "formats": np.array(model.formats),
        "loss": np.array(float(risk(model.params))),
        "formulas": np.array(formulas),
        "terms": terms,
        "exact": {
            part: np.array([[float(found[row, column]) for column in EXACT] for row in EXACT])
            for part, found in network.norms(EXACT).items()
        },
        "factors": {name: np.linalg.svd(matrix, compute_uv=False) for name, matrix in factors(network).items()},
    }
    progress.advance(task)
    return arrays | {"products": measured(config, risk, model.params, path, progress)}


def model_and_risk(config: Config):
    """The model with its layers side by side, and the objective of one text."""
    from attnlab.models.adapters import from_linen
    from attnlab.models.pretrained import load, smollm2
    from attnlab.models.transformer import LanguageModel, unstack_layers

    other = load_script(analysis_scripts()["language-model-curvature"])
    texts = other.Config(texts=1, length=config.length, dtype=config.dtype, seed=config.seed)
    if config.tiny:
        model = other.tiny_model(texts)
        blocks = replace(model.config.transformer, scan=False, remat=None)
        module = replace(model.config, transformer=blocks)
        params = unstack_layers(model.params)
        model = replace(model, config=module, params=params, predict=from_linen(LanguageModel(module)))
    else:
        options = {"dtype": config.dtype, "scan": False, "remat": None, "factored": True}
        model = smollm2(**options) if config.model is None else load(config.model, **options)
    risks, _ = other.risks_of(model, texts)
    return model, risks[0]


def norms_of_terms(network) -> tuple[list[str], np.ndarray]:
    """Part, block and formula of every term of the diagonal blocks in closed form, and its norm."""
    import jax

    def terms(network):
        parts = {"ggn": network.ggn(), "functional": network.functional()}
        return [
            (f"{PARTS[part]}, {name}: {term.formula}", replace(blocks[name, name], terms=(term,)))
            for part, blocks in parts.items()
            for name in EXACT
            for term in blocks[name, name].terms
        ]

    formulas: list[str] = []

    def norms(network):  # in one program, in which the blocks that are not asked for are never built
        found = terms(network)
        formulas[:] = [formula for formula, _ in found]
        return [block.norm() for _, block in found]

    return formulas, np.array([float(norm) for norm in jax.jit(norms)(network)])


def factors(network) -> dict[str, np.ndarray]:
    """Data, weights and moments of the first head, as matrices."""
    point, tokens = network.point, network.tokens
    found = {"tokens X": point.inputs[0], "first moments m": tokens.first[:, 0]}
    found |= {"values W_V": point.value[0], "keys W_K": point.key[0], "queries W_Q": point.query[0]}
    if tokens.pairs is not None:
        spread = np.einsum("nj,njc->njc", np.asarray(tokens.pairs.slopes[:, 0]), np.asarray(tokens.pairs.keys[:, 0]))
        found["weighted keys s_ij κ_ij"] = spread.reshape(-1, spread.shape[-1])
    return {name: np.asarray(matrix, float) for name, matrix in found.items()}


def measured(config: Config, risk, params, path: str, progress: Progress) -> Arrays:
    """Frobenius norms of the diagonal blocks by products, and their standard errors: (parts, blocks, 2)."""
    import jax

    from attnlab.curvature import frobenius_norm, functional, ggn, hessian

    task, rows = progress.add_task("products", total=len(PARTS) * len(MEASURED), status=""), []
    for build in (hessian, ggn, functional):
        row = []
        for place, name in enumerate(MEASURED):
            progress.update(task, advance=1, status=f"{build.__name__}, {name}")
            operator = build(risk, params, block=f"{path.removeprefix('transformer/')}/{name}", check=False)
            key = jax.random.fold_in(jax.random.key(config.seed), place)
            norm = frobenius_norm(operator, key, samples=config.samples)
            row.append([float(norm.value), float(norm.standard_error)])
        rows.append(row)
    return dict(zip(PARTS, np.array(rows), strict=True))


def plot(arrays: Arrays, config: Config):
    """Norms of the diagonal blocks, exact and by products, and how concentrated data, weights and moments are."""
    from attnlab.plotting.panels import panels

    worst, mixed = deviations(arrays).max(), arrays["exact"]["functional"][0, 1] / arrays["exact"]["ggn"][0, 1]
    message = (
        f"Closed form of a language model's last attention layer: within {worst:.1f} standard errors of products,\n"
        rf"$\|H_f\|$ is {mixed:.2g} times $\|H_o\|$ between value and output"
    )
    note = f"bars: two standard errors over {config.samples} vectors; weights dequantised from 4 bits"
    titles = ("bars exact, marks by products", "data, weights and moments, first head")
    figure, axes = panels(message, titles, note=note if not config.tiny else "a small random model", height=3.3)
    plot_blocks(axes[0], arrays)
    for name, values in arrays["factors"].items():
        color, line = factor_look(name)
        axes[1].plot(np.arange(1, len(values) + 1), values / values[0], line, color=color, label=mathtext(name))
    axes[1].set(xscale="log", yscale="log", xlabel="place of the singular value", ylim=(1e-5, 1.5))
    axes[1].set_ylabel("singular value / largest")
    axes[1].legend(loc="lower left", fontsize=7.5)
    return figure


def factor_look(name: str) -> tuple[str, str]:
    """Colour and line: weights in the colour of their block, tokens in black, moments in grey."""
    from attnlab.plotting.style import BLOCKS

    weights = {"values": ("value", "-"), "keys": ("key", "--"), "queries": ("query", "-.")}
    kind = name.split()[0]
    if kind in weights:
        block, line = weights[kind]
        return BLOCKS[block][0], line
    return {"tokens": ("black", "-"), "first": ("0.45", "--")}.get(kind, ("0.45", ":"))


def mathtext(words: str) -> str:
    """Words in which names with an index, such as W_V, are set as mathematics."""
    indexed = re.sub(r"(\w+)_([A-Za-z]+)", r"$\1_{\2}$", words)
    return indexed.replace("$sum", r"$\Sigma").replace("ᵀ", r"$^\top$")


def plot_blocks(axes, arrays: Arrays) -> None:
    from attnlab.plotting.style import PARTS as LOOKS

    exact = [(name, place, place) for place, name in enumerate(EXACT)] + [("value-\noutput", 0, 1)]
    names = [*MEASURED, "value-\noutput"]
    for number, (part, label) in enumerate(PARTS.items()):
        shift, found = 0.25 * (number - 1), arrays["products"][part]
        color = "0.6" if part == "hessian" else LOOKS[part][0]
        places = np.array([names.index(name) for name, _, _ in exact])
        norms = [arrays["exact"][part][row, column] for _, row, column in exact]
        axes.bar(places + shift, norms, 0.22, color=color, label=f"${label}$")
        marks = {"fmt": LOOKS[part][1], "color": "black", "capsize": 2, "markersize": 3}
        axes.errorbar(np.arange(len(MEASURED)) + shift, found[:, 0], 2 * found[:, 1], **marks)
    axes.set(yscale="log", xlabel="block", ylabel="Frobenius norm")
    axes.set_xticks(np.arange(len(names)), names)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.25)
    axes.legend(loc="upper center", ncols=3)


def details(arrays: Arrays, config: Config):
    """The norm of every term of the closed form, under its formula."""
    from attnlab.plotting.panels import panels
    from attnlab.plotting.style import PARTS as LOOKS

    order = np.argsort(arrays["terms"])
    message = f"The largest of {len(order)} terms of the diagonal blocks has norm {arrays['terms'].max():.3g}"
    titles = ("terms of the closed form, each above its bar",)
    figure, (axes,) = panels(message, titles, columns=1, height=0.4 * len(order) + 0.6)
    for height, place in enumerate(order):
        block, formula = str(arrays["formulas"][place]).split(": ", 1)
        part = LOOKS["ggn" if block.startswith("H_o") else "functional"]
        axes.barh(height, arrays["terms"][place], 0.35, color=part[0])
        axes.annotate(mathtext(f"{block}:  {formula}"), (0, height + 0.22), fontsize=8, va="bottom")
    axes.set(yticks=[], xlabel="Frobenius norm", xlim=(0, None), ylim=(-0.4, len(order) - 0.2))
    return figure


def deviations(arrays: Arrays) -> np.ndarray:
    """Of the closed form from the measured norms, in standard errors: (parts, blocks)."""
    return np.array(
        [
            np.abs(np.diag(arrays["exact"][part]) - found[: len(EXACT), 0]) / found[: len(EXACT), 1]
            for part, found in arrays["products"].items()
        ]
    )


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """The closed form agrees with products; the functional part where it mixes parameters."""
    exact = arrays["exact"]
    mixed = exact["functional"][0, 1] / exact["ggn"][0, 1]
    return [
        at_most(
            "closed form against products, in standard errors, the worst of nine",
            deviations(arrays).max(),
            4.0,
            because="of nine normal deviates one is beyond 4 in one run of 1,800",
            source="arXiv 2410.10986, theorems 3.1 and 3.2, with rotary positions",
        ),
        at_least("|H_f| / |H_o| of the block between value and output", mixed, 1.0, source="measured here"),
    ]


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """Norms in closed form beside those by products."""
    table = Table("block", *(f"|{label}|" for label in PARTS.values()), title=f"loss {float(arrays['loss']):.3f}")
    for place, name in enumerate(MEASURED):
        cells = []
        for part in PARTS:
            value, error = arrays["products"][part][place]
            closed = f"{arrays['exact'][part][place, place]:.4g}; " if name in EXACT else ""
            cells.append(f"{closed}{value:.3g} ± {error:.1g}")
        table.add_row(name, *cells)
    for row, column in ((0, 1), (0, 2), (1, 2)):
        table.add_row(
            f"{EXACT[row]} x {EXACT[column]}", *(f"{arrays['exact'][part][row, column]:.4g}" for part in PARTS)
        )
    return [table]


ANALYSIS = Analysis(
    "language-model-layer", Config, compute, plot, tables, findings, __doc__, slow=True, details=details
)

if __name__ == "__main__":
    ANALYSIS.main()
