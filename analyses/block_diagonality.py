"""Is the Hessian block-diagonal? The share of its norm between layers, matrices and units, and what its blocks forget.

Perceptrons of 1, 2 and 4 hidden layers on clusters of 2 to 1,000 classes, and small language models of 32 and 1,000
words, at initialisation and trained: the shares of ||H||_F^2 and of the Gauss-Newton matrix's ||G||_F^2 off the block
diagonal, exact (the columns of all layers but the last by products, the last layer in closed form); of a larger
language model by random vectors, with their errors. Beside them the steps of the blocks: <g, (B + damping)^-1 g>
against that of the whole matrix, the decrease of the damped quadratic model, and the loss. Three seeds.
"""

import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from rich.progress import Progress
from rich.table import Table

from attnlab.analysis import Analysis, AnalysisConfig, Arrays
from attnlab.expectation import Expectation, at_least, at_most, between

STATES = ("initial", "trained")
PARTS = {"hessian": "H", "ggn": "G"}
PARTITIONS = ("layer", "matrix", "unit")
STEPS = ("whole", *PARTITIONS)
STEP_MEASURES = ("<g, (B + damping)^-1 g>", "model, best length", "loss, own length", "loss, best length")
LENGTHS = 2.0 ** np.arange(-6, 3)
KERNELS = re.compile("layer_\\d+$|query|key|value|output|up|down|unembedding")
BLOCKS, STEPWISE, CLASSES = "arXiv 2602.00816", "arXiv 2510.09378", "arXiv 2505.02809"


@dataclass(frozen=True)
class Config(AnalysisConfig):
    """Options of the analysis."""

    SMOKE: ClassVar = {
        "classes": (2, 4),
        "depths": (1,),
        "vocabularies": (),
        "large": 0,
        "seeds": 1,
        "examples": 16,
        "width": 4,
        "steps": 3,
    }

    classes: tuple[int, ...] = (2, 10, 30, 100, 300, 1000)
    """Numbers of classes of the perceptrons."""
    depths: tuple[int, ...] = (1, 2, 4)
    """Numbers of hidden layers."""
    vocabularies: tuple[int, ...] = (32, 1000)
    """Words of the language models of two blocks."""
    large: int = 1000
    """Words of the larger language model, of four blocks; 0 is no such model."""
    seeds: int = 3
    """Random starts."""
    examples: int = 1000
    """Examples of the perceptrons; half as many words of text."""
    width: int = 16
    """Of the hidden layers."""
    steps: int = 150
    """Steps of Adam to the trained networks."""
    damping: float = 0.01
    """Of all inverses, in units of the highest eigenvalue of the Gauss-Newton matrix."""
    samples: int = 16
    """Random vectors for the larger language model."""


def builders(config: Config) -> dict:
    """By name: a function of a key to (objective, parameters), and the name of the last layer."""
    from attnlab.risks.networks import clusters, text_model

    found = {}
    for depth in config.depths:
        for classes in config.classes:
            options = {"count": config.examples, "width": config.width, "hidden": (config.width,) * depth}
            build = lambda key, classes=classes, options=options: clusters(key, classes, **options)  # noqa: E731
            found[f"{depth} hidden, {classes}"] = (build, f"layer_{depth}")
    sequences = max(config.examples // 16, 1)
    for vocabulary in config.vocabularies:
        build = lambda key, size=vocabulary: text_model(key, sequences=sequences, vocabulary=size, width=12)  # noqa: E731
        found[f"language, {vocabulary}"] = (build, "unembedding")
    if config.large:
        build = lambda key: text_model(key, sequences=sequences, vocabulary=config.large, width=32, layers=4)  # noqa: E731
        found[f"large, {config.large}"] = (build, "unembedding")
    return found


def compute(config: Config, progress: Progress) -> Arrays:
    """By network and state: shares (seeds, parts, partitions), of the last layer by class, and steps."""
    import jax
    import optax

    from attnlab.training import train

    arrays: Arrays = {}
    table = builders(config)
    task = progress.add_task("networks", total=len(table) * config.seeds * 2, status="")
    for name, (build, last) in table.items():
        parts: dict[str, list] = {state: [] for state in STATES}
        for seed in range(config.seed, config.seed + config.seeds):
            key = jax.random.key(seed)
            risk, start = build(key)
            trained = train(risk, start, optax.adam(5e-3), key, steps=config.steps, every=config.steps).params
            for state, params in zip(STATES, (start, trained), strict=True):
                progress.update(task, status=f"{name}, seed {seed}, {state}")
                found = (
                    sampled(config, risk, params, key) if name[:5] == "large" else measured(config, risk, params, last)
                )
                parts[state].append(found)
                progress.advance(task)
        arrays[name] = {s: {f: np.stack([part[f] for part in parts[s]]) for f in parts[s][0]} for s in STATES}
    return arrays


def layer_of(path: str) -> str:
    """The layer of a leaf: a matrix of a perceptron, a block of a transformer."""
    found = re.search(r"layer_\d+", path)
    return found.group() if found else path


def partitions(point) -> dict[str, np.ndarray]:
    """All three."""
    from attnlab.curvature.partitions import partition_by, partition_by_unit

    by = {"layer": partition_by(point, layer_of), "matrix": partition_by(point, str)}
    return {**by, "unit": partition_by_unit(point)}


def measured(config: Config, risk, params, last: str) -> Arrays:
    """Exact shares of one network, and the steps of its blocks."""
    import jax

    from attnlab.curvature import cross, ggn, hessian
    from attnlab.curvature.readout import readout

    end = readout(risk, params, last)
    whole, by_class = (float(norm) for norm in end.squared_norms())
    shares = np.zeros((len(PARTS), len(PARTITIONS)))
    for row, build in enumerate((hessian, ggn)):
        operator = build(risk, params, block=KERNELS, check=False)
        *names, behind = operator.point  # in the order of their names
        assert behind == last, f"the last layer {last} stands before {behind}"
        inner = re.compile("|".join(f"^{name}$" for name in names))
        columns = np.asarray(cross(operator, re.compile(""), inner).dense())
        size = columns.shape[1]
        square, rest = columns[:size], columns[size:]
        total = np.sum(square**2) + 2 * np.sum(rest**2) + whole
        labels = partitions({name: operator.point[name] for name in names})
        for column, kind in enumerate(PARTITIONS):
            same = labels[kind][:, None] == labels[kind]
            kept = np.sum(square[same] ** 2) + (by_class if kind == "unit" else whole)
            shares[row, column] = 1 - kept / total
    gradient = jax.jit(jax.grad(risk))(params)
    return {
        "shares": shares,
        "by_class": np.asarray(1 - by_class / whole),
        "first": first_layer_share(operator, square),
        "steps": of_steps(config, risk, params, operator, gradient, square, labels, last, end),
    }


def first_layer_share(operator, square: np.ndarray) -> np.ndarray:
    """Of the first matrix's block of G, the share between its units."""
    from attnlab.curvature.partitions import off_diagonal_share, partition_by_unit

    name, leaf = next(iter(operator.point.items()))
    return np.asarray(off_diagonal_share(square[: leaf.size, : leaf.size], partition_by_unit({name: leaf})))


def of_steps(config: Config, risk, params, operator, gradient, square, labels, last: str, end) -> np.ndarray:
    """Of each of STEPS, its four measures; the first two relative to the whole matrix's."""
    import jax
    import jax.numpy as jnp

    from attnlab.curvature import eigenpairs, ggn, solve
    from attnlab.curvature.partitions import solve_blocks
    from attnlab.trees import select

    selection = select(params, KERNELS)
    own = selection.take(gradient)
    damping = config.damping * float(eigenpairs(operator, jax.random.key(0), count=1).values[-1])
    best = solve(operator, own, damping=damping, tolerance=1e-8, steps=4000)
    end_block = ggn(risk, params, block=last, check=False)
    end_step = solve(end_block, OrderedDict({last: own[last]}), damping=damping, tolerance=1e-8, steps=4000)
    assert max(best.residual, end_step.residual) < 1e-6, (best.residual, end_step.residual)
    damped = end.class_blocks() + damping * jnp.eye(own[last].shape[0])[None]
    by_class = jnp.linalg.solve(damped, own[last].T[..., None])[..., 0].T
    flat = operator.ravel(own)
    inner = {kind: solve_blocks(square, each, flat[: len(square)], damping) for kind, each in labels.items()}
    ends = {"layer": end_step.vector[last], "matrix": end_step.vector[last], "unit": by_class}
    steps = {kind: operator.unravel(jnp.concatenate([inner[kind], ends[kind].ravel()])) for kind in PARTITIONS}
    return judged(risk, params, selection, operator, own, {"whole": best.vector, **steps}, damping)


def judged(risk, params, selection, operator, gradient, steps, damping: float) -> np.ndarray:
    """The measures of steps that are there."""
    import jax
    import jax.numpy as jnp

    start, flat = selection.take(params), operator.ravel(gradient)
    moved = lambda step, length: jax.tree.map(lambda w, d: w - length * d, start, step)  # noqa: E731
    losses = jax.jit(lambda step: jax.lax.map(lambda length: risk(selection.put(params, moved(step, length))), LENGTHS))
    best, rows = flat @ operator.ravel(steps["whole"]), []
    for kind in STEPS:
        direction = operator.ravel(steps[kind])
        curvature = direction @ operator.ravel(operator.mv(steps[kind])) + damping * direction @ direction
        after = losses(steps[kind]) / risk(params)
        energy = flat @ direction
        rows.append([energy / best, energy**2 / curvature / best, after[LENGTHS == 1][0], jnp.min(after)])
    return np.asarray(rows, float)


def sampled(config: Config, risk, params, key) -> Arrays:
    """Shares by layer and by matrix from random vectors, with their errors."""
    from attnlab.curvature import ggn, hessian
    from attnlab.curvature.partitions import off_diagonal_share_estimate

    shares = np.full((len(PARTS), len(PARTITIONS), 2), np.nan)
    for row, build in enumerate((hessian, ggn)):
        operator = build(risk, params, block=KERNELS, check=False)
        by = partitions(operator.point)
        for column, kind in enumerate(PARTITIONS[:2]):
            shares[row, column] = off_diagonal_share_estimate(operator, by[kind], key, samples=config.samples)
    return {"shares": shares[..., 0], "errors": shares[..., 1]}


def series(arrays: Arrays, config: Config, depth: int, state: str, field: str) -> np.ndarray:
    """A field of the perceptrons of one depth, (classes, seeds, ...)."""
    return np.stack([arrays[f"{depth} hidden, {classes}"][state][field] for classes in config.classes])


def plot(arrays: Arrays, config: Config):
    """Shares by the number of classes, of G and of H; by network; and the steps."""
    from attnlab.plotting.panels import legend_below, panels

    ends = (config.depths[0], config.depths[-1])
    outside = [
        [series(arrays, config, depth, "initial", "shares")[-1, :, part, 1].mean() for depth in ends] for part in (1, 0)
    ]
    (g_shallow, g_deep), (h_shallow, h_deep) = outside
    message = (
        f"Not block-diagonal: with {config.classes[-1]:,} classes {h_shallow:.2f} to {h_deep:.2f} of $H$ "
        "lies between matrices (initial)"
    )
    titles = (
        f"$G$ of perceptrons: {g_shallow:.2f} to {g_deep:.2f} there",
        f"$H$ of perceptrons: {h_shallow:.2f} to {h_deep:.2f} there",
        "language models",
        f"steps by matrices keep {least_kept(arrays):.2f} or more",
    )
    note = (
        f"$G$: Gauss-Newton matrix; marks: means over {config.seeds} starts, thin lines and dots: each; dashed: trained"
    )
    figure, axes = panels(message, titles, note=note, height=3.3)
    for panel, part in zip(axes[:2], (1, 0), strict=True):
        by_classes(panel, arrays, config, part)
    bars(axes[2], arrays)
    steps(axes[3], arrays)
    legend_below(figure, axes[0], columns=2)
    return figure


def least_kept(arrays: Arrays) -> float:
    """The least share of the decrease that steps by matrices keep, over networks, states and starts."""
    return min(
        each[state]["steps"][:, 2, 1].min() for each in arrays.values() for state in STATES if "steps" in each[state]
    )


def by_classes(panel, arrays: Arrays, config: Config, part: int) -> None:
    """Shares between matrices by the number of classes, each depth, and of the last layer by class."""
    classes = np.array(config.classes)
    for number, depth in enumerate(config.depths):
        for state, style in zip(STATES, ("-", "--"), strict=True):
            shares = series(arrays, config, depth, state, "shares")[:, :, part, 1]
            panel.loglog(classes, shares, style, color=f"C{number}", lw=0.6, alpha=0.6)
            label = f"between matrices, {depth} hidden" if state == "initial" else None
            panel.loglog(classes, shares.mean(axis=1), "o" + style, color=f"C{number}", ms=4, label=label)
    by_class = series(arrays, config, config.depths[0], "initial", "by_class").mean(axis=1)
    panel.loglog(classes, by_class, "s", color="black", ms=4, label="last layer, between classes")
    panel.loglog(classes, 1 / classes, ":", color="black", label="1 / classes")
    panel.set_xlabel("classes")
    panel.set_ylabel(f"share of $||{'HG'[part]}||_F^2$ outside blocks")


def shown_networks(arrays: Arrays) -> list[str]:
    """The language models; perceptrons at the largest number of classes where there are none."""
    return [name for name in arrays if "hidden" not in name] or list(arrays)[-1:]


def bars(panel, arrays: Arrays) -> None:
    """Shares of the language models, by partition and part."""
    from attnlab.plotting.style import PARTS as PARTS_LOOKS

    names = shown_networks(arrays)
    groups = [(part, state) for part in range(2) for state in range(2)]
    place = 0
    ticks = []
    for name in names:
        for column, kind in enumerate(PARTITIONS):
            if np.isnan(arrays[name]["initial"]["shares"][0, 0, column]):
                continue
            for number, (part, state) in enumerate(groups):
                values = arrays[name][STATES[state]]["shares"][:, part, column]
                color, hatch = ("0.45", PARTS_LOOKS["ggn"][0])[part], (None, "//")[state]
                label = f"{'HG'[part]}, {STATES[state]}" if place == 0 else None
                x = place + 0.2 * (number - 1.5)
                panel.bar(x, values.mean(), 0.2, color=color, hatch=hatch, edgecolor="white", label=label, alpha=0.9)
                panel.plot(np.full(len(values), x), values, ".", color="black", ms=3)
                if "errors" in arrays[name][STATES[state]]:
                    errors = arrays[name][STATES[state]]["errors"][:, part, column]
                    panel.errorbar(np.full(len(values), x), values, errors, fmt="none", color="black", lw=0.8)
            words = "" if "hidden" in name else " words"
            ticks.append((place, f"{name}{words}: {kind}"))
            place += 1
    panel.set_xticks([x for x, _ in ticks], [label for _, label in ticks], rotation=55, ha="right", fontsize=7.5)
    panel.set_ylim(0, 1.35)
    panel.set_ylabel("share off the diagonal")
    panel.set_xlabel("network: blocks")
    panel.legend(fontsize=7.5, ncols=2, loc="upper left", columnspacing=1)


def steps(panel, arrays: Arrays) -> None:
    """Decrease of the damped model by steps of blocks, against the share that they leave out."""
    for number, kind in enumerate(PARTITIONS):
        for state, marker in zip(STATES, "o^", strict=True):
            # Of a perceptron a layer is a matrix.
            names = [name for name in arrays if "steps" in arrays[name][state] and (number or "hidden" not in name)]
            if not names:
                continue
            each = [arrays[name][state] for name in names]
            shares = np.concatenate([a["shares"][:, 1, number] for a in each])
            kept = np.concatenate([a["steps"][:, 1 + number, 1] for a in each])
            label = f"by {kind}, {state}"
            panel.plot(shares, kept, marker, color=f"C{number}", ms=(6, 3.5, 3.5)[number], alpha=0.55, label=label)
    panel.axhline(1, color="0.4", ls=":")
    panel.set_ylim(0, 1.05)
    panel.set_xlabel("share of $||G||_F^2$ that the blocks leave out")
    panel.set_ylabel("decrease / whole matrix's")
    panel.legend(fontsize=7.5, loc="lower left", handletextpad=0.1, borderaxespad=0.1)


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """Each paper's statement, where it is tested."""
    found = []
    most, deepest = config.classes[-1], max(config.depths)
    for depth in config.depths:
        by_class = series(arrays, config, depth, "initial", "by_class").mean(axis=1) * np.array(config.classes)
        found.append(between(f"{depth} hidden, initial: last layer, between classes x classes", by_class, 0.9, 1.4,
                             because="1 / classes if all are as likely, more if not", source=CLASSES))  # fmt: skip
    between_matrices = series(arrays, config, min(config.depths), "initial", "shares")[:, :, 1, 1].mean(axis=1)
    slope = np.polyfit(np.log(config.classes[-3:]), np.log(between_matrices[-3:]), 1)[0]
    found.append(at_most("1 hidden, initial: exponent of the share of G between matrices in the classes", slope, -0.7,
                         because="-1 in the limit, and three numbers of classes", source=CLASSES))  # fmt: skip
    if deepest > 1:
        share = series(arrays, config, deepest, "initial", "shares")[-1, :, 1, 1]
        found.append(at_least(f"{deepest} hidden, {most} classes, initial: share of G between matrices", share, 0.2,
                              source=BLOCKS))  # fmt: skip
        share = series(arrays, config, deepest, "initial", "first")[-1]
        found.append(at_least(f"{deepest} hidden, {most} classes, initial: share of the first layer's G between units",
                              share, 0.2, source=f"against {CLASSES}"))  # fmt: skip
    for name, each in arrays.items():
        if "steps" in each["initial"]:
            kept = [np.mean(each[state]["steps"][:, 1, 1]) for state in STATES]
            found.append(at_least(f"{name}: decrease of the step by layers, of the whole matrix's", kept, 0.8,
                                  source=STEPWISE))  # fmt: skip
    return found


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """All shares, and all steps, means over seeds."""
    title = "Share off the block diagonal: initial / trained"
    columns = [f"{part} by {kind}" for part in PARTS.values() for kind in PARTITIONS]
    shares = Table("network", *columns, "last, class", title=title)
    steps = Table("network", "measure", *STEPS, title="Steps of the Gauss-Newton matrix: initial / trained")
    for name, each in arrays.items():
        pairs = [each[state]["shares"].mean(axis=0).ravel() for state in STATES]
        row = [f"{a:.3f} / {b:.3f}" for a, b in zip(*pairs, strict=True)]
        by_class = [each[state]["by_class"].mean() for state in STATES] if "by_class" in each["initial"] else []
        shares.add_row(name, *row, " / ".join(f"{value:.4f}" for value in by_class))
        if "steps" in each["initial"]:
            for number, measure in enumerate(STEP_MEASURES):
                pairs = [each[state]["steps"][..., number].mean(axis=0) for state in STATES]
                steps.add_row(name, measure, *(f"{a:.2f} / {b:.2f}" for a, b in zip(*pairs, strict=True)))
    return [shares, steps]


ANALYSIS = Analysis("block-diagonality", Config, compute, plot, tables, findings, __doc__, slow=True)

if __name__ == "__main__":
    ANALYSIS.main()
