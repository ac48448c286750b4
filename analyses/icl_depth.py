"""How deep linear attention learns in context: the best risk by depth, its laws, and the algorithms that attain it.

The exact risk of L layers with steps of their own (from the moments of the Wishart law), of one layer looped L times,
and of layers that also transform the inputs (GD++), beside attention stacks with these weights on prompts drawn afresh
for every point; and how the risk of one layer falls with the context when the inputs' spectrum is a power law.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from rich.progress import Progress
from rich.table import Table

from attnlab.analysis import Analysis, AnalysisConfig, Arrays
from attnlab.expectation import Expectation, equal

RATIOS = {"1": (1, 1), "1 : 2": (1, 2), "1 : 4": (1, 4)}
POWERS = (1.5, 2.0, 3.0)
PLUS_PLUS_LAYERS = (1, 2, 3)
KINDS = {"free": "steps of their own", "looped": "one layer, looped", "plus_plus": "GD++"}


@dataclass(frozen=True)
class Config(AnalysisConfig):
    """Options of the analysis."""

    SMOKE: ClassVar = {"prompts": 64, "draws": 2, "deepest": 6, "spectrum": 1000}

    dimension: int = 5
    """Dimension d of the sampled prompts."""
    length: int = 20
    """Number N of examples of the sampled prompts."""
    layers: int = 5
    """Depths 1 to this one on sampled prompts."""
    prompts: int = 20_000
    """Prompts of one draw."""
    draws: int = 5
    """Draws for every point: no two points share a prompt."""
    deepest: int = 32
    """Largest depth of the exact laws."""
    spectrum: int = 200_000
    """Eigenvalues of the power-law spectra."""


def compute(config: Config, progress: Progress) -> Arrays:
    """The exact risks, and those on prompts."""
    task = progress.add_task("laws", total=len(RATIOS) + 2, status="")
    depths = np.unique(np.round(np.geomspace(1, config.deepest, 14)).astype(int))
    arrays: Arrays = {"depths": depths, "law": {}}
    for name, ratio in RATIOS.items():
        arrays["law"][name] = depth_law(ratio, depths)
        progress.advance(task)
    arrays |= on_prompts(config)
    progress.advance(task)
    arrays |= power_laws(config)
    progress.advance(task)
    return arrays


def depth_law(ratio: tuple[int, int], depths) -> np.ndarray:
    """Least risk over d with free steps and looped, (2, depths), as d, N grow with d / N = `ratio`."""
    from fractions import Fraction

    from attnlab.icl.depth import depth_risk, looped_risk, marchenko_pastur_moments

    moments = marchenko_pastur_moments(Fraction(*ratio), 2 * int(depths[-1]))
    free = [depth_risk(moments, int(n)) for n in depths]
    return np.array([free, [looped_risk(moments, int(n))[0] for n in depths]])


def on_prompts(config: Config) -> Arrays:
    """Best steps, exact risks, and means with standard errors of attention stacks on prompts of their own."""
    import jax
    import jax.numpy as jnp

    from attnlab.icl.constructions import gradient_descent_stack, plus_plus_stack
    from attnlab.icl.depth import depth_risk, depth_step_sizes, gauss_rule, looped_risk, wishart_moments
    from attnlab.icl.models import looped_predict, stack_predict

    d, depths = config.dimension, range(1, config.layers + 1)
    moments = wishart_moments(d, config.length, max(2 * config.layers, 27))
    keys = iter(jax.random.split(jax.random.key(config.seed), 2 * config.layers + len(PLUS_PLUS_LAYERS)))
    identity = jnp.eye(d)[None]
    own, looped = {}, {}
    rows: dict[str, list[list[float]]] = {name: [] for name in KINDS}
    for layers in depths:
        steps = jnp.asarray(depth_step_sizes(moments, layers))
        stack = gradient_descent_stack(steps[:, None, None] * identity)
        found = sampled_risk(lambda prompt, stack=stack: stack_predict(stack, prompt), next(keys), config)
        rows["free"].append([d * depth_risk(moments, layers), *found])
        value, step = looped_risk(moments, layers)
        (layer,) = gradient_descent_stack(step * identity)
        loop = lambda prompt, layer=layer, layers=layers: looped_predict(layer, prompt, layers)  # noqa: E731
        rows["looped"].append([d * value, *sampled_risk(loop, next(keys), config)])
        own[str(layers)], looped[str(layers)] = steps, step
    rule = gauss_rule(moments, 14)
    for layers in PLUS_PLUS_LAYERS:
        exact, a, b = best_plus_plus(d, layers, rule)
        stack = plus_plus_stack(*(x[:, None, None] * identity for x in (a, b / a)))
        found = sampled_risk(lambda prompt, stack=stack: stack_predict(stack, prompt), next(keys), config)
        rows["plus_plus"].append([exact, *found])
    values, weights = (np.asarray(x) for x in rule)
    return {"steps": own, "looped_step": looped, "risk": rows, "nodes": values, "weights": weights}


def sampled_risk(predict, key, config: Config) -> tuple[float, float]:
    """Mean squared error of a model on fresh prompts and its standard error; draw after draw, to save memory."""
    import jax

    from attnlab.icl.diagnostics import risk
    from attnlab.icl.tasks import isotropic, sample_prompts

    problem = isotropic(config.dimension)
    one = jax.jit(lambda key: risk(predict, sample_prompts(key, problem, config.length, config.prompts)))
    found = np.array([one(draw) for draw in jax.random.split(key, config.draws)])
    return float(found[:, 0].mean()), float(np.sqrt(np.sum(found[:, 1] ** 2)) / config.draws)


def best_plus_plus(dimension: int, layers: int, rule):
    """The least population risk of GD++, its step sizes and contractions, by descent from three kinds of start."""
    import jax
    import jax.numpy as jnp
    import scipy.optimize

    from attnlab.icl.depth import plus_plus_risk

    @jax.jit
    @jax.value_and_grad
    def log_risk(vector):
        return jnp.log(dimension * plus_plus_risk(vector[:layers], vector[layers:], rule))

    # Good contractions grow with depth, since every one of them shrinks the eigenvalues for the next.
    random = np.random.default_rng(0)
    best = None
    for _ in range(8 * layers):
        steps = random.uniform(0.2, 0.6, layers) * 5.0 ** np.arange(layers)
        contractions = random.uniform(0.2, 0.4, layers) * 4.0 ** np.arange(layers)
        found = scipy.optimize.minimize(log_risk, np.append(steps, contractions), jac=True, method="BFGS", tol=1e-10)
        best = found if best is None or found.fun < best.fun else best
    a, b = jnp.asarray(best.x[:layers]), jnp.asarray(best.x[layers:])
    return float(np.exp(best.fun)), a, b


def power_laws(config: Config) -> Arrays:
    """Risk of the best single layer over context lengths for spectra i^-p (tasks isotropic in the whitened inputs)."""
    import jax.numpy as jnp

    from attnlab.icl.optima import spectral_risk

    lengths = np.geomspace(10, 10_000, 16)
    risks: Arrays = {}
    for power in POWERS:
        spectrum = jnp.arange(1.0, config.spectrum + 1) ** -power
        rest = config.spectrum ** (1 - power) / (power - 1)  # eigenvalues beyond the last: not learned
        risks[str(power)] = [float(spectral_risk(spectrum, n, rest)) + rest for n in lengths]
    return {"lengths": lengths, "power": risks}


def plot(arrays: Arrays, config: Config):
    """Depth laws and their exponents; exact risks and attention stacks on prompts, as they are and as ratios."""
    from attnlab.plotting.panels import panels

    depths = arrays["depths"].astype(float)
    own, looped = (local_slopes(depths, row)[1][-1] for row in arrays["law"]["1"])
    figure, axes = panels(
        f"The best risk of $L$ layers falls as a power of depth at $d = N$: near $L = {config.deepest}$ with exponent\n"
        f"{own:.2f} for steps of their own (limit $-1$) and {looped:.2f} for one looped layer (limit $-1/2$)",
        [
            "exact least risk at fixed $d/N$",
            "local exponent at $d = N$",
            f"exact risk, and on prompts ($d = {config.dimension}$, $N = {config.length}$)",
            "risk on prompts over the exact one",
        ],
        note=f"(a), (b): exact, for large $d$ and $N$. (c), (d): {config.draws * config.prompts} fresh prompts a "
        "point (one seed), bars of two standard errors.\nGD++: layers that also transform the inputs; with three of "
        "them rare contexts decide, which no sample holds",
        height=3.0,
    )
    plot_laws(axes[0], arrays)
    plot_exponents(axes[1], arrays)
    plot_prompts(axes[2], arrays, config)
    plot_ratios(axes[3], arrays, config)
    return figure


def details(arrays: Arrays, config: Config):
    """What the layers leave of the error, their steps, and the exponents in the length of the context."""
    from attnlab.plotting.panels import panels

    slopes = ", ".join(f"{fitted(arrays['lengths'], arrays['power'][str(power)]):.3f}" for power in POWERS)
    figure, axes = panels(
        f"One layer on inputs of spectrum $i^{{-p}}$: exponents {slopes} in the length\n"
        f"of the context, by the law $1/p - 1$ {', '.join(f'{1 / power - 1:.3f}' for power in POWERS)}",
        [
            "power-law spectra, one layer",
            "what $L$ layers leave of the error",
            "inverse step sizes spread over the spectrum",
        ],
        note=f"all exact. (b), (c): $d = {config.dimension}$, $N = {config.length}$; "
        r"$\hat G$: second moments of a context's inputs, grey: nodes and weights of its spectrum",
        height=3.0,
    )
    plot_powers(axes[0], arrays)
    plot_residuals(axes[1], arrays, config)
    plot_steps(axes[2], arrays, config)
    return figure


def plot_laws(axes, arrays: Arrays) -> None:
    depths = arrays["depths"]
    for number, name in enumerate(RATIOS):
        free, looped = arrays["law"][name]
        label = "$d/N = 1$" if name == "1" else f"$d/N = {name.replace(' : ', '/')}$"
        axes.loglog(depths, free, "o-", color=f"C{number}", label=f"{label}, own steps", markersize=3)
        axes.loglog(
            depths, looped, "s--", color=f"C{number}", markerfacecolor="none", markersize=3, label=f"{label}, looped"
        )
    laws = {r"laws: $1/(L + 1)$ and $(\pi L)^{-1/2}$": 1 / (depths + 1), None: (np.pi * depths) ** -0.5}
    for label, values in laws.items():
        axes.loglog(depths, values, ":", color="black", linewidth=1.5, label=label, zorder=3)
    low = max(arrays["law"]["1 : 4"][0].min(), 1e-8)
    axes.set(ylim=(low / 2, 2), xlabel="layers $L$", ylabel="least risk / $d$")
    depth_ticks(axes, depths)
    axes.legend(loc="lower left", fontsize=7.5, labelspacing=0.25)


def depth_ticks(axes, depths) -> None:
    ticks = 2 ** np.arange(int(np.log2(depths[-1])) + 1)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)


def local_slopes(depths, risks):
    """Slope of log risk against log depth between neighbours, at their geometric mean."""
    return np.sqrt(depths[1:] * depths[:-1]), np.diff(np.log(risks)) / np.diff(np.log(depths))


STYLES = {"free": ("C0", "o", "-"), "looped": ("C1", "s", "--"), "plus_plus": ("C2", "^", "-.")}


def plot_exponents(axes, arrays: Arrays) -> None:
    depths = arrays["depths"].astype(float)
    for name, risks, limit in zip(("looped", "free"), arrays["law"]["1"][::-1], (-0.5, -1), strict=True):
        color, marker, line = STYLES[name]
        axes.semilogx(*local_slopes(depths, risks), marker + line, color=color, label=KINDS[name])
        axes.axhline(limit, color="black", linewidth=1, linestyle=":", label="limits" if name == "free" else None)
    depth_ticks(axes, depths)
    axes.set(xlabel="layers $L$", ylabel="slope of log risk against log depth", ylim=(-1.05, -0.35))
    axes.legend(loc="upper right", bbox_to_anchor=(1.0, 0.75))


def plot_prompts(axes, arrays: Arrays, config: Config) -> None:
    for name, label in KINDS.items():
        exact, mean, error = arrays["risk"][name].T
        depths, (color, marker, line) = np.arange(1, len(exact) + 1), STYLES[name]
        axes.semilogy(depths, exact, line, color=color, label=f"{label}, exact")
        style = {"fmt": marker, "capsize": 2, "color": color, "markerfacecolor": "none"}
        axes.errorbar(depths, mean, 2 * error, **style)
    axes.plot([], [], "o", color="0.3", markerfacecolor="none", label="marks: attention on prompts")
    axes.set(xlabel="layers $L$", ylabel="risk", xticks=np.arange(1, config.layers + 1))
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, -0.02), fontsize=7.5, labelspacing=0.25)
    low, high = axes.get_ylim()
    axes.set_ylim(low * (low / high) ** 0.3, high)  # room for the legend under the curves


def plot_ratios(axes, arrays: Arrays, config: Config) -> None:
    for place, (name, label) in enumerate(KINDS.items()):
        exact, mean, error = arrays["risk"][name].T
        color, marker, _ = STYLES[name]
        style = {"fmt": marker, "capsize": 2, "color": color, "markerfacecolor": "none", "label": label}
        axes.errorbar(np.arange(1, len(exact) + 1) + 0.12 * (place - 1), mean / exact, 2 * error / exact, **style)
    axes.axhline(1, color="black", linewidth=1, linestyle=":", label="law: the exact risk")
    axes.set(xlabel="layers $L$", ylabel="risk on prompts / exact", xticks=np.arange(1, config.layers + 1))
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.6 * (high - low))  # room for the legend
    axes.legend(loc="upper left", ncols=2, columnspacing=1.0)


def plot_residuals(axes, arrays: Arrays, config: Config) -> None:
    nodes, weights = arrays["nodes"], arrays["weights"]
    grid = np.linspace(0, nodes[weights > 1e-4].max(), 400)
    for layers in range(1, min(config.layers, 4) + 1):
        residual = np.prod(1 - np.outer(grid, arrays["steps"][str(layers)]), axis=1)
        axes.plot(grid, residual, color=f"C{layers - 1}", label=f"$L = {layers}$")
        looped = (1 - grid * arrays["looped_step"][str(layers)]) ** layers
        axes.plot(grid, looped, ":", color=f"C{layers - 1}", linewidth=1)
    axes.plot([], [], ":", color="0.4", label="looped")
    axes.bar(nodes, weights, 0.03, color="0.75", zorder=0)
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set(ylim=(-0.6, 1.05), xlim=(0, grid[-1]))
    axes.set(xlabel=r"eigenvalue $\lambda$ of $\hat G$", ylabel=r"residual $r(\lambda)$")
    axes.legend(loc="upper left", bbox_to_anchor=(0.3, 1.02))


def plot_steps(axes, arrays: Arrays, config: Config) -> None:
    for layers in range(1, config.layers + 1):
        steps = arrays["steps"][str(layers)]
        labels = ("steps of their own", "looped") if layers == 1 else (None, None)
        axes.plot(np.full(len(steps), layers), 1 / steps, "o", color="C0", label=labels[0])
        step = arrays["looped_step"][str(layers)]
        axes.plot(layers, 1 / step, "s", color="C1", markerfacecolor="none", label=labels[1])
    axes.set(xlabel="layers $L$", ylabel="1 / step size", xticks=np.arange(1, config.layers + 1))
    axes.legend(loc="upper left")


def plot_powers(axes, arrays: Arrays) -> None:
    lengths = arrays["lengths"]
    for number, power in enumerate(POWERS):
        risks = arrays["power"][str(power)]
        label = f"$p = {power:g}$: slope {fitted(lengths, risks):.3f}"
        axes.loglog(lengths, risks, "os^"[number] + "-", color=f"C{number}", markersize=3, label=label)
        guide = risks[-1] * (lengths / lengths[-1]) ** (1 / power - 1)
        law = "law: $N^{1/p - 1}$" if number == 0 else None
        axes.loglog(lengths, guide, ":", color="black", linewidth=1.5, label=law, zorder=3)
    axes.set(xlabel="context length $N$", ylabel="least risk of one layer")
    axes.legend(loc="lower left")


def fitted(lengths, risks) -> float:
    """Slope of log risk over the last third of the lengths."""
    last = slice(-(len(lengths) // 3), None)
    return float(np.polyfit(np.log(lengths[last]), np.log(risks[last]), 1)[0])


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """Stacks on prompts have the exact risks; the exponents in depth and in the length of the context."""
    found = []
    for name, label in KINDS.items():
        # the rare eigenvalues that decide GD++ of three layers are in no sample of this size
        exact, mean, error = arrays["risk"][name][: 2 if name == "plus_plus" else None].T
        what, why = f"risk on prompts over the exact one, by layers: {label}", "a sample of prompts"
        bar = {"standard_error": error / exact, "because": why, "source": "orthogonal polynomials; derived here"}
        found.append(equal(what, mean / exact, 1.0, 4.5, **bar))
    depths, last = arrays["depths"].astype(float), f"local exponent at {config.deepest} layers"
    limits = {"because": "the limit is that of many layers", "source": "Catalan numbers; derived here"}
    for (kind, limit), row in zip((("own steps", -1), ("looped", -0.5)), arrays["law"]["1"], strict=True):
        found.append(equal(f"{last}: {kind}", local_slopes(depths, row)[1][-1], limit, 0.06, **limits))
    slopes = [fitted(arrays["lengths"], arrays["power"][str(power)]) for power in POWERS]
    what, laws = "exponents in the length of the context, by spectrum", 1 / np.array(POWERS) - 1
    return [
        *found,
        equal(what, slopes, laws, 0.05, because="the limit is that of long contexts", source="derived here"),
    ]


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """Exact risks beside the measured ones, and the exponents."""
    risks = Table(
        "layers", "exact", "on prompts", "errors apart", title="Risk by depth, and distance in standard errors"
    )
    for name, label in KINDS.items():
        for layers, (exact, mean, error) in enumerate(arrays["risk"][name], 1):
            apart = f"{(mean - exact) / error:+.1f}"
            risks.add_row(f"{label}, {layers}", f"{exact:.5g}", f"{mean:.5g} +- {error:.2g}", apart)
    exponents = Table("law", "theory", "last local exponent")
    for label, theory, row in zip(("depth, free steps", "depth, looped"), (-1, -0.5), arrays["law"]["1"], strict=True):
        exponents.add_row(label, f"{theory}", f"{local_slopes(arrays['depths'].astype(float), row)[1][-1]:.3f}")
    for power in POWERS:
        slope = fitted(arrays["lengths"], arrays["power"][str(power)])
        exponents.add_row(f"context, spectrum i^-{power:g}", f"{1 / power - 1:.3f}", f"{slope:.3f}")
    return [risks, exponents]


ANALYSIS = Analysis("icl-depth", Config, compute, plot, tables, findings, __doc__, slow=True, details=details)

if __name__ == "__main__":
    ANALYSIS.main()
