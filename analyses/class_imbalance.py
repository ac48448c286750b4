"""Where Adam's advantage on language sits: the loss by how frequent the next word is, on English text.

A causal attention layer predicts the next word of the help texts that come with Python, whose frequencies fall by the
law of Zipf. Words are put into groups of equal share of the text, from the most frequent to the rarest. The negative
control is the same text with balanced classes: the layer predicts the group of the next word. Both optimizers are tuned
over one grid of rates. Adam is ahead everywhere, in the control as well; what it gains above that sits in the rarest
group, and the control does not have it.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from rich.progress import Progress
from rich.table import Table

from attnlab.analysis import Analysis, Arrays, SinglePrecisionConfig
from attnlab.expectation import Expectation, at_least, at_most, between

OPTIMIZERS = ("Adam", "SGD with momentum")
FITTED = 300
"""Most frequent words, of which the law of Zipf is fitted."""
TEXT, CONTROL = "next word", "control: its group"


@dataclass(frozen=True)
class Config(SinglePrecisionConfig):
    """Options of the analysis."""

    SMOKE: ClassVar = {
        "sequences": 8,
        "length": 8,
        "batch": 4,
        "steps": 10,
        "every": 5,
        "groups": 4,
        "seeds": 2,
        "rates": (0.01, 0.1),
    }

    sequences: int = 1024
    """Sequences of text."""
    length: int = 16
    """Words in a sequence."""
    batch: int = 16
    """Sequences a step."""
    steps: int = 300
    """Steps, a multiple of `every`."""
    every: int = 50
    """Steps between measurements."""
    groups: int = 10
    """Groups of words, each of an equal share of the text."""
    seeds: int = 3
    """Starts and orders of minibatches, at least 2."""
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    """Learning rates that both optimizers are tuned over; one that diverges on any seed is out."""


def compute(config: Config, progress: Progress) -> Arrays:
    """Tune and train each optimizer on the text and on the control, with the loss of every group on all of the text."""
    import jax
    import jax.numpy as jnp
    import optax

    from attnlab.dynamics.frequency import frequency_groups, group_losses, group_prediction
    from attnlab.risks.language import next_word_prediction
    from attnlab.training import Session, minibatches, show_progress, train

    def start(key):
        return next_word_prediction(key, config.sequences, config.length)

    keys = jax.random.split(jax.random.key(config.seed), config.seeds)
    risk, params = start(keys[0])
    groups = frequency_groups(risk.targets, len(params["token_embedding"]), config.groups)
    tasks = {
        TEXT: (risk, groups),
        CONTROL: (group_prediction(risk, groups, config.groups), jnp.arange(config.groups)),
    }
    rules = (
        optax.inject_hyperparams(optax.adam)(learning_rate=1.0),
        optax.inject_hyperparams(optax.sgd)(learning_rate=1.0, momentum=0.9),
    )
    members = jnp.tile(keys, len(config.rates))
    arrays: Arrays = {"counts": np.bincount(np.asarray(risk.targets).ravel()), "groups": np.asarray(groups)}
    for task, (own, its_groups) in tasks.items():
        for name, rule in zip(OPTIMIZERS, rules, strict=True):
            records = train(
                own,
                jax.vmap(lambda key: start(key)[1])(members),
                rule,
                members,
                steps=config.steps,
                every=config.every,
                resample=minibatches(config.batch),
                hyperparameters={"learning_rate": jnp.repeat(jnp.array(config.rates), config.seeds)},
                probes={"groups": group_losses(its_groups, config.groups)},
                session=Session(report=show_progress(progress, f"{task}, {name}")),
            ).records
            losses = np.asarray(records.values["groups"]["loss"])
            arrays[f"{task}, {name}"] = losses.reshape(-1, len(config.rates), config.seeds, config.groups)
            share = np.asarray(records.values["groups"]["share"][0, 0])
            arrays |= {"steps": np.asarray(records.steps), "share": share}
    return arrays


def tuning(arrays: Arrays, run: str) -> np.ndarray:
    """Loss at the end at each rate, mean over the seeds; NaN where one of them diverged."""
    return (arrays[run][-1] @ arrays["share"]).mean(axis=-1)


def tuned(arrays: Arrays, run: str) -> np.ndarray:
    """Losses at the best rate, by measurement, seed and group."""
    return arrays[run][:, np.nanargmin(tuning(arrays, run))]


def zipf_slope(arrays: Arrays) -> float:
    """Slope of log count against log rank, of the most frequent words."""
    return float(zipf_line(arrays)[0])


def zipf_line(arrays: Arrays) -> np.ndarray:
    """Slope and intercept of log count against log rank, of the `FITTED` most frequent words."""
    counts = np.sort(arrays["counts"][arrays["counts"] > 0])[::-1][:FITTED]
    return np.polyfit(np.log(np.arange(1, len(counts) + 1)), np.log(counts), 1)


def advantage(arrays: Arrays, task: str) -> np.ndarray:
    """Loss of SGD less that of Adam at the end, by seed and group that holds a word."""
    adam, sgd = (tuned(arrays, f"{task}, {name}")[-1] for name in OPTIMIZERS)
    return (sgd - adam)[:, arrays["share"] > 0]


def excess(arrays: Arrays, task: str) -> np.ndarray:
    """By how much Adam's advantage in the rarest group is above its mean over the other groups, by seed."""
    gained = advantage(arrays, task)
    return gained[:, -1] - gained[:, :-1].mean(axis=1)


def standard_error(values: np.ndarray) -> np.ndarray:
    """Of the mean over the seeds, which lie along the first axis."""
    return values.std(axis=0, ddof=1) / len(values) ** 0.5


def plot(arrays: Arrays, config: Config):
    """Adam's advantage by group, and in the control; the losses of both by group; and the tuning."""
    from attnlab.plotting.panels import panels

    above, control = (float(excess(arrays, task).mean()) for task in (TEXT, CONTROL))
    message = (
        f"Adam gains {above:.1f} nats more on the rarest words than on others; {control:.1f} where classes are balanced"
    )
    titles = [
        "advantage, next word",
        "advantage, control: group of the next word",
        f"loss after {config.steps} steps, next word",
        "tuning (no point: a seed diverged)",
    ]
    note = f"groups of equal share of the text; means over {config.seeds} seeds, whiskers: their range"
    figure, (text, balanced, losses, rates) = panels(message, titles, note=note)
    balanced.sharey(text)
    held = np.flatnonzero(arrays["share"] > 0)
    for axes, task in ((text, TEXT), (balanced, CONTROL)):
        gained = advantage(arrays, task)
        axes.bar(held[:-1] + 1, gained[:, :-1].mean(axis=0), color="0.75")
        axes.bar(held[-1] + 1, gained[:, -1].mean(), color="C0")
        whiskers(axes, held + 1, gained, "black", "none")
        others = gained[:, :-1].mean()
        axes.axhline(others, color="black", ls=":", lw=1, label="mean of the others")
        axes.axhline(0, color="0.4", lw=0.8)
        axes.set(xlabel="group of words, frequent to rare", ylabel="loss, SGD minus Adam [nats]")
        axes.legend(loc="upper left")
    for name, color, marker in zip(OPTIMIZERS, ("C0", "C1"), ("o", "s"), strict=True):
        ends = tuned(arrays, f"{TEXT}, {name}")[-1][:, held]
        rate = config.rates[np.nanargmin(tuning(arrays, f"{TEXT}, {name}"))]
        whiskers(losses, held + 1, ends, color, marker, label=f"{name}, rate {rate:g}")
        for task, line in ((TEXT, "-"), (CONTROL, "--")):
            rates.loglog(config.rates, tuning(arrays, f"{task}, {name}"), line, color=color, marker=marker)
    losses.set(xlabel="group of words, frequent to rare", ylabel="cross-entropy [nats]", ylim=(0, None))
    losses.legend(loc="upper left")
    rates.set(xlabel="learning rate", ylabel=f"loss after {config.steps} steps [nats]", ylim=(1, 20))
    rates.plot([], [], "-", color="black", label="next word")
    rates.plot([], [], "--", color="black", label="control")
    rates.legend(loc="upper left", ncols=2)
    return figure


def whiskers(axes, places: np.ndarray, values: np.ndarray, color: str, marker: str, label: str | None = None) -> None:
    """Means over the seeds (seeds, places), and their range."""
    mean = values.mean(axis=0)
    reach = mean - values.min(axis=0), values.max(axis=0) - mean
    axes.errorbar(places, mean, reach, fmt=marker, color=color, capsize=2, lw=1, label=label)


def details(arrays: Arrays, config: Config):
    """The frequencies of the words, and the loss of each group over the steps, for both optimizers."""
    import matplotlib.pyplot as plt

    from attnlab.plotting.panels import panels

    gap = advantage(arrays, TEXT).mean(axis=0).max()
    titles = ["frequencies of the words", *(f"loss of each group, {name}" for name in OPTIMIZERS), "SGD less Adam"]
    note = f"means over {config.seeds} seeds; dark to light: the most frequent words to the rarest"
    message = f"Adam ends up to {gap:.2g} nats below SGD, group by group of words"
    figure, (frequencies, *shown, last) = panels(message, titles, note=note)
    counts = np.sort(arrays["counts"][arrays["counts"] > 0])[::-1]
    frequencies.loglog(np.arange(1, len(counts) + 1), counts, label="words of the text")
    slope, intercept = zipf_line(arrays)
    fitted = np.arange(1, min(FITTED, len(counts)) + 1)
    frequencies.loglog(fitted, np.exp(intercept) * fitted**slope, "k:", label=f"fitted, slope {slope:.2f}")
    frequencies.set(xlabel="rank of the word", ylabel="occurrences")
    frequencies.legend(loc="lower left")
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, config.groups))
    top = max(tuned(arrays, f"{TEXT}, {name}").mean(axis=1).max() for name in OPTIMIZERS)
    for axes, name in zip(shown, OPTIMIZERS, strict=True):
        losses = tuned(arrays, f"{TEXT}, {name}").mean(axis=1)
        for group in np.flatnonzero(arrays["share"] > 0):
            axes.plot(arrays["steps"], losses[:, group], color=colors[group])
        axes.plot(arrays["steps"], losses @ arrays["share"], "k--", label="mean of all")
        axes.set(xlabel="step", ylabel="cross-entropy [nats]", ylim=(0, 1.05 * top))
        axes.legend(loc="lower left")
    adam, sgd = (tuned(arrays, f"{TEXT}, {name}").mean(axis=1) for name in OPTIMIZERS)
    for group in np.flatnonzero(arrays["share"] > 0):
        last.plot(arrays["steps"], (sgd - adam)[:, group], color=colors[group])
    last.axhline(0, color="black", ls=":", lw=1)
    last.set(xlabel="step", ylabel="cross-entropy, difference [nats]")
    return figure


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """The law of Zipf; Adam's advantage in the rarest group, and by how much it is above that in the others; and that
    difference where the classes are balanced."""
    source, title = "Kunstner et al., arXiv 2402.19449", "that gap, rarest group minus the others"
    rarest = float(advantage(arrays, TEXT)[:, -1].mean())
    text, control = (float(excess(arrays, task).mean()) for task in (TEXT, CONTROL))
    slope, zipf = f"Zipf slope of the {FITTED} most frequent words", "about -1; small texts bend"
    clear, none = "several times the range over seeds", "half of what the text has at least"
    return [
        between(slope, zipf_slope(arrays), -1.1, -0.8, because=zipf, source="Zipf's law"),
        at_least("loss, SGD minus Adam, rarest group", rarest, 1.0, because=clear, source=source),
        at_least(title, text, 0.5, because=clear, source=source),
        at_most(f"{title}, balanced classes", control, 0.25, because=none, source="negative control"),
    ]


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """The tuning; share and losses of each group with errors over the seeds; its halves."""
    rates = Table("predicted", "optimizer", *(f"rate {rate:g}" for rate in config.rates))
    for task in (TEXT, CONTROL):
        for name in OPTIMIZERS:
            rates.add_row(task, name, *(f"{loss:.3f}" for loss in tuning(arrays, f"{task}, {name}")))
    table = Table("group", "words", "share", *OPTIMIZERS, "SGD minus Adam", "the same, control")
    gains = [advantage(arrays, task) for task in (TEXT, CONTROL)]
    for row, group in enumerate(np.flatnonzero(arrays["share"] > 0)):
        words = int(np.sum((arrays["groups"] == group) & (arrays["counts"] > 0)))
        losses = [tuned(arrays, f"{TEXT}, {name}")[-1, :, group] for name in OPTIMIZERS]
        cells = (with_error(values) for values in (*losses, *(gained[:, row] for gained in gains)))
        table.add_row(str(group + 1), str(words), f"{arrays['share'][group]:.3f}", *cells)
    differences = (with_error(excess(arrays, task)) for task in (TEXT, CONTROL))
    table.add_row("rarest minus others", "", "", "", "", *differences)
    return [rates, table]


def with_error(values: np.ndarray) -> str:
    """The mean over the seeds and its standard error."""
    return f"{values.mean():.3f} ± {standard_error(values):.3f}"


ANALYSIS = Analysis("class-imbalance", Config, compute, plot, tables, findings, __doc__, slow=True, details=details)

if __name__ == "__main__":
    ANALYSIS.main()
