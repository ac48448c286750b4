"""Pictures of results: every function draws on `axes` (its own, if none are given) and returns them.

`import attnlab as al` and `al.plot.density(...)`. They take what the front door returns, have the look of attnlab's own
figures (`with al.plot.style():` for all of yours), and leave saving, titles and arrangement to matplotlib:

    figure, axes = plt.subplots(1, 2)
    al.plot.density(density, axes=axes[0])
    al.plot.training(run, axes=axes[1])
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from attnlab.attention import AttentionHessian
from attnlab.attention.blocks import PARTS as ATTENTION_PARTS
from attnlab.attention.blocks import Part
from attnlab.checks import check_range, unknown_name
from attnlab.curvature import Eigenpairs, Operator, SpectralDensity
from attnlab.margin import RegularizationPath, attention_matrix, correlation
from attnlab.plotting.curves import density_on_logarithm, range_band
from attnlab.plotting.matrices import block_grid, signed_spectrum
from attnlab.plotting.style import BLOCKS, PALETTE, PARTS, style
from attnlab.training import Records, Trajectory, load_records
from attnlab.trees import block_slices

__all__ = ["block_norms", "blocks", "density", "margin_path", "spectrum", "style", "training"]

Run = Trajectory | Records | Path | str
"""A finished run, its records, or the directory of a run, which may still go on."""


def density(
    result: SpectralDensity, *, axes: Axes | None = None, width: float | None = None, label: str | None = None
) -> Axes:
    """A spectral density, with a band of two standard errors over its samples, on a logarithmic axis.

    `width` is the standard deviation of the smoothing, in units of the eigenvalues; by default a hundredth of their
    range. What lies more than five decades below the peak is cut off.

    Raises `TypeError` for another kind of result.
    """
    _check_kind("result", result, SpectralDensity, "al.spectral_density(operator, key)")
    axes = _axes(axes)
    grid, (mean, error) = result.smooth(width)
    density_on_logarithm(
        axes, *(np.asarray(part, float) for part in (grid, mean, error)), color=_next_color(axes), label=label
    )
    axes.set(xlabel="eigenvalue", ylabel="density of eigenvalues")
    return axes


def spectrum(
    values: Eigenpairs | jax.Array | np.ndarray, *, axes: Axes | None = None, label: str | None = None
) -> Axes:
    """Magnitudes of eigenvalues by rank, on a logarithmic axis: positive ones as dots, negative ones as open triangles.

    `values` are `Eigenpairs` (their residuals are then drawn as a floor where they exceed a value) or the eigenvalues
    themselves. Raises `ValueError` for an array that is not flat.
    """
    axes = _axes(axes)
    found = np.asarray(values.values if isinstance(values, Eigenpairs) else values, float)
    if found.ndim != 1:
        raise ValueError(f"values has shape {found.shape}; expected (n,), such as jnp.linalg.eigvalsh(matrix).")
    color = _next_color(axes)
    signed_spectrum(axes, found, color, label or "")
    if isinstance(values, Eigenpairs) and np.any(np.asarray(values.residuals) > np.abs(found)):
        axes.axhline(float(np.max(np.asarray(values.residuals))), color=color, linestyle=":", linewidth=1)
    axes.set(xlabel="rank by magnitude", ylabel="|eigenvalue|")
    return axes


def blocks(
    result: Operator | AttentionHessian, part: Part = "hessian", *, axes: Axes | None = None, decades: float = 6.0
) -> Axes:
    """The matrix itself, log10 of its entries' magnitudes, with lines between the blocks of its parameters.

    `part` is of an `AttentionHessian` alone: `hessian`, `ggn` or `functional`. The colours span so many `decades` below
    the largest entry. The matrix is formed: `ValueError` where it would take more than 4 GiB.
    """
    check_range("decades", decades, 1e-3, np.inf, "It is how far below the largest entry colours reach.")
    operator = result.operator(part) if isinstance(result, AttentionHessian) else result
    _check_kind("result", operator, Operator, "al.hessian(risk, params)")
    matrix = np.asarray(operator.dense(), float)
    largest = np.log10(np.abs(matrix).max() or 1.0)
    sizes = {name: cut.stop - cut.start for name, cut in block_slices(operator.point).items()}
    axes = _axes(axes)
    labels = {name: BLOCKS[name][2] if name in BLOCKS else name for name in sizes}
    image = block_grid(axes, matrix, sizes, (largest - decades, largest), labels)
    axes.figure.colorbar(image, ax=axes, label="$\\log_{10}$ |entry|", shrink=0.8)
    return axes


def block_norms(result: AttentionHessian, *, axes: Axes | None = None) -> Axes:
    """Frobenius norms of the blocks of an attention layer's H, H_o (Gauss-Newton) and H_f (functional).

    One row a pair of parameters, largest first; a block that is exactly zero has no mark.
    """
    _check_kind("result", result, AttentionHessian, "al.attention_hessian(risk, params)")
    norms = {part: {pair: float(norm) for pair, norm in found.items()} for part, found in result.norms().items()}
    pairs = sorted(result.ggn, key=lambda pair: norms["hessian"][pair])
    axes = _axes(axes)
    for part in ATTENTION_PARTS:
        color, marker, symbol = PARTS[part]
        shown = [(norms[part][pair], row) for row, pair in enumerate(pairs) if norms[part][pair] > 0]
        filled = {"markerfacecolor": "none", "markersize": 8} if part == "hessian" else {"markersize": 5}
        axes.plot(*zip(*shown, strict=True), marker, color=color, label=symbol, **filled)
    axes.set(xscale="log", xlabel="Frobenius norm of the block", yticks=range(len(pairs)))
    axes.set_yticklabels([", ".join(BLOCKS[name][2] if name in BLOCKS else name for name in pair) for pair in pairs])
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    return axes


def training(run: Run, what: str = "loss", *, axes: Axes | None = None, label: str | None = None) -> Axes:
    """A quantity of a training run against the step: the loss, or what a probe measured.

    `what` is `loss` or the path of a probe's value, such as `edge/ratio`. Of an ensemble, the median over the members
    and their range. Quantities that are positive throughout get a logarithmic axis; a ratio to a threshold
    (`.../ratio`) gets a line at 1.

    Raises `ValueError` for a path that was not measured, with those that were, and for one that is not a number a step.
    """
    records = _records(run)
    measured = {"loss": records.losses} | _numbers(records.values)
    if what not in measured:
        raise unknown_name("quantity of the run", what, measured)
    values = np.asarray(measured[what], float)
    steps = np.arange(len(values)) if what == "loss" else np.asarray(records.steps)
    axes = _axes(axes)
    color = _next_color(axes)
    if values.ndim == 1:
        axes.plot(steps, values, color=color, label=label)
    else:
        range_band(axes, steps, values.reshape(len(values), -1), color, label)
    if np.nanmin(values) > 0 and np.nanmax(values) > 10 * np.nanmin(values):
        axes.set_yscale("log")
    if what.split("/")[-1] == "ratio":
        axes.axhline(1.0, color="black", linestyle="--", linewidth=0.8)
    axes.set(xlabel="step", ylabel=what)
    return axes


def margin_path(
    result: RegularizationPath | Run, direction: Any = None, *, axes: Axes | None = None, label: str | None = None
) -> Axes:
    """How far attention's direction is from the max-margin one: 1 - correlation, against the norm of its weights.

    `result` is a `RegularizationPath`, with the max-margin `direction` to compare with, or a run with a `margin_probe`,
    whose every named direction is drawn. On logarithmic axes convergence at a power of the norm is a straight line.

    Raises `ValueError` for a path without `direction`, and a run without a `margin_probe`.
    """
    curves = _path_curves(result, direction) if isinstance(result, RegularizationPath) else _probe_curves(result)
    axes = _axes(axes)
    for name, (norms, distance) in curves.items():
        axes.loglog(
            norms, np.maximum(distance, np.finfo(float).eps), ".-", color=_next_color(axes), label=label or name
        )
    axes.set(xlabel="norm of the attention weights", ylabel="1 - correlation with the max-margin direction")
    if len(curves) > 1 or label:
        axes.legend()
    return axes


def _path_curves(path: RegularizationPath, direction: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    if direction is None:
        raise ValueError("direction is None; expected the max-margin direction, as al.max_margin(problem).direction.")
    matrices = [attention_matrix(jax.tree.map(lambda leaf, i=i: leaf[i], path.params)) for i in range(len(path.radii))]
    distance = [1 - float(correlation(matrix, jnp.asarray(direction))) for matrix in matrices]
    return {"regularization path": (np.asarray(path.radii), np.asarray(distance))}


def _probe_curves(run: Run) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    for values in _records(run).values.values():
        if isinstance(values, Mapping) and "norm" in values:
            named = {name: found for name, found in values.items() if name.startswith("correlation")}
            nested = named.pop("correlation", {})  # as read back from a directory
            flat = {name.partition("/")[2]: found for name, found in named.items()} | dict(nested)
            if flat:
                return {
                    name: (np.asarray(values["norm"], float), 1 - np.asarray(found)) for name, found in flat.items()
                }
    raise ValueError("the run has no margin_probe; expected probes={..., al.margin_probe({name: direction})} in train.")


def _records(run: Run) -> Records:
    if isinstance(run, str | Path):
        return load_records(run)
    records = run.records if isinstance(run, Trajectory) else run
    _check_kind("run", records, Records, "al.train(...), its records, or the directory of a run")
    return records


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """What probes measured, by path."""
    paths = jax.tree_util.tree_flatten_with_path(values)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def _axes(axes: Axes | None) -> Axes:
    if axes is not None:
        return axes
    with style():
        return plt.subplots()[1]


def _next_color(axes: Axes) -> str:
    taken = {str(line.get_color()) for line in axes.lines}
    return PALETTE[len(taken & {*PALETTE}) % len(PALETTE)]


def _check_kind(name: str, value: Any, kind: type, maker: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a {kind.__name__}, as of {maker}.")
