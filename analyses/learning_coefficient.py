"""How degenerate a minimum is: learning coefficients sampled, in closed form, and along the staircase of one layer.

Products of powers and of matrices, whose coefficients are known, against chains at finite n; what the Hessian alone
would say; how often the error bars cover, by sampler; and one layer of linear attention that learns rank after rank.
"""

import warnings
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from rich.progress import Progress
from rich.table import Table

from attnlab.analysis import Analysis, AnalysisConfig, Arrays
from attnlab.expectation import Expectation, at_least, at_most

CROSSINGS = {"w": (1,), "u v": (1, 1), "u v²": (1, 2), "t u v": (1, 1, 1)}
"""Exponents k of prod w_i^(2 k_i), by what is squared."""
PRODUCTS = (
    ((3, 4), 2), ((2, 2, 2), 0), ((2, 2, 2), 1), ((2, 2, 2), 2), ((3, 2, 3), 0), ((3, 2, 3), 1), ((3, 2, 3), 2),
    ((4, 3, 4), 1), ((2, 2, 2, 2), 0), ((2, 2, 2, 2), 1), ((3, 2, 2, 3), 1), ((3, 1, 2), 0),
)  # fmt: skip
"""Widths and rank of the truth."""
WAYS = {"HMC": ("hmc", None), "MALA": ("mala", None), "SGLD": ("sgld", None), "SGLD, batches": ("controlled_sgld", 32)}
SPECTRUM = (4.0, 2.0, 1.0, 0.5)


@dataclass(frozen=True)
class Config(AnalysisConfig):
    """Options of the analysis."""

    SMOKE: ClassVar = {"seeds": 2, "coverage": 2, "steps": 64, "counts": (100, 1000), "products": 2, "times": 3}

    seeds: int = 3
    """How many seeds; the first has the number `--seed`."""
    counts: tuple[int, ...] = (100, 1000, 10_000, 100_000, 1_000_000)
    """Numbers of examples n."""
    products: int = len(PRODUCTS)
    """How many of the products of matrices."""
    coverage: int = 100
    """Runs that the error bars are held against, for each sampler."""
    steps: int = 4096
    """Steps that are kept of each of four chains; a quarter of it for the coverage."""
    times: int = 32
    """Moments of the staircase."""
    staircase_count: int = 1000
    """n of the staircase."""
    staircase_localization: float = 3000.0
    """gamma of the staircase: it holds the chains at the saddles."""


def compute(config: Config, progress: Progress) -> Arrays:
    """All four parts."""
    arrays = {}
    parts = {"crossings": crossings, "products": products, "coverage": coverage, "staircase": staircase}
    task = progress.add_task("parts", total=len(parts), status="")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # tiny runs, and chains at saddles, are not to be trusted
        for name, part in parts.items():
            progress.update(task, status=name)
            arrays[name] = part(config)
            progress.advance(task)
    return arrays


def keys(config: Config):
    import jax

    return [jax.random.key(seed) for seed in range(config.seed, config.seed + config.seeds)]


def crossings(config: Config) -> Arrays:
    """Values and errors (crossings, counts, seeds), quadrature (crossings, counts), limits and first-order laws."""
    from attnlab.degeneracy.estimate import learning_coefficient
    from attnlab.degeneracy.exact import normal_crossing
    from attnlab.degeneracy.quadrature import crossing_energy
    from attnlab.risks.degenerate import crossing_risk

    found = []
    for exponents in CROSSINGS.values():
        risk, origin = crossing_risk(exponents)
        found.append([
            [learning_coefficient(risk, origin, key, count=n, steps=config.steps).estimate for key in keys(config)]
            for n in config.counts
        ])  # fmt: skip
    scales = [n / np.log(n) for n in config.counts]
    fine = np.geomspace(scales[0], scales[-1], 40)
    return {
        "found": np.array(found),
        "exact": [[crossing_energy(exponents, scale) for scale in scales] for exponents in CROSSINGS.values()],
        "scales": scales,
        "fine": fine,
        "curve": [[crossing_energy(exponents, scale) for scale in fine] for exponents in CROSSINGS.values()],
        "limit": [normal_crossing(exponents).value for exponents in CROSSINGS.values()],
    }


def products(config: Config) -> Arrays:
    """Of each product of matrices, turned at random: sampled at n = 1e6 (products, seeds, 2), the exact coefficient to
    first order in 1 / log n, the limit, half the rank of the Hessian, and half the number of parameters."""
    from attnlab.degeneracy.estimate import learning_coefficient
    from attnlab.degeneracy.exact import deep_linear
    from attnlab.degeneracy.laplace import laplace
    from attnlab.risks.degenerate import deep_linear_risk, turned

    count = 10**6
    scale, found, exact, limits, ranks, halves = count / np.log(count), [], [], [], [], []
    for widths, rank in PRODUCTS[: config.products]:
        risk, params = deep_linear_risk(widths, rank)
        law = deep_linear(widths, rank)
        exact.append(law.at(np.log(scale / (widths[0] * widths[-1]))))
        limits.append(law.value)
        ranks.append(half_rank(laplace(risk, params, scale).eigenvalues))
        sampled = []
        for key in keys(config):
            moved_risk, moved = turned(key, risk, params)
            sampled.append(learning_coefficient(moved_risk, moved, key, count=count, steps=config.steps).estimate)
        found.append(sampled)
        halves.append(moved.size / 2)
    return {"found": np.array(found), "exact": exact, "limit": limits, "half_rank": ranks, "half_parameters": halves}


def half_rank(eigenvalues) -> float:
    """Half the number of eigenvalues above rounding."""
    return float(np.sum(np.asarray(eigenvalues) > 1e-8)) / 2


def linear(weights, inputs):
    return inputs @ weights


def coverage(config: Config) -> Arrays:
    """Whether 95 % intervals cover (ways, problems, runs), and the distances in errors: regression in five dimensions
    with fresh noisy data against 5/2, and the product 2 x 2 x 2 at its origin against quadrature."""
    import jax
    import jax.numpy as jnp

    from attnlab.degeneracy.estimate import learning_coefficient
    from attnlab.degeneracy.quadrature import two_layer_energy
    from attnlab.losses import square_loss
    from attnlab.objectives import objective
    from attnlab.risks.degenerate import deep_linear_risk

    count = 1000
    scale, steps = count / np.log(count), max(config.steps // 4, 64)
    product, origin = deep_linear_risk((2, 2, 2))
    exact = two_layer_energy(2, 2, 2, scale / 4)
    inside, distances = [], []
    for sampler, batch in WAYS.values():
        results = []
        for run in range(config.coverage):
            key = jax.random.key(1000 * config.seed + run)
            input_key, noise_key = jax.random.split(key)
            inputs = jax.random.normal(input_key, (count, 5))
            targets = inputs.sum(axis=1) + jax.random.normal(noise_key, (count,))
            risk = objective(linear, square_loss, inputs, targets)
            best = jnp.linalg.lstsq(inputs, targets)[0]
            one = learning_coefficient(risk, best, key, sampler=sampler, batch=batch, steps=steps).estimate
            row = [judged(one, 2.5)]
            if batch is None:
                other = learning_coefficient(product, origin, key, count=count, sampler=sampler, steps=steps).estimate
                row.append(judged(other, exact))
            else:
                row.append((np.nan, np.nan))
            results.append(row)
        both = np.array(results)  # (runs, problems, 2)
        inside.append(both[..., 0].T)
        distances.append(both[..., 1].T)
    return {"inside": np.array(inside), "distances": np.array(distances)}


def judged(found, exact: float) -> tuple[float, float]:
    """Whether the interval covers, and the distance in errors."""
    low, high = found.interval()
    return float(low <= exact <= high), float((found.value - exact) / found.error)


def staircase(config: Config) -> Arrays:
    """Along gradient flow of four heads from small random starts: risks, coefficients with errors, those of the
    quadratic form, all (seeds, times); and the risks of the best layers of rank 0 to 4."""
    import jax
    import jax.numpy as jnp

    from attnlab.degeneracy.estimate import learning_coefficient
    from attnlab.degeneracy.laplace import laplace
    from attnlab.dynamics.flows import gradient_flow
    from attnlab.icl.optima import adapted_risks
    from attnlab.icl.population import population_objective
    from attnlab.icl.tasks import linear_regression

    problem = linear_regression(jnp.diag(jnp.array(SPECTRUM)))
    risk = population_objective(problem, 31, "rank_one")
    times = np.concatenate([[0.0], np.geomspace(0.1, 2000.0 if config.times > 3 else 1.0, config.times - 1)])
    n, gamma = config.staircase_count, config.staircase_localization
    shapes = (("value", (4,)), ("key", (4, 4)), ("query", (4, 4)))
    risks, found, quadratic = [], [], []
    for key in keys(config):
        drawn = zip(jax.random.split(key, 3), shapes, strict=True)
        start = {name: 0.1 * jax.random.normal(part, shape) for part, (name, shape) in drawn}
        path = gradient_flow(risk, start, times)
        points = [jax.tree.map(lambda leaf, i=i: leaf[i], path) for i in range(len(times))]
        risks.append(jax.vmap(risk)(path))
        options = {"count": n, "localization": gamma, "steps": max(config.steps // 4, 64)}
        found.append([learning_coefficient(risk, point, key, **options).estimate for point in points])
        quadratic.append([laplace(risk, point, n / np.log(n), gamma).coefficient for point in points])
    return {
        "times": times,
        "risks": np.array(risks),
        "found": np.array(found),
        "quadratic": np.array(quadratic),
        "plateaus": np.asarray(adapted_risks(problem, 31)),
    }


def rests(arrays: Arrays) -> list[np.ndarray]:
    """For each rank 0 to 4 the (seed, time) at which the risk is within 1 % of the best of that rank."""
    part = arrays["staircase"]
    return [np.abs(part["risks"] / plateau - 1) < 0.01 for plateau in part["plateaus"]]


def plot(arrays: Arrays, config: Config):
    """The four parts, a panel each."""
    from attnlab.plotting.panels import panels

    away, multiplied, levels = distances(arrays), arrays["products"], levels_at_rest(arrays)
    worst = np.max(np.abs(multiplied["found"][..., 0] / multiplied["exact"][:, None] - 1))
    missed = np.max(multiplied["exact"] - multiplied["half_rank"])
    shares = 100 * np.mean(arrays["coverage"]["inside"], axis=-1)
    steps = ", ".join(f"{np.median(values):.1f}" for values in levels.values()) or "none reached"
    message = f"Coefficients sampled within {100 * worst:.0f} % of exact; half the Hessian's rank is {missed:.1f} off"
    titles = [
        f"crossings: rms {np.sqrt(np.mean(away**2)):.2f} errors from integrals",
        f"products of matrices: within {100 * worst:.0f} %",
        f"95 % intervals cover {np.nanmin(shares):.0f} to {np.nanmax(shares):.0f} %",
        f"one layer at rest: {steps}",
    ]
    note = f"{config.seeds} seeds; bars: (a), (b) two errors, (d) range; grey: 95 % of chance, {config.coverage} runs"
    figure, axes = panels(message, titles, note=note, height=2.9)
    plot_crossings(axes[0], arrays["crossings"])
    plot_products(axes[1], multiplied)
    plot_coverage(axes[2], arrays["coverage"])
    plot_rest(axes[3], arrays, levels)
    return figure


def distances(arrays: Arrays) -> np.ndarray:
    """Of the sampled coefficients of crossings from quadrature, in their errors."""
    part = arrays["crossings"]
    return (part["found"][..., 0] - np.array(part["exact"])[..., None]) / part["found"][..., 1]


def levels_at_rest(arrays: Arrays) -> dict[int, np.ndarray]:
    """The sampled coefficients at rest at each rank from 1, where the flow rested there."""
    values = arrays["staircase"]["found"][..., 0]
    return {rank: values[at] for rank, at in enumerate(rests(arrays)) if rank and at.any()}


def plot_crossings(axes, part: Arrays) -> None:
    """Estimates beside quadrature, at finite n, and the limits."""
    for number, name in enumerate(CROSSINGS):
        axes.plot(part["fine"], part["curve"][number], color=f"C{number}", lw=1.2)
        values, errors = part["found"][number, ..., 0], part["found"][number, ..., 1]
        for seed in range(values.shape[1]):
            offsets = np.array(part["scales"]) * 1.12 ** (seed - (values.shape[1] - 1) / 2)
            label = f"({name})²".replace("(w)", "w") if seed == 0 else None
            look = {"fmt": "os^D"[number], "ms": 3, "lw": 1, "color": f"C{number}", "label": label}
            axes.errorbar(offsets, values[:, seed], 2 * errors[:, seed], **look)
    for number, limit in enumerate(sorted(set(np.array(part["limit"]).tolist()))):
        axes.axhline(limit, color="black", ls=":", lw=0.8, label=None if number else "limit")
    axes.set_xscale("log")
    axes.set(xlabel=r"inverse temperature $n\beta$", ylabel=r"coefficient $\hat\lambda$", ylim=(0, 0.62))
    axes.legend(loc="lower right", ncols=3, columnspacing=0.8, handletextpad=0.3)


def plot_products(axes, part: Arrays) -> None:
    """Estimates over the exact coefficients, with what the Hessian and the number of parameters would say."""
    exact = part["exact"]
    top = 1.1 * max(part["half_parameters"])
    axes.plot([0, top], [0, top], ":", color="black", lw=1, label="exact")
    values, errors = part["found"][..., 0], part["found"][..., 1]
    axes.plot(exact, part["half_parameters"], "x", color="C3", label="half the parameters")
    axes.plot(exact, part["half_rank"], "v", color="C1", mfc="none", ms=5, label="half the Hessian's rank")
    for seed in range(values.shape[1]):
        look = {"fmt": "o", "ms": 3, "color": "C0", "label": None if seed else "sampled"}
        axes.errorbar(exact, values[:, seed], 2 * errors[:, seed], **look)
    axes.set(xlabel=r"exact $\lambda - (m-1)/\log n\beta$ (Aoyagi)", ylabel="estimate", xlim=(0, 1.15 * max(exact)))
    axes.legend(loc="upper left", fontsize=7.5)


def plot_coverage(axes, part: Arrays) -> None:
    """How often intervals of each sampler hold the exact value, and what chance would make of 95 %."""
    shares, chance = np.mean(part["inside"], axis=-1), 1.96 * np.sqrt(0.95 * 0.05 / part["inside"].shape[-1])
    for number, name in enumerate(("regression, fresh data", "2 × 2 × 2 at its origin")):
        places = np.arange(len(WAYS)) + 0.24 * number - 0.12
        axes.plot(100 * shares[:, number], places, "os"[number], color=f"C{number}", label=name)
    axes.axvspan(100 * (0.95 - chance), min(100, 100 * (0.95 + chance)), color="0.9", zorder=0)
    axes.axvline(95, color="black", ls=":", lw=1)
    axes.set_yticks(range(len(WAYS)), list(WAYS))
    axes.set(xlim=(78, 101), ylim=(len(WAYS) + 0.8, -0.5), xlabel="runs whose interval covers, %")
    axes.legend(loc="lower left", fontsize=7.5)


def plot_rest(axes, arrays: Arrays, levels: dict[int, np.ndarray]) -> None:
    """Medians and ranges of the coefficient at rest at each rank, sampled and of the quadratic form."""
    for rank, values in levels.items():
        quadratic = arrays["staircase"]["quadratic"][rests(arrays)[rank]]
        for each, color, marker in ((values, "C0", "o"), (quadratic, "C1", "v")):
            place = rank + (0.08 if marker == "v" else -0.08)
            axes.vlines(place, each.min(), each.max(), color=color, lw=1)
            axes.plot(place, np.median(each), marker, color=color)
    axes.plot([], [], "o", color="C0", label="sampled")
    axes.plot([], [], "v", color="C1", label="of the Hessian's quadratic form")
    axes.set(xlabel="rank learned so far", ylabel=r"coefficient $\hat\lambda$", xlim=(0.5, 4.5), xticks=range(1, 5))
    axes.legend(loc="lower right")


def details(arrays: Arrays, config: Config):
    """The staircase in time: the risk, and the coefficient at each moment."""
    from attnlab.plotting.panels import panels

    part = arrays["staircase"]
    times = np.maximum(part["times"], 0.05)
    note = "dots: sampled, bars: two errors, cut off below; lines: the Hessian's quadratic form; colours: seeds"
    levels = [np.median(values) for values in levels_at_rest(arrays).values()]
    climbs = f" climbs from {levels[0]:.2f} to {levels[-1]:.2f}" if levels else " along training"
    message = f"As linear attention learns rank after rank its learning coefficient{climbs}"
    figure, (risk, coefficient) = panels(message, ["risk along gradient flow", "learning coefficient"], note=note)
    for seed in range(len(part["risks"])):
        values, errors = part["found"][seed, :, 0], part["found"][seed, :, 1]
        risk.plot(
            times,
            part["risks"][seed],
            ("-", "--", "-.")[seed % 3],
            color=f"C{seed}",
            label=f"seed {seed + config.seed}",
        )
        coefficient.plot(times, part["quadratic"][seed], color=f"C{seed}", lw=0.8)
        coefficient.errorbar(times, values, 2 * errors, fmt="os^"[seed % 3], ms=3, lw=0.7, color=f"C{seed}")
    for rank, plateau in enumerate(part["plateaus"]):
        risk.axhline(plateau, color="black", ls=":", lw=0.8)
        risk.text(times[-1], plateau, f"rank {rank}", ha="right", va="bottom", fontsize=7.5)
    risk.set(xscale="log", xlabel="time of gradient flow", ylabel="risk")
    coefficient.set(xscale="log", xlabel="time of gradient flow", ylabel=r"coefficient $\hat\lambda$", ylim=(-3, 4))
    risk.legend(loc="center right", bbox_to_anchor=(1, 0.72))
    return figure


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """How far sampling is from what is exact, how often its bars cover, and whether the steps show."""
    multiplied, z = arrays["products"], distances(arrays)
    off = multiplied["found"][..., 0].mean(axis=1) - multiplied["exact"]
    missed = np.max(multiplied["exact"] - multiplied["half_rank"])
    lau, aoyagi = "Lau et al., arXiv 2308.12108", "Aoyagi 2024, Neural Networks 172, 106132"
    found = [
        at_most("crossings: rms distance from the integral, in errors", np.sqrt(np.mean(z**2)), 1.5, source=lau),
        at_most("products: largest distance from the formula", np.max(np.abs(off)), 0.15, source=aoyagi,
                because="the next order in 1 / log n, and what gamma = 1 takes"),
        at_least("products: most that half the rank of the Hessian misses", missed, 0.4, source="Laplace's method"),
    ]  # fmt: skip
    shares = np.mean(arrays["coverage"]["inside"], axis=-1)
    for name, share in zip(WAYS, shares, strict=True):
        because, what = "the chance error of a hundred runs is 2 %", f"coverage of 95 % intervals, {name}"
        found.append(at_least(what, np.nanmin(share), 0.95, 0.06, because=because, source=lau))
    levels = [np.median(values) for values in levels_at_rest(arrays).values()]
    if len(levels) > 1:
        source = "Zhang, Singh, Latham, Saxe, arXiv 2501.16265, for the plateaus"
        found.append(at_least("staircase: least rise from rank to rank", np.min(np.diff(levels)), 0.3, source=source))
    return found


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """Products, coverage, and the coefficient at rest at each rank."""
    first = Table("widths", "rank", "λ", "with (m - 1)/log", "sampled", "half rank H", "half d", title="Products")
    part = arrays["products"]
    rows = zip(part["limit"], part["exact"], part["found"], part["half_rank"], part["half_parameters"], strict=True)
    for (widths, rank), (limit, exact, found, half, parameters) in zip(PRODUCTS, rows, strict=False):
        sampled = ", ".join(f"{value:.3f} ± {error:.3f}" for value, error in found)
        first.add_row(
            " ".join(map(str, widths)), str(rank), f"{limit:g}", f"{exact:.3f}", sampled, f"{half:g}", f"{parameters:g}"
        )
    second = Table("sampler", "regression", "rms errors", "2 x 2 x 2", "rms errors", title="Coverage of 95 % intervals")
    for name, inside, distances in zip(WAYS, *arrays["coverage"].values(), strict=True):
        cells = [(f"{np.mean(i):.2f}", f"{np.sqrt(np.mean(z**2)):.2f}") for i, z in zip(inside, distances, strict=True)]
        second.add_row(name, *cells[0], *cells[1])
    third = Table("rank", "moments at rest", "λ sampled, median", "of the quadratic form", title="Staircase")
    part = arrays["staircase"]
    for rank, at in enumerate(rests(arrays)):
        both = (part["found"][..., 0], part["quadratic"])
        medians = (f"{np.median(values[at]):.2f}" if at.any() else "" for values in both)
        third.add_row(str(rank), str(int(at.sum())), *medians)
    return [first, second, third]


ANALYSIS = Analysis(
    "learning-coefficient", Config, compute, plot, tables, findings, __doc__, slow=True, details=details
)

if __name__ == "__main__":
    ANALYSIS.main()
