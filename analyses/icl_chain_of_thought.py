"""Chain of thought as composition: with its steps shown, a two-layer function is learned in context to rounding.

Prompts of y = <v, relu(W x)> with and without the steps relu(W x) of every example. Regression step by step, by least
squares or by a stack of linear attention layers, is exact as soon as every step has been seen active d times, and far
off one example earlier; without the steps no number of examples suffices for learners of linear functions.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from rich.progress import Progress
from rich.table import Table

from attnlab.analysis import Analysis, AnalysisConfig, Arrays
from attnlab.expectation import Expectation, at_least, at_most, equal

LEARNERS = {
    "least_squares": "with steps, least squares",
    "attention": "with steps, linear attention (Newton)",
    "plain": "without steps, least squares",
    "neighbours": "without steps, 3 nearest neighbours",
}
AROUND = np.arange(-6, 5)
WIDTHS = (1, 2, 4)
SOLVED = 1e-16


@dataclass(frozen=True)
class Config(AnalysisConfig):
    """Options of the analysis."""

    SMOKE: ClassVar = {"dimension": 2, "width": 2, "length": 14, "prompts": 16, "stride": 3, "layers": 4}

    dimension: int = 6
    """Dimension d of the inputs."""
    width: int = 4
    """Number of steps, at most d."""
    length: int = 36
    """Longest context N."""
    prompts: int = 1000
    """Sampled prompts."""
    stride: int = 1
    """Take every so many context lengths."""
    layers: int = 24
    """Newton steps of the attention stack, one layer each (and two more)."""


def compute(config: Config, progress: Progress) -> Arrays:
    """Squared errors of every learner at every length, around the number of examples needed, and shares solved."""
    import jax

    from attnlab.icl.composition import examples_needed
    from attnlab.icl.tasks import composition_prompts

    lengths = np.arange(1, config.length + 1, config.stride)
    task = progress.add_task("prompts", total=len(LEARNERS) + 1 + len(WIDTHS), status="")
    key = jax.random.key(config.seed)
    prompts, all_steps = composition_prompts(key, config.dimension, config.width, config.length, config.prompts)
    steps = all_steps[:, :-1]
    arrays: Arrays = {"lengths": lengths, "label_variance": (prompts.target**2).mean(), "errors": {}, "solved": {}}
    for name in LEARNERS:
        arrays["errors"][name] = errors_by_length(name, prompts, steps, lengths, config)
        progress.advance(task)
    needed = jax.vmap(lambda s: examples_needed(s, config.dimension))(steps)
    arrays["around"] = errors_around(prompts, steps, needed, config)
    progress.advance(task)
    for width in WIDTHS:
        _, seen = composition_prompts(
            jax.random.fold_in(key, width), config.dimension, width, config.length, config.prompts
        )
        needed = jax.vmap(lambda s: examples_needed(s[:-1], config.dimension))(seen)
        arrays["solved"][str(width)] = (np.asarray(needed)[:, None] <= lengths[None, :]).mean(axis=0)
        progress.advance(task)
    return arrays


def squared_error(name: str, prompt, steps, kept, config: Config):
    """Of one learner on one prompt with only the `kept` examples of its context."""
    import jax.numpy as jnp

    from attnlab.icl.baselines import least_squares, nearest_neighbours
    from attnlab.icl.composition import chain_of_thought, filtered
    from attnlab.icl.constructions import newton_layers, newton_predict

    def attention(prompt):
        # stable up to an eigenvalue of 20 of the context's second moments
        layers = newton_layers(len(prompt.query), config.layers, 0.005, prompt.query.dtype)
        return newton_predict(layers, prompt)

    short = filtered(prompt, kept)
    shown = jnp.where(kept[:, None], steps, 0)
    if name in ("least_squares", "attention"):
        learner = least_squares if name == "least_squares" else attention
        found = chain_of_thought(learner, short, shown)
    elif name == "plain":
        found = least_squares(short)
    else:
        far = jnp.where(kept[:, None], prompt.inputs, 1e3)  # examples left out are nobody's neighbours
        found = nearest_neighbours(type(prompt)(far, short.labels, prompt.query, prompt.target), neighbours=3)
    return (found - prompt.target) ** 2


def errors_by_length(name: str, prompts, steps, lengths, config: Config) -> np.ndarray:
    """Squared errors over the variance of the labels, (lengths, prompts)."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def at(length, prompts, steps):
        kept = jnp.arange(config.length) < length
        return jax.vmap(lambda prompt, s: squared_error(name, prompt, s, kept, config))(prompts, steps)

    return np.stack([at(length, prompts, steps) for length in lengths]) / np.mean(np.asarray(prompts.target) ** 2)


def errors_around(prompts, steps, needed, config: Config) -> np.ndarray:
    """Squared errors of step-by-step least squares with `AROUND` examples more than needed, (places, prompts)."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def at(offset, prompts, steps, needed):
        def one(prompt, steps, needed):
            kept = jnp.arange(config.length) < needed + offset
            # a context that is too short for the prompt's need is left out
            inside = needed + jnp.max(AROUND) <= config.length
            return jnp.where(inside, squared_error("least_squares", prompt, steps, kept, config), jnp.nan)

        return jax.vmap(one)(prompts, steps, needed)

    return np.stack([at(offset, prompts, steps, needed) for offset in AROUND]) / np.mean(
        np.asarray(prompts.target) ** 2
    )


def plot(arrays: Arrays, config: Config):
    """Errors by length, errors around the number of examples needed, and shares of prompts solved."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12.5, 4.1))
    for number, (name, label) in enumerate(LEARNERS.items()):
        quartiles(axes[0], arrays["lengths"], arrays["errors"][name], f"C{number}", label)
    axes[0].set(xlabel="context length $N$", ylabel="squared error / variance (median, quartiles)")
    axes[0].set_title(f"two-layer tasks, $d = {config.dimension}$, {config.width} steps")
    quartiles(axes[1], AROUND, arrays["around"], "C0", "least squares, step by step")
    axes[1].axvline(-0.5, ymax=0.7, color="black", linewidth=0.7, linestyle="--", label="every step seen $d$ times")
    axes[1].set(xlabel="examples beyond those needed", ylabel="squared error / variance (median, quartiles)")
    axes[1].set_title("exact from one example to the next")
    for panel in axes[:2]:
        panel.set_yscale("log")
        panel.set_ylim(1e-34, 1e18)  # room for the legend over the curves
        panel.set_yticks(10.0 ** np.arange(-32, 1, 4))
    plot_solved(axes[2], arrays, config)
    for panel, place in zip(axes, ("upper left", "upper left", "lower right"), strict=True):
        panel.legend(loc=place)
    return figure


def quartiles(axes, places, errors, color: str, label: str) -> None:
    """Median and quartiles over the prompts; errors of exactly zero are drawn at the bottom."""
    low, middle, high = np.maximum(np.nanquantile(errors, (0.25, 0.5, 0.75), axis=1), 1e-33)
    axes.fill_between(places, low, high, color=color, alpha=0.2, linewidth=0)
    axes.plot(places, middle, ".-", color=color, label=label)


def plot_solved(axes, arrays: Arrays, config: Config) -> None:
    lengths = arrays["lengths"]
    once = binomial_tail(lengths, config.dimension)
    for number, width in enumerate(WIDTHS):
        share = arrays["solved"][str(width)]
        error = np.sqrt(share * (1 - share) / config.prompts)
        label = "1 step" if width == 1 else f"{width} steps"
        axes.errorbar(lengths, share, 2 * error, fmt="o", color=f"C{number}", markerfacecolor="none", label=label)
        law = r"$P(\mathrm{Binomial}(N, 1/2) \geq d)^{\mathrm{steps}}$" if number == 0 else None
        axes.plot(lengths, once**width, color=f"C{number}", linewidth=0.9, label=law)
    axes.set(xlabel="context length $N$", ylabel="share of prompts", title="enough examples of every step")


def binomial_tail(lengths, dimension: int) -> np.ndarray:
    """P(Binomial(N, 1/2) >= d), the probability that one step is active in d of N examples."""
    from scipy.stats import binom

    return binom.sf(dimension - 1, lengths, 0.5)


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """Exact from one example to the next; how often the examples are enough; and that steps are needed for it."""
    before, after = (arrays["around"][list(AROUND).index(offset)] for offset in (-1, 0))
    counted = "Li et al., arXiv 2305.18869, for the filter; the law derived here"
    found = [
        at_most("median squared error with the examples needed", np.nanmedian(after), 1e-24, source=counted),
        at_least("the same with one example fewer", np.nanmedian(before), 1e-6, source=counted),
        at_least(
            "without steps, at the longest context", np.median(arrays["errors"]["plain"][-1]), 1e-3, source=counted
        ),
    ]
    for width in WIDTHS:
        law = binomial_tail(arrays["lengths"], config.dimension) ** width
        bars = np.sqrt(np.maximum(law * (1 - law), 1 / config.prompts) / config.prompts)
        what = f"share of prompts solved, {width} steps, by length"
        share = arrays["solved"][str(width)]
        found.append(equal(what, share, law, 4.5, standard_error=bars, because="a sample", source=counted))
    return found


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """Median errors around the number of examples needed, and at the longest context."""
    around = Table("examples beyond those needed", "median squared error / variance", "share below 1e-16")
    for offset, errors in zip(AROUND, arrays["around"], strict=True):
        inside = errors[np.isfinite(errors)]
        share = (inside < SOLVED).mean() if len(inside) else np.nan
        around.add_row(str(offset), f"{np.nanmedian(errors):.2g}", f"{share:.3f}")
    longest = Table("learner", "median", "mean", title=f"Squared error / variance at N = {arrays['lengths'][-1]}")
    for name, label in LEARNERS.items():
        last = arrays["errors"][name][-1]
        longest.add_row(label, f"{np.median(last):.2g}", f"{last.mean():.2g} +- {last.std() / len(last) ** 0.5:.1g}")
    return [around, longest]


ANALYSIS = Analysis("icl-chain-of-thought", Config, compute, plot, tables, findings, __doc__)

if __name__ == "__main__":
    ANALYSIS.main()
