"""The curvature of an attention layer along training: moments, block norms, H_o against H_f, and the spectrum.

Exact at every measured step, in closed form, inside the training scan: a layer on handwritten digits (square loss), and
the last attention layer of a transformer on five-digit addition (cross-entropy).
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from rich.progress import Progress
from rich.table import Table

from attnlab.analysis import Analysis, AnalysisConfig, Arrays
from attnlab.expectation import Expectation, at_least, at_most

TASKS = ("digits", "addition")
BLOCKS = {"value": "V", "query": "Q", "key": "K"}
PARTS = {"ggn": "H_o", "functional": "H_f"}


@dataclass(frozen=True)
class Config(AnalysisConfig):
    """Options of the analysis."""

    SMOKE: ClassVar = {"images": 4, "sequences": 4, "width": 4, "steps": 20, "every": 10}

    images: int = 64
    """Images of the digits task."""
    sequences: int = 64
    """Additions of the addition task."""
    width: int = 16
    """Width of the transformer on addition, and of queries and keys on digits."""
    steps: int = 2000
    """Training steps of Adam; a multiple of `every`."""
    every: int = 25
    """Steps between measurements."""
    learning_rate: float = 0.01
    """Of Adam."""


def compute(config: Config, progress: Progress) -> Arrays:
    """Train both models, measuring in the scan."""
    import jax
    import optax

    from attnlab.training import Session, probe, show_progress, train

    arrays = {}
    for number, name in enumerate(TASKS):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), number), 3)
        risk, params = (digits_task if name == "digits" else addition_task)(config, keys[0], keys[1])
        records = train(
            risk,
            params,
            optax.adam(config.learning_rate),
            keys[2],
            steps=config.steps,
            every=config.every,
            probes={"layer": probe(measurements)},
            session=Session(report=show_progress(progress, name), directory=config.scratch() / name),
        ).records
        arrays |= {name: records.values["layer"] | {"losses": records.losses}, "steps": records.steps}
    return arrays


def digits_task(config: Config, data_key, init_key):
    """One layer on the digits: every token regresses to the image's one-hot class."""
    from attnlab.data.digits import digits
    from attnlab.losses import square_loss
    from attnlab.models.adapters import from_linen
    from attnlab.models.attention import AttentionConfig, SelfAttention
    from attnlab.objectives import objective

    data = digits(data_key, config.images, patch=(2, 2), positions="one_hot")
    layer = AttentionConfig(key_dim=config.width, value_dim=10)
    module = SelfAttention(layer)

    params = module.init(init_key, data.inputs)["params"]
    return objective(from_linen(module), square_loss, data.inputs, data.targets), params


def addition_task(config: Config, data_key, init_key):
    """The attention layer of a one-block transformer; the curvature behind it acts on each token by itself."""
    from attnlab.data.addition import addition, answer_positions
    from attnlab.losses import cross_entropy
    from attnlab.models.adapters import at_positions, from_linen
    from attnlab.models.attention import AttentionConfig
    from attnlab.models.transformer import LanguageModel, LanguageModelConfig, TransformerConfig
    from attnlab.objectives import objective

    width, scheme = config.width, {"init": "normal", "gain": 0.8 * config.width**-0.5}
    attention = AttentionConfig(width, width, causal=True, output_dim=width, **scheme)
    blocks = TransformerConfig(attention, 1, 4 * width, activation="gelu", norm=None, **scheme)
    model = LanguageModel(LanguageModelConfig(blocks, 12, 18, width, embedding_std=0.3, dtype=config.dtype, **scheme))
    tokens, answers = addition(data_key, config.sequences)
    places = answer_positions()
    params = model.init(init_key, tokens)["params"]
    predict = at_positions(from_linen(model), places)
    return objective(predict, cross_entropy, tokens, answers), params


def measurements(risk, params):
    """Block norms of H, H_o and H_f of the attention layer, eigenvalues of H, and the size of the moments."""
    import jax.numpy as jnp

    from attnlab.attention import attention_hessian

    exact = attention_hessian(risk, params)
    norms = exact.norms()
    eigenvalues = jnp.linalg.eigvalsh(exact.dense())
    moments = exact.moments
    probabilities = jnp.where(moments.weights > 0, moments.weights, 1)
    return {
        "entropy": -jnp.mean(jnp.sum(probabilities * jnp.log(probabilities), axis=-1)),
        "second": jnp.mean(jnp.trace(moments.second, axis1=-2, axis2=-1)),
        "first": jnp.mean(jnp.sum(moments.first**2, axis=-1)),
        "gradient": jnp.linalg.norm(exact.gradient),
        "largest": eigenvalues[-1],
        "smallest": eigenvalues[0],
        "negative": jnp.mean(eigenvalues < -1e-10 * eigenvalues[-1]),
        "H": {name: norms["hessian"][name, name] for name in BLOCKS},
        "H_o": {name: norms["ggn"][name, name] for name in BLOCKS},
        "H_f": {name: norms["functional"][name, name] for name in BLOCKS},
    }


def plot(arrays: Arrays, config: Config):
    """Rows: the tasks; columns: loss and entropy, block norms, moments, extreme eigenvalues."""
    import matplotlib.pyplot as plt

    figure, rows = plt.subplots(len(TASKS), 4, figsize=(14, 6.4))
    for axes, task in zip(rows, TASKS, strict=True):
        now = arrays[task] | {"steps": np.maximum(arrays["steps"], config.every / 3)}
        plot_loss(axes[0], now, task)
        plot_norms(axes[1], now, task)
        plot_moments(axes[2], now, task)
        plot_eigenvalues(axes[3], now, task)
        for panel in axes:
            panel.set_xscale("log")
            panel.set_xlabel("step (the first point is step 0)")
    return figure


def plot_loss(axes, now: Arrays, task: str) -> None:
    axes.loglog(np.arange(1, len(now["losses"]) + 1), now["losses"], color="C0", label="training loss")
    axes.set(ylabel="training loss", title=f"{task}: loss and attention entropy")
    right = axes.twinx()
    right.plot(now["steps"], now["entropy"], "o-", color="C1")
    right.set_ylabel("mean attention entropy (nats)", color="C1")
    right.spines["right"].set_visible(True)


def legend_above(axes, **options) -> None:
    """A legend in head room above the curves of a logarithmic axis."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.45)
    axes.legend(loc="upper center", **options)


def plot_norms(axes, now: Arrays, task: str) -> None:
    for color, (name, label) in enumerate(BLOCKS.items()):
        axes.loglog(now["steps"], now["H_o"][name], color=f"C{color}", label=f"$H_o$, {label}{label}")
        if np.any(now["H_f"][name] > 0):
            axes.loglog(now["steps"], now["H_f"][name], "--", color=f"C{color}", label=f"$H_f$, {label}{label}")
    axes.set(ylabel="Frobenius norm", title=f"{task}: diagonal blocks")
    legend_above(axes, ncols=3, columnspacing=1, handlelength=1.6)


def plot_moments(axes, now: Arrays, task: str) -> None:
    axes.loglog(now["steps"], now["first"], label=r"first moment, mean $\|m_i\|^2$")
    axes.loglog(now["steps"], now["second"], label=r"second moment, mean $\mathrm{tr}\,\Sigma_i$")
    axes.loglog(now["steps"], now["gradient"], label=r"gradient at the output, $\|g\|$")
    axes.set(title=f"{task}: attention moments and residual", ylabel="size")
    legend_above(axes)


def plot_eigenvalues(axes, now: Arrays, task: str) -> None:
    axes.loglog(now["steps"], now["largest"], label="largest eigenvalue of $H$")
    axes.loglog(now["steps"], np.abs(now["smallest"]), "--", label="|smallest eigenvalue| of $H$")
    axes.set(title=f"{task}: spectrum of the layer's block", ylabel="|eigenvalue|")
    right = axes.twinx()
    right.plot(now["steps"], 100 * now["negative"], ".:", color="C2")
    right.set(ylim=(0, 60))
    right.set_ylabel("negative eigenvalues (%)", color="C2")
    right.spines["right"].set_visible(True)
    legend_above(axes)


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """The value block of H_f on digits, negative curvature at the start, and a Gauss-Newton matrix that takes over."""
    source = "Ormaniec, Dangel, Singh, arXiv 2410.10986"
    digits = arrays["digits"]
    values = np.max(digits["H_f"]["value"] / digits["H_o"]["value"])
    loss = [arrays[task]["losses"][-1] / arrays[task]["losses"][0] for task in TASKS]
    negative = [arrays[task]["negative"][0] for task in TASKS]
    return [
        at_most("digits: ||H_f|| / ||H_o|| of the value block, at any step", values, 1e-10, source=source),
        at_least("share of negative eigenvalues at the start: digits, addition", negative, 0.05, source=source),
        at_most("loss at the end over that at the start: digits, addition", loss, 0.5, source="both models learn"),
    ]


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """Beginning, middle and end of both trajectories."""
    picked = [0, len(arrays["steps"]) // 2, -1]
    table = Table("task", "quantity", *(f"step {arrays['steps'][i]}" for i in picked))
    for task in TASKS:
        for part in ("H", "H_o", "H_f"):
            for name, label in BLOCKS.items():
                values = arrays[task][part][name]
                table.add_row(task, f"norm of {label}{label} of {part}", *(f"{values[i]:.3g}" for i in picked))
        for quantity in ("largest", "smallest"):
            values = arrays[task][quantity]
            table.add_row(task, f"{quantity} eigenvalue of H", *(f"{values[i]:.3g}" for i in picked))
    return [table]


ANALYSIS = Analysis("curvature-along-training", Config, compute, plot, tables, findings, __doc__, slow=True)

if __name__ == "__main__":
    ANALYSIS.main()
