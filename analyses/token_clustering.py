"""Tokens as particles on the sphere: when attention clusters them in theory, and what real tokens do.

Clusters of tokens on the circle against the fastest growing mode, equal angles against their law, the transition of
long contexts; and the tokens of a sentence encoder and of a language model on English prose, layer by layer, where a
cosine within a text means something only beside that between texts.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from rich.progress import Progress
from rich.table import Table

from attnlab.analysis import Analysis, Arrays, SinglePrecisionConfig
from attnlab.expectation import Expectation, at_least, at_most, between

RIGOLLET = "Geshkovski, Letrouit, Polyanskiy, Rigollet, arXiv 2312.10794"
LONG = "Rigollet, arXiv 2512.01868"
COSINE = 0.5  # of the tokens at equal angles in a long context
MODELS = {"minilm": "MiniLM", "smollm2": "SmolLM2"}


@dataclass(frozen=True)
class Config(SinglePrecisionConfig):
    """Options of the analysis."""

    SMOKE: ClassVar = {
        "betas": (16.0,), "seeds": 1, "tokens": 32, "horizon": 200.0,
        "counts": (16,), "texts": 2, "length": 8, "models": (),
    }  # fmt: skip

    betas: tuple[float, ...] = (9.0, 16.0, 25.0, 36.0, 49.0, 64.0, 81.0, 100.0)
    """Inverse temperatures on the circle."""
    seeds: int = 3
    """How many seeds; the first has the number `--seed`."""
    tokens: int = 128
    """Tokens on the circle."""
    horizon: float = 1000.0
    """Time at which the tokens on the circle are last seen."""
    counts: tuple[int, ...] = (16, 128, 1024)
    """Lengths of the context."""
    texts: int = 8
    """Texts of each seed."""
    length: int = 64
    """Tokens of each text."""
    models: tuple[str, ...] = tuple(MODELS)
    """Which real models; none for a tiny random encoder."""


def compute(config: Config, progress: Progress) -> Arrays:
    """The four parts."""
    parts = {"circle": circle, "angles": angles, "long": long_context, "real": real_tokens}
    task, arrays = progress.add_task("parts", total=len(parts), status=""), {}
    for name, part in parts.items():
        progress.update(task, status=name)
        arrays[name] = part(config)
        progress.advance(task)
    return arrays


def seeds(config: Config) -> range:
    return range(config.seed, config.seed + config.seeds)


def circle(config: Config) -> Arrays:
    """Clusters at all times (betas, seeds, times) of tokens drawn on the circle, the number that lasts longest and how
    long (betas, seeds, 2), and the fastest mode."""
    import jax
    import jax.numpy as jnp

    from attnlab.particles.clusters import count_clusters, metastable_count
    from attnlab.particles.flow import token_flow, uniform_tokens
    from attnlab.particles.laws import fastest_mode

    times = np.concatenate([[0.0], np.geomspace(1.0, config.horizon, 60)])
    counts, lasting = [], []
    for beta in config.betas:
        paths = [
            token_flow(uniform_tokens(jax.random.key(seed), config.tokens, 2), jnp.asarray(times), beta, tolerance=1e-5)
            for seed in seeds(config)
        ]
        counts.append([jax.lax.map(lambda x, b=beta: count_clusters(x, 1 - 0.02 / b), path) for path in paths])
        lasting.append([metastable_count(one, times) for one in counts[-1]])
    modes = [fastest_mode(beta) for beta in config.betas]
    return {"times": times, "counts": np.array(counts), "lasting": np.array(lasting), "modes": modes}


ANGLE_BETAS = (1.0, 4.0, 9.0)


def angles(config: Config) -> Arrays:
    """Mean cosines in time (betas, times) from equal angles of cosine 0.05, from tokens drawn in 64 dimensions (seeds,
    betas, times), and the law."""
    import jax
    import jax.numpy as jnp

    from attnlab.dynamics.tokens import mean_cosine
    from attnlab.particles.flow import equiangular_tokens, token_flow, uniform_tokens
    from attnlab.particles.laws import equiangular_cosine

    times = jnp.linspace(0.0, 16.0, 41)
    drawn = [uniform_tokens(jax.random.key(seed), 32, 64) for seed in seeds(config)]

    def cosines(start, beta):
        return jax.vmap(mean_cosine)(token_flow(start, times, beta, tolerance=1e-6))

    return {
        "times": times,
        "equal": [cosines(equiangular_tokens(32, 0.05), beta) for beta in ANGLE_BETAS],
        "law": [equiangular_cosine(0.05, times, 32, beta, tolerance=1e-6) for beta in ANGLE_BETAS],
        "drawn": np.array([[cosines(start, beta) for beta in ANGLE_BETAS] for start in drawn]),
    }


def long_context(config: Config) -> Arrays:
    """How fast the cosine of tokens at equal angles grows over what averaging gives, measured (counts, strengths) at
    beta = strength log n, and what law gives (counts, fine)."""
    import jax
    import jax.numpy as jnp

    from attnlab.particles.flow import equiangular_tokens, velocity
    from attnlab.particles.laws import self_attention_share

    strengths, fine = np.linspace(0.25, 4.0, 16), np.linspace(0.1, 4.0, 100)

    @jax.jit
    def rate(tokens, beta):
        moved = velocity(tokens, beta)
        return moved[0] @ tokens[1] + moved[1] @ tokens[0]

    measured = []
    for n in config.counts:
        tokens = equiangular_tokens(n, COSINE)
        slowed = 2 * (1 - COSINE) * (1 + (n - 1) * COSINE) / (n - 1)
        measured.append([float(rate(tokens, jnp.float32(c * np.log(n)))) / slowed for c in strengths])
    law = [1 - self_attention_share(n, fine, COSINE) for n in config.counts]
    return {"strengths": strengths, "fine": fine, "measured": measured, "law": np.array(law)}


def real_tokens(config: Config) -> Arrays:
    """By model, trained and with shuffled weights: mean cosines within texts and between texts after every layer
    (seeds, layers), and clusters at a cosine of 0.9 over tokens."""
    arrays = {}
    for name in config.models or ("tiny",):
        model, trained, mixed = weights_of(name, config)
        batches = [batch_of(model, seed, config) for seed in seeds(config)]
        arrays[name] = {}
        for kind, params in (("trained", trained), ("shuffled", mixed)):
            parts = [geometry(model.predict, params, batch) for batch in batches]
            arrays[name][kind] = {field: np.array([part[field] for part in parts]) for field in parts[0]}
    return arrays


def weights_of(name: str, config: Config):
    """The model, its trained parameters, and shuffled ones, whose matrices keep their entries and nothing learned."""
    import jax

    if name == "tiny":
        return tiny_model(config)
    from attnlab.models.pretrained import minilm, smollm2

    model = minilm() if name == "minilm" else smollm2(scan=False, remat=None, factored=True)
    return model, model.params, jax.jit(shuffled)(model.params, jax.random.key(config.seed))


def shuffled(params, key):
    """Every matrix of the layers with its entries in random order; vectors and embeddings as they are."""
    import jax

    named, structure = jax.tree_util.tree_flatten_with_path(params)
    keys = jax.random.split(key, len(named))
    mixed = [
        leaf
        if leaf.ndim < 2 or "embedding" in jax.tree_util.keystr(path)
        else jax.random.permutation(part, leaf.ravel()).reshape(leaf.shape)
        for part, (path, leaf) in zip(keys, named, strict=True)
    ]
    return jax.tree_util.tree_unflatten(structure, mixed)


def tiny_model(config: Config):
    """A random encoder of one small layer, in place of a pretrained one."""
    import jax
    import jax.numpy as jnp

    from attnlab.models.adapters import from_linen
    from attnlab.models.pretrained import Pretrained, bert_config, wordpiece
    from attnlab.models.text_encoder import TextEncoder, TokenBatch

    letters = "abcdefghijklmnopqrstuvwxyz"
    tokenizer = wordpiece(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters)])
    size = {"vocabulary": tokenizer.vocabulary, "length": config.length}
    module = TextEncoder(bert_config(layers=1, width=8, heads=2, **size))
    tokens = jnp.ones((1, config.length), jnp.int32)
    params = module.init(jax.random.key(0), TokenBatch(tokens, tokens > 0))["params"]
    model = Pretrained(module.config, params, from_linen(module), tokenizer, "", "")
    return model, params, shuffled(params, jax.random.key(1))


def batch_of(model, seed: int, config: Config):
    """Texts that fill the length, drawn by the seed, as the model takes them."""
    from attnlab.data.sentences import paragraphs
    from attnlab.models.text_encoder import TokenBatch
    from attnlab.models.transformer import LanguageModelConfig

    batch = model.tokenizer.encode(paragraphs(), config.length)
    full = np.flatnonzero(np.asarray(batch.mask).all(axis=1))
    chosen = np.random.default_rng(seed).choice(full, config.texts, replace=False)
    tokens = batch.tokens[chosen]
    return tokens if isinstance(model.config, LanguageModelConfig) else TokenBatch(tokens, batch.mask[chosen])


def geometry(predict, params, batch) -> Arrays:
    """Cosines and clusters of the tokens after each layer, without the first of each text, which models use as a
    sink."""
    import jax
    import jax.numpy as jnp

    from attnlab.dynamics.tokens import mean_cosine, representations
    from attnlab.particles.clusters import count_clusters

    def measure(tokens):
        tokens = tokens[:, 1:]
        unit = tokens / jnp.linalg.norm(tokens, axis=-1, keepdims=True)
        means = jnp.mean(unit, axis=1)
        texts = len(means)
        products = means @ means.T
        between_texts = (jnp.sum(products) - jnp.trace(products)) / (texts * (texts - 1))
        clusters = jnp.mean(jax.lax.map(lambda one: count_clusters(one, 0.9), unit) / tokens.shape[1])
        return {"within": mean_cosine(tokens), "between": between_texts, "clusters": clusters}

    def run(params, batch):
        return {name: measure(tokens) for name, tokens in representations(predict, params, batch).items()}

    found = jax.jit(run)(params, batch)
    ordered = sorted(found, key=lambda name: int(name.rsplit("_", 1)[1]))
    return {field: np.array([found[name][field] for name in ordered]) for field in ("within", "between", "clusters")}


def plot(arrays: Arrays, config: Config):
    """The three laws, and how far tokens of one text are nearer to each other than to those of other texts."""
    from attnlab.plotting.panels import panels

    part, real = arrays["circle"], arrays["real"]
    ratio = np.mean(part["lasting"][..., 0] / np.array(part["modes"])[:, None])
    off = np.max(np.abs(np.array(arrays["angles"]["law"]) - arrays["angles"]["equal"]))
    inner = [np.max(excess(each["trained"]).mean(axis=0)[:-1], initial=0.0) for each in real.values()]
    message = (
        f"On the circle {ratio:.2f} times the fastest mode's clusters last longest;\nreal tokens of one text are "
        f"{max(inner):.2f} nearer than of two, at most, before the last layer"
    )
    tops = " and ".join(f"{np.mean(excess(each['trained'])[:, -1]):.2f}" for each in real.values())
    titles = ["clusters that last on the circle", f"equal angles: within {off:.0e} of their law"]
    titles += [rf"long contexts: $c = {1 / (1 - COSINE):g}$ in the limit", f"real tokens: {tops} in the last layer"]
    note = f"(a) median and range, (d) mean and range over {config.seeds} seeds; (b), (c) no randomness"
    figure, axes = panels(message, titles, note=note)
    plot_circle(axes[0], part, config)
    plot_angles(axes[1], arrays["angles"])
    plot_long(axes[2], arrays["long"], config)
    plot_excess(axes[3], real)
    return figure


def plot_circle(axes, part: Arrays, config: Config) -> None:
    betas, lasting = np.array(config.betas), part["lasting"][..., 0]
    fine = np.linspace(0, 1.05 * max(betas), 100)
    axes.plot(fine, np.sqrt(2 * fine), ":", color="black", label=r"fastest mode, $\sqrt{2\beta}$")
    middle = np.median(lasting, axis=1)
    reach = middle - lasting.min(axis=1), lasting.max(axis=1) - middle
    axes.errorbar(betas, middle, reach, fmt="o", color="C0", capsize=2, lw=1, label="clusters that last longest")
    axes.set(xlabel=r"inverse temperature $\beta$", ylabel="clusters on the circle", ylim=(0, 1.5 * max(part["modes"])))
    axes.legend(loc="upper left")


def law_and_flow(axes, fine: np.ndarray, law: np.ndarray, points: np.ndarray, measured, labels: list[str]) -> None:
    """The law of each label as a line, and the flow as open marks."""
    for number, label in enumerate(labels):
        axes.plot(fine, law[number], ":", color="black", label=None if number else "law")
        axes.plot(points, measured[number], "os^"[number % 3], color=f"C{number}", mfc="none", label=f"flow, {label}")
    axes.legend(loc="center right")


def plot_angles(axes, part: Arrays) -> None:
    labels = [rf"$\beta = {beta:g}$" for beta in ANGLE_BETAS]
    law_and_flow(axes, part["times"], part["law"], part["times"][::3], np.array(part["equal"])[:, ::3], labels)
    axes.set(xlabel="time", ylabel="mean cosine of two tokens")


def plot_long(axes, part: Arrays, config: Config) -> None:
    axes.axvline(1 / (1 - COSINE), color="0.5", ls="--", lw=0.8, label=r"$n \to \infty$")
    law_and_flow(
        axes, part["fine"], part["law"], part["strengths"], part["measured"], [f"n = {n}" for n in config.counts]
    )
    axes.set(xlabel=r"$c$, with $\beta = c\,\log n$", ylabel="contraction / that of averaging")
    axes.legend(loc="lower left")


def excess(part: Arrays) -> np.ndarray:
    """Cosine within a text above that between texts, (seeds, layers)."""
    return part["within"] - part["between"]


def against_depth(axes, values: np.ndarray, color: str, line: str, label: str) -> None:
    """Mean and range over the seeds (seeds, layers), over the layer as a share of all."""
    depth = np.arange(1, values.shape[1] + 1) / values.shape[1]
    axes.fill_between(depth, values.min(axis=0), values.max(axis=0), color=color, alpha=0.2, lw=0)
    axes.plot(depth, values.mean(axis=0), line, color=color, marker="o", ms=2.5, label=label)


def plot_excess(axes, part: Arrays) -> None:
    for number, (name, each) in enumerate(part.items()):
        for kind, line in (("trained", "-"), ("shuffled", ":")):
            against_depth(axes, excess(each[kind]), f"C{number}", line, f"{MODELS.get(name, name)}, {kind}")
    axes.set(xlabel="depth (layer over layers)", ylabel="cosine within texts, less between")
    axes.legend(loc="upper left")


def details(arrays: Arrays, config: Config):
    """Tokens drawn at random against the law of equal angles; and of real tokens all that their excess is made of."""
    from attnlab.plotting.curves import range_band
    from attnlab.plotting.panels import panels

    part, real = arrays["angles"], arrays["real"]
    titles = ["tokens drawn in 64 dimensions", "clusters over tokens", *(f"cosines, {MODELS.get(n, n)}" for n in real)]
    note = f"bands: range over {config.seeds} seeds; trained weights, and the same shuffled within each matrix"
    shown = ", ".join(f"{MODELS.get(n, n)} {each['trained']['within'][:, -1].mean():.2f}" for n, each in real.items())
    message = f"Mean cosine of two tokens of a text behind the last layer: {shown}"
    figure, (drawn, clusters, *cosines) = panels(message, titles, note=note)
    for number, beta in enumerate(ANGLE_BETAS):
        label = rf"$\beta = {beta:g}$"
        range_band(drawn, part["times"], part["drawn"][:, number].T, f"C{number}", label, ("-", "--", "-.")[number])
        drawn.plot(part["times"], part["law"][number], ":", color="black", label=None if number else "equal angles")
    drawn.set(xlabel="time", ylabel="mean cosine of two tokens")
    for number, (name, each) in enumerate(real.items()):
        for kind, line in (("trained", "-"), ("shuffled", ":")):
            against_depth(clusters, each[kind]["clusters"], f"C{number}", line, f"{MODELS.get(name, name)}, {kind}")
            for field, color in (("within", "C2"), ("between", "C3")):
                label = field if kind == "trained" else f"{field}, shuffled"
                against_depth(cosines[number], each[kind][field], color, line, label)
        cosines[number].set(xlabel="depth (layer over layers)", ylabel="mean cosine of two tokens", ylim=(None, 1.4))
    clusters.set(xlabel="depth (layer over layers)", ylabel="clusters / tokens", ylim=(0, 1.6))
    drawn.legend(loc="center right")
    for axes in (clusters, *cosines):
        axes.legend(loc="upper left", ncols=2, fontsize=7.5)
    return figure


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """Clusters, the law of equal angles, the transition, and whether real tokens cluster by text."""
    part, long = arrays["circle"], arrays["long"]
    ratio = np.mean(part["lasting"][..., 0] / np.array(part["modes"])[:, None])
    off = np.max(np.abs(np.array(arrays["angles"]["law"]) - arrays["angles"]["equal"]))
    away = np.max(np.abs(np.interp(long["strengths"], long["fine"], long["law"][-1]) - long["measured"][-1]))
    why = "the law is that of an even spread; random starts leave gaps, in which neighbours meet"
    what = "clusters that last longest over the fastest mode"
    found = [
        between(what, ratio, 0.5, 1.0, because=why, source="derived here"),
        at_most("equal angles: distance from the law", off, 1e-3, because="float32 and the solver", source=RIGOLLET),
        at_most("long contexts: distance from the law", away, 0.02, because="float32, the law's grid", source=LONG),
    ]
    for name, each in {name: each for name, each in arrays["real"].items() if name in MODELS}.items():
        rise = each["trained"]["within"][:, -2].mean() - each["trained"]["within"][:, 0].mean()
        label = MODELS[name]
        found.append(at_least(f"{label}: rise of the cosine to the last layer but one", rise, 0.1, source=RIGOLLET))
        inner = np.max(excess(each["trained"]).mean(axis=0)[:-1])
        why = "what rises is common to all texts, not the meeting of the tokens of one"
        what = f"{label}: largest excess within texts before the last layer"
        found.append(at_most(what, inner, 0.1, because=why, source="derived here"))
        last, nothing = (excess(each[kind]).mean(axis=0)[-1] for kind in ("trained", "shuffled"))
        if name == "minilm":
            found.append(at_least(f"{label}: excess in the last layer", last, 0.2, source="its training, which pools"))
            collapsed, what = each["shuffled"]["within"][:, -1].mean(), f"{label}, shuffled: cosine in the last layer"
            found.append(at_least(what, collapsed, 0.9, source=RIGOLLET))
        else:
            what = f"{label}, shuffled: excess in the last layer over that of the trained one"
            found.append(at_least(what, nothing / last, 2.0, source="derived here"))
    return found


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """Clusters by beta, and cosines by layer."""
    first = Table("beta", "fastest mode", "clusters that last longest", "from t to so many t", title="The circle")
    for beta, mode, lasting in zip(config.betas, arrays["circle"]["modes"], arrays["circle"]["lasting"], strict=True):
        numbers = (", ".join(f"{value:.3g}" for value in column) for column in lasting.T)
        first.add_row(f"{beta:g}", str(int(mode)), *numbers)
    second = Table("model", "weights", "layer", "within", "between", "clusters / tokens", title="Real tokens")
    for name, each in arrays["real"].items():
        for kind, part in each.items():
            layers = part["within"].shape[1]
            for layer in sorted({0, layers // 2, max(layers - 2, 0), layers - 1}):
                cells = (f"{part[field][:, layer].mean():.3f}" for field in ("within", "between", "clusters"))
                second.add_row(name, kind, str(layer + 1), *cells)
    return [first, second]


ANALYSIS = Analysis("token-clustering", Config, compute, plot, tables, findings, __doc__, slow=True, details=details)

if __name__ == "__main__":
    ANALYSIS.main()
