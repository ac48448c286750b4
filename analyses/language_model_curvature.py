"""Curvature of a pretrained language model on real text, matrix by matrix, exact products and no approximation of them.

SmolLM2 (134.5 million parameters, 30 layers; its weights are dequantised from 4 bits) on paragraphs of the Python
language reference. For the matrices of some layers the trace and the Frobenius norm of their diagonal block of H, H_o
and H_f, trained and at initialisation: which matrix carries the curvature, where in depth, and whether the functional
part is still the larger one (Ormaniec, Dangel, Singh, arXiv 2410.10986, have theory and small networks at
initialisation). And the spectra of H and of the Gauss-Newton matrix in all parameters. `--model` is for your weights.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from rich.progress import Progress
from rich.table import Table

from attnlab.analysis import Analysis, Arrays, SinglePrecisionConfig
from attnlab.expectation import Expectation, at_least, at_most

PARTS = {"hessian": "H", "ggn": "H_o", "functional": "H_f"}
WEIGHTS = {"trained": "trained", "initial": "at initialisation"}
MATRICES = {
    **{name: ("attention", name) for name in ("query", "key", "value", "output")},
    **{name: ("mlp", name) for name in ("gate", "up", "down")},
    "attention norm": ("attention_norm", "scale"),
    "mlp norm": ("mlp_norm", "scale"),
}
"""Where a matrix stands in a layer's parameters; a layer may lack some."""


@dataclass(frozen=True)
class Config(SinglePrecisionConfig):
    """Options of the analysis."""

    SMOKE: ClassVar = {"texts": 2, "length": 6, "layers": 2, "samples": 2, "steps": 3, "tiny": True}

    model: Path | None = None
    """A folder or file of pretrained weights; the packaged SmolLM2 if none is named."""
    texts: int = 3
    """Paragraphs, each with random vectors of its own: error bars are over both."""
    length: int = 64
    """Tokens that are predicted of each."""
    layers: int = 5
    """How many layers are looked at, the first and the last among them."""
    samples: int = 3
    """Random vectors of each spectrum."""
    steps: int = 24
    """Lanczos steps of each."""
    tiny: bool = False
    """A random model of two small layers in place of the pretrained one."""


def compute(config: Config, progress: Progress) -> Arrays:
    """Of every block, by weights and text, v.Av and |Av|^2 for a random v; Gauss rules of the whole; the losses."""
    from attnlab.checks import check_range
    from attnlab.runs import stored_arrays

    check_range("texts", config.texts, 2, 10_000, "Error bars are over the texts.")
    model = language_model(config)
    (risks, whole), weights = risks_of(model, config), weights_of(model, config)
    chosen = chosen_layers(config, model.config.transformer.layers)
    blocks = blocks_of(weights["trained"], chosen)
    arrays: Arrays = {"layers": chosen, "formats": np.array(model.formats)}
    task = progress.add_task("blocks", total=len(weights) * len(risks) * len(blocks), status="")
    for name, params in weights.items():
        parts = []
        for number, risk in enumerate(risks):
            progress.update(task, status=f"{WEIGHTS[name]}, text {number + 1}")
            path = config.scratch() / f"{name}-{number}.npz"
            parts.append(stored_arrays(path, lambda p=params, r=risk, n=number: measured(r, p, blocks, config, n)))
            progress.advance(task, len(blocks))
        arrays[name] = {field: np.stack([part[field] for part in parts]) for field in parts[0]}
    arrays["spectra"] = spectra(whole, weights["trained"], config, progress)
    arrays["blocks"] = np.array([f"{matrix}@{layer}" for matrix, layer, _ in blocks])
    return arrays


def language_model(config: Config):
    """The model, ready for an objective."""
    from attnlab.models.pretrained import load, smollm2

    if config.tiny:
        return tiny_model(config)
    options = {"dtype": config.dtype, "scan": True, "remat": "elementwise", "factored": True}
    return smollm2(**options) if config.model is None else load(config.model, **options)


def tiny_model(config: Config):
    """A random model of SmolLM2's architecture, two layers of width eight."""
    import jax

    from attnlab.models.adapters import from_linen
    from attnlab.models.attention import AttentionConfig
    from attnlab.models.positions import Rotary
    from attnlab.models.pretrained import Pretrained
    from attnlab.models.transformer import LanguageModel, LanguageModelConfig, TransformerConfig

    head = AttentionConfig(4, 4, 2, output_dim=8, key_value_heads=1, rotary=Rotary(), causal=True)
    norms = {"normalization": "rms_norm", "final_norm": True, "scan": True, "remat": "elementwise"}
    blocks = TransformerConfig(head, 2, 12, "gated", "silu", **norms)
    size = {"vocabulary": 30, "length": config.length, "width": 8, "dtype": config.dtype}
    module = LanguageModel(LanguageModelConfig(blocks, **size, positions="none", tied=True, factored=True))
    params = module.init(jax.random.key(0), np.zeros((1, config.length), int))["params"]
    return Pretrained(module.config, params, from_linen(module), None, "a random model", "random numbers")


def risks_of(model, config: Config) -> tuple[list, object]:
    """The objective of each text, and that of all: tokens predicted from those before them, padding of weight 0."""
    import jax

    from attnlab.data.sentences import paragraphs
    from attnlab.losses import cross_entropy
    from attnlab.models.pretrained import next_tokens
    from attnlab.objectives import objective

    if model.tokenizer is None:
        shape = (config.texts, config.length)
        inputs = jax.random.randint(jax.random.key(config.seed), shape, 0, model.config.vocabulary)
        targets, counted = inputs[:, ::-1], np.ones(shape, config.dtype)
    else:
        # The first words of the longest paragraphs: each fills its length.
        longest = sorted(paragraphs(), key=len, reverse=True)[: config.texts]
        inputs, targets, counted = next_tokens(model.tokenizer.encode(longest, config.length + 1))

    def on(rows: slice):
        return objective(model.predict, cross_entropy, inputs[rows], targets[rows], weights=counted[rows])

    return [on(slice(i, i + 1)) for i in range(config.texts)], on(slice(None))


def weights_of(model, config: Config) -> dict:
    """The pretrained weights and random ones of the same model's initialisation."""
    import jax

    from attnlab.models.transformer import LanguageModel

    key, tokens = jax.random.key(config.seed), np.zeros((1, 2), int)
    return {"trained": model.params, "initial": jax.jit(LanguageModel(model.config).init)(key, tokens)["params"]}


def chosen_layers(config: Config, layers: int) -> np.ndarray:
    return np.unique(np.linspace(0, layers - 1, min(config.layers, layers)).round().astype(int))


def blocks_of(params, chosen: np.ndarray) -> list[tuple[str, int, tuple[str, ...]]]:
    """(matrix, layer, path) of every block; the embedding counts as layer -1. The layers are stacked on the first axis
    of their arrays."""
    layers = params["transformer"]["layers"]
    found = [("embedding", -1, ("token_embedding",))]
    for matrix, (module, leaf) in MATRICES.items():
        if leaf in layers.get(module, {}):
            path = ("transformer", "layers", module, leaf)
            found += [(matrix, int(layer), path) for layer in chosen]
    return found


def measured(risk, params, blocks, config: Config, number: int) -> Arrays:
    """Traces (blocks, 3) and squared norms (blocks, 3) of H, H_o and H_f by one random vector each, and the loss.

    For v of independent signs within the block, E[v.Av] = tr A and E|Av|^2 = |A|^2 (Hutchinson, 1990); what a product
    with all parameters says of the others is left out.
    """
    import jax

    from attnlab.curvature import ggn, hessian

    key = jax.random.fold_in(jax.random.key(config.seed), number)
    found = {"traces": np.zeros((len(blocks), 3)), "squares": np.zeros((len(blocks), 3))}
    operators = [build(risk, params, check=False) for build in (hessian, ggn)]
    zeros = jax.tree.map(jax.numpy.zeros_like, params)
    for place, (_, layer, path) in enumerate(blocks):
        vector, signs = random_in(zeros, path, layer, jax.random.fold_in(key, place))
        whole, outer = (np.asarray(taken(operator.mv(vector), path, layer), float) for operator in operators)
        for column, image in enumerate((whole, outer, whole - outer)):
            found["traces"][place, column] = np.vdot(np.asarray(signs, float), image)
            found["squares"][place, column] = np.sum(image**2)
    return {**found, "loss": np.array(float(jax.jit(lambda risk, params: risk(params))(risk, params)))}


def random_in(zeros, path: tuple[str, ...], layer: int, key):
    """Independent signs in one block, zeros elsewhere; and the signs alone."""
    import jax

    leaf = taken(zeros, path, layer)
    signs = jax.random.rademacher(key, leaf.shape, leaf.dtype)

    def put(tree, path):
        if not path:
            return signs if layer < 0 else tree.at[layer].set(signs)
        return {**tree, path[0]: put(tree[path[0]], path[1:])}

    return put(zeros, path), signs


def taken(tree, path: tuple[str, ...], layer: int):
    for name in path:
        tree = tree[name]
    return tree if layer < 0 else tree[layer]


def spectra(risk, params, config: Config, progress: Progress) -> Arrays:
    """Gauss rules of H and of the Gauss-Newton matrix, in all parameters and over all texts."""
    import jax

    from attnlab.curvature import ggn, hessian, spectral_density
    from attnlab.runs.session import Session

    found = {"dimension": np.array(sum(leaf.size for leaf in jax.tree.leaves(params)))}
    for number, (part, build) in enumerate({"hessian": hessian, "ggn": ggn}.items()):
        task = progress.add_task(f"spectrum of {PARTS[part]}", total=config.samples * config.steps, status="")

        def report(seen, task=task):
            progress.update(task, completed=seen.products)

        session = Session(directory=config.scratch() / part, report=report)
        operator, key = build(risk, params, check=False), jax.random.fold_in(jax.random.key(config.seed), 1000 + number)
        density = spectral_density(operator, key, samples=config.samples, steps=config.steps, session=session)
        found[part] = {"nodes": np.asarray(density.nodes), "weights": np.asarray(density.weights)}
    return found


def mean_and_error(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Over the texts, the first axis, and with them over the random vectors."""
    return values.mean(axis=0), values.std(axis=0, ddof=1) / len(values) ** 0.5


def places(arrays: Arrays, matrix: str) -> np.ndarray:
    """Where a matrix's blocks stand, layer by layer."""
    names = [str(name).split("@")[0] for name in arrays["blocks"]]
    return np.array([place for place, name in enumerate(names) if name == matrix], int)


def matrices(arrays: Arrays) -> list[str]:
    return [matrix for matrix in MATRICES if len(places(arrays, matrix))]


def norms(arrays: Arrays, name: str, part: str, matrix: str) -> np.ndarray:
    """Frobenius norm in each layer and its standard error to first order, (2, layers)."""
    column = list(PARTS).index(part)
    square, error = mean_and_error(arrays[name]["squares"][:, places(arrays, matrix), column])
    root = np.sqrt(square)
    return np.array([root, error / (2 * np.where(root > 0, root, 1))])


def traces(arrays: Arrays, name: str, part: str, matrix: str) -> np.ndarray:
    """Trace in each layer and its standard error, (2, layers)."""
    column = list(PARTS).index(part)
    return np.array(mean_and_error(arrays[name]["traces"][:, places(arrays, matrix), column]))


def lead(arrays: Arrays, name: str, part: str) -> np.ndarray:
    """Norm of the value block over the geometric mean of query's and key's, and its standard error, (2, layers)."""
    (value, v), (query, q), (key, k) = (norms(arrays, name, part, matrix) for matrix in ("value", "query", "key"))
    ratio = value / np.sqrt(query * key)
    return np.array([ratio, ratio * np.sqrt((v / value) ** 2 + (q / query) ** 2 / 4 + (k / key) ** 2 / 4)])


def functional_share(arrays: Arrays, name: str, matrix: str) -> np.ndarray:
    """|H_f| / |H_o| in each layer and its standard error, the two taken as independent, (2, layers)."""
    (inner, i), (outer, o) = (norms(arrays, name, part, matrix) for part in ("functional", "ggn"))
    return np.array([inner / outer, inner / outer * np.hypot(i / inner, o / outer)])


def plot(arrays: Arrays, config: Config):
    """Norms of the blocks of H, the value block's lead, the functional part against the outer one, and the spectra."""
    from attnlab.plotting.panels import legend_below, panels

    start, end = (np.median(lead(arrays, name, "hessian")[0]) for name in ("initial", "trained"))
    share = np.median([functional_share(arrays, "trained", matrix)[0] for matrix in matrices(arrays)])
    message = (
        f"{model_name(config)}: the value block leads {start:.2g} times at initialisation, {end:.2g} times trained,\n"
        rf"where $H_f$ is {share:.2g} times $H_o$ (median blocks)"
    )
    titles = (
        "blocks of $H$, trained",
        "lead of the value block",
        "functional over outer part, trained",
        "spectra, trained",
    )
    figure, axes = panels(message, titles, note=note(arrays, config), height=2.9)
    for matrix in matrices(arrays):
        draw(axes[0], arrays, norms(arrays, "trained", "hessian", matrix), matrix)
        draw(axes[2], arrays, functional_share(arrays, "trained", matrix), matrix)
    axes[0].set(yscale="log", ylabel="Frobenius norm")
    axes[2].axhline(1, color="black", linewidth=0.7, linestyle=":")
    axes[2].set(yscale="log", ylabel=r"$\Vert H_f \Vert / \Vert H_o \Vert$")
    plot_lead(axes[1], arrays)
    plot_spectra(axes[3], arrays)
    for axis in axes[:3]:
        axis.set(xlabel="layer", xticks=arrays["layers"] + 1)
    legend_below(figure, axes[0], columns=5)
    return figure


def note(arrays: Arrays, config: Config) -> str:
    """What the weights are and what bars mean."""
    stored = str(arrays["formats"]).replace("Q4_1", "in 4 bits (Q4_1)")
    return f"weights stored: {stored}; bars and bands: two standard errors over {config.texts} texts and their vectors"


def details(arrays: Arrays, config: Config):
    """Norms of the blocks of H at initialisation, and traces trained."""
    from attnlab.plotting.panels import legend_below, panels

    negative = np.mean([np.mean(traces(arrays, "trained", "hessian", matrix)[0] < 0) for matrix in matrices(arrays)])
    message = f"{negative:.0%} of the trained blocks of $H$ have a negative trace"
    titles = ("blocks of $H$, at initialisation", "traces of the blocks of $H$, trained")
    figure, axes = panels(message, titles, note=note(arrays, config), height=2.9)
    for matrix in matrices(arrays):
        draw(axes[0], arrays, norms(arrays, "initial", "hessian", matrix), matrix)
        value, error = traces(arrays, "trained", "hessian", matrix)
        color, style = look(matrix)
        axes[1].errorbar(arrays["layers"] + 1, value, 2 * error, fmt=style, color=color, capsize=2, markersize=3.5)
    axes[0].set(yscale="log", ylabel="Frobenius norm")
    axes[1].axhline(0, color="black", linewidth=0.7)
    axes[1].set(yscale="symlog", ylabel="trace (symmetric logarithm)")
    for axis in axes:
        axis.set(xlabel="layer", xticks=arrays["layers"] + 1)
    legend_below(figure, axes[0], columns=5)
    return figure


def model_name(config: Config) -> str:
    return "A small random model" if config.tiny else "SmolLM2-135M" if config.model is None else config.model.name


def look(matrix: str) -> tuple[str, str]:
    """Colour and line of a matrix: attention's own, solid; those of the MLP and the norms in others, dashed."""
    from attnlab.plotting.style import BLOCKS

    if matrix in BLOCKS:
        color, marker, _ = BLOCKS[matrix]
        return color, f"{marker}-"
    others = [name for name in MATRICES if name not in BLOCKS]
    place = others.index(matrix)
    return ("#7F3B08", "#999933", "black", "0.5", "0.7")[place % 5], f"{'vx*<>'[place % 5]}--"


def draw(axes, arrays: Arrays, found: np.ndarray, matrix: str) -> None:
    """A value in each layer, with bars."""
    from attnlab.plotting.curves import points_with_bars

    color, style = look(matrix)
    points_with_bars(axes, arrays["layers"] + 1, *found, style, color=color, label=matrix, markersize=3.5)


def plot_lead(axes, arrays: Arrays) -> None:
    from attnlab.plotting.curves import points_with_bars
    from attnlab.plotting.style import PARTS as LOOKS

    for name, line, face in (("trained", "-", None), ("initial", ":", "none")):
        for part, label in PARTS.items():
            color, marker, _ = LOOKS[part]
            options = {
                "color": color,
                "markersize": 3.5,
                "markerfacecolor": face,
                "label": f"${label}$, {WEIGHTS[name]}",
            }
            points_with_bars(axes, arrays["layers"] + 1, *lead(arrays, name, part), f"{marker}{line}", **options)
    axes.axhline(1, color="black", linewidth=0.7, linestyle=":")
    axes.set(yscale="log", ylabel=r"$\Vert VV\Vert \, / \sqrt{\Vert QQ\Vert \, \Vert KK\Vert}$")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.4)
    axes.legend(fontsize=7.5, loc="upper center", ncols=2, columnspacing=1, handlelength=1.6)


def density(arrays: Arrays, part: str):
    """The spectral density of the whole."""
    from attnlab.curvature import SpectralDensity

    return SpectralDensity(**arrays["spectra"][part])


def plot_spectra(axes, arrays: Arrays) -> None:
    """How many eigenvalues lie above a value in modulus, with bands of two standard errors over the samples."""
    from attnlab.plotting.spectra import draw_counts
    from attnlab.plotting.style import PARTS as LOOKS

    n = int(arrays["spectra"]["dimension"])
    for part, symbol in (("hessian", "$H$"), ("ggn", "$H_o$")):
        names = {1: symbol, -1: f"{symbol}, negative"}
        draw_counts(axes, density(arrays, part), n, LOOKS[part][0], names.get)
    axes.set_ylim(0.3, 3 * n)
    axes.legend(fontsize=7.5)


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """The value block's lead and the weight of the functional part, at initialisation and trained."""
    source, few = (
        "Ormaniec, Dangel, Singh, arXiv 2410.10986, for the start; measured here",
        "from few texts and vectors",
    )
    here = "measured here"
    leads = {name: np.median(lead(arrays, name, "hessian")[0]) for name in WEIGHTS}
    share = np.median([functional_share(arrays, "trained", matrix)[0] for matrix in matrices(arrays)])
    negative = density(arrays, "ggn").negative_share()
    return [
        at_least("lead of the value block in H at initialisation, median layer", leads["initial"], 1.0, source=source),
        at_least("the same, trained", leads["trained"], 1.0, because=few, source=source),
        at_least("|H_f| / |H_o| of a block, trained: median", share, 1.0, because=few, source=here),
        at_most("negative share of the Gauss-Newton matrix", negative.value, 1e-3, because="rounding", source=here),
    ]


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """Norm of H, |H_f| / |H_o| and trace of every matrix and layer, with standard errors."""
    found = []
    for name, caption in WEIGHTS.items():
        loss, error = mean_and_error(arrays[name]["loss"])
        title = f"{model_name(config)}, {caption}: loss {loss:.3f} ± {error:.3f}; weights: {arrays['formats']}"
        table = Table("matrix", "layer", "|H|", "|H_o|", "|H_f|", "tr H", "tr H_o", title=title)
        for matrix in ("embedding", *matrices(arrays)):
            cells = [norms(arrays, name, part, matrix) for part in PARTS]
            cells += [traces(arrays, name, part, matrix) for part in ("hessian", "ggn")]
            layers = [""] if matrix == "embedding" else [str(layer + 1) for layer in arrays["layers"]]
            for row, layer in enumerate(layers):
                shown = ["{:.3g} ± {:.1g}".format(*cell[:, row]) for cell in cells]
                table.add_row(matrix, layer, *shown)
        found.append(table)
    return found


ANALYSIS = Analysis(
    "language-model-curvature", Config, compute, plot, tables, findings, __doc__, slow=True, details=details
)

if __name__ == "__main__":
    ANALYSIS.main()
