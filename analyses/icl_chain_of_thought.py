"""With its steps shown, a two-layer function is learned in context to rounding once each was seen active d times.

Prompts of y = <v, relu(W x)> with and without the steps relu(W x) of every example. Regression step by step, by least
squares or by a stack of linear attention layers, solves every prompt as soon as all steps have been active d times. One
example earlier it solves 43 % of them (d = 6, four steps): most of those whose query leaves the missing step at zero,
and none of those whose query activates it. Without the steps no number of examples suffices for learners of linear
functions.
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
    arrays["asked"] = jax.vmap(asks_for_more, (0, 0, None))(all_steps, needed - 1, config.dimension)
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


def asks_for_more(all_steps, length, dimension: int):
    """Whether the query, the last row, activates a step that fewer than d of the first `length` examples do."""
    import jax.numpy as jnp

    kept = (jnp.arange(len(all_steps)) < length)[:, None]
    short = jnp.sum((all_steps > 0) & kept, axis=0) < dimension
    return jnp.any(short & (all_steps[-1] > 0))


def plot(arrays: Arrays, config: Config):
    """Shares solved and errors around the number of examples needed; errors and shares by the length of the context."""
    from attnlab.plotting.panels import panels

    before, enough, needing = (share_solved(arrays, *of) for of in ((-1,), (0,), (-1, arrays["asked"])))
    figure, axes = panels(
        f"With the examples that its steps need, chain of thought solves {percent(enough)} of prompts; with\n"
        f"one fewer {percent(before)}, but {percent(needing)} of those whose query activates the missing step",
        [
            "solved, by examples beyond those needed",
            "errors with fewer examples than needed",
            f"without the steps, none suffice ($d = {config.dimension}$, {config.width} steps)",
            "shares with enough examples, and solved",
        ],
        note=f"needed: every step seen active $d = {config.dimension}$ times; last step: the one for which that takes "
        f"longest;\nsolved: squared error / variance < {SOLVED:g}. (a), (b): {inside(arrays).sum()} prompts, (c), (d): "
        f"{config.prompts} (one seed).\n(a), (d): bars of two standard errors. (c): median and middle half of prompts",
        height=3.0,
    )
    plot_around(axes[0], arrays)
    plot_distribution(axes[1], arrays)
    plot_lengths(axes[2], arrays)
    plot_needed(axes[3], arrays, config)
    return figure


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def inside(arrays: Arrays) -> np.ndarray:
    """Which prompts are long enough for what they need and more: others have no errors around it."""
    return np.isfinite(arrays["around"]).all(axis=0)


def share_solved(arrays: Arrays, offset: int, which=None) -> float:
    """Share of the prompts, or of `which` of them, that are solved with so many examples beyond those needed."""
    kept = inside(arrays) if which is None else inside(arrays) & which
    errors = arrays["around"][list(AROUND).index(offset), kept]
    return float(np.mean(errors < SOLVED)) if errors.size else float("nan")


def plot_around(axes, arrays: Arrays) -> None:
    """All prompts, and parted by whether the query activates the step that is short one example before the need."""
    asked, rest = arrays["asked"], ~arrays["asked"]
    groups = {
        "query leaves the\nlast step at zero": (rest, "C2", "^:"),
        "all prompts": (None, "C0", "o-"),
        "query activates\nthe last step": (asked, "C1", "s--"),
    }
    for label, (which, color, style) in groups.items():
        count = np.sum(inside(arrays) if which is None else inside(arrays) & which)
        shares = np.array([share_solved(arrays, offset, which) for offset in AROUND])
        errors = np.sqrt(shares * (1 - shares) / max(count, 1))
        axes.errorbar(AROUND, shares, 2 * errors, fmt=style, color=color, capsize=2, label=label)
    axes.axvline(-0.5, color="black", linewidth=0.7, linestyle="--", zorder=0)
    axes.set(xlabel="examples beyond those needed", ylabel="share of prompts solved", ylim=(-0.03, 1.03))
    axes.legend(loc="center right", bbox_to_anchor=(1.02, 0.5), labelspacing=0.9)


def plot_distribution(axes, arrays: Arrays) -> None:
    """Cumulative shares of the errors of all prompts; rounding and what counts as solved as grey areas."""
    for offset, color, style in ((0, "C0", "-"), (-1, "C1", "--"), (-2, "C4", "-."), (-6, "C3", ":")):
        errors = np.sort(np.maximum(arrays["around"][list(AROUND).index(offset), inside(arrays)], LEAST))
        label = "all needed" if offset == 0 else f"{-offset} fewer"
        axes.plot(errors, (np.arange(len(errors)) + 1) / max(len(errors), 1), style, color=color, label=label)
    axes.axvspan(LEAST, SOLVED, color="0.93", zorder=-1)
    axes.text(SOLVED, 0.72, "solved ", va="center", ha="right", fontsize=8, color="0.3")
    axes.set(xscale="log", xlim=(LEAST, 10), ylim=(0, 1.03))
    axes.set(xlabel="squared error / variance of the label", ylabel="share of prompts below it")
    axes.legend(loc="upper right", bbox_to_anchor=(0.9, 0.97))


LEAST = 1e-34
LOOKS = {"least_squares": "C0", "attention": "C1", "plain": "C2", "neighbours": "C3"}


def plot_lengths(axes, arrays: Arrays) -> None:
    """Median and middle half of the errors; those of exactly zero are drawn at the bottom."""
    styles = {"least_squares": "-", "attention": "--", "plain": "-.", "neighbours": ":"}
    for name, style in styles.items():
        low, middle, high = np.maximum(np.quantile(arrays["errors"][name], (0.25, 0.5, 0.75), axis=1), LEAST)
        axes.fill_between(arrays["lengths"], low, high, color=LOOKS[name], alpha=0.2, linewidth=0)
        axes.plot(arrays["lengths"], middle, style, color=LOOKS[name])
    places = {
        "plain": (1.0, 0.97, "without steps: least squares"),
        "neighbours": (1.0, 0.91, "and 3 nearest neighbours (dotted)"),
        "attention": (1.0, 0.5, "linear attention\n(a Newton step\na layer)"),
        "least_squares": (0.02, 0.4, "with steps:\nleast\nsquares"),
    }
    for name, (right, up, label) in places.items():
        side = "right" if right > 0.5 else "left"
        axes.text(right, up, label, color=LOOKS[name], ha=side, va="center", fontsize=8, transform=axes.transAxes)
    axes.set(yscale="log", xlabel="context length $N$", ylabel="squared error / variance", ylim=(LEAST, 1e7))
    axes.set_yticks(10.0 ** np.arange(-32, 1, 8))


def plot_needed(axes, arrays: Arrays, config: Config) -> None:
    """Share of prompts with the examples needed, beside its law; and of those solved, which are more."""
    lengths = arrays["lengths"]
    once = binomial_tail(lengths, config.dimension)
    for number, width in enumerate(WIDTHS):
        share = arrays["solved"][str(width)]
        error = np.sqrt(share * (1 - share) / config.prompts)
        label = f"enough, {width} step{'s' * (width > 1)}"
        marks = {"fmt": "os^"[number], "color": f"C{number}", "markerfacecolor": "none", "markersize": 3.5}
        axes.errorbar(lengths, share, 2 * error, label=label, **marks)
        law = r"law: $P(\mathrm{Bin}(N, \frac{1}{2}) \geq d)^{\mathrm{steps}}$" if number == 0 else None
        axes.plot(lengths, once**width, ":", color="black", linewidth=1, label=law, zorder=0)
    solved = np.mean(arrays["errors"]["least_squares"] < SOLVED, axis=1)
    axes.plot(lengths, solved, "-", color="C4", label=f"solved, {config.width} steps", zorder=0)
    axes.set(xlabel="context length $N$", ylabel="share of prompts", ylim=(-0.03, 1.03))
    axes.legend(loc="lower right", fontsize=7.5)


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
        at_most(
            "share solved with one example fewer, where the query needs the missing step",
            share_solved(arrays, -1, arrays["asked"]),
            0.0,
            source="derived here",
        ),
        at_least(
            "without steps, at the longest context", np.median(arrays["errors"]["plain"][-1]), 1e-3, source=counted
        ),
    ]
    for width in WIDTHS:
        law = binomial_tail(arrays["lengths"], config.dimension) ** width
        bars = np.sqrt(np.maximum(law * (1 - law), 1 / config.prompts) / config.prompts)
        what = f"share of prompts with enough examples, {width} steps, by length"
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
