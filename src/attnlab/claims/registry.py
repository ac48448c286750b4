"""What a claim is, and the table of all of them."""

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from attnlab.checks import unknown_name
from attnlab.expectation import Expectation
from attnlab.types import PRNGKey

Found = Expectation | Sequence[Expectation]


@dataclass(frozen=True)
class Claim:
    """A sourced statement that can be checked on a random instance.

    Attributes:
        name: unique, in lower case with dashes.
        statement: in LaTeX.
        source: paper, theorem or equation; "derived here" where there is none.
        measure: `measure(key)` draws an instance and returns one `Expectation` or several; a claim that can be checked
            on larger instances takes `measure(key, size)` as well, with `size=1` the default and a multiple of it
            `--strict`.
        tolerance: of the expectations that name none.
        because: why tolerances are what they are, for the expectations that do not say.
        slow: whether it compiles for several seconds: the quick tests leave it to the nightly ones.
        disagrees_with: where the claim contradicts a published statement: which, under what conditions, and what would
            change our mind.
    """

    name: str
    statement: str
    source: str
    measure: Callable[..., Found]
    tolerance: float | None = None
    because: str = ""
    slow: bool = False
    disagrees_with: str = ""

    def __repr__(self) -> str:
        """Name and source."""
        return f"Claim({self.name!r}, source={self.source!r})"

    @property
    def sizable(self) -> bool:
        """Whether there are larger instances."""
        return "size" in inspect.signature(self.measure).parameters

    def expectations(self, key: PRNGKey, size: int = 1) -> tuple[Expectation, ...]:
        """The parts of the claim on one instance, with what the claim says for all of them filled in.

        Raises `ValueError` where there are none, or one has no tolerance.
        """
        found = self.measure(key, **({"size": size} if self.sizable else {}))
        parts = (found,) if isinstance(found, Expectation) else tuple(found)
        if not parts:
            raise ValueError(f"claim '{self.name}' returns no expectation; expected one or several.")
        return tuple(self._completed(part) for part in parts)

    def _completed(self, part: Expectation) -> Expectation:
        tolerance = self.tolerance if part.tolerance is None else part.tolerance
        if tolerance is None:
            raise ValueError(
                f"claim '{self.name}' has no tolerance for '{part.what}'; expected one there or in the decorator."
            )
        because, source = part.because or self.because, part.source or self.source
        return replace(part, tolerance=tolerance, because=because, source=source)

    def verify(self, seed: int, size: int = 1) -> "Verdict":
        """Check the claim on the instance of one seed, `size` times the default where it has larger ones."""
        import jax

        started = time.perf_counter()
        parts = self.expectations(jax.random.key(seed), size)
        return Verdict(self, seed, parts, time.perf_counter() - started)


@dataclass(frozen=True)
class Verdict:
    """What a claim gave on one seed; `reason` says why there is no measurement, where an error kept it, and `skipped`
    that the error is but an optional package that is not installed."""

    claim: Claim
    seed: int
    parts: tuple[Expectation, ...]
    seconds: float
    reason: str = ""
    skipped: bool = False

    def __repr__(self) -> str:
        """Passed or not, and the worst part."""
        outcome = self.reason or (
            f"{self.worst.what}: {self.error:.3g} of the tolerance" if self.worst else "nothing measured"
        )
        passed = "skipped" if self.skipped else "passed" if self.passed else "failed"
        return f"Verdict({self.claim.name!r}, seed={self.seed}, {passed}, {outcome})"

    def _repr_html_(self) -> str:
        """A row a part."""
        rows = (
            (
                part.what,
                _brief(part.measured),
                part.relation,
                _brief(part.reference),
                "passed" if part.passed else "failed",
            )
            for part in self.parts
        )
        from attnlab.display import html_table  # costs JAX

        return html_table(("", "measured", "relation", "reference", ""), rows, self.claim.name)

    @property
    def passed(self) -> bool:
        """Whether every part is within its tolerance."""
        return bool(self.parts) and all(part.passed for part in self.parts)

    @property
    def worst(self) -> Expectation | None:
        """The part whose deviation is the largest multiple of its tolerance; None where nothing was measured."""
        return max(self.parts, key=lambda part: (not part.passed, part.error), default=None)

    @property
    def error(self) -> float:
        """That multiple."""
        return float("inf") if self.worst is None else self.worst.error


def _brief(numbers: np.ndarray) -> str:
    return f"{numbers.item():.6g}" if numbers.size == 1 else f"{numbers.size} numbers"


REGISTRY: dict[str, Claim] = {}


def claim(
    *,
    statement: str,
    source: str,
    tolerance: float | None = None,
    because: str = "",
    slow: bool = False,
    disagrees_with: str = "",
) -> Callable[[Callable[..., Found]], Claim]:
    """Register a function of a key (and a size) that returns one `Expectation` or several; its name, with dashes, is
    the claim's. `tolerance` and `because` serve the expectations that name none; `disagrees_with` as of `Claim`.

    Raises `ValueError` for a name that is taken.
    """

    def register(measure: Callable[..., Found]) -> Claim:
        name = measure.__name__.replace("_", "-")
        if name in REGISTRY:
            raise ValueError(f"there is a claim '{name}' already; expected a new name. Rename the function.")
        REGISTRY[name] = Claim(name, statement, source, measure, tolerance, because, slow, disagrees_with)
        return REGISTRY[name]

    return register


def claim_by_name(name: str) -> Claim:
    """The claim called `name`; raises `ValueError` for an unknown one."""
    if name not in REGISTRY:
        raise unknown_name("claim", name, REGISTRY)
    return REGISTRY[name]
