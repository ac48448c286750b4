"""An attention layer of a pretrained language model in closed form: what data, weights and moments make of its Hessian.

SmolLM2's last layer (rotary positions, three queries to a key; weights dequantised from 4 bits) on real text. Behind it
every token goes by itself, so that its value, output and query blocks are exact sums of Kronecker products over tokens,
term by term; a key's block keeps no such form under rotation, and is measured with products, as all are for a check.
`--model` is for your weights.
"""

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
    """Norms of the blocks, exact and by products; of every term; and how concentrated data, weights, moments are."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(16, 4.8), width_ratios=(1, 1.1, 1))
    places = np.arange(len(MEASURED))
    for color, (part, label) in enumerate(PARTS.items()):
        shift, found = 0.25 * (color - 1), arrays["products"][part]
        axes[0].bar(places[:-1] + shift, np.diag(arrays["exact"][part]), 0.22, color=f"C{color}", label=f"${label}$")
        bars = {"fmt": "o", "color": "black", "capsize": 3, "markersize": 3}
        label = "by products" if color == 0 else None
        axes[0].errorbar(places + shift, found[:, 0], 2 * found[:, 1], label=label, **bars)
    axes[0].set(xticks=places, xticklabels=MEASURED, yscale="log", ylabel="Frobenius norm", title="diagonal blocks")
    axes[0].legend(fontsize=8)
    order = np.argsort(arrays["terms"])
    axes[1].barh(np.arange(len(order)), arrays["terms"][order], color="C4", alpha=0.5)
    for height, place in enumerate(order):
        axes[1].annotate(f" {arrays['formulas'][place]}", (0, height), fontsize=6.5, va="center")
    axes[1].set(yticks=[], xlabel="Frobenius norm", title="terms of the closed form, diagonal blocks")
    for name, values in arrays["factors"].items():
        axes[2].plot(np.arange(1, len(values) + 1), values / values[0], label=name)
    axes[2].set(xscale="log", yscale="log", xlabel="number", ylabel="singular value / largest", ylim=(1e-5, 1.5))
    axes[2].set_title("data, weights and moments, first head")
    axes[2].legend(fontsize=7)
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


ANALYSIS = Analysis("language-model-layer", Config, compute, plot, tables, findings, __doc__, slow=True)

if __name__ == "__main__":
    ANALYSIS.main()
