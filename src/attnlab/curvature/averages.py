"""Means over random samples of an operator's products, with their errors, on one device or side by side on many."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array

from attnlab.checks import check_whole, is_concrete
from attnlab.curvature.guards import check_operator_and_key, check_symmetric, non_finite
from attnlab.curvature.operator import Operator
from attnlab.local_devices import everywhere, local_sharding, side_by_side, together_again
from attnlab.statistics import Estimate
from attnlab.trees import length
from attnlab.types import PRNGKey, PyTree

Measure = Callable[[Array, Array], Array]
"""Of a sample and its image."""


def mean_over_samples(
    operator: Operator,
    key: PRNGKey,
    samples: int,
    measure: Measure,
    unravel: Callable[[Array], PyTree] = jnp.asarray,
    unit: Array | None = None,
) -> Estimate:
    """The mean of measure(z, A z / unit) over Rademacher samples z, unravelled, and its standard error. Raises as
    `trace` does."""
    check_operator_and_key(operator, key)
    check_whole(samples=samples)
    unit = jnp.ones((), operator.flat_dtype) if unit is None else unit
    mean, error, asymmetry, finite = _mean_of(_parts(operator, jax.random.split(key, samples), measure, unit), samples)
    if not is_concrete(mean):
        value, error = (unravel(jnp.where(finite == samples, part, jnp.nan)) for part in (mean, error))
        return Estimate(value, error, samples)
    estimate = Estimate(unravel(mean), unravel(error), int(finite))
    if finite < samples:
        raise non_finite(operator, f"for sample {finite} of {samples}", estimate if finite else None)
    check_symmetric(asymmetry, operator.epsilon)
    return estimate


class _Part(NamedTuple):
    """Of the samples of a part before its first that is not finite: their number, mean and root of the sum of squared
    differences from it; and how far <A u, v> and <u, A v> of two consecutive ones differ relative to |A u| |v|."""

    seen: Array
    mean: Array
    spread: Array
    asymmetry: Array


def _parts(operator: Operator, keys: Array, measure: Measure, unit: Array) -> _Part:
    """Consecutive samples by device, stacked; of each device two at least: symmetry is seen between them."""
    local = local_sharding(operator, len(keys) // 2) if len(keys) % 2 == 0 else None
    if local is None:
        return _stacked(operator, keys, measure, unit)
    return together_again(_side_by_side(everywhere(operator, local), keys, measure, unit, local), operator)


@jax.jit(static_argnames=("measure",))
def _stacked(operator: Operator, keys: Array, measure: Measure, unit: Array) -> _Part:
    return jax.tree.map(lambda leaf: leaf[None], _part(operator, keys, measure, unit))


@jax.jit(static_argnames=("measure", "sharding"))
def _side_by_side(operator: Operator, keys: Array, measure: Measure, unit: Array, sharding: NamedSharding) -> _Part:
    def own(held: tuple[Operator, Array], keys: Array) -> _Part:
        return _stacked(held[0], keys, measure, held[1])

    return side_by_side(own, sharding)((operator, unit), keys)


@jax.jit(static_argnames=("samples",))
def _mean_of(parts: _Part, samples: int) -> tuple[Array, Array, Array, Array]:
    """The mean over the samples before the first that is not finite, its standard error, the largest asymmetry of
    theirs, and their number."""
    dtype, (first, *others) = parts.spread.dtype, _rows(parts)
    whole, each = first, samples // (1 + len(others))
    for place, part in enumerate(others, start=1):
        complete = whole.seen == place * each  # otherwise what comes later does not count
        whole = jax.tree.map(partial(jnp.where, complete), _joined(whole, part, dtype), whole)
    number = whole.seen.astype(dtype)
    error = jnp.where(number > 1, whole.spread / jnp.sqrt(nonzero(number * (number - 1))), jnp.inf)
    return whole.mean, error, whole.asymmetry, whole.seen


def _rows(parts: _Part) -> list[_Part]:
    return [jax.tree.map(lambda leaf, row=row: leaf[row], parts) for row in range(len(parts.seen))]


def _joined(first: _Part, second: _Part, dtype: jnp.dtype) -> _Part:
    """Two parts as one (Chan, Golub, LeVeque 1983)."""
    before, after = first.seen.astype(dtype), second.seen.astype(dtype)
    share = after / nonzero(before + after)
    difference = second.mean - first.mean
    within = _hypotenuse(first.spread, second.spread)
    return _Part(
        seen=first.seen + second.seen,
        mean=first.mean + share * difference,
        spread=_hypotenuse(within, jnp.abs(difference) * jnp.sqrt(before * share)),
        asymmetry=jnp.maximum(first.asymmetry, second.asymmetry),
    )


class _UnderWay(NamedTuple):
    """A part so far, with the last sample and its image."""

    part: _Part
    sample: Array
    image: Array


def _part(operator: Operator, keys: Array, measure: Measure, unit: Array) -> _Part:
    """The part of these samples; no more than two of them are held (Welford 1962; the root of the squares, which does
    not overflow)."""
    dtype = operator.flat_dtype

    def step(state: _UnderWay, item: tuple[Array, Array]) -> tuple[_UnderWay, None]:
        key, count = item
        number, last = count.astype(dtype), state.part
        sample = operator.sample(jax.random.rademacher, key)
        image = operator.flat_mv(sample) / unit
        difference = measure(sample, image) - last.mean
        mean = last.mean + difference / number
        spread = _hypotenuse(last.spread, jnp.abs(difference) * jnp.sqrt((number - 1) / number))
        gap = jnp.abs(jnp.vdot(state.image, sample) - jnp.vdot(state.sample, image))
        size = (length(state.image) + length(image)) * jnp.linalg.norm(sample)
        asymmetry = jnp.where(count > 1, jnp.maximum(last.asymmetry, gap / nonzero(size)), 0)
        new = _UnderWay(_Part(count, mean, spread, asymmetry), sample, image)
        good = (last.seen == count - 1) & jnp.all(jnp.isfinite(mean))
        return jax.tree.map(partial(jnp.where, good), new, state), None

    shape = jax.eval_shape(measure, *[jax.ShapeDtypeStruct((operator.flat_size,), dtype)] * 2).shape
    counts = jnp.arange(1, len(keys) + 1)
    nothing, vector = jnp.zeros(shape, dtype), jnp.zeros(operator.flat_size, dtype)
    start = _Part(jnp.zeros_like(counts[0]), nothing, nothing, jnp.zeros((), dtype))
    state, _ = jax.lax.scan(step, _UnderWay(start, vector, vector), (keys, counts))
    return state.part


def _hypotenuse(a: Array, b: Array) -> Array:
    """(a^2 + b^2)^1/2 of numbers that are not negative, whose squares may be out of range."""
    large, small = jnp.maximum(a, b), jnp.minimum(a, b)
    return large * jnp.sqrt(1 + (small / nonzero(large)) ** 2)


def nonzero(number: Array) -> Array:
    """The number, or 1 for zero: a divisor."""
    return jnp.where(number == 0, 1, number)
