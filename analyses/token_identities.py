"""Attention maps and tokens against exact statements: entropy and its bound, rank collapse, tangent kernel and Hessian.

Entropy over the norm of the scores: rows of a random layer above the least entropy of that norm, scores that attain
it, and the bound that is known beforehand, from spectral norms. How far the tokens of a sequence are from agreeing,
layer by layer, without skip connections and with residual branches scaled by one over the root of the depth. Along
training, the top of the empirical tangent kernel against that of the generalised Gauss-Newton matrix.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from rich.progress import Progress
from rich.table import Table

from attnlab.analysis import Analysis, AnalysisConfig, Arrays
from attnlab.expectation import Expectation, at_least, at_most

STACKS = {"no skip connection": (False, False), "skip, branches over √depth": (True, True), "skip": (True, False)}
"""Name of the stack: whether it has skip connections, whether its branches are scaled down."""


@dataclass(frozen=True)
class Config(AnalysisConfig):
    """Options of the analysis."""

    SMOKE: ClassVar = {"depth": 4, "starts": 2, "steps": 20, "every": 10, "images": 4}

    depth: int = 24
    """Attention layers of a stack."""
    width: int = 32
    """Width of its tokens."""
    length: int = 16
    """Tokens in a sequence."""
    starts: int = 5
    """Random stacks and inputs."""
    steps: int = 400
    """Training steps along which kernel and Gauss-Newton matrix are compared."""
    every: int = 50
    """Steps between two comparisons."""
    images: int = 16
    """Digits to train on."""


def compute(config: Config, progress: Progress) -> Arrays:
    """All three parts in turn."""
    import jax

    parts = (entropies, collapse, kernels)
    task = progress.add_task("identities", total=len(parts), status="")
    arrays: Arrays = {}
    for part in parts:
        arrays[part.__name__] = part(config, jax.random.key(config.seed))
        progress.advance(task)
    return arrays


def entropies(config: Config, key):
    """By scale of the tokens the entropies of all rows, the norms of their scores, the mean of the norms' bound, and
    the least entropy over the bound; and the same of the scores that attain it."""
    import jax
    import jax.numpy as jnp

    from attnlab.dynamics.tokens import attention_calls, entropy, entropy_bound, least_entropy
    from attnlab.models.adapters import from_linen
    from attnlab.models.attention import AttentionConfig, SelfAttention

    module = SelfAttention(AttentionConfig(config.width, config.width))
    tokens = jax.random.normal(key, (8, config.length, config.width))
    params = module.init(key, tokens)["params"]

    @jax.jit
    def measure(scale):
        (call,) = attention_calls(from_linen(module), params, scale * tokens).values()
        found, logs = entropy(call.attention), jnp.log(call.attention)
        # softmax does not see the mean of its scores: without it their norm is the least
        norms = jnp.linalg.norm(logs - jnp.mean(logs, axis=-1, keepdims=True), axis=-1)
        weights = jnp.linalg.norm(params["query"] @ params["key"].T, ord=2)
        spectral = call.config.score_scale * weights * jnp.linalg.norm(call.inputs, ord=2, axis=(-2, -1)) ** 2
        slack = jnp.min(found - entropy_bound(call))
        return found.ravel(), norms.ravel(), jnp.mean(spectral), slack

    scales = jnp.geomspace(0.02, 2.0, 13)
    found, norms, spectral, slack = jax.lax.map(measure, scales)
    # one score up, all others down, of Euclidean norm s: the bound is their entropy
    sizes, count = jnp.geomspace(0.1, 8.0, 61), config.length
    extremal = jnp.full(count, -1 / (count * (count - 1)) ** 0.5).at[0].set(((count - 1) / count) ** 0.5)
    least = least_entropy(sizes, float(count))
    attained = jax.vmap(lambda size: entropy(jax.nn.softmax(size * extremal)))(sizes)
    return {
        "scales": scales,
        "entropy": found,
        "norms": norms,
        "spectral": spectral,
        "slack": slack,
        "sizes": sizes,
        "attained": attained,
        "least": least,
        "extremal": jnp.abs(attained / least - 1),
    }


def collapse(config: Config, key):
    """The rank residual of the tokens after every layer, (starts, depth + 1) by stack."""
    import jax
    import jax.numpy as jnp

    from attnlab.dynamics.tokens import rank_residual, representations
    from attnlab.models.adapters import from_linen
    from attnlab.models.attention import AttentionConfig
    from attnlab.models.transformer import Transformer, TransformerConfig

    def residuals(key, skip, scaled):
        attention = AttentionConfig(config.width, config.width, output_dim=config.width)
        stack = Transformer(TransformerConfig(attention, config.depth, norm=None, residual=skip))
        tokens = jax.random.normal(key, (4, config.length, config.width))
        params = stack.init(key, tokens)["params"]
        factor = config.depth**-0.5 if scaled else 1.0
        for layer in params.values():
            layer["attention"]["output"] = factor * layer["attention"]["output"]
        found = representations(from_linen(stack), params, tokens)
        layers = [found[f"layer_{index}"] for index in range(config.depth)]
        return jnp.stack([rank_residual(tokens), *(rank_residual(layer) for layer in layers)])

    keys = jax.random.split(key, config.starts)
    measure = jax.jit(lambda key, skip, scaled: residuals(key, skip, scaled), static_argnums=(1, 2))
    return {name: jnp.stack([measure(key, *stack) for key in keys]) for name, stack in STACKS.items()}


def kernels(config: Config, key):
    """Largest eigenvalues of kernel and Gauss-Newton matrix along gradient descent on digits."""
    import jax.numpy as jnp
    import optax

    from attnlab.curvature import ggn
    from attnlab.dynamics.kernel import empirical_ntk
    from attnlab.krylov.tracking import cold_top_pairs
    from attnlab.risks.digits import digits_attention
    from attnlab.training import probe, train

    risk, params = digits_attention(key, key, config.images)
    # the loss is half the squared distance, mean over images: the Hessian in the outputs is 1 / images

    def measure(risk, params):
        kernel = jnp.linalg.eigvalsh(empirical_ntk(risk, params))[-1] / config.images
        matrix = ggn(risk, params)
        top = cold_top_pairs(matrix.flat_mv, matrix.dimension, 1, key, kernel.dtype)
        return {"kernel": kernel, "gauss_newton": top.values[-1]}

    options = {"steps": config.steps, "every": config.every, "probes": {"top": probe(measure)}}
    records = train(risk, params, optax.sgd(0.1), key, **options).records
    found = records.values["top"]
    return {"steps": records.steps, "ntk": found["kernel"], "ggn": found["gauss_newton"]}


def plot(arrays: Arrays, config: Config):
    """Entropy and its bound, agreement by depth, and the two eigenvalues with how far they are apart."""
    from attnlab.plotting.panels import panels

    attained, apart = float(arrays["entropies"]["extremal"].max()), eigenvalues_apart(arrays)
    left = np.median(arrays["collapse"]["no skip connection"][:, min(4, config.depth)])
    message = (
        f"Attention's identities hold: entropy bound attained to {attained:.0e}, one eigenvalue to {apart.max():.0e}"
    )
    titles = [
        "entropy over the norm of the scores",
        f"spread: {left:.0e} after 4 bare layers",
        "one eigenvalue of two matrices",
        "their difference",
    ]
    note = f"(a) rows of 8 sequences; (b) median and range over {config.starts} random stacks; (c), (d) one seed"
    figure, (entropies, depth, top, difference) = panels(message, titles, note=note)
    plot_entropies(entropies, arrays["entropies"], config)
    plot_collapse(depth, arrays["collapse"])
    part = arrays["kernels"]
    top.plot(part["steps"], part["ggn"], color="C0", label="Gauss-Newton matrix")
    top.plot(part["steps"], part["ntk"], "o", color="C1", mfc="none", ms=6, label="tangent kernel / images")
    top.set(xlabel="step of gradient descent", ylabel=r"largest eigenvalue $\lambda_1$", ylim=(0, None))
    top.legend(loc="lower right")
    difference.plot(part["steps"], np.maximum(apart, 1e-16), "o-", color="C0", label="measured")
    difference.axhline(TRACKING, color="black", ls=":", lw=1, label="tolerance of the iteration")
    difference.set(yscale="log", ylim=(1e-17, 1e-3), xlabel="step of gradient descent", ylabel="relative difference")
    difference.legend(loc="center right")
    return figure


TRACKING = 1e-5
"""Relative tolerance of the largest eigenvalues."""


def eigenvalues_apart(arrays: Arrays) -> np.ndarray:
    """Relative difference of the two largest eigenvalues at each step."""
    return np.abs(arrays["kernels"]["ntk"] / arrays["kernels"]["ggn"] - 1)


def plot_entropies(axes, part: Arrays, config: Config) -> None:
    """Every row at the norm of its scores, the least entropy of that norm, and where spectral norms place a layer."""
    highest, rows = np.log(config.length), part["entropy"].mean(axis=1)
    axes.plot(part["norms"].ravel(), part["entropy"].ravel(), ".", color="C0", ms=2, alpha=0.4, rasterized=True)
    axes.plot([], [], "o", color="C0", ms=3, label="rows of a random layer")
    axes.plot(part["spectral"], rows, "s-", color="C1", lw=0.8, ms=3.5, label="at the spectral bound")
    axes.plot(
        part["sizes"][::4], part["attained"][::4], "o", color="black", mfc="none", ms=5, label="scores that attain it"
    )
    axes.plot(part["sizes"], part["least"], ":", color="black", label="least entropy")
    axes.text(900, highest * 1.02, "uniform", fontsize=7.5, color="0.3", ha="right")
    axes.axhline(highest, color="0.6", lw=0.8)
    axes.set(xscale="log", xlim=(0.01, 1e3), ylim=(-0.1, 1.5 * highest))
    axes.set(xlabel="Euclidean norm of a row of scores", ylabel="entropy [nats]")
    axes.legend(loc="upper right", ncols=2, fontsize=7.5, columnspacing=0.7, handletextpad=0.3, handlelength=1.4)


def plot_collapse(axes, part: Arrays) -> None:
    """The residual by layer of each stack, and the floor of rounding."""
    from attnlab.plotting.curves import range_band

    floor = np.finfo(float).eps
    for (name, values), color, line in zip(part.items(), ("C0", "C1", "C2"), ("-", "--", "-."), strict=True):
        range_band(axes, np.arange(values.shape[1]), np.maximum(values.T, floor / 10), color, name, line)
    axes.axhline(floor, color="0.5", ls=":", lw=1)
    axes.text(values.shape[1] - 1, 2 * floor, "rounding", ha="right", va="bottom", fontsize=7.5, color="0.3")
    axes.set(yscale="log", xlabel="layer", ylabel=r"$\|X - 1\bar{x}^\top\| \,/\, \|X\|$", ylim=(1e-17, 30))
    axes.legend(loc="center right")


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """The identities to rounding, and how fast the tokens of a stack agree."""
    bound, rank = "Zhai et al., arXiv 2303.06296", "Dong et al., arXiv 2103.03404"
    difference = float(np.max(eigenvalues_apart(arrays)))
    means = {name: arrays["collapse"][name].mean(axis=0) for name in STACKS}
    bare, scaled, _ = means.values()
    bounds, rounding = arrays["entropies"], "rounding"
    return [
        at_least(
            "least entropy over its bound [nats]", bounds["slack"].min(), 0.0, 1e-12, because=rounding, source=bound
        ),
        at_most("extremal scores off the bound", bounds["extremal"].max(), 1e-10, because=rounding, source=bound),
        at_least(
            "rank residual of the inputs",
            bare[0],
            0.9,
            because="independent tokens: sqrt(1 - 1 / length), less chance",
            source=rank,
        ),
        at_most(
            "rank residual after 4 layers without skip",
            bare[4],
            0.01,
            because="doubly exponential decay gives far more than two decades",
            source=rank,
        ),
        at_least(
            f"rank residual after {config.depth} layers, branches over √depth",
            scaled[-1],
            0.8,
            because="such branches leave the spread of order one",
            source="Noci et al., arXiv 2206.03126: negative control",
        ),
        at_most(
            "tangent kernel off Gauss-Newton, at any step",
            difference,
            TRACKING,
            because="the tolerance of the tracking",
            source="Jacot et al., arXiv 1806.07572",
        ),
    ]


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """Rank residuals by depth."""
    table = Table("stack", *(f"after {depth}" for depth in (0, 1, 2, 4, config.depth)))
    for name in STACKS:
        mean = arrays["collapse"][name].mean(axis=0)
        table.add_row(name, *(f"{mean[depth]:.3g}" for depth in (0, 1, 2, 4, config.depth)))
    return [table]


ANALYSIS = Analysis("token-identities", Config, compute, plot, tables, findings, __doc__, slow=True)

if __name__ == "__main__":
    ANALYSIS.main()
