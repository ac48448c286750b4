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
    """The first trained network: spectra in three precisions, errors beside Weyl's bound; and of all networks the
    highest eigenvalues' errors against residuals, and noise."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(15, 8))
    first = networks_in(arrays, "trained")[0]
    for axis, (part, label) in zip(axes[0], PARTS.items(), strict=False):
        plot_spectrum(axis, first[part], f"${label}$, trained, first start")
    for column, dtype in enumerate(PRECISIONS):
        plot_certificates(axes[1, column], arrays, dtype)
    plot_errors(axes[0, 2], first["hessian"])
    plot_noise(axes[1, 2], arrays)
    return figure


def plot_spectrum(axes, found: Arrays, title: str) -> None:
    for color, (name, one) in enumerate((("float64", found), *((dtype, found[dtype]) for dtype in PRECISIONS))):
        values = np.asarray(one["values"])
        for sign, line, label in ((1, "-", name), (-1, ":", f"{name}, negative")):
            moduli = np.sort((sign * values)[sign * values > 0])[::-1]
            axes.plot(np.arange(1, len(moduli) + 1), moduli, line, color=f"C{color}", label=label)
        if name in PRECISIONS:
            axes.axhline(float(one["noise"]), color=f"C{color}", linewidth=0.7, linestyle="--")
    axes.set(
        xscale="log", yscale="log", xlabel="rank", ylabel=r"$|\lambda|$", title=title + r" (dashed: $\Vert E\Vert_2$)"
    )
    axes.legend(fontsize=7)


def plot_errors(axes, found: Arrays) -> None:
    for color, dtype in enumerate(PRECISIONS, start=1):
        scale, size = largest(found), np.abs(found["values"])
        axes.loglog(size / scale, np.maximum(errors(found, dtype), 1e-18) / scale, ".", color=f"C{color}", label=dtype)
        axes.axhline(float(found[dtype]["noise"]) / scale, color=f"C{color}", linestyle="--", label="Weyl's bound")
    line = np.array([1e-9, 1.0])
    axes.plot(line, line, color="black", linewidth=0.7, label="as large as the eigenvalue")
    axes.set(
        xlabel=r"$|\lambda| / \Vert H\Vert_2$", ylabel="error relative to the norm", title="all eigenvalues of $H$"
    )
    axes.legend(fontsize=7)


def plot_certificates(axes, arrays: Arrays, dtype: str) -> None:
    pairs = [(one[part], largest(one[part])) for one in arrays.values() for part in PARTS]
    error = np.concatenate([top_errors(found, dtype) / scale for found, scale in pairs])
    labels = {"stated": "stated by the iteration", "checked": f"of a product in {PRECISIONS[dtype]}"}
    for color, (name, label) in enumerate(labels.items()):
        residual = np.concatenate([found[dtype][name] / scale for found, scale in pairs])
        axes.loglog(residual, np.maximum(error, 1e-18), ".", color=f"C{color}", label=f"residual {label}")
    line = np.array([1e-10, 1e-1])
    axes.plot(line, line, color="black", linewidth=0.7)
    axes.set(xlabel="residual / norm", ylabel="error / norm", title=f"highest eigenvalues in {dtype}: bounds lie right")
    axes.legend(fontsize=7)


def plot_noise(axes, arrays: Arrays) -> None:
    names = []
    for place, (state, part) in enumerate((state, part) for state in STATES for part in PARTS):
        names.append(f"${PARTS[part]}$\n{state}")
        for color, dtype in enumerate(PRECISIONS, start=1):
            values = noise(arrays, state, part, dtype)
            axes.plot(np.full(len(values), place), values, "o", color=f"C{color}", label=dtype if place == 0 else None)
    for dtype, bits in (("float32", 23), ("bfloat16", 7)):
        axes.axhline(2.0**-bits, color="black", linewidth=0.7, linestyle=":")
        axes.annotate(f"epsilon of {dtype}", (3.4, 2.0**-bits), fontsize=7, ha="right", va="bottom")
    axes.set(yscale="log", xticks=range(len(names)), xticklabels=names, title=r"$\Vert E\Vert_2$ / norm")
    axes.legend(fontsize=7)


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


ANALYSIS = Analysis("low-precision", Config, compute, plot, tables, findings, __doc__, slow=True)

if __name__ == "__main__":
    ANALYSIS.main()
