"""Time and memory of Hessian spectra as the model, the batch and the number of Lanczos steps grow.

A small language model: seconds of a spectral density and of the highest eigenpairs by measurement, memory
beyond weights and data from the compiled program, each beside what one gradient takes on the same model and batch.
"""

import time
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from rich.progress import Progress
from rich.table import Table

from attnlab.analysis import Analysis, Arrays, SinglePrecisionConfig
from attnlab.expectation import Expectation, at_most

SWEEPS = {"width": "parameters", "batch": "sequences in the batch", "steps": "Lanczos steps"}
METHODS = {"gradient": "gradient", "density": "spectral density, one probe", "top": "highest eigenpairs"}
COLUMNS = (*SWEEPS, *(f"{method} {what}" for method in METHODS for what in ("seconds", "bytes")), "products")


@dataclass(frozen=True)
class Config(SinglePrecisionConfig):
    """Options of the analysis."""

    SMOKE: ClassVar = {"width": (4,), "batch": (1,), "steps": (2,), "layers": 1, "length": 4, "vocabulary": 8}

    width: tuple[int, ...] = (32, 64, 96, 128, 192, 256)
    """Widths of the model; the middle one holds where the others grow."""
    batch: tuple[int, ...] = (2, 4, 8, 16, 32)
    """Sequences in the batch."""
    steps: tuple[int, ...] = (8, 16, 32, 64, 128)
    """Lanczos steps of a density."""
    layers: int = 2
    """Blocks of the model."""
    length: int = 64
    """Tokens of a sequence."""
    vocabulary: int = 512
    """Different tokens."""
    count: int = 5
    """Eigenpairs, to a residual of a hundredth of the largest eigenvalue."""
    repeats: int = 3
    """Measurements, of which the median counts."""


def compute(config: Config, progress: Progress) -> Arrays:
    """Rows of `COLUMNS` for each sweep."""
    sizes = {name: getattr(config, name) for name in SWEEPS}
    points = [{**middles(config), name: size} for name in SWEEPS for size in sizes[name]]
    task = progress.add_task("sizes", total=len(points), status="")
    found: dict[tuple, list[float]] = {}  # the middles are in all three sweeps
    for point in points:
        progress.update(task, status=", ".join(f"{name} {size}" for name, size in point.items()))
        if tuple(point.values()) not in found:
            found[tuple(point.values())] = costs(config, **point)
        progress.advance(task)
    rows = [found[tuple(point.values())] for point in points]
    ends = np.cumsum([len(size) for size in sizes.values()])
    return dict(zip(SWEEPS, np.split(np.array(rows), ends[:-1]), strict=True))


def middles(config: Config) -> dict[str, int]:
    """The sizes at which all but one stay."""
    return {name: getattr(config, name)[len(getattr(config, name)) // 2] for name in SWEEPS}


def costs(config: Config, width: int, batch: int, steps: int) -> list[float]:
    """The sizes, then seconds and bytes of each method, and how many products the eigenpairs took."""
    import jax

    from attnlab.curvature import eigenpairs, hessian, spectral_density
    from attnlab.trees import dimension

    risk, params = problem(config, width, batch)
    key, operator = jax.random.key(config.seed), hessian(risk, params)
    saved = sum(leaf.nbytes for leaf in jax.tree.leaves(operator.linear))
    *gradient, _ = measured(config, lambda risk, params: jax.grad(risk)(params), risk, params)
    *density, _ = measured(config, lambda a: spectral_density(a, key, samples=1, steps=steps).nodes, operator)
    *top, pairs = measured(config, lambda a: eigenpairs(a, key, config.count, tolerance=1e-2), operator)
    density[1], top[1] = density[1] + saved, top[1] + saved
    return [dimension(params), batch, steps, *gradient, *density, *top, int(pairs.products)]


def measured(config: Config, function, *arguments) -> tuple:
    """Median seconds of a compiled function, the bytes of its temporary arrays, and what it returned."""
    import jax

    program = jax.jit(function).lower(*arguments).compile()
    value = jax.block_until_ready(program(*arguments))
    seconds = []
    for _ in range(config.repeats):
        began = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds)), float(program.memory_analysis().temp_size_in_bytes), value


def problem(config: Config, width: int, batch: int):
    """A causal language model with random weights, on random tokens."""
    import jax

    from attnlab.losses import cross_entropy
    from attnlab.models.adapters import from_linen
    from attnlab.models.attention import AttentionConfig
    from attnlab.models.transformer import LanguageModel, LanguageModelConfig, TransformerConfig
    from attnlab.objectives import objective

    heads = AttentionConfig(width // 4, width // 4, heads=4, causal=True, output_dim=width)
    blocks = TransformerConfig(heads, config.layers, mlp_width=4 * width, bias=True, final_norm=True)
    model = LanguageModel(LanguageModelConfig(blocks, config.vocabulary, config.length, width, dtype=config.dtype))
    data_key, init_key = jax.random.split(jax.random.key(config.seed))
    tokens = jax.random.randint(data_key, (batch, config.length + 1), 0, config.vocabulary)
    params = jax.jit(model.init)(init_key, tokens[:, :-1])["params"]
    return objective(from_linen(model), cross_entropy, tokens[:, :-1], tokens[:, 1:]), params


def plot(arrays: Arrays, config: Config):
    """Above seconds, below memory, against the parameters and against the Lanczos steps."""
    from attnlab.plotting.panels import legend_below, panels

    step = f"a Lanczos step costs {products(arrays):.2g} gradients (median)"
    figure, axes = panels(
        f"Spectra at a gradient's price: {step}", titles(config, ("width", "steps")), note=note(config)
    )
    draw_sweeps(axes, arrays, config, ("width", "steps"))
    legend_below(figure, axes[0], columns=3)
    return figure


def details(arrays: Arrays, config: Config):
    """The same against the batch."""
    from attnlab.plotting.panels import legend_below, panels

    table = dict(zip(COLUMNS, arrays["batch"].T, strict=True))
    growth = table["density bytes"][-1] / table["density bytes"][0]
    message = f"A batch {table['batch'][-1] / table['batch'][0]:.0f} times as large takes {growth:.1f} times the memory"
    figure, axes = panels(message, titles(config, ("batch",)), note=note(config))
    draw_sweeps(axes, arrays, config, ("batch",))
    legend_below(figure, axes[0], columns=3)
    return figure


def note(config: Config) -> str:
    return (
        f"medians of {config.repeats} timings on one machine; memory: of the compiled program, beyond weights and data"
    )


def titles(config: Config, names: tuple[str, ...]) -> list[str]:
    """Of the panels of sweeps: what is measured, and what is held."""
    held = {
        name: ", ".join(f"{other} {size}" for other, size in middles(config).items() if other != name) for name in names
    }
    return [f"{what}: {held[name]}" for what in ("time", "memory") for name in names]


def draw_sweeps(axes, arrays: Arrays, config: Config, names: tuple[str, ...]) -> None:
    """One column a sweep: seconds above, mebibytes below (side by side where there is one sweep)."""
    for column, name in enumerate(names):
        table = dict(zip(COLUMNS, arrays[name].T, strict=True))
        for row, (what, unit, label) in enumerate((("seconds", 1, "seconds"), ("bytes", 2**20, "MiB"))):
            panel = axes[row * len(names) + column]
            for number, (method, caption) in enumerate(METHODS.items()):
                look = {"color": f"C{number}", "marker": "os^"[number], "label": caption}
                panel.loglog(table[name], table[f"{method} {what}"] / unit, **look)
            panel.set(xlabel=SWEEPS[name], ylabel=label)
            if name != "width":
                panel.set_xticks(table[name], [f"{size:.0f}" for size in table[name]])
                panel.minorticks_off()


def products(arrays: Arrays) -> float:
    """Median seconds of a Lanczos step over those of a gradient, over the widths."""
    widths = dict(zip(COLUMNS, arrays["width"].T, strict=True))
    return float(np.median(widths["density seconds"] / widths["steps"] / widths["gradient seconds"]))


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """What a Lanczos step costs in gradients, and how time and memory grow with the steps."""
    table = dict(zip(COLUMNS, arrays["steps"].T, strict=True))
    source, clock = "a product is a derivative of a gradient", "a clock on a machine that others use as well"
    found = [
        at_most(
            "median seconds of a Lanczos step over those of a gradient",
            products(arrays),
            6.0,
            because=clock,
            source=source,
        )
    ]
    if len(table["steps"]) > 2:
        slope = np.polyfit(np.log(table["steps"][-3:]), np.log(table["density seconds"][-3:]), 1)[0]
        found.append(at_most("power of the Lanczos steps in the seconds", slope, 1.4, because=clock, source=source))
    return found


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """The numbers of the figure."""
    found = []
    for name, label in SWEEPS.items():
        heads = [f"{method}, {unit}" for method in METHODS for unit in ("s", "MiB")]
        table = Table(label, *heads, "products of the eigenpairs")
        for row in arrays[name]:
            size, values = row[list(SWEEPS).index(name)], row[len(SWEEPS) : -1]
            cells = [f"{value / (2**20 if i % 2 else 1):.3g}" for i, value in enumerate(values)]
            table.add_row(f"{int(size):,}", *cells, str(int(row[-1])))
        found.append(table)
    return found


ANALYSIS = Analysis("curvature-cost", Config, compute, plot, tables, findings, __doc__, slow=True, details=details)

if __name__ == "__main__":
    ANALYSIS.main()
