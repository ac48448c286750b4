"""How often descent on attention selects the best token of every sequence: rarely in 2 dimensions, mostly in 50.

From W = 0, normalised gradient descent on random problems ends global (every sequence attends its best token), local
(saturated, but on another token somewhere) or unsettled; shares of all three over many problems, with their standard
errors. In d >= max(T - 1, n) dimensions some W attends to any choice of tokens (the n queries are independent, and so
are the T - 1 differences of each sequence); descent finds the best ones by and by as d grows beyond.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from rich.progress import Progress
from rich.table import Table

from attnlab.analysis import Analysis, AnalysisConfig, Arrays
from attnlab.expectation import Expectation, at_least, at_most

OUTCOMES = ("global", "local", "unsettled")
SATURATED = 0.99
EXPECTED = 0.9  # share of global outcomes in the highest dimension


@dataclass(frozen=True)
class Config(AnalysisConfig):
    """Options of the analysis."""

    SMOKE: ClassVar = {"seeds": 5, "steps": 20, "shapes": ((3, 3), (3, 4)), "dims": (2, 4)}

    shapes: tuple[tuple[int, int], ...] = ((5, 5), (10, 5), (5, 10), (10, 10))
    """Pairs (sequences n, tokens T)."""
    dims: tuple[int, ...] = (2, 5, 10, 20, 50)
    """Token dimensions d."""
    seeds: int = 1000
    """Random problems a cell."""
    steps: int = 600
    """Steps of normalised gradient descent."""
    step_size: float = 0.2
    """Length of a step."""


def compute(config: Config, progress: Progress) -> Arrays:
    """The share of each outcome, (shapes, dims, outcomes)."""
    import jax

    task = progress.add_task("cells", total=len(config.shapes) * len(config.dims), status="")
    shares = np.zeros((len(config.shapes), len(config.dims), len(OUTCOMES)))
    for row, (sequences, tokens) in enumerate(config.shapes):
        for column, dim in enumerate(config.dims):
            key = jax.random.fold_in(jax.random.key(config.seed), 1000 * row + column)
            shares[row, column] = cell(config, key, sequences, tokens, dim)
            progress.update(task, advance=1, status=f"n {sequences} T {tokens} d {dim}: {shares[row, column, 0]:.2f}")
    errors = np.sqrt(shares * (1 - shares) / config.seeds)
    return {"shapes": np.array(config.shapes), "dims": np.array(config.dims), "shares": shares, "errors": errors}


def cell(config: Config, key, sequences: int, length: int, dim: int) -> list[float]:
    """Shares of the outcomes among problems of one shape."""
    import jax
    import jax.numpy as jnp

    from attnlab.margin import attention_logits, normalized_descent, rescaled
    from attnlab.training import train

    keys = jax.random.split(key, config.seeds)
    risks, best = jax.vmap(lambda k: problem(k, sequences, length, dim))(keys)
    shape = risks.inputs["tokens"].shape[-1], risks.inputs["queries"].shape[-1]
    trained = train(
        jax.vmap(rescaled)(risks),
        {"query_key": jnp.zeros((config.seeds, *shape))},
        normalized_descent(config.step_size),
        keys,
        steps=config.steps,
        every=config.steps,
        own_risks=True,
    )
    weights = jax.nn.softmax(jax.vmap(attention_logits)(trained.params, risks.inputs), axis=-1)
    right = jnp.all(jnp.argmax(weights, axis=-1) == best, axis=-1)
    settled = jnp.all(jnp.max(weights, axis=-1) > SATURATED, axis=-1)
    return [float(jnp.mean(which)) for which in (right & settled, ~right & settled, ~settled)]


def problem(key, sequences: int, length: int, dim: int):
    """A Gaussian problem with random labels, and its best tokens.

    In orthonormal coordinates of the spans of its tokens and queries, where descent from 0 stays: same path, fewer
    parameters.
    """
    import jax
    import jax.numpy as jnp

    from attnlab.margin import attention_risk

    keys = jax.random.split(key, 4)
    tokens = jax.random.normal(keys[0], (sequences * length, dim))
    queries = jax.random.normal(keys[1], (sequences, dim))
    readout = jax.random.normal(keys[2], (dim,))
    labels = jax.random.rademacher(keys[3], (sequences,), dtype=readout.dtype)
    left, right = jnp.linalg.qr(tokens.T)[0], jnp.linalg.qr(queries.T)[0]
    tokens = (tokens @ left).reshape(sequences, length, -1)
    risk = attention_risk(tokens, labels, queries=queries @ right, readout=readout @ left)
    return risk, jnp.argmax(labels[:, None] * (tokens @ (readout @ left)), axis=-1)


def plot(arrays: Arrays, config: Config):
    """For every shape the shares of all three outcomes, stacked to one, over the dimension."""
    from attnlab.plotting.panels import legend_below, panels

    shapes = arrays["shapes"]
    figure, axes = panels(
        message(arrays),
        [f"{sequences} sequences of {tokens} tokens" for sequences, tokens in shapes],
        note=f"{config.seeds} random problems a bar, {config.steps} steps each; error bars: two standard errors",
        height=2.5,
        sharey=True,
    )
    for panel, (sequences, tokens), shares, errors in zip(
        axes, shapes, arrays["shares"], arrays["errors"], strict=True
    ):
        plot_outcomes(panel, arrays["dims"], shares, errors)
        mark_feasible(panel, arrays["dims"], max(tokens - 1, sequences))
    for panel in axes[::2]:
        panel.set_ylabel("share of problems")
    for panel in axes[-2:]:
        panel.set_xlabel("token dimension $d$")
    legend_below(figure, axes, columns=2)
    return figure


def message(arrays: Arrays) -> str:
    """The range over the shapes of the share that selects every best token, at both ends of the dimensions; what was
    expected, where it falls short."""
    best = arrays["shares"][:, :, OUTCOMES.index("global")]
    low, high = (f"{100 * ends.min():.3g} to {100 * ends.max():.3g} %" for ends in (best[:, 0], best[:, -1]))
    short = f" ({100 * EXPECTED:g} % were expected)" if best[:, -1].min() < EXPECTED else ""
    return (
        f"Descent selects the best token of every sequence in {high}\n"
        f"of problems in {arrays['dims'][-1]} dimensions{short}, in {low} in {arrays['dims'][0]}"
    )


LOOKS = {
    "global": ("the best token of every sequence", "C0", ""),
    "local": ("settled, but on another token somewhere", "C4", "///"),
    "unsettled": (f"unsettled: some largest weight is below {SATURATED}", "0.8", "..."),
}


def plot_outcomes(panel, dims: np.ndarray, shares: np.ndarray, errors: np.ndarray) -> None:
    """A bar for every dimension, of the three shares in the order of `OUTCOMES` from below."""
    places, bottom = np.arange(len(dims)), np.zeros(len(dims))
    for number, outcome in enumerate(OUTCOMES):
        label, color, hatch = LOOKS[outcome]
        panel.bar(
            places,
            shares[:, number],
            0.75,
            bottom,
            color=color,
            hatch=hatch,
            edgecolor="white",
            linewidth=0,
            label=label,
        )
        bottom = bottom + shares[:, number]
    panel.errorbar(places, shares[:, 0], 2 * errors[:, 0], fmt="none", color="black", capsize=3, linewidth=1)
    for place, share in zip(places, shares[:, 0], strict=True):
        inside = share > 0.2
        panel.annotate(
            f"{100 * share:.3g} %",
            (place, share),
            (0, -6 if inside else 6),
            textcoords="offset points",
            ha="center",
            va="top" if inside else "bottom",
            fontsize=8,
            color="white" if inside else "black",
            bbox=None if inside else {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none"},
        )
    panel.set(ylim=(0, 1), xlim=(-0.6, len(dims) - 0.4))
    panel.set_xticks(places, [str(dim) for dim in dims])


def mark_feasible(panel, dims: np.ndarray, enough: int) -> None:
    """A line on the left of the first dimension in which some W attends to any choice of tokens, almost surely."""
    place = np.searchsorted(dims, enough) - 0.5
    label = r"right of it, $d \geq \max(T - 1, n)$, any choice is feasible"
    panel.axvline(place, color="black", linestyle="--", linewidth=1, label=label)


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """Every best token is found in high dimensions and few in low ones, the more the higher; nearly all runs settle."""
    source = "Tarzanagh, Li, Thrampoulidis, Oymak, arXiv 2308.16898: over-parametrisation makes descent global"
    ours = f"{source}, without a number; the bound is ours"
    shares = dict(zip(OUTCOMES, np.moveaxis(arrays["shares"], -1, 0), strict=True))
    low, high = min(config.dims), max(config.dims)
    return [
        at_least(f"share of global outcomes at d = {high}, by shape", shares["global"][:, -1], EXPECTED, source=ours),
        at_most(f"the same at d = {low}, the control", shares["global"][:, 0], 0.5, source=ours),
        at_least(
            "least growth of that share from one dimension to the next, over its standard error, by shape",
            growth(arrays),
            -3.0,
            because="samples of problems",
            source=source,
        ),
        at_most("share of unsettled outcomes at the highest dimension", shares["unsettled"][:, -1], 0.05, source=ours),
    ]


def growth(arrays: Arrays) -> np.ndarray:
    """Least growth of the share of global outcomes between neighbouring dimensions in standard errors, by shape."""
    shares, errors = (arrays[name][:, :, OUTCOMES.index("global")] for name in ("shares", "errors"))
    scale = np.hypot(errors[:, 1:], errors[:, :-1])
    return np.min(np.diff(shares, axis=1) / np.where(scale > 0, scale, 1.0), axis=1)


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """Shares of the outcomes of every cell."""
    table = Table("n", "T", "d", *OUTCOMES, title=f"outcomes of {config.seeds} problems a cell")
    for row, (sequences, tokens) in enumerate(arrays["shapes"]):
        for column, dim in enumerate(arrays["dims"]):
            cells = zip(arrays["shares"][row, column], arrays["errors"][row, column], strict=True)
            table.add_row(str(sequences), str(tokens), str(dim), *(f"{s:.3f} +- {e:.3f}" for s, e in cells))
    return [table]


ANALYSIS = Analysis("margin-phase-diagram", Config, compute, plot, tables, findings, __doc__, slow=True)

if __name__ == "__main__":
    ANALYSIS.main()
