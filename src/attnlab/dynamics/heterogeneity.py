"""How different two spectra are: a statistic on linear bins, and one on orders of magnitude."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.checks import check_positive


def jensen_shannon(first: Float[Array, " n"], second: Float[Array, " m"], bins: int = 64) -> Float[Array, ""]:
    """Jensen-Shannon divergence, in bits (0 to 1), of two histograms on `bins` equal bins over their common range.

    The statistic of Zhang et al., arXiv 2402.16788. Spectra of Hessians span orders of magnitude: nearly all
    eigenvalues share the bin around zero, and what differs between two blocks is seen hardly or not at all.
    """
    check_positive(bins=bins)
    both = jnp.concatenate([first, second])
    edges = jnp.linspace(jnp.min(both), jnp.max(both), bins + 1)
    p, q = (jnp.histogram(values, edges)[0] / values.size for values in (first, second))
    middle = (p + q) / 2
    return (_divergence(p, middle) + _divergence(q, middle)) / 2


def _divergence(p: Float[Array, " bins"], q: Float[Array, " bins"]) -> Float[Array, ""]:
    held = p > 0
    return jnp.sum(jnp.where(held, p * jnp.log2(jnp.where(held, p / jnp.where(held, q, 1), 1)), 0))


def log_wasserstein(first: Float[Array, " n"], second: Float[Array, " m"], *, floor: float = 1e-8) -> Float[Array, ""]:
    """Wasserstein-1 distance of the laws of log10 |eigenvalue|: by how many orders of magnitude they lie apart.

    Multiplying one spectrum by c moves it by exactly |log10 c| from itself. Eigenvalues below `floor` times the
    largest of their own spectrum are null up to rounding, and left out. NaN for a spectrum of zeros.
    """
    logs = [_magnitudes(values, floor) for values in (first, second)]
    points = jnp.sort(jnp.concatenate([values for values, _ in logs]))
    # a left-out eigenvalue repeats the largest, where the law has reached 1
    laws = [jnp.minimum(jnp.searchsorted(v, points[:-1], side="right").astype(v.dtype) / n, 1) for v, n in logs]
    return jnp.sum(jnp.abs(laws[0] - laws[1]) * jnp.diff(points))


def _magnitudes(values: Float[Array, " n"], floor: float) -> tuple[Float[Array, " n"], Float[Array, ""]]:
    """log10 |values|, ascending, with the left-out ones at the top, and how many are not left out."""
    sizes = jnp.abs(values)
    largest = jnp.max(sizes)
    kept = sizes > floor * largest
    logs = jnp.sort(jnp.log10(jnp.where(kept, sizes, largest)))
    return logs, jnp.sum(kept.astype(sizes.dtype))
