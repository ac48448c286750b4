"""When curvature in bfloat16 is noise: products, eigenvalues, traces in three precisions, and what certificates say.

A small language model on English text, its weights rounded to bfloat16 once, so that all that differs is the
arithmetic. Against the matrix in float64: E, the error of the matrix of products; the errors of all eigenvalues beside
Weyl's bound |E|_2; the highest eigenpairs as found in low precision, the residual that their iteration states, and the
residual of one more product in float32 (float64 for float32), which bounds the error whatever the iteration believed;
traces by random vectors.
"""

import warnings
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from rich.progress import Progress
from rich.table import Table

from attnlab.analysis import Analysis, AnalysisConfig, Arrays
from attnlab.expectation import Expectation, at_least, at_most

PRECISIONS = {"float32": "float64", "bfloat16": "float32"}
"""Of products, each with the precision of the product that checks its eigenpairs."""
PARTS = {"hessian": "H", "ggn": "H_o"}
STATES = ("initial", "trained")


@dataclass(frozen=True)
class Config(AnalysisConfig):
    """Options of the analysis."""

    SMOKE: ClassVar = {"seeds": 2, "sequences": 2, "length": 4, "vocabulary": 6, "width": 4, "steps": 2, "count": 1}

    seeds: int = 3
    """Random starts of the network."""
    sequences: int = 64
    """Sequences of text."""
    length: int = 16
    """Words in a sequence."""
    vocabulary: int = 32
    """Different words; the rarer ones count as one."""
    width: int = 8
    """Width of the network, of two layers."""
    steps: int = 500
    """Steps of Adam to the trained network."""
    count: int = 10
    """Highest eigenpairs."""


def compute(config: Config, progress: Progress) -> Arrays:
    """By start, network, part and precision: eigenvalues, norms of the error, eigenpairs with residuals, traces."""
    import jax

    arrays: Arrays = {}
    task = progress.add_task("networks", total=2 * config.seeds, status="")
    for seed in range(config.seeds):
        points = networks(config, jax.random.key(config.seed + seed))
        for state, params in zip(STATES, points, strict=True):
            progress.update(task, status=f"start {seed + 1}, {state}")
            arrays[f"{state}-{seed}"] = measured(config, params)
            progress.advance(task)
    return arrays


def risk_in(config: Config, dtype: str):
    """The objective in a precision, and its module."""
    import jax.numpy as jnp

    from attnlab.data.text import next_words
    from attnlab.losses import cross_entropy
    from attnlab.models.adapters import from_linen
    from attnlab.models.attention import AttentionConfig
    from attnlab.models.transformer import LanguageModel, LanguageModelConfig, TransformerConfig
    from attnlab.objectives import objective

    half = config.width // 2
    attention = AttentionConfig(half, half, heads=2, causal=True, output_dim=config.width)
    blocks = TransformerConfig(attention, 2, 2 * config.width, final_norm=True)
    size = {"length": config.length, "width": config.width, "dtype": dtype}
    module = LanguageModel(LanguageModelConfig(blocks, config.vocabulary, tied=True, **size))
    data, _ = next_words(config.sequences, config.length)
    inputs, targets = (jnp.minimum(tokens, config.vocabulary - 1) for tokens in data)
    return objective(from_linen(module), cross_entropy, inputs, targets), module


def networks(config: Config, key) -> tuple:
    """Parameters at initialisation and trained, in float64."""
    import optax

    from attnlab.training import train

    risk, module = risk_in(config, "float64")
    start = module.init(key, risk.inputs[:1])["params"]
    return start, train(risk, start, optax.adam(1e-2), key, steps=config.steps, every=config.steps).params


def measured(config: Config, params) -> Arrays:
    """All of one network."""
    import jax
    import jax.numpy as jnp

    from attnlab.curvature import ggn, hessian

    key = jax.random.key(config.seed)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    found: Arrays = {}
    for part, build in {"hessian": hessian, "ggn": ggn}.items():
        operators = {
            dtype: build(risk_in(config, dtype)[0], jax.tree.map(lambda x, d=dtype: x.astype(d), rounded), check=False)
            for dtype in ("float64", *PRECISIONS)
        }
        exact = np.asarray(operators["float64"].dense())
        found[part] = {"values": np.linalg.eigvalsh(exact), "trace": np.trace(exact)}
        for dtype, finer in PRECISIONS.items():
            found[part][dtype] = compared(operators[dtype], operators[finer], exact, config.count, key)
    return found


def compared(operator, finer, exact: np.ndarray, count: int, key) -> Arrays:
    """An operator in low precision beside the exact matrix, and its highest pairs beside a `finer` operator."""
    import jax

    from attnlab.curvature import CurvatureWarning, eigenpairs, residuals, trace

    matrix = np.asarray(operator.dense(), float)
    error = matrix - exact
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CurvatureWarning)  # of what is looked at here
        try:
            pairs = eigenpairs(operator, key, count)
            top, stated = pairs.values, pairs.residuals
            checked = residuals(finer, pairs)
        except ValueError:  # products that are not symmetric are refused
            top = stated = checked = np.full(count, np.nan)
    found = trace(operator, jax.random.fold_in(key, 1), samples=20)
    return {
        "values": np.linalg.eigvalsh((matrix + matrix.T) / 2),
        "noise": np.linalg.norm((error + error.T) / 2, 2),
        "top": np.asarray(top, float),
        "stated": np.asarray(stated, float),
        "checked": np.asarray(checked, float),
        "trace": np.array([float(found.value), float(found.standard_error)]),
    }


def networks_in(arrays: Arrays, state: str) -> list[Arrays]:
    """The networks of one state, start by start."""
    return [arrays[name] for name in arrays if name.startswith(state)]


def largest(found: Arrays) -> float:
    """The norm of the exact matrix."""
    return float(np.abs(found["values"]).max())


def noise(arrays: Arrays, state: str, part: str, dtype: str) -> np.ndarray:
    """|E|_2 / |H|_2, start by start."""
    return np.array([float(one[part][dtype]["noise"]) / largest(one[part]) for one in networks_in(arrays, state)])


def errors(found: Arrays, dtype: str) -> np.ndarray:
    """Of all eigenvalues, ascending."""
    return np.abs(found[dtype]["values"] - found["values"])


def refused(arrays: Arrays, dtype: str) -> float:
    """Share of the operators that are refused for not being symmetric."""
    return float(np.mean([np.isnan(one[part][dtype]["top"]).any() for one in arrays.values() for part in PARTS]))


def top_errors(found: Arrays, dtype: str) -> np.ndarray:
    """How far each of the highest eigenvalues, as found, is from the nearest exact one; NaN where none was."""
    return np.abs(found["values"][None] - found[dtype]["top"][:, None]).min(axis=1)


def uncovered(arrays: Arrays, dtype: str, residual: str) -> float:
    """Share of the highest eigenpairs, of all networks that gave some, whose error is above a residual."""
    above = [
        top_errors(one[part], dtype) > one[part][dtype][residual] + 1e-12 * largest(one[part])
        for one in arrays.values()
        for part in PARTS
        if not np.isnan(one[part][dtype]["top"]).any()
    ]
    return float(np.mean(np.concatenate(above))) if above else np.nan


def noisy_share(found: Arrays, dtype: str) -> float:
    """Share of the eigenvalues that are below |E|_2 in modulus: of these nothing is known, not even the sign."""
    return float(np.mean(np.abs(found["values"]) <= found[dtype]["noise"]))


def plot(arrays: Arrays, config: Config):
    """Noise of the products, errors of all eigenvalues, and what residuals say in both precisions."""
    from attnlab.plotting.panels import panels

    noises = {state: noise(arrays, state, "hessian", "bfloat16") for state in STATES}
    shown = [f"{100 * np.min(values):.2g} to {100 * np.max(values):.2g} % {state}" for state, values in noises.items()]
    message = f"In bfloat16 the noise of $H$ is a share of its norm: {', '.join(shown)}"
    titles = (
        r"noise $\|E\|_2$ over the norm",
        "errors of all eigenvalues of $H$, one trained",
        *(f"highest eigenvalues, {dtype}" for dtype in PRECISIONS),
    )
    note = (
        f"{len(networks_in(arrays, STATES[0]))} starts, each a mark, against float64; E: the difference of the matrices"
    )
    figure, axes = panels(message, titles, note=note, height=2.9)
    plot_noise(axes[0], arrays)
    plot_errors(axes[1], networks_in(arrays, "trained")[0]["hessian"])
    for panel, dtype in zip(axes[2:], PRECISIONS, strict=True):
        plot_certificates(panel, arrays, dtype)
    return figure


def details(arrays: Arrays, config: Config):
    """Spectra of the first trained network in three precisions."""
    from attnlab.plotting.panels import legend_below, panels

    first = networks_in(arrays, "trained")[0]
    whole, outer = (100 * noisy_share(first[part], "bfloat16") for part in ("hessian", "ggn"))
    message = f"{whole:.3g} % of the eigenvalues of $H$ and {outer:.3g} % of $H_o$ are below bfloat16's noise"
    titles = [f"${PARTS[part]}$, trained, first start" for part in ("hessian", "ggn")]
    figure, axes = panels(
        message, titles, note="E: what a precision changes of the matrix; exact ones are drawn widest"
    )
    for panel, part in zip(axes, ("hessian", "ggn"), strict=True):
        plot_spectrum(panel, first[part])
    legend_below(figure, axes[0], columns=3)
    return figure


def plot_spectrum(axes, found: Arrays) -> None:
    """Moduli of positive and negative eigenvalues by rank, and the noise of the lower precisions."""
    for color, (name, one) in enumerate((("float64", found), *((dtype, found[dtype]) for dtype in PRECISIONS))):
        values = np.asarray(one["values"])
        for sign, line, label in ((1, "-", name), (-1, ":", f"{name}, negative")):
            moduli = np.sort((sign * values)[sign * values > 0])[::-1]
            # Where they agree the more precise one is seen on either side of the other.
            width = 3.6 - 1.2 * color
            axes.plot(np.arange(1, len(moduli) + 1), moduli, line, color=f"C{color}", label=label, linewidth=width)
        if name in PRECISIONS:
            label = rf"$\Vert E\Vert_2$ in {name}"
            axes.axhline(float(one["noise"]), color=f"C{color}", linewidth=0.7, linestyle="--", label=label)
    axes.set(xscale="log", yscale="log", xlabel="rank", ylabel=r"$|\lambda|$")


def plot_errors(axes, found: Arrays) -> None:
    for color, dtype in enumerate(PRECISIONS, start=1):
        scale, size = largest(found), np.abs(found["values"])
        relative, bound = np.maximum(errors(found, dtype), 1e-18) / scale, float(found[dtype]["noise"]) / scale
        axes.loglog(size / scale, relative, "ov"[color - 1], markersize=2, color=f"C{color}", label=dtype)
        axes.axhline(bound, color=f"C{color}", linestyle="--", label=f"Weyl's bound, {dtype}")
    line = np.array([1e-9, 1.0])
    axes.plot(line, line, color="black", linewidth=0.7, label="as large as the eigenvalue")
    axes.axvspan(axes.get_xlim()[0], 2.0**-52, ymax=0.5, color="0.9", label="below float64's epsilon", zorder=0)
    axes.set(xlabel=r"$|\lambda| / \Vert H\Vert_2$", ylabel="error / norm")
    head_room(axes, 0.9)
    axes.legend(fontsize=7.5, loc="upper left")


def head_room(axes, share: float = 0.5) -> None:
    """Room for a legend above what a logarithmic axis shows, as a share of that."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** share)


def plot_certificates(axes, arrays: Arrays, dtype: str) -> None:
    pairs = [(one[part], largest(one[part])) for one in arrays.values() for part in PARTS]
    error = np.concatenate([top_errors(found, dtype) / scale for found, scale in pairs])
    labels = {"stated": "stated by the iteration", "checked": f"of a product in {PRECISIONS[dtype]}"}
    for color, (name, label) in enumerate(labels.items()):
        residual = np.concatenate([found[dtype][name] / scale for found, scale in pairs])
        look = {"markersize": 3, "color": f"C{3 + color}", "label": label}
        axes.loglog(residual, np.maximum(error, 1e-18), "os"[color], **look)
    line = np.array([1e-10, 1e-1])
    axes.plot(line, line, color="black", linewidth=0.7, label="error = residual (bounds lie right)")
    axes.set(xlabel="residual / norm", ylabel="error / norm")
    head_room(axes)
    axes.legend(fontsize=7.5, loc="upper left")


def plot_noise(axes, arrays: Arrays) -> None:
    names = []
    for place, (state, part) in enumerate((state, part) for state in STATES for part in PARTS):
        names.append(f"${PARTS[part]}$\n{state}")
        for color, dtype in enumerate(PRECISIONS, start=1):
            values = noise(arrays, state, part, dtype)
            label = dtype if place == 0 else None
            axes.plot(np.full(len(values), place), values, "ov"[color - 1], color=f"C{color}", label=label)
    for dtype, bits in (("float32", 23), ("bfloat16", 7)):
        axes.axhline(2.0**-bits, color="black", linewidth=0.7, linestyle=":")
        axes.annotate(f"epsilon of {dtype}", (1.5, 2.0**-bits), fontsize=7.5, ha="center", va="bottom")
    axes.set(yscale="log", ylabel=r"$\Vert E\Vert_2$ / norm", xlabel="part and state")
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.legend(fontsize=7.5, loc="center left")


def worst(arrays: Arrays, measure) -> float:
    """The largest `measure(found, dtype)` of all networks, parts and precisions."""
    return max(measure(one[part], dtype) for one in arrays.values() for part in PARTS for dtype in PRECISIONS)


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """What holds in any precision, and what does not hold in bfloat16."""
    weyl = worst(arrays, lambda found, dtype: errors(found, dtype).max() / (found[dtype]["noise"] + 1e-14))
    relative = {dtype: max(noise(arrays, s, p, dtype).max() for s in STATES for p in PARTS) for dtype in PRECISIONS}
    negative = np.mean([np.mean(one["ggn"]["bfloat16"]["values"] < 0) for one in networks_in(arrays, "trained")])
    checked, stated = (uncovered(arrays, "bfloat16", residual) for residual in ("checked", "stated"))
    few, none, here = "a few roundings of 2^-8 in a row", "none is, in exact arithmetic", {"source": "measured here"}
    weyls, bounds = {"source": "Weyl (1912)"}, {"float32": 100 * 2.0**-24, "bfloat16": 10 * 2.0**-8}
    return [
        at_most("error of an eigenvalue over |E|_2, at worst", weyl, 1 + 1e-6, **weyls),
        at_most("|E|_2 / |H|_2 in float32, at worst", relative["float32"], bounds["float32"], because=few, **here),
        at_most("|E|_2 / |H|_2 in bfloat16, at worst", relative["bfloat16"], bounds["bfloat16"], because=few, **here),
        at_most("highest pairs in bfloat16 outside of the residual of a float32 product", checked, 0, **weyls),
        at_least("highest pairs in bfloat16 outside of their stated residual", stated, 0.1, **here),
        at_least("share of negative eigenvalues of H_o in bfloat16, trained", negative, 0.1, because=none, **here),
    ]


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """By state, part and precision: noise, eigenvalues below it, coverage of residuals, error of the trace."""
    shares = ", ".join(f"{dtype} {refused(arrays, dtype):.2g}" for dtype in PRECISIONS)
    title = f"mean and range over the starts; operators refused as not symmetric: {shares}"
    columns = ("network", "part", "precision", "|E| / norm", "eigenvalues below |E|", "error of the highest / norm")
    table = Table(*columns, "tr: error in standard errors", title=title)
    for state in STATES:
        for part, label in PARTS.items():
            for dtype in PRECISIONS:
                found = [one[part] for one in networks_in(arrays, state)]
                cells = [
                    noise(arrays, state, part, dtype),
                    [noisy_share(one, dtype) for one in found],
                    [top_errors(one, dtype).max() / largest(one) for one in found],
                    [abs(one[dtype]["trace"][0] - one["trace"]) / one[dtype]["trace"][1] for one in found],
                ]
                shown = [f"{np.mean(cell):.2g} ({np.min(cell):.2g} to {np.max(cell):.2g})" for cell in cells]
                table.add_row(state, label, dtype, *shown)
    return [table]


ANALYSIS = Analysis("low-precision", Config, compute, plot, tables, findings, __doc__, slow=True, details=details)

if __name__ == "__main__":
    ANALYSIS.main()
