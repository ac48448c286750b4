"""What every measurement of an operator refuses, and how it says so."""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

from attnlab.checks import check_key, is_concrete
from attnlab.curvature.operator import Operator
from attnlab.objectives import BatchedObjective
from attnlab.runs.checkpoint import fingerprint
from attnlab.types import PyTree


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


def identity_of(operator: Operator, *choices: PyTree) -> str:
    """What decides the numbers of a computation on `operator` with these `choices` (keys and numbers).

    It holds a product with one fixed vector, which tells operators apart by all that decides their numbers: kind, model
    and loss, weights and data, however they are batched, sharded or composed.
    """
    sample = jax.random.normal(jax.random.key(0), (operator.dimension,), operator.flat_dtype)
    witness = operator.mv(operator.in_order().unravel(sample))
    return fingerprint((witness, operator.point, list(map(_array, choices))))


def _array(choice: PyTree) -> Any:
    return choice if isinstance(choice, jax.Array) else np.asarray(choice)


def check_symmetric(asymmetry: jax.Array, epsilon: float) -> None:
    """Raise `ValueError` if a relative |<A u, v> - <u, A v>| is above the square root of the machine epsilon, that of
    the coarsest dtype of the products."""
    limit = epsilon**0.5
    worst = float(jnp.max(asymmetry))
    if worst > limit:
        raise ValueError(
            f"the operator is not symmetric: <Au, v> and <u, Av> differ by {worst:.2g} of its norm squared, expected "
            f"at most {limit:.2g}. Either two products with it disagree (dropout or sampling without a fixed key), or "
            "a derivative rule is wrong. `check_curvature` tells which."
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
    available = available_bytes()
    if available is not None and needed > available:
        raise MemoryError(
            f"{what} would take about {needed / 2**30:.2f} GiB, and {available / 2**30:.2f} GiB are left. {remedy}"
        )


def available_bytes() -> int | None:
    """What the first device has left, of a CPU the machine; None where that is not known."""
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


def check_samples_fit(operator: Operator, together: int) -> None:
    """Raise `MemoryError` if as many samples do not fit at once, each with what a product keeps in flight: about what
    the operator's linearisation saved."""
    if not is_concrete(operator):
        return  # within a program that may run elsewhere
    dimension = share_of(operator)
    saved = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(operator.linear))
    needed = together * 4 * dimension * operator.flat_dtype.itemsize + (together - 1) * saved
    check_memory(f"{together} samples of {dimension} numbers at once", needed, "Run fewer together.")


def share_of(operator: Operator) -> int:
    """The length of the part of a flat vector that one device holds."""
    layout = operator.layout
    return operator.dimension if layout is None else layout.sharding.shard_shape((layout.size,))[0]
