"""How often descent on attention selects the best token of every sequence, over sequences, tokens and dimension.

From W = 0, normalised gradient descent on random problems ends global (every sequence attends its best token), local
(saturated at others) or unsettled; shares over many seeds with their standard errors.
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
    """The share of global and of local outcomes against the dimension, a curve a shape, with two standard errors."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10.5, 4.2), sharex=True)
    for panel, outcome in zip(panels, ("global", "local"), strict=True):
        which = OUTCOMES.index(outcome)
        for color, (sequences, tokens) in enumerate(arrays["shapes"]):
            shares, errors = arrays["shares"][color, :, which], arrays["errors"][color, :, which]
            label = f"$n = {sequences}$, $T = {tokens}$"
            panel.errorbar(arrays["dims"], shares, 2 * errors, fmt="o-", color=f"C{color}", label=label, capsize=2)
        panel.set(xscale="log", xlabel="token dimension $d$", ylabel="share of problems")
        panel.set_xticks(arrays["dims"], labels=[str(d) for d in arrays["dims"]])
        panel.minorticks_off()
    panels[0].set(ylim=(-0.03, 1.03), title="global: every sequence attends its best token")
    panels[1].set_title("local: saturated at other tokens")
    panels[0].legend(loc="lower right")
    return figure


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """Every best token is found in high dimensions and few in low ones; nearly all runs settle."""
    source = "Tarzanagh, Li, Thrampoulidis, Oymak, arXiv 2308.16898: over-parametrisation makes descent global"
    shares = dict(zip(OUTCOMES, np.moveaxis(arrays["shares"], -1, 0), strict=True))
    low, high = min(config.dims), max(config.dims)
    return [
        at_least(f"share of global outcomes at d = {high}, by shape", shares["global"][:, -1], 0.9, source=source),
        at_most(f"the same at d = {low}, the control", shares["global"][:, 0], 0.5, source=source),
        at_most(
            "share of unsettled outcomes at the highest dimension", shares["unsettled"][:, -1], 0.05, source=source
        ),
    ]


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
