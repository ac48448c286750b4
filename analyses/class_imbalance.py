"""Where Adam's advantage on language sits: the loss by how frequent the next word is, on English text.

A causal attention layer predicts the next word of the help texts that come with Python, whose frequencies fall by the
law of Zipf. Both optimizers see the same minibatches; words are put into groups of equal share of the text, from the
most frequent to the rarest.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from rich.progress import Progress
from rich.table import Table

from attnlab.analysis import Analysis, AnalysisConfig, Arrays, Finding, findings_table

OPTIMIZERS = ("Adam", "SGD with momentum")
FITTED = 300
"""Most frequent words, of which the law of Zipf is fitted."""


@dataclass(frozen=True)
class Config(AnalysisConfig):
    """Options of the analysis."""

    SMOKE: ClassVar = {"sequences": 8, "length": 8, "batch": 4, "steps": 10, "every": 5, "groups": 4}

    dtype: Literal["float64", "float32"] = "float32"
    """Precision of the computation."""
    sequences: int = 2048
    """Sequences of text."""
    length: int = 16
    """Words in a sequence."""
    batch: int = 64
    """Sequences a step."""
    steps: int = 300
    """Steps, a multiple of `every`."""
    every: int = 25
    """Steps between measurements."""
    groups: int = 10
    """Groups of words, each of an equal share of the text."""
    adam_rate: float = 0.01
    """Learning rate of Adam."""
    sgd_rate: float = 0.2
    """Learning rate of SGD with momentum 0.9; the best of 0.05, 0.2 and 0.8, where it diverges."""


def compute(config: Config, progress: Progress) -> Arrays:
    """Train with each optimizer from one start, with the loss of every group on all of the text."""
    import jax
    import optax

    from attnlab.dynamics.frequency import frequency_groups, group_losses
    from attnlab.dynamics.problems import next_word_prediction
    from attnlab.training import minibatches, show_progress, train

    key = jax.random.key(config.seed)
    risk, params = next_word_prediction(key, config.sequences, config.length)
    counts = np.bincount(np.asarray(risk.targets).ravel())
    groups = frequency_groups(risk.targets, len(params["token_embedding"]), config.groups)
    rules = (optax.adam(config.adam_rate), optax.sgd(config.sgd_rate, momentum=0.9))
    arrays: Arrays = {"counts": counts, "groups": np.asarray(groups)}
    for name, rule in zip(OPTIMIZERS, rules, strict=True):
        records = train(
            risk,
            params,
            rule,
            key,
            steps=config.steps,
            every=config.every,
            resample=minibatches(config.batch),
            probes={"groups": group_losses(groups, config.groups)},
            report=show_progress(progress, name),
        ).records
        arrays[f"{name}/loss"] = np.asarray(records.values["groups"]["loss"])
        arrays |= {"steps": np.asarray(records.steps), "share": np.asarray(records.values["groups"]["share"][0])}
    return arrays


def zipf_slope(arrays: Arrays) -> float:
    """Slope of log count against log rank, of the most frequent words."""
    return float(zipf_line(arrays)[0])


def zipf_line(arrays: Arrays) -> np.ndarray:
    """Slope and intercept of log count against log rank, of the `FITTED` most frequent words."""
    counts = np.sort(arrays["counts"][arrays["counts"] > 0])[::-1][:FITTED]
    return np.polyfit(np.log(np.arange(1, len(counts) + 1)), np.log(counts), 1)


def advantage(arrays: Arrays) -> np.ndarray:
    """Loss of SGD less that of Adam at the end, by group."""
    return arrays[f"{OPTIMIZERS[1]}/loss"][-1] - arrays[f"{OPTIMIZERS[0]}/loss"][-1]


def plot(arrays: Arrays, config: Config):
    """Frequencies; loss of each group over the steps, for both; Adam's advantage by group."""
    import matplotlib.pyplot as plt

    figure, (left, adam, sgd, right) = plt.subplots(1, 4, figsize=(15, 3.8))
    counts = np.sort(arrays["counts"][arrays["counts"] > 0])[::-1]
    left.loglog(np.arange(1, len(counts) + 1), counts, label="words of the text")
    slope, intercept = zipf_line(arrays)
    fitted = np.arange(1, min(FITTED, len(counts)) + 1)
    left.loglog(fitted, np.exp(intercept) * fitted**slope, "--", label=f"slope {slope:.2f}")
    left.set(xlabel="rank of the word", ylabel="occurrences", title="frequencies of the words")
    left.legend(fontsize="small")
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, config.groups))
    held = np.flatnonzero(arrays["share"] > 0)
    for axes, name in ((adam, OPTIMIZERS[0]), (sgd, OPTIMIZERS[1])):
        for group in held:
            label = {held[0]: "most frequent words", held[-1]: "rarest words"}.get(group)
            axes.plot(arrays["steps"], arrays[f"{name}/loss"][:, group], color=colors[group], label=label)
        axes.plot(arrays["steps"], arrays[f"{name}/loss"] @ arrays["share"], "k--", label="all")
        axes.set(xlabel="step", ylabel="cross-entropy [nats]", title=f"{name}: groups of words by frequency")
        axes.legend(fontsize="small")
    low, high = adam.get_ylim()[0], max(adam.get_ylim()[1], sgd.get_ylim()[1])
    for axes in (adam, sgd):
        axes.set_ylim(min(0, low), high)
    right.bar(held + 1, advantage(arrays)[held], color=colors[held])
    right.axhline(0, color="0.4", lw=0.8)
    right.set(
        xlabel="group, frequent to rare",
        ylabel="loss, SGD minus Adam [nats]",
        title=f"advantage of Adam after {config.steps} steps",
    )
    return figure


def findings(arrays: Arrays, config: Config) -> list[Finding]:
    """The law of Zipf; Adam's advantage in the rare half of the groups, and in the frequent half."""
    source, held = "Kunstner et al., arXiv 2402.19449", np.flatnonzero(arrays["share"] > 0)
    gained, half = advantage(arrays)[held], len(held) // 2
    rare, frequent = float(gained[-half:].mean()), float(gained[:half].mean())
    return [
        Finding(f"Zipf slope of the {FITTED} most frequent words", zipf_slope(arrays), -1.1, -0.8, "Zipf's law"),
        Finding("loss, SGD minus Adam, rare half of the groups", rare, 0.2, np.inf, source),
        Finding("rare half over frequent half of that gap", rare / max(frequent, 1e-3), 1.3, np.inf, source),
    ]


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """Words, share and final losses of each group; and the findings."""
    table = Table("group", "words", "share of the text", *(f"loss, {name}" for name in OPTIMIZERS), "SGD minus Adam")
    for group in np.flatnonzero(arrays["share"] > 0):
        words = int(np.sum((arrays["groups"] == group) & (arrays["counts"] > 0)))
        losses = [arrays[f"{name}/loss"][-1, group] for name in OPTIMIZERS]
        row = (str(words), f"{arrays['share'][group]:.3f}", *(f"{loss:.3f}" for loss in losses))
        table.add_row(str(group + 1), *row, f"{losses[1] - losses[0]:.3f}")
    return [table, findings_table(findings(arrays, config))]


ANALYSIS = Analysis("class-imbalance", Config, compute, plot, tables, __doc__)

if __name__ == "__main__":
    ANALYSIS.main()
