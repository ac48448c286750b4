"""What a claim is, and the table of all of them."""

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from attnlab.checks import unknown_name

Relation = Literal["equal", "at most", "at least"]


class Comparison(NamedTuple):
    """One random instance's prediction and measurement, numbers or arrays of one shape.

    The error is the largest of |measured - predicted| over `scale`: the predicted magnitude by default, the
    measurement's standard error for a statistical claim, 1 for an absolute one. Where the relation is `at most` or `at
    least`, only what goes beyond the prediction counts.
    """

    predicted: ArrayLike
    measured: ArrayLike
    scale: ArrayLike | None = None


@dataclass(frozen=True)
class Claim:
    """A sourced statement that can be checked on a random instance.

    Attributes:
        name: unique, in lower case with dashes.
        statement: in LaTeX.
        source: paper, theorem or equation; "derived here" where there is none.
        tolerance: largest error that passes, in units of the comparison's scale.
        because: why the tolerance is what it is.
        relation: of the measurement to the prediction.
        compare: `compare(key)` draws an instance and returns its `Comparison`; a claim that can be checked on larger
            instances takes `compare(key, size)` as well, with `size=1` the default and a multiple of it `--strict`.
    """

    name: str
    statement: str
    source: str
    tolerance: float
    because: str
    relation: Relation
    compare: Callable[..., Comparison]

    @property
    def sizable(self) -> bool:
        """Whether there are larger instances."""
        return "size" in inspect.signature(self.compare).parameters

    def verify(self, seed: int, size: int = 1) -> "Verdict":
        """Check the claim on the instance of one seed, `size` times the default where it has larger ones."""
        import jax

        started = time.perf_counter()
        options = {"size": size} if self.sizable else {}
        comparison = self.compare(jax.random.key(seed), **options)
        predicted, measured = (np.asarray(value, float) for value in comparison[:2])
        if predicted.shape != measured.shape:
            raise ValueError(
                f"claim '{self.name}' predicts an array of shape {predicted.shape} and measures one of {measured.shape}; "
                "expected one shape."
            )
        error = _error(predicted, measured, comparison.scale, self.relation)
        return Verdict(self, seed, predicted, measured, error, time.perf_counter() - started)


def _error(predicted: np.ndarray, measured: np.ndarray, scale: ArrayLike | None, relation: Relation) -> float:
    difference = measured - predicted
    beyond = {"equal": np.abs(difference), "at most": np.maximum(difference, 0), "at least": np.maximum(-difference, 0)}
    unit = np.max(np.abs(predicted)) if scale is None else np.asarray(scale, float)
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = np.where(beyond[relation] == 0, 0.0, beyond[relation] / unit)
    # A measurement that is not a number confirms nothing.
    return float(np.max(np.where(np.isnan(difference), np.inf, errors), initial=0.0))


@dataclass(frozen=True)
class Verdict:
    """What a claim gave on one seed; `problem` says why there is no measurement, where an error kept it, and `skipped`
    that the error is but an optional package that is not installed."""

    claim: Claim
    seed: int
    predicted: np.ndarray
    measured: np.ndarray
    error: float
    seconds: float
    problem: str = ""
    skipped: bool = False

    @property
    def passed(self) -> bool:
        """Whether the error is within the claim's tolerance."""
        return self.error <= self.claim.tolerance


REGISTRY: dict[str, Claim] = {}


def claim(
    *, statement: str, source: str, tolerance: float, because: str, relation: Relation = "equal"
) -> Callable[[Callable[..., Comparison]], Claim]:
    """Register a function of a key (and a size) that returns a `Comparison`; its name, with dashes, is the claim's.

    Raises `ValueError` for a name that is taken.
    """

    def register(compare: Callable[..., Comparison]) -> Claim:
        name = compare.__name__.replace("_", "-")
        if name in REGISTRY:
            raise ValueError(f"there is a claim '{name}' already; expected a new name. Rename the function.")
        REGISTRY[name] = Claim(name, statement, source, tolerance, because, relation, compare)
        return REGISTRY[name]

    return register


def claim_by_name(name: str) -> Claim:
    """The claim called `name`; raises `ValueError` for an unknown one."""
    if name not in REGISTRY:
        raise unknown_name("claim", name, REGISTRY)
    return REGISTRY[name]
