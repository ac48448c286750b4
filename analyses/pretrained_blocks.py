"""Curvature of the query, key and value matrices in every layer of a pretrained sentence encoder, on real sentences.

MiniLM (six layers, 22.7 million parameters) with the contrastive loss it was trained with: each sentence of the Python
language reference is told from others as the one before its successor. Norms and spectra of the blocks of H, H_o and
H_f beside those at BERT's initialisation: the value block's lead over query and key (Ormaniec, Dangel, Singh, arXiv
2410.10986), which their theory and experiments have at initialisation, in a trained network.
"""

import itertools
import string
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from rich.progress import Progress
from rich.table import Table

from attnlab.analysis import Analysis, Arrays, SinglePrecisionConfig
from attnlab.expectation import Expectation, at_least, at_most

MATRICES = ("query", "key", "value")
PARTS = {"hessian": "H", "ggn": "H_o", "functional": "H_f"}
WEIGHTS = {"trained": "trained", "initial": "at initialisation"}
SCALE = 20.0  # of the cosines, as in this model's training


@dataclass(frozen=True)
class Config(SinglePrecisionConfig):
    """Options of the analysis."""

    SMOKE: ClassVar = {"pairs": 3, "length": 8, "texts": 2, "steps": 4, "tiny": True}

    pairs: int = 12
    """Pairs of neighbouring sentences."""
    length: int = 24
    """Tokens that are read of each sentence."""
    texts: int = 6
    """Draws of the pairs, each with a random vector of its own for every spectrum: error bars are over both."""
    steps: int = 8
    """Lanczos steps of each."""
    tiny: bool = False
    """A random encoder of one small layer in place of the pretrained one."""


def compute(config: Config, progress: Progress) -> Arrays:
    """Gauss rules (texts, steps) of every block, by weights, layer, part and matrix."""
    import jax

    from attnlab.curvature import functional, ggn, hessian, spectral_density

    build = {"hessian": hessian, "ggn": ggn, "functional": functional}
    encoder, weights, texts = problem(config)
    risks, layers = [contrastive_risk(encoder, pairs) for pairs in texts], encoder.config.transformer.layers
    keys = jax.random.split(jax.random.key(config.seed), len(risks))
    arrays: Arrays = {"dimension": encoder.config.width**2}
    for name, params in weights.items():
        blocks = {str(layer): {part: {} for part in PARTS} for layer in range(layers)}
        losses = np.mean([loss_and_accuracy(risk, params) for risk in risks], axis=0)
        arrays[name] = {"loss": losses, "layers": blocks}
    cases = list(itertools.product(range(layers), PARTS, WEIGHTS, range(len(MATRICES))))
    task = progress.add_task("blocks", total=len(cases), status="")
    for layer, part, name, number in cases:
        progress.update(task, status=f"layer {layer + 1}, {PARTS[part]}, {MATRICES[number]}, {WEIGHTS[name]}")
        found = []
        for risk, key in zip(risks, keys, strict=True):
            operator = build[part](*in_one_matrix(risk, weights[name], f"layer_{layer}", number))
            found.append(spectral_density(operator, key, samples=1, steps=config.steps))
        rules = {field: np.concatenate([getattr(each, field) for each in found]) for field in ("nodes", "weights")}
        arrays[name]["layers"][str(layer)][part][MATRICES[number]] = rules
        progress.advance(task)
    return arrays


def problem(config: Config):
    """The encoder, its weights (trained, initial), and every draw of the pairs as tokens (2, pairs, length)."""
    import jax

    from attnlab.data.sentences import sentence_pairs
    from attnlab.models.pretrained import bert_config, minilm, wordpiece
    from attnlab.models.text_encoder import TextEncoder, TokenBatch

    data_key, init_key, tiny_key = jax.random.split(jax.random.key(config.seed), 3)
    if config.tiny:
        letters = string.ascii_lowercase
        tokenizer = wordpiece(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters)])
        size = {"layers": 1, "width": 8, "heads": 2, "vocabulary": tokenizer.vocabulary, "length": config.length}
        encoder = TextEncoder(bert_config(**size))
    else:
        found = minilm(dtype=None)
        encoder, trained, tokenizer = TextEncoder(found.config), found.params, found.tokenizer
    texts = []
    for key in jax.random.split(data_key, config.texts):
        firsts, seconds = sentence_pairs(key, config.pairs)
        batch = tokenizer.encode(firsts + seconds, config.length)
        texts.append(TokenBatch(*(leaf.reshape(2, config.pairs, config.length) for leaf in batch)))
    init = jax.jit(encoder.init)
    if config.tiny:
        trained = init(tiny_key, texts[0])["params"]
    return encoder, {"trained": trained, "initial": init(init_key, texts[0])["params"]}, texts


def contrastive_risk(encoder, pairs):
    """The loss of the model's training: each first text is to be told which of the second ones follows it."""
    import jax.numpy as jnp

    from attnlab.losses import cross_entropy
    from attnlab.models.adapters import from_linen
    from attnlab.models.text_encoder import pair_logits
    from attnlab.objectives import objective

    return objective(pair_logits(from_linen(encoder), SCALE), cross_entropy, pairs, jnp.arange(len(pairs.mask[0])))


def loss_and_accuracy(risk, params) -> tuple[float, float]:
    """The contrastive loss, and how many first texts find their successor nearest."""
    import jax
    import jax.numpy as jnp

    logits = jax.jit(risk.predict)(params, risk.inputs)
    return float(risk.loss(logits, risk.targets)), float(jnp.mean(jnp.argmax(logits, axis=1) == risk.targets))


def in_one_matrix(risk, params, layer: str, number: int):
    """The risk as a function of one matrix of one layer, and its place there.

    Which of the three matrices is an array, so that one compiled program serves all; `hessian(..., block=)` would
    compile each.
    """
    from jax.tree_util import Partial

    from attnlab.objectives import Objective

    point = params["transformer"][layer]["attention"][MATRICES[number]]
    predict = Partial(PredictFromMatrix(layer), np.asarray(number), params, risk.predict)
    return Objective(predict, risk.loss, risk.inputs, risk.targets), point


@dataclass(frozen=True)
class PredictFromMatrix:
    """`predict` as a function of the matrix with a number of `MATRICES` in one layer, the others held fixed."""

    layer: str

    def __call__(self, number, params, predict, matrix, inputs):
        """See the class."""
        import jax.numpy as jnp

        transformer = params["transformer"]
        attention = transformer[self.layer]["attention"]
        placed = {name: jnp.where(number == i, matrix, attention[name]) for i, name in enumerate(MATRICES)}
        layer = transformer[self.layer] | {"attention": attention | placed}
        return predict(params | {"transformer": transformer | {self.layer: layer}}, inputs)


def density(arrays: Arrays, name: str, layer: int, part: str, matrix: str):
    """The spectral density of a block."""
    from attnlab.curvature import SpectralDensity

    return SpectralDensity(**arrays[name]["layers"][str(layer)][part][matrix])


def norm(arrays: Arrays, *where) -> tuple[float, float]:
    """Frobenius norm of a block from its density's second moment, and its standard error to first order."""
    from attnlab.curvature.estimators import square_root

    root, n = square_root(density(arrays, *where).moment(2)), int(arrays["dimension"])
    return float(n**0.5 * root.value), float(n**0.5 * root.standard_error)


def norms(arrays: Arrays, name: str, part: str, matrix: str) -> np.ndarray:
    """Norm and standard error in every layer, (2, layers)."""
    return np.array([norm(arrays, name, layer, part, matrix) for layer in range(layers_of(arrays))]).T


def layers_of(arrays: Arrays) -> int:
    return len(arrays["trained"]["layers"])


def lead(arrays: Arrays, name: str, part: str) -> np.ndarray:
    """Norm of the value block over the geometric mean of query's and key's in every layer, and its standard error.

    The three share their samples but are taken as independent, which if anything widens the bars."""
    found = {matrix: norms(arrays, name, part, matrix) for matrix in MATRICES}
    (value, _), (query, _), (key, _) = (found[matrix] for matrix in ("value", "query", "key"))
    ratio = value / np.sqrt(query * key)
    relative = {matrix: error / norm for matrix, (norm, error) in found.items()}
    return np.array(
        [ratio, ratio * np.sqrt(relative["value"] ** 2 + (relative["query"] ** 2 + relative["key"] ** 2) / 4)]
    )


def negative_shares(arrays: Arrays, name: str, part: str, matrix: str) -> np.ndarray:
    """Share of the negative eigenvalues in the sum of moduli and its standard error in every layer, (2, layers)."""
    found = [density(arrays, name, layer, part, matrix).negative_share() for layer in range(layers_of(arrays))]
    return np.array([(share.value, share.standard_error) for share in found]).T


def plot(arrays: Arrays, config: Config):
    """By layer: norms of H, the value block's lead, H_o over H_f, and the share of negative eigenvalues."""
    from attnlab.plotting.panels import legend_below, panels

    trained, initial = (lead(arrays, name, "hessian")[0] for name in WEIGHTS)
    message = (
        f"The value block leads query and key {trained.min():.0f} to {trained.max():.0f} times when trained,\n"
        f"{initial.min():.0f} to {initial.max():.0f} times at initialisation"
    )
    titles = ("blocks of $H$", "lead of the value block", "outer over functional part", "negative eigenvalues of $H$")
    figure, axes = panels(message, titles, note=note(config))
    plot_norms(axes[0], arrays, "hessian")
    plot_lead(axes[1], arrays)
    plot_balance(axes[2], arrays)
    plot_shares(axes[3], arrays)
    legend_below(figure, axes[:2], columns=4)
    return figure


def note(config: Config) -> str:
    return (
        "filled, solid: trained; open, dotted: at initialisation; "
        f"bars: two standard errors over {config.texts} texts, each with its own vector"
    )


def details(arrays: Arrays, config: Config):
    """Norms of H_o and H_f, ends of the spectra of H, and the spectra of one layer."""
    from attnlab.plotting.panels import legend_below, panels

    outer = lead(arrays, "initial", "ggn")[0]
    message = f"At initialisation the value block of $H_o$ leads {outer.min():.0f} to {outer.max():.0f} times"
    middle = layers_of(arrays) // 2
    titles = (
        "blocks of $H_o$",
        "blocks of $H_f$",
        "ends of the spectra of $H$, trained",
        f"layer {middle + 1}, trained",
    )
    figure, axes = panels(message, titles, note=note(config))
    plot_norms(axes[0], arrays, "ggn")
    plot_norms(axes[1], arrays, "functional")
    axes[1].sharey(axes[0])
    plot_ends(axes[2], arrays)
    plot_counts(axes[3], arrays, middle)
    legend_below(figure, axes[0], columns=3)
    return figure


LOOK = {"trained": ("-", None), "initial": (":", "none")}


def plot_norms(axes, arrays: Arrays, part: str) -> None:
    from attnlab.plotting.style import BLOCKS

    for matrix in MATRICES:
        for name in WEIGHTS:
            draw(axes, *norms(arrays, name, part, matrix), BLOCKS[matrix], name, matrix)
    axes.set(yscale="log", ylabel="Frobenius norm")


def plot_lead(axes, arrays: Arrays) -> None:
    from attnlab.plotting.style import PARTS as LOOKS

    for part in PARTS:
        for name in WEIGHTS:
            draw(axes, *lead(arrays, name, part), LOOKS[part], name, LOOKS[part][2])
    axes.axhline(1, color="black", linewidth=0.7)
    axes.set(yscale="log", ylabel=r"$\Vert VV\Vert \, / \sqrt{\Vert QQ\Vert \, \Vert KK\Vert}$")


def plot_balance(axes, arrays: Arrays) -> None:
    from attnlab.plotting.style import BLOCKS

    for matrix in MATRICES:
        for name in WEIGHTS:
            outer, outer_error = norms(arrays, name, "ggn", matrix)
            inner, inner_error = norms(arrays, name, "functional", matrix)
            error = outer / inner * np.hypot(outer_error / outer, inner_error / inner)
            draw(axes, outer / inner, error, BLOCKS[matrix], name, matrix)
    axes.axhline(1, color="black", linewidth=0.7)
    axes.set(yscale="log", ylabel=r"$\Vert H_o \Vert / \Vert H_f \Vert$")


def draw(axes, value, error, look: tuple[str, str, str], name: str, label: str) -> None:
    """A value in every layer with bars, in a colour and marker; only filled ones go into the legend."""
    from attnlab.plotting.curves import points_with_bars

    (color, marker, _), (line, face), layers = look, LOOK[name], 1 + np.arange(len(value))
    options = {"color": color, "markerfacecolor": face, "label": label if face is None else "_nolegend_"}
    points_with_bars(axes, layers, value, error, f"{marker}{line}", **options)
    axes.set(xlabel="layer", xticks=layers)


def plot_ends(axes, arrays: Arrays) -> None:
    """The largest and the lowest Ritz value of every trained block, over the samples, and how far the others reach: the
    eigenvalues lie at these or beyond."""
    from attnlab.plotting.style import BLOCKS

    layers = 1 + np.arange(layers_of(arrays))
    for matrix in MATRICES:
        color, marker, _ = BLOCKS[matrix]
        nodes = np.array([density(arrays, "trained", layer - 1, "hessian", matrix).nodes for layer in layers])
        for sign, line, face in ((1, "-", None), (-1, ":", "none")):
            reached = np.max(sign * nodes, axis=2)  # (layers, samples)
            furthest = np.max(reached, axis=1)
            bars = (furthest - np.min(reached, axis=1), np.zeros(len(layers)))
            axes.errorbar(layers, furthest, bars, fmt=f"{marker}{line}", color=color, markerfacecolor=face, capsize=2)
    axes.set(yscale="log", xlabel="layer", xticks=layers)
    axes.set_ylabel(r"largest $|\lambda|$ (open: of the negative ones)")


def plot_shares(axes, arrays: Arrays) -> None:
    from attnlab.plotting.style import BLOCKS

    for matrix in MATRICES:
        for name in WEIGHTS:
            draw(axes, *negative_shares(arrays, name, "hessian", matrix), BLOCKS[matrix], name, matrix)
    axes.axhline(0.5, color="black", linewidth=0.7)
    axes.set_ylabel(r"their share in $\sum |\lambda|$")


def plot_counts(axes, arrays: Arrays, layer: int) -> None:
    """How many eigenvalues are above a value in modulus, for the positive and the negative ones of a layer, with bands
    of two standard errors over the samples."""
    from attnlab.plotting.spectra import draw_counts
    from attnlab.plotting.style import BLOCKS

    n = int(arrays["dimension"])
    for matrix in MATRICES:
        draw_counts(axes, density(arrays, "trained", layer, "hessian", matrix), n, BLOCKS[matrix][0])
    top = max(np.abs(density(arrays, "trained", layer, "hessian", matrix).nodes).max() for matrix in MATRICES)
    axes.set(xlim=(3e-4 * top, 2 * top), ylim=(0.3, None), xlabel=r"$|\lambda|$ (dotted: negative eigenvalues)")


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """The value block's lead: large at initialisation, smaller and still there in the trained network."""
    source, few = "Ormaniec, Dangel, Singh, arXiv 2410.10986, for the start; measured here", "from few samples"
    leads = {name: lead(arrays, name, "hessian")[0] for name in WEIGHTS}
    outer = np.min(lead(arrays, "initial", "ggn")[0])
    what = "norm of the value block over that of query and key, H"
    return [
        at_least(f"{what}, trained: least of the layers", leads["trained"].min(), 3.0, because=few, source=source),
        at_most(f"{what}, trained: largest", leads["trained"].max(), 12.0, because=few, source=source),
        at_least(f"{what}, at initialisation: least", leads["initial"].min(), 20.0, because=few, source=source),
        at_least("the same of H_o at initialisation", outer, 200.0, because=few, source=source),
    ]


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """Norms by layer, part and matrix with their standard errors, and the lead of the value block."""
    found = []
    for name, caption in WEIGHTS.items():
        loss, accuracy = arrays[name]["loss"]
        title = f"{caption}: loss {loss:.3g} (chance {np.log(config.pairs):.3g}), {accuracy:.0%} of pairs found"
        heads = [f"|{matrix}|" for matrix in MATRICES]
        table = Table("layer", "part", *heads, "value / sqrt(query key)", "negative share Q, K, V", title=title)
        for layer, part in itertools.product(range(layers_of(arrays)), PARTS):
            cells = ["{:.3g} ± {:.1g}".format(*norms(arrays, name, part, matrix)[:, layer]) for matrix in MATRICES]
            cells.append("{:.3g} ± {:.1g}".format(*lead(arrays, name, part)[:, layer]))
            shares = [negative_shares(arrays, name, part, matrix)[:, layer] for matrix in MATRICES]
            shown = ", ".join(f"{share:.0%} ± {error:.1%}" for share, error in shares)
            table.add_row(str(layer + 1), PARTS[part], *cells, shown)
        found.append(table)
    return found


ANALYSIS = Analysis("pretrained-blocks", Config, compute, plot, tables, findings, __doc__, slow=True, details=details)

if __name__ == "__main__":
    ANALYSIS.main()
