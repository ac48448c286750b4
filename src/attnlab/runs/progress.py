"""What a computation of many products with an operator reports while it goes on."""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Progress:
    """What a progress report sees.

    Attributes:
        products: products with the operator so far, those before a resumption among them.
        total: products in all; None where their number depends on the convergence.
        seconds: since the computation began or was resumed.
        left: seconds that are left at the speed so far. Where `total` is None it is a guess, that the residual goes on
            falling as fast as since its highest in this session; None until it has fallen tenfold.
        residual: largest residual of the wanted eigenpairs relative to the operator's norm; None for a density.
        part: which of several computations this is (a block and its number), whose products, total and seconds these
            are; None for a single one.
    """

    products: int
    total: int | None
    seconds: float
    left: float | None = None
    residual: float | None = None
    part: str | None = None


Report = Callable[[Progress], Any]


def print_progress(progress: Progress) -> None:
    """A `report` that keeps one line of standard error up to date."""
    of_total = "" if progress.total is None else f" of {progress.total}"
    left = "" if progress.left is None else f", {progress.left:.0f} s left"
    residual = "" if progress.residual is None else f", largest residual {progress.residual:.1e}"
    end = "\n" if progress.products == progress.total else ""
    part = "" if progress.part is None else f"{progress.part}: "
    line = f"{part}{progress.products}{of_total} products in {progress.seconds:.0f} s{left}{residual}"
    sys.stderr.write(f"\r\x1b[K{line}{end}")
    sys.stderr.flush()


class Clock:
    """Makes progress reports: `before` products were done in an earlier session, `total` or as many as bring the
    residual down to `tolerance` are to be done."""

    def __init__(self, report: Report, before: int, total: int | None = None, tolerance: float = 0.0):
        self._report, self._before, self._total, self._began = report, before, total, time.monotonic()
        self._tolerance = tolerance
        self._highest: tuple[int, float] | None = None

    def tell(self, products: int, residual: float | None = None, foreseeable: bool = True) -> None:
        """Report; `foreseeable` unless what is left does not depend on the residual, as when a converged iteration
        looks for what is missing."""
        seconds, here = time.monotonic() - self._began, max(products - self._before, 1)
        to_do = self._to_do(products, residual)
        left = None if to_do is None or not foreseeable else seconds * to_do / here
        self._report(Progress(products, self._total, seconds, left, residual))

    def _to_do(self, products: int, residual: float | None) -> float | None:
        """Products that are left; where the residual decides, its logarithm is taken to fall in proportion to them."""
        if self._total is not None or residual is None:
            return None if self._total is None else self._total - products
        if residual <= self._tolerance:
            return 0.0
        if self._highest is None or not residual < self._highest[1]:
            self._highest = products, residual
        start, highest = self._highest
        if residual > highest / 10 or self._tolerance == 0:  # a smaller fall is soon undone by a new Ritz vector
            return None
        return (products - start) * math.log(residual / self._tolerance) / math.log(highest / residual)
