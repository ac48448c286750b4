"""Which Kronecker approximation for which matrix: K-FAC, EKFAC, the nearest product, Shampoo and SOAP by weight.

A perceptron and an attention layer on handwritten digits, and a small language model on English text, at initialisation
and trained. Each approximation stands beside the exact block of the Gauss-Newton matrix: in Frobenius norm, at the best
scale, in trace, in the damped inverse that acts on the gradient; and in the step of all weights at once, beside the
exact blocks and the whole matrix. Everything exact, no label is drawn. Three seeds.
"""

import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from rich.progress import Progress
from rich.table import Table

from attnlab.analysis import Analysis, AnalysisConfig, Arrays
from attnlab.expectation import Expectation, at_least, at_most, equal

STATES = ("initial", "trained")
NAMES = {
    "kfac": "K-FAC",
    "kfac_reduce": "K-FAC, reduce",
    "ekfac": "EKFAC",
    "kfoc": "nearest product",
    "shampoo": "Shampoo, 1/2",
    "shampoo_squared": "Shampoo, 1",
    "soap": "SOAP",
}
MEASURES = ("frobenius", "shape", "trace", "inverse")
STEPS = ("whole matrix", "exact blocks", *NAMES)
STEP_MEASURES = ("model, best length", "loss, own length", "loss, best length")
LENGTHS = 2.0 ** np.arange(-6, 3)
KERNELS = {
    "perceptron": re.compile("layer"),
    "attention": re.compile("query|key|value|output|readout|^embedding"),
    "language": re.compile("query|key|value|output|up|down|unembedding"),
}
EKFAC, SQUARE = "George et al., arXiv 1806.03884", "Morwani et al., arXiv 2406.17748"


@dataclass(frozen=True)
class Config(AnalysisConfig):
    """Options of the analysis."""

    SMOKE: ClassVar = {"networks": ("perceptron",), "seeds": 1, "examples": 12, "steps": 5}

    networks: tuple[str, ...] = tuple(KERNELS)
    """Which of the networks."""
    seeds: int = 3
    """Random starts."""
    examples: int = 128
    """Images; of text, an eighth as many sequences."""
    steps: int = 50
    """Steps of Adam to the trained network."""
    damping: float = 0.01
    """Of all inverses, in units of the highest eigenvalue of the Gauss-Newton matrix."""


def compute(config: Config, progress: Progress) -> Arrays:
    """By network and state: errors (seeds, weights, approximations, measures), steps (seeds, steps, 3), weights."""
    import jax

    from attnlab.checks import check_names

    check_names("network", config.networks, KERNELS)
    arrays: Arrays = {name: {state: {} for state in STATES} for name in config.networks}
    task = progress.add_task("networks", total=2 * config.seeds * len(config.networks), status="")
    for name in config.networks:
        parts: dict[str, list] = {state: [] for state in STATES}
        for seed in range(config.seed, config.seed + config.seeds):
            for state, (risk, params) in networks(config, name, jax.random.key(seed)).items():
                progress.update(task, status=f"{name}, seed {seed}, {state}")
                parts[state].append(measured(config, name, risk, params))
                progress.advance(task)
        for state in STATES:
            arrays[name][state] = {field: np.stack([part[field] for part in parts[state]]) for field in parts[state][0]}
    return arrays


def networks(config: Config, name: str, key) -> dict:
    """A network at initialisation and trained: its objective and its parameters."""
    import optax

    from attnlab.risks.networks import digits_attention_classes, digits_perceptron, text_model
    from attnlab.training import train

    builders = {
        "perceptron": lambda: digits_perceptron(key, config.examples),
        "attention": lambda: digits_attention_classes(key, config.examples),
        "language": lambda: text_model(key, sequences=config.examples // 8, width=24),
    }
    risk, start = builders[name]()
    trained = train(risk, start, optax.adam(5e-3), key, steps=config.steps, every=config.steps).params
    return {"initial": (risk, start), "trained": (risk, trained)}


def measured(config: Config, name: str, risk, params) -> Arrays:
    """All of one network at one point."""
    import jax

    from attnlab.curvature import eigenpairs, ggn
    from attnlab.curvature.kronecker import approximate, pseudo_gradients, selection_of

    selection = selection_of(params, KERNELS[name])
    found = pseudo_gradients(risk, params, selection)
    whole = ggn(risk, params, block=KERNELS[name], check=False)
    damping = config.damping * float(eigenpairs(whole, jax.random.key(0), count=1).values[-1])
    gradient = selection.take(jax.jit(jax.grad(risk))(params))
    approximations = {kind: approximate(kind, tuple(found.values()), whole.point) for kind in NAMES}
    errors = [of_weight(leaf, found[leaf], approximations, gradient, damping) for leaf in found]
    steps = {kind: each.solve(gradient, damping) for kind, each in approximations.items()}
    steps["exact blocks"] = exact_blocks_step(found, gradient, damping)
    return {
        "weights": np.array(list(found)),
        "errors": np.asarray(errors, float),
        "steps": of_steps(risk, params, selection, whole, gradient, steps, damping),
        "damping": np.asarray(damping),
    }


def of_weight(leaf: str, pseudo, approximations, gradient, damping: float) -> list:
    """Errors of one weight's block, (approximations, measures)."""
    import jax

    from attnlab.curvature import matrix_operator
    from attnlab.curvature.kronecker import KroneckerApproximation, operator_errors

    place = list(gradient).index(leaf)
    point = {leaf: gradient[leaf]}
    exact = matrix_operator(pseudo.second_moment(), point)
    rows = []
    for kind, whole in approximations.items():
        own = KroneckerApproximation((whole.blocks[place],), point, kind)
        step = own.solve(point, damping)
        found = operator_errors(own.operator, exact, step, point, jax.random.key(0), damping=damping)
        rows.append([float(getattr(found, measure).value) for measure in MEASURES])
    return rows


def exact_blocks_step(found, gradient, damping: float):
    """(F + damping)^-1 g with the exact block of every weight."""
    from collections import OrderedDict

    import jax.numpy as jnp

    def one(leaf):
        matrix = found[leaf].second_moment()
        damped = matrix + damping * jnp.eye(len(matrix), dtype=matrix.dtype)
        return jnp.linalg.solve(damped, gradient[leaf].ravel()).reshape(gradient[leaf].shape)

    return OrderedDict((leaf, one(leaf)) for leaf in found)


def of_steps(risk, params, selection, whole, gradient, steps, damping: float) -> np.ndarray:
    """Of each of STEPS: the decrease of the damped quadratic model at the best length, of the whole matrix's; the loss
    after it over that before, at its own length and at the best of LENGTHS."""
    import jax
    import jax.numpy as jnp

    from attnlab.curvature import solve

    flat, start = whole.ravel(gradient), selection.take(params)
    best = solve(whole, gradient, damping=damping, tolerance=1e-8, steps=4000)
    assert best.residual < 1e-6, f"the whole matrix's step has a residual of {best.residual}"
    moved = lambda step, length: jax.tree.map(lambda w, d: w - length * d, start, step)  # noqa: E731
    losses = jax.jit(lambda step: jax.lax.map(lambda length: risk(selection.put(params, moved(step, length))), LENGTHS))
    rows = []
    for kind in STEPS:
        step = best.vector if kind == "whole matrix" else steps[kind]
        direction = whole.ravel(step)
        curvature = direction @ whole.ravel(whole.mv(step)) + damping * direction @ direction
        after = losses(step) / risk(params)
        model = (flat @ direction) ** 2 / curvature / (flat @ whole.ravel(best.vector))
        rows.append([model, after[LENGTHS == 1][0], jnp.min(after)])
    return np.asarray(rows, float)


def kind_of(weight: str) -> str:
    """The weight without its layer."""
    return weight.split("/")[-1]


SHOWN = {f"layer_{number}": f"layer {number + 1}" for number in range(9)} | {"up": "MLP, first", "down": "MLP, second"}
"""What a kind of weight is called in the picture, where not by its own name."""


def by_kind(arrays: Arrays, name: str, state: str, measure: str) -> dict[str, np.ndarray]:
    """Median over seeds and layers, (approximations,), by kind of weight."""
    each = arrays[name][state]
    weights = each["weights"][0]
    values = each["errors"][..., MEASURES.index(measure)]
    groups = dict.fromkeys(kind_of(str(weight)) for weight in weights)
    return {
        kind: np.median(values[:, [kind_of(str(weight)) == kind for weight in weights]], axis=(0, 1)) for kind in groups
    }


def plot(arrays: Arrays, config: Config):
    """The error at the best scale by matrix, at initialisation and trained."""
    from attnlab.plotting.panels import panels

    medians = {state: median_errors(arrays, state) for state in STATES}
    trained = medians["trained"]
    kfac, nearest = trained["kfac"], trained["kfoc"]
    message = f"Trained, K-FAC errs by {kfac:.2f}, the nearest Kronecker product by {nearest:.2f} (medians)"
    note = f"medians over {config.seeds} starts and layers; bold: the best of a row"
    figure, axes = panels(message, STATES, note=note, height=4.6, sharey=True)
    for panel, state in zip(axes, STATES, strict=True):
        image = heat(panel, arrays, state)
    figure.colorbar(image, ax=axes, label=r"error at the best scale, $\min_c \|cK - F\| \,/\, \|F\|$", shrink=0.8)
    return figure


def median_errors(arrays: Arrays, state: str) -> dict[str, float]:
    """Error at the best scale by approximation, median over networks, matrices and starts."""
    errors = [np.concatenate([each[state]["errors"][..., n, 1].ravel() for each in arrays.values()])
              for n in range(len(NAMES))]  # fmt: skip
    return {name: float(np.median(values)) for name, values in zip(NAMES, errors, strict=True)}


def details(arrays: Arrays, config: Config):
    """The damped inverse on the gradient, and the step in all weights."""
    from attnlab.plotting.panels import panels

    kept = np.concatenate([each[state]["steps"][:, 1, 0] for each in arrays.values() for state in STATES])
    message = f"Steps of exact blocks keep {kept.min():.2f} to {kept.max():.2f} of the decrease of the whole matrix"
    note = f"{config.seeds} starts; dots: weights of all networks, bars on the left: their medians, on the right: means"
    figure, axes = panels(message, ("damped inverse on the gradient", "step in all weights"), note=note, height=4.0)
    scatter(axes[0], arrays)
    bars(axes[1], arrays)
    return figure


def heat(panel, arrays: Arrays, state: str):
    """Matrices by approximations, with their numbers."""
    rows = {
        f"{name}: {SHOWN.get(kind, kind)}": values
        for name in arrays
        for kind, values in by_kind(arrays, name, state, "shape").items()
    }
    values = np.array(list(rows.values()))
    image = panel.imshow(values, vmin=0, vmax=1, cmap="magma_r", aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        best = value <= values[row].min() + 0.005
        weight, color = ("bold" if best else "normal"), ("white" if value > 0.45 else "black")
        panel.text(column, row, f"{value:.2f}", ha="center", va="center", color=color, weight=weight, size=7.5)
    panel.set_xticks(range(len(NAMES)), list(NAMES.values()), rotation=90)
    panel.set_yticks(range(len(rows)), list(rows), fontsize=8)
    panel.set_xlabel("approximation")
    return image


def scatter(panel, arrays: Arrays) -> None:
    """Error of the damped inverse on the gradient, each weight of each network and seed."""
    for number in range(len(NAMES)):
        for shift, state in zip((-0.18, 0.18), STATES, strict=True):
            values = np.concatenate([each[state]["errors"][:, :, number, 3].ravel() for each in arrays.values()])
            color = "C0" if state == "initial" else "C1"
            place = number + shift + 0.12 * np.linspace(-1, 1, len(values))
            panel.plot(place, values, ".", color=color, alpha=0.35, markersize=4)
            panel.plot(number + shift, np.median(values), "_", color="black", markersize=16, markeredgewidth=2)
    panel.plot([], [], ".", color="C0", label="initial")
    panel.plot([], [], ".", color="C1", label="trained")
    panel.set_yscale("log")
    panel.set_xticks(range(len(NAMES)), list(NAMES.values()), rotation=90)
    panel.set_ylabel("relative error of $(K + \\delta)^{-1} g$")
    panel.set_xlabel("approximation")
    low, high = panel.get_ylim()
    panel.set_ylim(low, high * (high / low) ** 0.15)  # room for the legend
    panel.legend(loc="upper center", ncols=2)


def bars(panel, arrays: Arrays) -> None:
    """Decrease of the damped model by the step in all weights, of what the whole matrix has."""
    groups = [(name, state) for name in arrays for state in STATES]
    for number, (name, state) in enumerate(groups):
        values = arrays[name][state]["steps"][:, 1:, 0]
        place = np.arange(len(STEPS) - 1) + 0.8 * (number / len(groups) - 0.5)
        look = {"color": f"C{number // 2}", "hatch": (None, "///")[number % 2], "edgecolor": "white", "linewidth": 0.3}
        panel.bar(place, values.mean(axis=0), 0.8 / len(groups), align="edge", label=f"{name}, {state}", **look)
    panel.axhline(1, color="0.4", ls=":")
    panel.set_xticks(range(len(STEPS) - 1), ["exact blocks", *NAMES.values()], rotation=90)
    panel.set_ylabel("decrease / that of the whole matrix")
    panel.set_xlabel("step in all weights, at its best length")
    panel.set_ylim(0, 1.6)
    panel.legend(fontsize=7.5, ncols=2, loc="upper right", columnspacing=0.8, handlelength=1.0)


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """What must hold, and what the papers say."""
    column = list(NAMES).index
    found = []
    for name in config.networks:
        for state in STATES:
            errors = arrays[name][state]["errors"]
            frobenius, best, trace = (errors[..., place] for place in range(3))
            products = frobenius[..., [column(kind) for kind in ("kfac", "shampoo", "shampoo_squared")]]
            over_nearest = np.max(frobenius[..., [column("kfoc")]] - products)
            corrected = np.max(frobenius[..., column("ekfac")] - frobenius[..., column("kfac")])
            kept = np.max(np.abs(trace[..., [column(kind) for kind in ("ekfac", "shampoo_squared", "soap")]]))
            gain = np.median(best[..., column("shampoo_squared")] - best[..., column("shampoo")])
            least = np.min(trace[..., column("shampoo")])
            what, because = f"{name}, {state}: ", "an identity in float64, to rounding"
            found += [
                at_most(what + "error of EKFAC less K-FAC's", corrected, 0, 1e-9, because=because, source=EKFAC),
                at_most(what + "error of the nearest product less other products'", over_nearest, 0, 1e-6,
                        because="to the tolerance of its iteration", source="Van Loan, Pitsianis 1993"),
                equal(what + "error of the trace of EKFAC, SOAP, Shampoo with 1", kept, 0, 1e-9,
                      because=because, source="derived here"),
                at_least(what + "trace of Shampoo with 1/2 over the exact one less 1", least, 0, 1e-9,
                         because="tr L^1/2 >= (tr L)^1/2, to rounding", source="derived here"),
                at_most(what + "error of Shampoo with 1 less that with 1/2, median", gain, 0, source=SQUARE),
            ]  # fmt: skip
    return found


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """Which approximation for which matrix, and the steps."""
    first = Table("network", "matrix", "state", *NAMES.values(), "best", title="Error at the best scale, medians")
    inverse = Table("network", "matrix", "state", *NAMES.values(), "best", title="Error of the inverse on g, medians")
    for table, measure in ((first, "shape"), (inverse, "inverse")):
        for name in config.networks:
            for state in STATES:
                for kind, values in by_kind(arrays, name, state, measure).items():
                    best = list(NAMES.values())[int(np.argmin(values))]
                    table.add_row(name, kind, state, *(f"{value:.2f}" for value in values), best)
    names = (*STEPS[:2], *NAMES.values())
    whole = Table("network", "state", "measure", *names, title="The step of all weights, medians")
    for name in config.networks:
        for state in STATES:
            for number, measure in enumerate(STEP_MEASURES):
                values = np.median(arrays[name][state]["steps"][..., number], axis=0)
                whole.add_row(name, state, measure, *(f"{value:.2f}" for value in values))
    frobenius = Table("network", "state", "measure", *NAMES.values(), title="Own scale, medians over weights and seeds")
    for name in config.networks:
        for state in STATES:
            for measure in ("frobenius", "trace"):
                values = np.median(arrays[name][state]["errors"][..., MEASURES.index(measure)], axis=(0, 1))
                frobenius.add_row(name, state, measure, *(f"{value:.2f}" for value in values))
    return [first, inverse, whole, frobenius]


ANALYSIS = Analysis("kronecker-quality", Config, compute, plot, tables, findings, __doc__, slow=True, details=details)

if __name__ == "__main__":
    ANALYSIS.main()
