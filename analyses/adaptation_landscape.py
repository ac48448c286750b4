"""Adapting a trained model: where LoRA starts and ends, when prompts beat pooling, how far federated rounds drift.

The spectrum of LoRA's Hessian at its start, a strict saddle, and at a minimiser, flat along its gauge; the error of one
gradient step on pooled tokens against attention to a prompt, in the three phases of contextual data; the distance of a
federated round from descent on all data, and what its leading order leaves, against the rate, with local slopes.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from rich.progress import Progress
from rich.table import Table

from attnlab.analysis import Analysis, AnalysisConfig, Arrays
from attnlab.expectation import Expectation, equal

LOCAL_STEPS = (2, 5, 20)


@dataclass(frozen=True)
class Config(AnalysisConfig):
    """Options of the analysis."""

    SMOKE: ClassVar = {"shape": (4, 3), "rank": 2, "gradient_rank": 1, "spreads": 4, "sequences": 500, "rates": 3}

    shape: tuple[int, int] = (16, 12)
    """Rows and columns of the adapted matrix."""
    rank: int = 4
    """Rank r of the adaptation."""
    gradient_rank: int = 3
    """Rank of the change that the new data ask for."""
    relevant: float = 0.25
    """Share of relevant tokens."""
    spreads: int = 25
    """Spreads of the irrelevant tokens, up to four edges."""
    sequences: int = 20_000
    """Sequences at each spread."""
    rates: int = 9
    """Learning rates between 1e-4 and 1e-1."""


def compute(config: Config, progress: Progress) -> Arrays:
    """The three panels."""
    task = progress.add_task("panels", total=3, status="")
    arrays: Arrays = {}
    for part in (lora_spectra, phases, drifts):
        arrays |= part(config)
        progress.advance(task)
    return arrays


def lora_spectra(config: Config) -> Arrays:
    """Eigenvalues at B = 0 and at a minimiser of LoRA on a linear map whose targets differ by a low-rank change."""
    import jax
    import jax.numpy as jnp

    from attnlab.adaptation.lora import lora
    from attnlab.adaptation.pullback import reparametrise
    from attnlab.curvature import hessian
    from attnlab.losses import square_loss
    from attnlab.objectives import objective

    keys = jax.random.split(jax.random.key(config.seed), 5)
    rows = config.shape[0]
    inputs, weight = jax.random.normal(keys[0], (4 * rows, rows)), jax.random.normal(keys[1], config.shape)

    def spectra(change_rank: int):
        left, right = (jax.random.normal(k, (n, change_rank)) for k, n in zip(keys[2:], config.shape, strict=False))
        risk = objective(lambda p, x: x @ p["W"], square_loss, inputs, inputs @ (weight + left @ right.T))
        change, start = lora({"W": weight}, "W", config.rank, keys[4])
        adapted = reparametrise(risk, change)
        u, s, vt = jnp.linalg.svd(left @ right.T, full_matrices=False)
        end = {"W": {"B": u[:, : config.rank] * s[None, : config.rank], "A": vt[: config.rank]}}
        return [np.linalg.eigvalsh(hessian(adapted, point).dense()) for point in (start, end)]

    # the start asks for less than the rank can give, the minimiser uses all of it
    return {"spectrum": {"start": spectra(config.gradient_rank)[0], "end": spectra(config.rank)[1]}}


def phases(config: Config) -> Arrays:
    """Error rates of one gradient step on pooled tokens and on attention to a prompt, (spreads, 2)."""
    import jax
    import jax.numpy as jnp

    from attnlab.data.contextual import contextual_mixture, pooling_error
    from attnlab.models.heads import softmax_weights

    edge = config.relevant / (1 - config.relevant)
    spreads = edge * np.linspace(0.2, 4, config.spreads)
    rows = []
    for number, spread in enumerate(spreads):
        key = jax.random.fold_in(jax.random.key(config.seed), number)
        tokens, labels = contextual_mixture(key, config.sequences, 8, 3, config.relevant, float(spread))
        weights = softmax_weights(50 * tokens[..., 0])
        features = jnp.mean(tokens, axis=1), jnp.einsum("nl,nld->nd", weights, tokens)
        rows.append([jnp.mean(labels * (x @ jnp.mean(labels[:, None] * x, axis=0)) <= 0) for x in features])
    exact = np.array([pooling_error(config.relevant, float(spread)) for spread in spreads])
    return {"phase": {"spreads": spreads, "errors": np.array(rows), "exact": exact, "edge": edge}}


def drifts(config: Config) -> Arrays:
    """Norms of FedAvg - GD and of that less its leading order, (local steps, rates, 2), for one attention layer."""
    import jax
    import jax.numpy as jnp

    from attnlab.adaptation.federated import central_descent, drift, federated_round
    from attnlab.losses import square_loss
    from attnlab.models.adapters import from_linen
    from attnlab.models.attention import AttentionConfig, SelfAttention
    from attnlab.objectives import objective
    from attnlab.trees import ravel

    module, key = SelfAttention(AttentionConfig(key_dim=2, value_dim=2)), jax.random.key(config.seed)
    tokens, targets = jax.random.normal(key, (4, 8, 4, 3)), jax.random.normal(key, (4, 8, 4, 2))
    params = module.init(key, tokens[0])["params"]
    risks = [objective(from_linen(module), square_loss, *pair) for pair in zip(tokens, targets, strict=True)]
    clients = jax.tree.map(lambda *leaves: jnp.stack(leaves), *risks)
    rates = np.geomspace(1e-4, 1e-1, config.rates)
    rows = []
    for steps in LOCAL_STEPS:

        @jax.jit
        def norms(rate, steps=steps):
            local, central, formula = (
                ravel(f(clients, params, rate, steps)) for f in (federated_round, central_descent, drift)
            )
            return jnp.stack([jnp.linalg.norm(local - central), jnp.linalg.norm(local - central - formula)])

        rows.append([norms(jnp.asarray(rate)) for rate in rates])
    return {"drift": {"rates": rates, "norms": np.array(rows)}}


def plot(arrays: Arrays, config: Config):
    """LoRA's spectra, phases, drift and its slopes."""
    from attnlab.adaptation.lora import inertia
    from attnlab.plotting.panels import panels

    negative, flat = inertia(arrays["spectrum"]["start"])[0], inertia(arrays["spectrum"]["end"])[1]
    worst = arrays["phase"]["errors"].max(axis=0)
    drift = drift_slopes(arrays)[:, 0].mean()
    figure, axes = panels(
        f"LoRA starts at a saddle of {negative} negative eigenvalues, its minima are flat in {flat}; pooling errs\n"
        f"by up to {100 * worst[0]:.0f} %, attention to a prompt by {100 * worst[1]:.2g} %; "
        f"federated rounds drift as $\\eta^{{{drift:.2f}}}$",
        [
            f"LoRA's Hessian, {config.shape[0]} × {config.shape[1]}, rank {config.rank}",
            "three phases of contextual data",
            r"a federated round, rate $\eta$",
            r"local powers of $\eta$ in (c)",
        ],
        note=f"(a), (c), (d): exact, one random problem each (one seed); (b): {config.sequences} sequences a point, "
        "bars: two standard errors.\n(c): distance of a round of four clients from descent on all their data",
        height=2.9,
    )
    plot_spectra(axes[0], arrays)
    plot_phases(axes[1], arrays, config)
    plot_drift(axes[2], arrays)
    plot_powers(axes[3], arrays)
    return figure


def plot_spectra(axes, arrays: Arrays) -> None:
    for number, (name, label) in enumerate((("start", "start, $B = 0$"), ("end", "minimiser"))):
        values = np.sort(arrays["spectrum"][name])[::-1]
        axes.plot(np.arange(1, len(values) + 1), values, ".+"[number], color=f"C{number}", label=label)
    axes.set_yscale("symlog", linthresh=1e-2)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_yticks([-1, -0.01, 0, 0.01, 1, 100], ["-1", "-0.01", "0", "0.01", "1", "100"])
    axes.set_yticks([], minor=True)
    axes.set(xlabel="rank of the eigenvalue", ylabel="eigenvalue (linear within 0.01)")
    axes.legend(loc="lower left")


def plot_phases(axes, arrays: Arrays, config: Config) -> None:
    spreads, errors, edge = arrays["phase"]["spreads"], arrays["phase"]["errors"], float(arrays["phase"]["edge"])
    bars = 2 * np.sqrt(errors * (1 - errors) / config.sequences)
    style = {"color": "C0", "markerfacecolor": "none", "capsize": 2, "label": "pooling"}
    axes.errorbar(spreads, errors[:, 0], bars[:, 0], fmt="o", **style)
    axes.errorbar(spreads, errors[:, 1], bars[:, 1], fmt="s-", color="C1", label="attention to a prompt")
    axes.plot(spreads, arrays["phase"]["exact"], ":", color="black", label="law of pooling", zorder=3)
    for factor in (1, 2):
        axes.axvline(factor * edge, color="0.6", linewidth=1, label="edges of the phases" if factor == 1 else None)
    axes.set(xlabel=r"spread $\Delta$ of irrelevant tokens", ylabel="classification error", ylim=(-0.03, 0.95))
    axes.legend(loc="upper right", framealpha=1, frameon=True, edgecolor="none", borderpad=0.1)


def plot_drift(axes, arrays: Arrays) -> None:
    rates = arrays["drift"]["rates"]
    for number, (steps, rows) in enumerate(zip(LOCAL_STEPS, arrays["drift"]["norms"], strict=True)):
        marker, color = "os^"[number], f"C{number}"
        axes.loglog(rates, rows[:, 0], marker + "-", color=color, label=f"{steps} local steps")
        axes.loglog(rates, rows[:, 1], marker + "--", color=color, markerfacecolor="none")
        for column, power in ((0, 2), (1, 3)):
            guide = rows[0, column] * (rates / rates[0]) ** power
            axes.loglog(rates, guide, ":", color="black", linewidth=1, zorder=3)
    axes.plot([], [], "--", color="0.4", label="less the leading order")
    axes.plot([], [], ":", color="black", label=r"laws: $\eta^2$ and $\eta^3$")
    low, high = axes.get_ylim()
    axes.set_ylim(low * (low / high) ** 0.3, high)  # room for the legend
    axes.set(xlabel=r"learning rate $\eta$", ylabel="distance in parameters")
    axes.legend(loc="lower right")


def plot_powers(axes, arrays: Arrays) -> None:
    """Slopes of the logarithms between neighbouring rates: of the drift, and less its leading order."""
    rates = arrays["drift"]["rates"]
    places = np.sqrt(rates[1:] * rates[:-1])
    for number, (steps, rows) in enumerate(zip(LOCAL_STEPS, arrays["drift"]["norms"], strict=True)):
        slopes = np.diff(np.log(rows), axis=0) / np.diff(np.log(rates))[:, None]
        marker, color = "os^"[number], f"C{number}"
        axes.semilogx(places, slopes[:, 0], marker + "-", color=color, label=f"{steps} local steps")
        axes.semilogx(places, slopes[:, 1], marker + "--", color=color, markerfacecolor="none")
    for power in (2, 3):
        axes.axhline(power, color="black", linewidth=1, linestyle=":", label="laws: 2 and 3" if power == 2 else None)
    axes.set(xlabel=r"learning rate $\eta$", ylabel="slope of log distance in log rate")
    axes.legend(loc="center left", bbox_to_anchor=(0.0, 0.65))


def drift_slopes(arrays: Arrays) -> np.ndarray:
    """Exponents of the drift and of the remainder over the three smallest rates, (local steps, 2)."""
    rates, norms = arrays["drift"]["rates"][:3], arrays["drift"]["norms"]
    return np.array([np.polyfit(np.log(rates), np.log(rows[:3]), 1)[0] for rows in norms])


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """Signs of LoRA's spectra, the errors of both ways to read contextual data, the orders of the federated drift."""
    from attnlab.adaptation.lora import inertia, initial_inertia

    start, end = (inertia(arrays["spectrum"][name]) for name in ("start", "end"))
    flat, errors = config.rank**2, arrays["phase"]["errors"]
    gauge = (0, flat, sum(config.shape) * config.rank - flat)
    begins = initial_inertia(config.shape, config.rank, config.gradient_rank)
    signs, count = "negative, zero, positive eigenvalues of LoRA's Hessian", "counts"
    bar, data = 0.5 / config.sequences**0.5, "derived here for the data of Oymak et al., arXiv 2306.03435"
    powers = {"because": "the next order in the rate", "source": "derived here: two expansions in the rate"}
    return [
        equal(f"{signs}: start", start, begins, 0.0, because=count, source="derived here by inertia"),
        equal(f"{signs}: minimiser", end, gauge, 0.0, because=count, source="derived here: the gauge group GL(r)"),
        equal("errors of pooling", errors[:, 0], arrays["phase"]["exact"], 4.5, standard_error=bar, source=data),
        equal("errors of attention to a prompt", errors[:, 1], 0.0, 4.5, standard_error=bar, source=data),
        equal("exponents of the federated drift, by local steps", drift_slopes(arrays)[:, 0], 2.0, 0.1, **powers),
        equal("exponents of what its leading order leaves", drift_slopes(arrays)[:, 1], 3.0, 0.1, **powers),
    ]


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """Signs of the spectra and slopes of the drift, with what theory says."""
    from attnlab.adaptation.lora import inertia, initial_inertia

    signs = Table("point", "negative", "zero", "positive", title="LoRA's Hessian")
    predicted = initial_inertia(config.shape, config.rank, config.gradient_rank)
    signs.add_row("start, predicted", *map(str, predicted))
    signs.add_row("start, found", *map(str, inertia(arrays["spectrum"]["start"])))
    signs.add_row(
        "minimiser, predicted", "0", str(config.rank**2), str(sum(config.shape) * config.rank - config.rank**2)
    )
    signs.add_row("minimiser, found", *map(str, inertia(arrays["spectrum"]["end"])))
    slopes = Table("local steps", "slope of the drift (2)", "slope of the remainder (3)")
    for steps, fits in zip(LOCAL_STEPS, drift_slopes(arrays), strict=True):
        slopes.add_row(str(steps), *(f"{slope:.3f}" for slope in fits))
    errors = Table("phase", "largest |error - predicted| of pooling", "largest error of the prompt")
    difference = np.abs(arrays["phase"]["errors"][:, 0] - arrays["phase"]["exact"])
    errors.add_row("all", f"{difference.max():.4f}", f"{arrays['phase']['errors'][:, 1].max():.4f}")
    return [signs, slopes, errors]


ANALYSIS = Analysis("adaptation-landscape", Config, compute, plot, tables, findings, __doc__, slow=True)

if __name__ == "__main__":
    ANALYSIS.main()
