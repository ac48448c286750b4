"""Two ways for attention to go blind: its tokens become one with depth, and its softmax saturates with dimension.

The spread of the tokens around their mean by depth, for pure attention, with a residual, and for pre-LN blocks with an
MLP; one layer's spread, gradient and Hessian blocks against the spread of its inputs; mean and median of the softmax
Jacobian's trace against the dimension, with and without the scale 1/sqrt(d), and the mean over its law.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from rich.progress import Progress
from rich.table import Table

from attnlab.analysis import Analysis, AnalysisConfig, Arrays
from attnlab.expectation import Expectation, at_least, at_most, equal

STACKS = {
    "pure": ("pure attention", {"norm": None, "residual": False}),
    "residual": ("with residual", {"norm": None, "residual": True}),
    "mlp": ("pre-LN blocks with MLP", {"norm": "pre", "residual": True, "mlp_width": 64}),
}
EXPONENTS = {"spread": 3, "gradient": 2, "ggn": 4, "functional": 3, "value": 0}
LABELS = {
    "spread": "outputs' spread",
    "gradient": "gradient, QK",
    "ggn": "$H_o$, QK",
    "functional": "$H_f$, QK",
    "value": "$H_o$, V",
}


@dataclass(frozen=True)
class Config(AnalysisConfig):
    """Options of the analysis."""

    SMOKE: ClassVar = {"layers": 3, "seeds": 2, "draws": 1000, "dims": (1, 4), "points": 4}

    layers: int = 12
    """Depth of the stacks."""
    length: int = 16
    """Tokens of a sequence."""
    width: int = 32
    """Width of the tokens in the stacks."""
    seeds: int = 20
    """Random initialisations of the stacks."""
    points: int = 13
    """Spreads between 1e-4 and 1 of one layer's inputs."""
    dims: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
    """Dimensions d of queries and keys."""
    tokens: int = 8
    """Tokens that a query chooses from."""
    draws: int = 200_000
    """Random queries and keys at each dimension."""


def compute(config: Config, progress: Progress) -> Arrays:
    """Spreads by depth, powers of one layer, saturation by dimension."""
    task = progress.add_task("parts", total=3, status="")
    arrays: Arrays = {}
    for part in (by_depth, by_spread, by_dimension):
        arrays |= part(config)
        progress.advance(task)
    return arrays


def by_depth(config: Config) -> Arrays:
    """Relative spread ||X - mean|| / ||X|| after every layer, (seeds, layers + 1)."""
    import jax
    import jax.numpy as jnp

    from attnlab.models.attention import AttentionConfig
    from attnlab.models.transformer import TransformerBlock, TransformerConfig

    attention = AttentionConfig(config.width, config.width)
    spreads: Arrays = {}
    for name, (_, options) in STACKS.items():
        block = TransformerBlock(TransformerConfig(attention, **options))
        step = jax.jit(jax.vmap(lambda key, x, block=block: block.apply(block.init(key, x), x)))
        tokens = jax.random.normal(jax.random.key(config.seed), (config.seeds, config.length, config.width))
        rows = []
        for layer in range(config.layers + 1):
            centred = tokens - jnp.mean(tokens, axis=1, keepdims=True)
            rows.append(np.asarray(jnp.linalg.norm(centred, axis=(1, 2)) / jnp.linalg.norm(tokens, axis=(1, 2))))
            tokens = step(jax.random.split(jax.random.key(config.seed + 1 + layer), config.seeds), tokens)
        spreads[name] = np.stack(rows, axis=1)
    return {"depth": spreads}


def by_spread(config: Config) -> Arrays:
    """Norms of one merged layer whose tokens are one token plus a spread."""
    import jax
    import jax.numpy as jnp

    from attnlab.attention import attention_hessian
    from attnlab.losses import square_loss
    from attnlab.models.adapters import from_linen
    from attnlab.models.attention import AttentionConfig, SelfAttention
    from attnlab.objectives import objective

    layer = AttentionConfig(key_dim=4, value_dim=3, merged=True)
    key = jax.random.key(config.seed)
    common, noise = jax.random.normal(key, (1, 4)), jax.random.normal(jax.random.fold_in(key, 1), (6, 4))
    noise, targets = noise - jnp.mean(noise, axis=0, keepdims=True), jax.random.normal(key, (6, 3))
    params = SelfAttention(layer).init(key, noise)["params"]
    spreads, rows = np.geomspace(1e-4, 1, config.points), {name: [] for name in EXPONENTS}
    pair = ("query_key", "query_key")
    first_order = jax.jit(lambda risk, params: (risk.outputs(params), jax.grad(risk)(params)))
    for spread in spreads:
        tokens = common + spread * noise
        risk = objective(from_linen(SelfAttention(layer)), square_loss, tokens, targets)
        outputs, gradient = first_order(risk, params)
        norms = attention_hessian(risk, params).norms()
        found = {
            "spread": jnp.linalg.norm(outputs - jnp.mean(outputs, axis=0, keepdims=True)),
            "gradient": jnp.linalg.norm(gradient["query_key"]),
            "ggn": norms["ggn"][pair],
            "functional": norms["functional"][pair],
            "value": norms["ggn"]["value", "value"],
        }
        for name, value in found.items():
            rows[name].append(float(value))
    return {"spreads": spreads, "power": rows}


def by_dimension(config: Config) -> Arrays:
    """Mean with its standard error, and median, of 1 - sum a^2 without and with the scale."""
    import jax
    import jax.numpy as jnp

    from attnlab.attention.cumulants import saturation, saturation_constant

    traces: Arrays = {}
    for name, power in (("unscaled", 0.0), ("scaled", -0.5)):
        rows = []
        for dim in config.dims:
            key = jax.random.fold_in(jax.random.key(config.seed), dim)
            values = saturation(key, dim, config.tokens, config.draws, dim**power)
            rows.append([jnp.mean(values), jnp.std(values) / config.draws**0.5, jnp.median(values)])
        traces[name] = np.array(rows)
    return {"constant": saturation_constant(config.tokens), "trace": traces}


def plot(arrays: Arrays, config: Config):
    """Depth, powers of the spread, saturation, and its mean over the law."""
    from attnlab.plotting.panels import panels

    last = arrays["trace"]["unscaled"][-1, 0] * config.dims[-1] ** 0.5 / arrays["constant"]
    message = f"Attention alone goes blind: its tokens are {fate(arrays)}"
    titles = [
        "spread of the tokens by depth",
        "one layer: powers of the spread",
        f"softmax over {config.tokens} tokens saturates",
        f"mean trace: {last:.2f} of its law at $d = {config.dims[-1]}$",
    ]
    note = (
        f"(a) median and range over {config.seeds} initialisations; (b) one seed, dotted: the predicted powers; "
        "bars: two standard errors"
    )
    figure, (depth, powers, trace, law) = panels(message, titles, note=note)
    plot_depth(depth, arrays)
    plot_powers(powers, arrays)
    plot_saturation(trace, arrays, config)
    plot_law(law, arrays, config)
    return figure


def fate(arrays: Arrays) -> str:
    """When the tokens of pure attention are one to rounding, at the median start, or how far they are apart."""
    median = np.median(arrays["depth"]["pure"], axis=0)
    equal_from = np.flatnonzero(median < 2 * np.finfo(float).eps)
    if len(equal_from):
        return f"one to rounding after {equal_from[0]} bare layers"
    return f"{median[-1]:.0e} apart after {len(median) - 1} bare layers"


def plot_depth(axes, arrays: Arrays) -> None:
    from attnlab.plotting.curves import range_band

    floor = np.finfo(float).eps
    for number, (name, (label, _)) in enumerate(STACKS.items()):
        values = np.maximum(arrays["depth"][name].T, floor)
        range_band(axes, np.arange(len(values)), values, f"C{number}", label, ("-", "--", "-.")[number])
    axes.axhline(floor, color="0.5", ls=":", lw=1)
    axes.text(0, 0.6 * floor, "rounding", va="top", fontsize=7.5, color="0.3")
    axes.set(yscale="log", xlabel="layer", ylabel=r"$\|X - \bar X\| \,/\, \|X\|$", ylim=(1e-18, 30))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="center right")


def plot_powers(axes, arrays: Arrays) -> None:
    from attnlab.plotting.style import BLOCKS, PARTS

    spreads, fixed = arrays["spreads"], {**PARTS, "value": BLOCKS["value"]}
    colors = {"spread": "black", "gradient": "0.5"} | {name: look[0] for name, look in fixed.items()}
    for number, (name, exponent) in enumerate(EXPONENTS.items()):
        values, marker = arrays["power"][name], "osD^v"[number]
        size = 7 if name == "spread" else 3.5  # it lies where the functional part does
        label = rf"{LABELS[name]}: $\epsilon^{exponent}$"
        axes.loglog(spreads, values, marker, color=colors[name], ms=size, mfc="none", label=label)
        axes.loglog(spreads, values[0] * (spreads / spreads[0]) ** exponent, ":", color="black", lw=1, zorder=0)
    axes.set(xlabel=r"spread $\epsilon$ of the input tokens", ylabel="norm", ylim=(1e-17, 1e12))
    axes.legend(loc="upper left", fontsize=7.5, ncols=2, columnspacing=0.6, handletextpad=0.2)


def plot_saturation(axes, arrays: Arrays, config: Config) -> None:
    dims = np.array(config.dims, float)
    for number, (name, label) in enumerate((("unscaled", "no scale"), ("scaled", r"scale $1/\sqrt{d}$"))):
        mean, error, median = arrays["trace"][name].T
        axes.errorbar(dims, mean, 2 * error, fmt="os"[number], color=f"C{number}", ms=4, label=f"{label}: mean")
        if name == "unscaled":
            axes.loglog(dims, median, "v--", color="C2", mfc="none", lw=0.8, label=f"{label}: median")
    axes.loglog(dims, arrays["constant"] / dims**0.5, ":", color="black", label=r"law, $c_N / \sqrt{d}$")
    axes.set(xlabel="dimension $d$ of queries and keys", ylabel=r"trace $1 - \sum_j a_j^2$", ylim=(1e-8, 5))
    axes.set_xscale("log", base=2)
    axes.legend(loc="lower left")


def plot_law(axes, arrays: Arrays, config: Config) -> None:
    dims = np.array(config.dims, float)
    mean, error, _ = arrays["trace"]["unscaled"].T * dims**0.5 / arrays["constant"]
    axes.errorbar(dims, mean, 2 * error, fmt="o-", color="C0", lw=1, capsize=2)
    axes.axhline(1, color="black", ls=":", lw=1)
    axes.set(xlabel="dimension $d$ of queries and keys", ylabel=r"mean trace $\cdot \sqrt{d} \,/\, c_N$, no scale")
    axes.set(ylim=(0, 1.1))
    axes.set_xscale("log", base=2)


def fitted(arrays: Arrays, name: str) -> float:
    """Power of the spread in a quantity, over the three smallest spreads."""
    return float(np.polyfit(np.log(arrays["spreads"][:3]), np.log(arrays["power"][name][:3]), 1)[0])


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """Collapse without a residual and none with it; the powers of the spread; the mean trace at the last dimension."""
    rank, derived = "Dong, Cordonnier, Loukas, arXiv 2103.03404", "derived here from the cumulants"
    pure, residual = (np.median(arrays["depth"][name][:, -1]) for name in ("pure", "residual"))
    mean, error, _ = arrays["trace"]["unscaled"][-1] * config.dims[-1] ** 0.5 / arrays["constant"]
    return [
        at_most(f"median spread after {config.layers} layers of pure attention", pure, 1e-6, source=rank),
        at_least("the same with a residual, the negative control", residual, 0.1, source=rank),
        equal(
            f"powers of the spread in {', '.join(EXPONENTS)}",
            [fitted(arrays, name) for name in EXPONENTS],
            list(EXPONENTS.values()),
            0.05,
            because="the next order is one power of the spread further",
            source=derived,
        ),
        equal(
            "mean trace of the softmax Jacobian at the highest dimension over c_N / sqrt(d)",
            mean,
            1.0,
            0.05 + 4 * error,
            because="the next order in 1 / d, and four standard errors",
            source="derived here",
        ),
    ]


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """Fitted exponents, and the mean trace over its prediction."""
    exponents = Table("quantity", "exponent", "fitted over the three smallest spreads")
    for name, exponent in EXPONENTS.items():
        exponents.add_row(name, str(exponent), f"{fitted(arrays, name):.4f}")
    ratios = Table("d", "mean trace, unscaled", "over c_N / sqrt(d)", "median, unscaled", "mean, scaled")
    for dim, row, other in zip(config.dims, arrays["trace"]["unscaled"], arrays["trace"]["scaled"], strict=True):
        ratio = row[0] * dim**0.5 / arrays["constant"]
        ratios.add_row(str(dim), f"{row[0]:.4g} +- {row[1]:.1g}", f"{ratio:.3f}", f"{row[2]:.3g}", f"{other[0]:.4g}")
    return [exponents, ratios]


ANALYSIS = Analysis("depth-and-scale", Config, compute, plot, tables, findings, __doc__, slow=True)

if __name__ == "__main__":
    ANALYSIS.main()
