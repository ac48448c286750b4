"""The curvature of an attention layer along training: moments, block norms, H_o against H_f, and the spectrum.

Exact at every measured step, in closed form, inside the training scan: a layer on handwritten digits (square loss), and
the last attention layer of a transformer on five-digit addition (cross-entropy). H_o comes to outweigh H_f in the query
and key blocks; the lowest eigenvalue of H nears zero, and on digits it is thrown back by bursts of Adam: it is the
larger in modulus, the rougher the loss is around that step.
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

    SMOKE: ClassVar = {"images": 4, "sequences": 4, "width": 4, "steps": 20, "every": 10, "seeds": 2}

    seeds: int = 3
    """Independent draws of data and weights; the first has the number `--seed`."""
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
    """Train both models at every seed, measuring in the scan: (seeds, steps / every + 1) of each quantity."""
    import jax

    runs = [{task: trained(config, task, seed, progress) for task in TASKS} for seed in range(config.seeds)]
    steps = [run[task].pop("steps") for run in runs for task in TASKS]
    return jax.tree.map(lambda *seeds: np.stack(seeds), *runs) | {"steps": steps[0]}


def trained(config: Config, task: str, seed: int, progress: Progress) -> Arrays:
    """One run: what was measured, the loss at every step, and the steps of the measurements."""
    import jax
    import optax

    from attnlab.training import Session, probe, show_progress, train

    key = jax.random.fold_in(jax.random.key(config.seed + seed), TASKS.index(task))
    keys = jax.random.split(key, 3)
    risk, params = (digits_task if task == "digits" else addition_task)(config, keys[0], keys[1])
    session = Session(
        report=show_progress(progress, f"{task}, seed {config.seed + seed}"),
        directory=config.scratch() / f"{task}-{config.seed + seed}",
    )
    optimizer, options = optax.adam(config.learning_rate), {"steps": config.steps, "every": config.every}
    probes = {"layer": probe(measurements)}
    records = train(risk, params, optimizer, keys[2], probes=probes, session=session, **options).records
    return records.values["layer"] | {"losses": records.losses, "steps": records.steps}


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
    """H_o over H_f by block, the ends of the spectrum, and what throws the lowest eigenvalue back."""
    from attnlab.plotting.panels import panels

    (start, digits), (begin, addition) = (np.median(balance(arrays[task]), axis=0)[[0, -1]] for task in TASKS)
    message = (
        r"The Gauss-Newton part takes over: $\|H_o\|/\|H_f\|$ of queries and keys goes "
        f"from {start:.1f} to {digits:.0f} on digits,\nfrom {begin:.1f} to {addition:.0f} on addition"
    )
    titles = (
        "digits, one layer (of VV $H_f$ is zero)",
        "addition, layer of a transformer",
        "lowest over highest eigenvalue of $H$",
        f"digits, from step {config.steps // 3}: bursts of Adam",
    )
    note = f"lines: medians over {config.seeds} seeds, bands: their range; exact at every measured step, step 0 first"
    figure, axes = panels(message, titles, note=note)
    for panel, task in zip(axes[:2], TASKS, strict=True):
        plot_balance(panel, arrays, task, config)
    plot_ends(axes[2], arrays, config)
    plot_bursts(axes[3], arrays, config)
    return figure


def balance(now: Arrays) -> np.ndarray:
    """||H_o|| / ||H_f||, geometric mean of the query and the key block, (seeds, points)."""
    return np.sqrt(np.prod([now["H_o"][name] / now["H_f"][name] for name in ("query", "key")], axis=0))


def shown_steps(arrays: Arrays, config: Config) -> np.ndarray:
    """The measured steps for a logarithmic axis, on which step 0 stands a third of an interval after zero."""
    return np.maximum(arrays["steps"], config.every / 3)


def curve(axes, arrays: Arrays, config: Config, values: np.ndarray, color: str, label: str, line: str = "-") -> None:
    """Median and range over the seeds of a quantity, (seeds, points)."""
    from attnlab.plotting.curves import range_band

    range_band(axes, shown_steps(arrays, config), values.T, color, label, line)
    axes.set(xscale="log", xlabel="training step")


LINES = {"value": "-", "query": "--", "key": "-."}


def plot_balance(axes, arrays: Arrays, task: str, config: Config) -> None:
    from attnlab.plotting.panels import log_ticks
    from attnlab.plotting.style import BLOCKS as LOOKS

    now = arrays[task]
    for name, label in BLOCKS.items():
        if np.all(now["H_f"][name] > 1e-12 * now["H_o"][name]):
            values = now["H_o"][name] / now["H_f"][name]
            curve(axes, arrays, config, values, LOOKS[name][0], f"{label}{label}", LINES[name])
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set(yscale="log", ylabel=r"$\|H_o\| \, / \, \|H_f\|$", ylim=(0.01, 300))  # room for the legend below
    log_ticks(axes.yaxis, 1, 10, 100)
    axes.legend(loc="lower right")


def plot_ends(axes, arrays: Arrays, config: Config) -> None:
    for color, task in enumerate(TASKS):
        ratio = np.abs(np.minimum(arrays[task]["smallest"], 0.0)) / arrays[task]["largest"]
        curve(axes, arrays, config, ratio, ("black", "0.5")[color], task, ("-", "--")[color])
    axes.set(yscale="log", ylabel=r"$|\lambda_{\min}| \, / \, \lambda_{\max}$")
    axes.legend(loc="lower left")


def plot_bursts(axes, arrays: Arrays, config: Config) -> None:
    """The lowest eigenvalue against the roughness of the loss around that step, with the rank correlations."""
    correlations = burst_correlations(arrays, config)
    for seed, (lowest, rough) in enumerate(zip(*bursts(arrays, config), strict=True)):
        label = f"seed {config.seed + seed}: {correlations[seed]:.2f}"
        look = {"marker": "osD^v"[seed % 5], "color": ("black", "0.45", "0.7")[seed % 3]}
        axes.loglog(rough, lowest, linestyle="none", markersize=3, label=label, **look)
    axes.set(xlabel="roughness of the loss around the step", ylabel=r"$|\lambda_{\min}|$")
    axes.legend(loc="lower right", handletextpad=0.2, title="rank correlation", title_fontsize=8)


REACH = 5


def bursts(arrays: Arrays, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """|lowest eigenvalue| on digits in the last two thirds of training, and how rough the loss is there: the standard
    deviation of its changes over `2 REACH` steps; (seeds, points) both."""
    steps, losses = arrays["steps"], arrays["digits"]["losses"]
    late = (steps >= config.steps // 3) & (steps >= REACH) & (steps + REACH <= losses.shape[1])
    changes = np.diff(losses, axis=1)
    rough = [changes[:, step - REACH : step + REACH].std(axis=1) for step in steps[late]]
    return np.abs(arrays["digits"]["smallest"][:, late]), np.stack(rough, axis=1)


def burst_correlations(arrays: Arrays, config: Config) -> np.ndarray:
    """Spearman's rank correlation of the two `bursts`, of each seed."""
    from scipy.stats import spearmanr

    return np.array([spearmanr(*pair).statistic for pair in zip(*bursts(arrays, config), strict=True)])


def details(arrays: Arrays, config: Config):
    """Norms of the diagonal blocks by task; losses and attention entropies; ends of the spectrum."""
    from attnlab.plotting.panels import panels

    titles = [
        *(f"{task}: norms of the diagonal blocks" for task in TASKS),
        "losses, and gradients in the outputs",
        "ends of the spectrum",
    ]
    ends = ", ".join(f"{np.median(arrays[task]['losses'][:, -1]):.2g} ({task})" for task in TASKS)
    note = f"lines: medians over {config.seeds} seeds, bands: their range; (c), (d) black: digits, grey: addition"
    figure, axes = panels(f"Behind it: losses end at {ends}", titles, note=note)
    for panel, task in zip(axes, TASKS, strict=False):
        plot_norms(panel, arrays, task, config)
    for task, color in zip(TASKS, ("black", "0.55"), strict=True):
        plot_losses(axes[2], arrays, task, config, color)
        curve(axes[3], arrays, config, arrays[task]["largest"], color, rf"{task}: $\lambda_{{\max}}$")
        curve(axes[3], arrays, config, np.abs(arrays[task]["smallest"]), color, r"$|\lambda_{\min}|$", "--")
    axes[2].set(xscale="log", yscale="log", xlabel="training step", ylabel="loss, norm")
    axes[3].set(yscale="log", ylabel="|eigenvalue|")
    for panel in axes[2:]:
        legend_above(panel, ncols=2)
    return figure


def plot_losses(axes, arrays: Arrays, task: str, config: Config, color: str) -> None:
    from attnlab.plotting.curves import range_band

    losses = arrays[task]["losses"]
    range_band(axes, np.arange(1, losses.shape[1] + 1), losses.T, color, f"{task}: loss")
    range_band(axes, shown_steps(arrays, config), arrays[task]["gradient"].T, color, "gradient", "-.")


def plot_norms(axes, arrays: Arrays, task: str, config: Config) -> None:
    from attnlab.plotting.style import BLOCKS as LOOKS

    for name, label in BLOCKS.items():
        for part, line in (("H_o", "-"), ("H_f", "--")):
            values = arrays[task][part][name]
            if np.all(values > 0):
                curve(axes, arrays, config, values, LOOKS[name][0], f"${part}$ {label}{label}", line)
    axes.set(yscale="log", ylabel="Frobenius norm")
    legend_above(axes, ncols=3)


def legend_above(axes, **options) -> None:
    """A legend in head room above the curves of a logarithmic axis."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.45)
    axes.legend(loc="upper center", fontsize=7.5, columnspacing=1, handlelength=1.6, **options)


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """The value block of H_f on digits, negative curvature at the start, and a Gauss-Newton matrix that takes over."""
    source = "Ormaniec, Dangel, Singh, arXiv 2410.10986"
    digits = arrays["digits"]
    values = np.max(digits["H_f"]["value"] / digits["H_o"]["value"])
    loss = [arrays[task]["losses"][:, -1] / arrays[task]["losses"][:, 0] for task in TASKS]
    negative = [arrays[task]["negative"][:, 0] for task in TASKS]
    grown = [balance(arrays[task])[:, -1] / balance(arrays[task])[:, 0] for task in TASKS]
    return [
        at_most("digits: ||H_f|| / ||H_o|| of the value block, at any step", values, 1e-10, source=source),
        at_least("share of negative eigenvalues at the start: digits, addition", negative, 0.05, source=source),
        at_most("loss at the end over that at the start: digits, addition", loss, 0.5, source="both models learn"),
        at_least(
            "growth of ||H_o|| / ||H_f|| of queries and keys", grown, 10.0, because="an order", source="seen here"
        ),
        at_least(
            "digits: rank correlation of |lowest eigenvalue| and roughness of the loss",
            burst_correlations(arrays, config),
            0.3,
            because="Adam moves the residual, on which H_f depends",
            source="seen here",
        ),
    ]


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """Beginning, middle and end of both trajectories at the first seed."""
    picked = [0, len(arrays["steps"]) // 2, -1]
    table = Table("task", "quantity", *(f"step {arrays['steps'][i]}" for i in picked))
    for task in TASKS:
        for part in ("H", "H_o", "H_f"):
            for name, label in BLOCKS.items():
                values = arrays[task][part][name][0]
                table.add_row(task, f"norm of {label}{label} of {part}", *(f"{values[i]:.3g}" for i in picked))
        for quantity in ("largest", "smallest"):
            values = arrays[task][quantity][0]
            table.add_row(task, f"{quantity} eigenvalue of H", *(f"{values[i]:.3g}" for i in picked))
    return [table]


ANALYSIS = Analysis(
    "curvature-along-training", Config, compute, plot, tables, findings, __doc__, slow=True, details=details
)

if __name__ == "__main__":
    ANALYSIS.main()
