"""How many eigenvalues lie beyond a value, by sampled densities."""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes


class Density(Protocol):
    """What is read of a `SpectralDensity`: its nodes, and integrals with their standard errors."""

    @property
    def nodes(self) -> Any:
        """Of the quadrature, a row a sample."""

    def integral(self, function: Callable[[Any], Any]) -> Any:
        """Of a function of the eigenvalue, with its standard error."""


Shares = tuple[Float[np.ndarray, "nodes"], Float[np.ndarray, "nodes"], Float[np.ndarray, "nodes"]]


def shares_beyond(density: Density, sign: int) -> Shares:
    """Of the eigenvalues of one sign: descending moduli of nodes, the share of all eigenvalues at each or beyond, and
    its standard error over the samples. Nodes within rounding of zero (1e-12 of the largest) are left out."""
    nodes = np.asarray(density.nodes).ravel()
    moduli = sign * nodes
    values = -np.sort(-moduli[moduli > 1e-12 * np.abs(nodes).max()])

    def beyond(eigenvalues):
        return (sign * eigenvalues[None, :] >= values[:, None]).astype(eigenvalues.dtype)

    share, error = density.integral(beyond)
    return values, np.asarray(share), np.asarray(error)


def draw_counts(
    axes: Axes, density: Density, dimension: int, color: str, label: Callable[[int], str | None] | None = None
) -> None:
    """Eigenvalues beyond each modulus of `dimension` ones, the negative ones dotted, with bands of two standard errors.

    `label` names a curve by its sign.
    """
    for sign, line in ((1, "-"), (-1, ":")):
        values, share, error = shares_beyond(density, sign)
        if not len(values):
            continue
        name = None if label is None else label(sign)
        axes.step(values, dimension * share, line, where="post", color=color, label=name)
        low, high = (dimension * np.maximum(share + side * error, 1e-12) for side in (-2, 2))
        axes.fill_between(values, low, high, step="post", color=color, alpha=0.15, linewidth=0)
    axes.set(xscale="log", yscale="log", xlabel=r"$|\lambda|$", ylabel="eigenvalues above")
