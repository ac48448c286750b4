"""What is measured beside what is expected of it: the one type that claims and analyses return. No JAX here."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike
from rich.table import Table
from rich.text import Text

Relation = Literal["equal", "at most", "at least"]
Unit = Literal["absolute", "relative", "standard error"]
SIGNS = {"equal": "", "at most": "≤ ", "at least": "≥ "}


@dataclass(frozen=True, eq=False)
class Expectation:
    """A measurement, and what is expected of it: numbers, or arrays of one shape.

    Its `deviation` is the largest of |measured - reference| over the unit; where the relation is `at most` or
    `at least`, only what goes beyond the reference counts.

    Attributes:
        what: is measured, in words.
        measured: a number or an array.
        relation: of the measurement to the reference.
        reference: shaped like the measurement, or one number for all of its entries.
        unit: of deviation and tolerance: 1, the largest magnitude of the reference, or the `standard_error`.
        tolerance: the largest deviation that passes; None leaves it to the claim that returns the expectation.
        because: why the tolerance is what it is.
        source: whose expectation it is: paper, theorem or equation.
        standard_error: of the measurement, for that unit alone; broadcast against it.
    """

    what: str
    measured: Any
    relation: Relation
    reference: Any
    unit: Unit = "absolute"
    tolerance: float | None = None
    because: str = ""
    source: str = ""
    standard_error: Any = None

    def __post_init__(self) -> None:
        """Hold plain arrays; raises `ValueError` for shapes that differ and for an unknown relation or unit."""
        for name, known in (("relation", Relation), ("unit", Unit)):
            if getattr(self, name) not in get_args(known):
                given, allowed = getattr(self, name), ", ".join(map(repr, get_args(known)))
                raise ValueError(f"{name} of '{self.what}' is {given!r}; expected one of {allowed}.")
        for name in ("measured", "reference"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), float))
        if self.reference.shape not in ((), self.measured.shape):
            raise ValueError(
                f"'{self.what}' has a reference of shape {self.reference.shape} and a measurement of shape "
                f"{self.measured.shape}; expected one shape, or a single number as the reference."
            )
        if (self.unit == "standard error") != (self.standard_error is not None):
            raise ValueError(
                f"'{self.what}' has the unit '{self.unit}' and the standard error {self.standard_error}; expected a "
                "standard error with the unit of that name, and with no other."
            )
        if self.tolerance is not None:
            object.__setattr__(self, "tolerance", float(self.tolerance))
        if self.standard_error is not None:
            object.__setattr__(self, "standard_error", np.asarray(self.standard_error, float))

    @property
    def scale(self) -> np.ndarray:
        """The size of one unit."""
        if self.unit == "relative":
            return np.max(np.abs(self.reference), initial=0.0)
        return np.asarray(1.0) if self.standard_error is None else self.standard_error

    @property
    def deviation(self) -> float:
        """How far the measurement is off, in units; infinite for one that is not a number, which confirms nothing."""
        with np.errstate(divide="ignore", invalid="ignore"):
            difference = self.measured - self.reference
            sides = {"equal": np.abs(difference), "at most": difference, "at least": -difference}
            beyond = np.maximum(sides[self.relation], 0)
            units = np.where(beyond == 0, 0.0, beyond / self.scale)
        return float(np.max(np.where(np.isnan(difference), np.inf, units), initial=0.0))

    @property
    def allowed(self) -> float:
        """The tolerance; raises `ValueError` where nobody has named one."""
        if self.tolerance is None:
            raise ValueError(f"'{self.what}' has no tolerance; expected one, here or in the claim's decorator.")
        return self.tolerance

    @property
    def error(self) -> float:
        """The deviation over the tolerance: 1 is as much as passes. Where the tolerance is 0, either 0 or infinite."""
        deviation = self.deviation
        return deviation / self.allowed if self.allowed else np.inf * np.sign(deviation) if deviation else 0.0

    @property
    def passed(self) -> bool:
        """Whether the deviation is within the tolerance."""
        return self.deviation <= self.allowed

    @property
    def expected(self) -> str:
        """The reference, its relation and the tolerance in words."""
        units = {"absolute": "", "relative": " of it", "standard error": " standard errors"}
        tolerance = f" ± {self.allowed:.2g}{units[self.unit]}" if self.allowed else ""
        return SIGNS[self.relation] + shown(self.reference) + tolerance

    def record(self) -> dict[str, Any]:
        """In values of JSON; what is not finite becomes null."""
        return {
            "what": self.what,
            "relation": self.relation,
            "reference": shown(self.reference),
            "unit": self.unit,
            "tolerance": self.allowed,
            "expected": self.expected,
            "measured": shown(self.measured),
            "deviation": _finite(self.deviation),
            "error": _finite(self.error),
            "passed": self.passed,
            "because": self.because,
            "source": self.source,
        }


def _finite(number: float) -> float | None:
    return number if np.isfinite(number) else None


def equal(
    what: str,
    measured: ArrayLike,
    reference: ArrayLike,
    tolerance: float | None = None,
    *,
    unit: Unit = "absolute",
    standard_error: ArrayLike | None = None,
    because: str = "",
    source: str = "",
) -> Expectation:
    """That a measurement is the reference, up to the tolerance, which is in standard errors where one is given.

    Example:
        >>> import attnlab as al
        >>> al.equal("pi", 3.1416, 3.14159265, tolerance=1e-4, because="four digits").passed
        True
    """
    unit = unit if standard_error is None else "standard error"
    return Expectation(what, measured, "equal", reference, unit, tolerance, because, source, standard_error)


def at_most(
    what: str, measured: ArrayLike, reference: ArrayLike, tolerance: float = 0.0, *, because: str = "", source: str = ""
) -> Expectation:
    """That a measurement does not exceed the reference by more than the tolerance.

    Example:
        >>> import attnlab as al
        >>> al.at_most("error", 0.2, 0.1, tolerance=0.0, because="a bound").passed
        False
    """
    return Expectation(what, measured, "at most", reference, "absolute", tolerance, because, source)


def at_least(
    what: str, measured: ArrayLike, reference: ArrayLike, tolerance: float = 0.0, *, because: str = "", source: str = ""
) -> Expectation:
    """That a measurement does not stay below the reference by more than the tolerance.

    Example:
        >>> import attnlab as al
        >>> al.at_least("cosine", 0.99, 0.9, tolerance=0.0, because="a bound").passed
        True
    """
    return Expectation(what, measured, "at least", reference, "absolute", tolerance, because, source)


def between(
    what: str, measured: ArrayLike, low: float, high: float, *, because: str = "", source: str = ""
) -> Expectation:
    """That a measurement lies in an interval, as its middle and half its width.

    Example:
        >>> from attnlab.expectation import between
        >>> between("ratio", 1.02, 0.9, 1.1, because="five per cent of scatter").passed
        True
    """
    return equal(what, measured, (low + high) / 2, (high - low) / 2, because=because, source=source)


def shown(values: np.ndarray) -> str:
    """A number or a few; of a long array its size and norm."""
    if values.size > 6:
        return f"{values.size} numbers, norm {np.linalg.norm(values):.4g}"
    return ", ".join(f"{value:.4g}" for value in np.ravel(values))


def expectations_table(expectations: Sequence[Expectation]) -> Table:
    """What was measured beside what was expected."""
    table = Table("what", "expected", "measured", "reproduced", "source")
    for each in expectations:
        verdict = Text("yes") if each.passed else Text("no", style="red")
        table.add_row(*map(Text, (each.what, each.expected, shown(each.measured))), verdict, Text(each.source))
    return table
