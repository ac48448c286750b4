"""The one estimate: a value, its standard error, and the interval that follows."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.special import stdtrit

from attnlab.display import brief, whatever_it_holds
from attnlab.trees import power_of_two
from attnlab.types import PyTree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Estimate:
    """A mean over random samples and its error, as a pytree that crosses `jit`.

    Attributes:
        value: a number, an array or a pytree of them.
        standard_error: shaped alike; infinite for a single sample, which bounds nothing.
        samples: how many.
        bound: shaped alike: what the value may be off by beside chance, as truncation or a residual brings it; None
            where there is no such error.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnlab.statistics import estimate
        >>> found = estimate(jnp.array([1.0, 2.0, 3.0]))
        >>> float(found.value), round(float(found.standard_error), 4)
        (2.0, 0.5774)
    """

    value: PyTree
    standard_error: PyTree
    samples: int = field(metadata={"static": True})
    bound: PyTree = None

    def in_words(self) -> str:
        """`value ± error` of a number; shapes of anything else."""
        return f"{brief(self.value)} ± {brief(self.error)}"

    @whatever_it_holds
    def __repr__(self) -> str:
        """The value and its error, and of how many samples."""
        return f"Estimate({self.in_words()}, samples={self.samples})"

    @property
    def error(self) -> PyTree:
        """The standard error and the bound, joined as the sides of a right angle."""
        if self.bound is None:
            return self.standard_error
        return jax.tree.map(jnp.hypot, self.standard_error, self.bound)

    def __iter__(self) -> Iterator[PyTree]:
        """`value, error = estimate`."""
        return iter((self.value, self.error))

    def __getitem__(self, place: int) -> PyTree:
        """`estimate[0]` is the value, `estimate[1]` the error."""
        return (self.value, self.error)[place]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Value and error side by side, as results are saved: an array (2,) for a number."""
        return np.asarray([np.asarray(self.value), np.asarray(self.error)], dtype=dtype)

    def interval(self, level: float = 0.95) -> tuple[PyTree, PyTree]:
        """Lower and upper end of the interval that covers with probability `level`, by Student's t with samples - 1
        degrees of freedom, on both sides wider by the `bound`.

        It supposes samples that are nearly normal. Where one of many eigenvectors carries the sum and few samples meet
        it (a spike), they are not, and it covers less often: see `curvature.trace`. Raises `ValueError` for a level
        that is not between 0 and 1.
        """
        if not 0 < level < 1:
            raise ValueError(f"level is {level}; expected 0 < level < 1, such as 0.95.")
        wide = float(stdtrit(max(self.samples - 1, 1), (1 + level) / 2))
        half = jax.tree.map(lambda error: wide * error, self.standard_error)
        if self.bound is not None:
            half = jax.tree.map(jnp.add, half, self.bound)
        return jax.tree.map(jnp.subtract, self.value, half), jax.tree.map(jnp.add, self.value, half)


def estimate(samples: Float[Array, "n *shape"]) -> Estimate:
    """The mean over the leading axis and its standard error."""
    return Estimate(jnp.mean(samples, axis=0), standard_error(samples), samples.shape[0])


def standard_error(samples: Float[Array, "n *shape"]) -> Float[Array, "*shape"]:
    """Standard error of the mean over the leading axis (infinite for a single sample), also where the squares of the
    samples would overflow or underflow."""
    count = samples.shape[0]
    if count == 1:
        return jnp.full(samples.shape[1:], jnp.inf, samples.dtype)
    unit = power_of_two(jnp.max(jnp.abs(samples), axis=0))
    return unit * (jnp.std(samples / unit[None], axis=0, ddof=1) / count**0.5)
