"""How often training one layer ends in a bad local minimum (13 of 32 random starts, say), and the curvature there.

The atlas of a full linear layer that learns in context: the share of random starts that end away from the optimum, as
anisotropy, context length, size of the start and parametrisation change; what its losses look like on the way; and the
exact Hessian at both ends.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from rich.progress import Progress
from rich.table import Table

from attnlab.analysis import Analysis, AnalysisConfig, Arrays
from attnlab.expectation import Expectation, at_least, between, equal

LENGTHS = (5, 10, 20, 40, 80, 160)
POWERS = (0.0, 0.5, 1.0, 1.5, 2.0)
DIMENSIONS = (2, 3, 4, 5)
SIZES = (0.01, 0.03, 0.1, 0.3, 1.0)
MODELS = {"merged": "query-key merged", "two_heads": "merged, two heads", "layer": "separate $W_Q, W_K, W_V, W_O$"}
SPECTRUM = (2.0, 1.0, 0.5, 0.25, 0.1)
BAD = 1.02  # an end this far above the least risk, and stationary, is counted as bad


@dataclass(frozen=True)
class Config(AnalysisConfig):
    """Options of the analysis."""

    SMOKE: ClassVar = {"starts": 4, "steps": 60, "stride": 3}

    starts: int = 32
    """Random starts for each setting."""
    steps: int = 1500
    """Steps of Adam with a cosine schedule."""
    learning_rate: float = 0.03
    """Of Adam at the start."""
    noise_variance: float = 0.1
    """Of the labels."""
    stride: int = 1
    """Take every so many of the settings."""


def compute(config: Config, progress: Progress) -> Arrays:
    """Train every setting of the three maps, then measure the anisotropic case closely."""
    import jax
    import jax.numpy as jnp

    from attnlab.icl.tasks import isotropic, linear_regression

    noise = config.noise_variance
    key = jax.random.key(config.seed)
    lengths = LENGTHS[:: config.stride]
    anisotropic = linear_regression(jnp.diag(jnp.array(SPECTRUM)), noise_variance=noise)
    powers = {power: jnp.arange(1.0, 5.0) ** -power for power in POWERS[:: config.stride]}
    maps = {
        "anisotropy": [
            (linear_regression(jnp.diag(4 * s / jnp.sum(s)), noise_variance=noise), length, "merged", 0.1)
            for s in powers.values()
            for length in lengths
        ],
        "isotropic": [
            (isotropic(d, noise), length, "merged", 0.1) for d in DIMENSIONS[:: config.stride] for length in lengths
        ],
        "start": [(anisotropic, 20, model, size) for model in MODELS for size in SIZES[:: config.stride]],
    }
    shares: Arrays = {}
    optimizer = adam(config)
    for name, settings in maps.items():
        task = progress.add_task(name, total=len(settings), status="")
        found = []
        for problem, length, model, size in settings:
            key, starts = jax.random.fold_in(key, len(found)), config.starts
            found.append(ends(train_from_random(problem, length, model, size, starts, config.steps, optimizer, key)))
            progress.update(task, advance=1, status=f"{found[-1][0]:.0%} bad")
        rows = len(settings) // len(SIZES[:: config.stride] if name == "start" else lengths)
        shares[name] = np.array(found).reshape(rows, -1, 2)
    return {"shares": shares} | close_up(anisotropic, config, optimizer, key)


def adam(config: Config):
    """One optimizer for all settings, so that those of one shape share a compiled loop."""
    import optax

    return optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps))


def random_start(model: str, size: float, dimension: int, key):
    """N(0, size^2) weights of one of the `MODELS`."""
    from attnlab.icl.models import init_effective, init_layer

    if model == "layer":
        return init_layer(key, dimension + 1, size)
    return init_effective(key, dimension, size, heads=2 if model == "two_heads" else 1)


def train_from_random(problem, length, model, size, starts, steps, optimizer, key):
    """The exact risk as an objective, its least value, and the ensemble trained on it."""
    import jax

    from attnlab.icl.optima import optimal_risk
    from attnlab.icl.population import population_objective
    from attnlab.training import train

    risk = population_objective(problem, length, "layer" if model == "layer" else "merged")
    keys = jax.random.split(key, starts)
    params = jax.vmap(lambda key: random_start(model, size, problem.dimension, key))(keys)
    return risk, optimal_risk(problem, length), train(risk, params, optimizer, keys, steps=steps, every=steps)


def ends(trained) -> tuple[float, float]:
    """Shares of the starts that end stationary above `BAD` times the least risk, and above it but not yet stationary.

    Stationary: the gradient times the parameters' norm, the change of risk by order-one relative moves, is below 1 %.
    """
    risk, best, trajectory = trained
    values, slopes = relative_slopes(risk, trajectory.params)
    away = values > BAD * best
    return float((away & (slopes < 0.01 * values)).mean()), float((away & (slopes >= 0.01 * values)).mean())


def relative_slopes(risk, params):
    """Risks of an ensemble, and the products of the norms of its gradients and parameters."""
    import jax
    import optax

    def one(params):
        value, gradient = jax.value_and_grad(risk)(params)
        return value, optax.tree.norm(gradient) * optax.tree.norm(params)

    return jax.jit(jax.vmap(one))(params)


def close_up(problem, config: Config, optimizer, key) -> Arrays:
    """The anisotropic problem at N = 20: losses along training, and the exact Hessian at both minima."""
    import jax
    import jax.numpy as jnp

    from attnlab.curvature import hessian
    from attnlab.icl.landscape import balance, stationary_point, swapped_start
    from attnlab.icl.optima import optimal_preconditioner
    from attnlab.icl.population import reduced_weights

    risk, best, trained = train_from_random(problem, 20, "merged", 0.1, config.starts, config.steps, optimizer, key)
    newton = jax.jit(stationary_point)
    start = {
        "bad": swapped_start(problem, 20),
        "best": reduced_weights({"preconditioner": optimal_preconditioner(problem, 20)}),
    }
    arrays: Arrays = {"losses": trained.records.losses, "least": best}
    for name, params in start.items():
        point = newton(risk, balance(params))
        minimum = balance(point.params)
        arrays[name] = {
            "risk": point.risk,
            "gradient": point.gradient_norm,
            "eigenvalues": jnp.linalg.eigvalsh(hessian(risk, minimum).dense()),
            "usual": minimum["query_key"][0, :-1] * minimum["value"][0, -1],
            "swapped": jnp.outer(minimum["value"][0, :-1], minimum["query_key"][0, -1]),
        }
    return arrays


def plot(arrays: Arrays, config: Config):
    """Both maps, the share of bad ends by the size of the start, and the losses of one setting."""
    from attnlab.plotting.panels import panels

    bad, risks = ended_badly(arrays), {name: float(arrays[name]["risk"]) for name in ("bad", "best")}
    cells = 100 * np.concatenate([arrays["shares"][name][:, :, 0].ravel() for name in ("anisotropy", "isotropic")])
    figure, axes = panels(
        f"{bad.sum()} of {len(bad)} random starts of one layer end in a bad local minimum, of risk {risks['bad']:.3g}\n"
        f"instead of {risks['best']:.3g}, see (d); by inputs and length of the context {cells.min():.0f} to "
        f"{cells.max():.0f} % do, (a) and (b)",
        [
            "bad ends (%), inputs of spectrum $i^{-p}$, $d = 4$",
            "bad ends (%), isotropic inputs",
            "spectrum (2, 1, .5, .25, .1), $N = 20$",
            "training in the setting of (c), weights of size 0.1",
        ],
        note=f"{config.starts} random starts a setting: (a), (b) within {200 * (0.25 / config.starts) ** 0.5:.0f} % "
        "(two standard errors at most), bars in (c): two standard errors.\nbad: stationary at a risk "
        f"{100 * (BAD - 1):.0f} % above the least; *: over a tenth is not yet stationary; (c) leaves such settings out",
        height=2.9,
    )
    lengths = LENGTHS[:: config.stride]
    powers = [f"{power:g}" for power in POWERS[:: config.stride]]
    image = share_map(axes[0], arrays["shares"]["anisotropy"], powers, lengths)
    axes[0].set(xlabel="context length $N$", ylabel="power $p$ of the spectrum")
    share_map(axes[1], arrays["shares"]["isotropic"], [str(d) for d in DIMENSIONS[:: config.stride]], lengths)
    axes[1].set(xlabel="context length $N$", ylabel="dimension $d$")
    figure.colorbar(image, ax=axes[1], label="ends in a bad minimum (%)")
    plot_start(axes[2], arrays, config)
    plot_losses(axes[3], arrays)
    return figure


def details(arrays: Arrays, config: Config):
    """The Hessian at both minima, and the two paths of the bad one."""
    from attnlab.plotting.panels import panels

    values = arrays["bad"]["eigenvalues"]
    curved = values[np.abs(values) > 1e-9 * values[-1]]
    figure, axes = panels(
        f"The bad minimum is strict but for scale: curvatures from {curved[0]:.2g} to {curved[-1]:.3g}",
        ["exact Hessian at both ends (balanced)", "step sizes along the eigenvectors"],
        note="spectrum (2, 1, .5, .25, .1), $N = 20$; the flat direction of scale is left out in (a). Two paths:\n"
        "usual, values read the label and keys the inputs; swapped, values read the inputs and keys the label",
        height=2.9,
    )
    plot_hessians(axes[0], arrays)
    plot_paths(axes[1], arrays)
    return figure


def ended_badly(arrays: Arrays) -> np.ndarray:
    """Which of the starts in the setting of the close-up end above `BAD` times the least risk."""
    return arrays["losses"][-1] > BAD * arrays["least"]


def share_map(axes, shares, rows, columns):
    """Percentages as colours and numbers; a star where more than a tenth of the starts are not yet stationary."""
    percent = 100 * shares[:, :, 0]
    image = axes.imshow(percent, vmin=0, vmax=100, cmap="magma", aspect="auto", origin="lower")
    for (row, column), value in np.ndenumerate(percent):
        star, color = "*" if shares[row, column, 1] > 0.1 else "", "black" if value > 60 else "white"
        axes.text(column, row, f"{value:.0f}{star}", ha="center", va="center", color=color, fontsize=8)
    axes.set_xticks(range(len(columns)), [str(column) for column in columns])
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def plot_start(axes, arrays: Arrays, config: Config) -> None:
    sizes = np.array(SIZES[:: config.stride])
    for number, (shares, label) in enumerate(zip(arrays["shares"]["start"], MODELS.values(), strict=True)):
        share = np.where(shares[:, 1] > 0.1, np.nan, shares[:, 0])
        error = np.sqrt(np.maximum(share * (1 - share), 1 / config.starts) / config.starts)
        style = {"fmt": "os^"[number] + ("-", "--", "-.")[number], "capsize": 2, "color": f"C{number}", "label": label}
        axes.errorbar(sizes * 1.06 ** (number - 1), 100 * share, 200 * error, **style)
    axes.set_xscale("log")
    axes.set_xlim(sizes[0] / 1.5, sizes[-1] * 1.5)
    axes.set(xlabel="standard deviation of initial weights", ylabel="ends in a bad minimum (%)", ylim=(-5, 105))
    axes.legend(loc="upper left")


def plot_losses(axes, arrays: Arrays) -> None:
    losses, bad = arrays["losses"], ended_badly(arrays)
    steps = np.arange(1, len(losses) + 1)
    kinds = (("C0", "-", ~bad, "end at the optimum"), ("C1", "--", bad, "end in the bad minimum"))
    for color, style, members, label in kinds:
        if members.any():
            axes.loglog(steps, losses[:, members], style, color=color, linewidth=0.7, alpha=0.7)
            axes.plot([], [], style, color=color, label=f"{members.sum()} starts {label}")
    for name, label in (("bad", "exact risk of either"), ("best", None)):
        axes.axhline(float(arrays[name]["risk"]), color="black", linewidth=1, linestyle=":", label=label, zorder=3)
    axes.set(xlabel="training step", ylabel="exact risk")
    axes.set_ylim(0.3 * float(arrays["least"]))  # room for the legend
    axes.set_yticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
    axes.tick_params(axis="y", which="minor", left=False, labelleft=False)
    axes.legend(loc="lower left")


def plot_hessians(axes, arrays: Arrays) -> None:
    for number, (name, label) in enumerate((("bad", "bad minimum"), ("best", "optimum"))):
        eigenvalues = arrays[name]["eigenvalues"][::-1]
        curved = eigenvalues > 1e-9 * eigenvalues[0]
        rank = np.arange(1, len(eigenvalues) + 1)
        label = f"{label}, risk {float(arrays[name]['risk']):.4f}"
        axes.semilogy(rank[curved], eigenvalues[curved], "ov"[number], color=f"C{1 - number}", label=label)
    axes.set(xlabel="rank of the eigenvalue", ylabel="eigenvalue of the Hessian")
    axes.legend(loc="upper right")


def plot_paths(axes, arrays: Arrays) -> None:
    places = np.arange(len(SPECTRUM))
    bars = {("best", "usual"): "optimum", ("bad", "usual"): "bad, usual path", ("bad", "swapped"): "bad, swapped path"}
    for number, ((name, path), label) in enumerate(bars.items()):
        style = {"color": f"C{number}", "hatch": ("", "///", "...")[number], "edgecolor": "white", "linewidth": 0}
        axes.bar(places + 0.27 * (number - 1), np.diag(arrays[name][path]), 0.25, label=label, **style)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_xticks(places, [f"{value:g}" for value in SPECTRUM])
    axes.set(xlabel="eigenvalue of the inputs' covariance", ylabel="step size along its eigenvector")
    axes.legend(loc="upper left")


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """Both minima of the anisotropic problem, how strict the bad one is, and that random starts find both."""
    bad, best = arrays["bad"], arrays["best"]
    relative = bad["eigenvalues"] / bad["eigenvalues"][-1]
    share = np.mean(ended_badly(arrays))
    derived = {"source": "derived here"}
    found = [
        equal("flat Hessian eigenvalues of the bad minimum", np.sum(np.abs(relative) <= 1e-9), 1, 0.0, **derived),
        at_least(
            "its lowest other eigenvalue over the highest", relative[1], 1e-9, because="beyond rounding", **derived
        ),
        between("share of random starts that end there", share, 0.1, 0.6, because="32 starts", **derived),
    ]
    if config.noise_variance == 0.1:
        values = [bad["risk"], best["risk"]]
        digits = equal("risks of both", values, [1.935972, 0.792426], 1e-5, because="to the digits given", **derived)
        found.insert(0, digits)
    return found


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """The maps as numbers, and both minima."""
    shares = Table("setting", "bad (%)", "not yet stationary (%)", title=f"Ends of {config.starts} starts")
    lengths = LENGTHS[:: config.stride]
    labels = {
        "anisotropy": ("p", POWERS, "N", lengths),
        "isotropic": ("d", DIMENSIONS, "N", lengths),
        "start": ("model", tuple(MODELS), "size", SIZES[:: config.stride]),
    }
    for name, (row_name, rows, column_name, columns) in labels.items():
        rows = rows if name == "start" else rows[:: config.stride]
        for row, values in zip(rows, arrays["shares"][name], strict=True):
            for column, (bad, unfinished) in zip(columns, values, strict=True):
                shares.add_row(
                    f"{name}, {row_name} {row}, {column_name} {column}", f"{100 * bad:.0f}", f"{100 * unfinished:.0f}"
                )
    minima = Table("minimum", "risk", "gradient norm", "flat", "least curved eigenvalue", "largest")
    for name in ("bad", "best"):
        eigenvalues = arrays[name]["eigenvalues"]
        curved = np.abs(eigenvalues) > 1e-9 * eigenvalues[-1]
        values = (arrays[name]["risk"], arrays[name]["gradient"], eigenvalues[curved][0], eigenvalues[-1])
        risk, gradient, least, largest = (f"{float(value):.4g}" for value in values)
        minima.add_row(name, risk, gradient, str(int((~curved).sum())), least, largest)
    return [shares, minima]


ANALYSIS = Analysis("icl-landscape", Config, compute, plot, tables, findings, __doc__, slow=True, details=details)

if __name__ == "__main__":
    ANALYSIS.main()
