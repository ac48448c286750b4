"""Contextual mixture: sequences whose relevant tokens carry the label, and whose irrelevant ones point against it."""

import jax
import jax.numpy as jnp

from attnlab.checks import check_positive, check_range
from attnlab.data.dataset import Dataset
from attnlab.types import PRNGKey


def contextual_mixture(
    key: PRNGKey, count: int, length: int, dim: int, relevant: float, spread: float, noise: float = 0.0
) -> Dataset:
    """Labels y = +-1 (count,) and tokens (count, length, dim), relevant ones first.

    The first round(`relevant` L) tokens are e_0 + y e_1, the others -delta (e_0 + y e_1) with delta uniform on
    [0, `spread`] for each sequence; every entry has noise N(0, noise^2) besides.

    After the contextual data model of Oymak, Rawat, Soltanolkotabi, Thrampoulidis (arXiv 2306.03435), whose context
    direction q* is e_0 and class direction w* is e_1; the uniform law of delta is chosen here.
    Raises `ValueError` for a fraction outside [0, 1] or fewer than two dimensions.
    """
    check_positive(count=count, length=length)
    check_range("dim", dim, 2, float("inf"), "The context and the class take one direction each.")
    check_range("relevant", relevant, 0, 1, "It is the fraction of relevant tokens.")
    label_key, delta_key, noise_key = jax.random.split(key, 3)
    labels = jax.random.rademacher(label_key, (count,), dtype=float)
    delta = spread * jax.random.uniform(delta_key, (count, 1))
    first = jnp.arange(length)[None] < round(relevant * length)
    weights = jnp.where(first, 1.0, -delta)
    signal = jnp.zeros((count, dim)).at[:, 0].set(1.0).at[:, 1].set(labels)
    tokens = weights[..., None] * signal[:, None, :]
    return Dataset(tokens + noise * jax.random.normal(noise_key, tokens.shape), labels)


def pooling_error(relevant: float, spread: float) -> float:
    """Error of the best linear classifier of mean tokens learned by one gradient step, for noiseless tokens.

    Derived here. The mean token is (z - (1 - z) delta)(e_0 + y e_1), z the relevant fraction: a positive coefficient
    for all sequences while spread <= z / (1 - z), and one of positive mean, hence a gradient in the right direction,
    while spread < 2 z / (1 - z). Between the two edges the share 1 - z / ((1 - z) spread) is misread; beyond, the
    gradient has turned and the rest is.
    """
    edge = relevant / (1 - relevant)
    if spread <= edge:
        return 0.0
    misread = 1 - edge / spread
    return misread if spread < 2 * edge else 1 - misread
