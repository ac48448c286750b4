"""What long computations share: progress, state on disk, an estimate of memory, and errors that say where."""

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

from attnlab.checks import check_key
from attnlab.curvature.batches import BatchedObjective
from attnlab.curvature.operators import Operator
from attnlab.runs import manifest, owned_directory, replace_file, write_json
from attnlab.training.checkpoint import Checkpoint, fingerprint
from attnlab.types import PyTree


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

    def __init__(self, report: Report | None, before: int, total: int | None = None, tolerance: float = 0.0):
        self._report, self._before, self._total, self._began = report, before, total, time.monotonic()
        self._tolerance = tolerance
        self._highest: tuple[int, float] | None = None

    def tell(self, products: int, residual: float | None = None, foreseeable: bool = True) -> None:
        """Report, if there is someone to report to; `foreseeable` unless what is left does not depend on the residual,
        as when a converged iteration looks for what is missing."""
        if self._report is None:
            return
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


Function = TypeVar("Function", bound=Callable[..., Any])


def owning_directory(function: Function) -> Function:
    """`function`, with its argument `directory`, if there is one, held against other runs until it returns."""
    parameters = signature(function)

    @wraps(function)
    def owning(*arguments: Any, **named: Any) -> Any:
        directory = parameters.bind(*arguments, **named).arguments.get("directory")
        if directory is None:
            return function(*arguments, **named)
        with owned_directory(Path(directory)):
            return function(*arguments, **named)

    return owning  # type: ignore[return-value]


SAVE_SECONDS = 1.0
"""Least time between two saves, so that the disk costs little: a run that is killed loses that much."""


class StateOnDisk:
    """One pytree in a directory, replaced whole."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint, self._saved = checkpoint, time.monotonic()

    def restore(self, state: PyTree) -> PyTree:
        """What was saved, shaped like `state`, or `state` itself."""
        found = self._checkpoint.restore((), state)
        return state if found is None else jax.tree.map(_like, state, found.state)

    def save(self, state: PyTree, *, last: bool = False) -> None:
        """Save if it is time, or the `last` time."""
        if last or time.monotonic() - self._saved >= SAVE_SECONDS:
            self._checkpoint.save(0, (), state)
            self._saved = time.monotonic()


def _like(leaf: PyTree, found: jax.Array) -> PyTree:
    return np.array(found) if isinstance(leaf, np.ndarray) else found


def open_checkpoint(directory: Path | None, operator: Operator, *choices: PyTree) -> StateOnDisk | None:
    """The checkpoint of a computation on `operator` with these `choices` (keys and numbers); None without a directory.

    Its identity holds a product with one fixed vector, which tells operators apart by all that decides their numbers:
    kind, model and loss, weights and data, however they are batched, sharded or composed.
    """
    if directory is None:
        return None
    probe = jax.random.normal(jax.random.key(0), (operator.dimension,), operator.flat_dtype)
    witness = operator.mv(operator.unravel(probe))
    return StateOnDisk(Checkpoint(Path(directory), fingerprint((witness, operator.point, list(map(_array, choices))))))


def _array(choice: PyTree) -> Any:
    return choice if isinstance(choice, jax.Array) else np.asarray(choice)


class Session(NamedTuple):
    """One of the stretches in which a long run is done: since `began`, of `time.monotonic()`; `resumed` if an earlier
    one left its state."""

    began: float
    resumed: bool


def begin_session(directory: Path | None) -> Session:
    """A session that begins now, before anything is saved."""
    return Session(time.monotonic(), directory is not None and (Path(directory) / "state.npz").exists())


def write_result(directory: Path | None, choices: dict[str, Any], session: Session, **arrays: Any) -> None:
    """At the end of a run: its numbers in `result.npz` and what made them in `manifest.json`, once, in its directory.

    The manifest's seconds are those of this session alone, and it says whether that was a resumed one.
    """
    if directory is None or (Path(directory) / "manifest.json").exists():
        return
    with replace_file(Path(directory) / "result.npz") as partial:
        np.savez(partial, allow_pickle=False, **{name: np.asarray(array) for name, array in arrays.items()})
    record = {"resumed": session.resumed, **manifest(choices, time.monotonic() - session.began)}
    write_json(Path(directory) / "manifest.json", record)


class NonFiniteProductError(ArithmeticError):
    """A product with the operator holds NaN or infinity; `partial` is what had been computed until then (or None)."""

    def __init__(self, message: str, partial: Any = None):
        super().__init__(message)
        self.partial = partial


def non_finite(operator: Operator, where: str, partial: Any = None) -> NonFiniteProductError:
    """The error for a product that is not finite: it says `where`, and in which batch if there are batches."""
    batch = _first_bad_batch(operator)
    of_batch = "" if batch is None else f"; the first batch that gives one is batch {batch}"
    return NonFiniteProductError(
        f"the operator's product is not finite {where}{of_batch}. Look for a derivative that does not exist at these "
        "parameters (sqrt or norm at zero, log of zero), or an overflow: take float64.",
        partial,
    )


def _first_bad_batch(operator: Operator) -> int | None:
    """The first batch whose own product is not finite, for an operator that holds a product over batches somewhere."""
    held = jax.tree.leaves(operator.linear, is_leaf=_is_batched)
    for product in filter(_is_batched, held):
        risk, params = product.args
        flat, unravel = ravel_pytree(params)
        vector = unravel(jax.random.normal(jax.random.key(0), flat.shape, flat.dtype))
        for number in range(risk.feed.count):
            image = product.func.linearize.linear(risk.batch(number), params)(vector)
            if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(image)):
                return number
    return None


def _is_batched(node: Any) -> bool:
    return isinstance(node, Partial) and any(isinstance(part, BatchedObjective) for part in node.args)


def check_symmetric(asymmetry: jax.Array, epsilon: float) -> None:
    """Raise `ValueError` if a relative |<A u, v> - <u, A v>| is above the square root of the machine epsilon, that of
    the coarsest dtype of the products."""
    limit = epsilon**0.5
    worst = float(jnp.max(asymmetry))
    if worst > limit:
        raise ValueError(
            f"the operator is not symmetric: <Au, v> and <u, Av> differ by {worst:.2g} of its norm squared, expected "
            f"at most {limit:.2g}. Either two products with it disagree (dropout or sampling without a fixed key), or "
            "a derivative rule is wrong. `verify` tells which."
        )


def check_operator(operator: Any) -> None:
    """Raise `TypeError` unless this is an `Operator`."""
    if not isinstance(operator, Operator):
        raise TypeError(
            f"operator is a {type(operator).__name__}; expected an Operator, as hessian(risk, params) and ggn(risk, "
            "params) build it. It comes first."
        )


def check_operator_and_key(operator: Any, key: Any) -> None:
    """Raise `TypeError` unless these are an `Operator` and one typed key."""
    check_operator(operator)
    check_key(key)


def check_memory(what: str, needed: int, remedy: str) -> None:
    """Raise `MemoryError` if `needed` bytes are more than the device has left."""
    available = _available_bytes()
    if available is not None and needed > available:
        raise MemoryError(
            f"{what} would take about {needed / 2**30:.2f} GiB, and {available / 2**30:.2f} GiB are left. {remedy}"
        )


def _available_bytes() -> int | None:
    statistics = jax.local_devices()[0].memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        names = getattr(os, "sysconf_names", {})
        if "SC_PHYS_PAGES" not in names:
            return None
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def saved_bytes(operator: Operator) -> int:
    """Bytes of what the operator's linearisation saved: about what one product keeps in flight."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(operator.linear))
