"""What is tested when an operator is built, once for every structure; `check_curvature` shares the measurements."""

import re
import warnings
from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.extend.core import ClosedJaxpr
from jax.tree_util import Partial

from attnlab.curvature.independence import check_batches, check_examples
from attnlab.objectives import BatchedObjective, Objective, Risk
from attnlab.trees import leaf_sizes
from attnlab.types import Params, PyTree

Vector = np.ndarray
"""A flat vector of parameters on the host, in 64 bits: arithmetic on it compiles nothing."""

Linearize = Callable[[Objective, Params], Partial]

ASYMMETRIC = "<u, Hv> and <v, Hu> differ: a derivative rule is wrong (custom_vjp, custom_jvp)."
NOT_DERIVATIVE = (
    "a product with the Hessian is not the derivative of the gradient: kinks (relu), whose curvature automatic "
    "differentiation does not see, or a wrong derivative rule."
)
DISAGREE = "two evaluations disagree: dropout or sampling draws new numbers. Fix its key, or switch it off."


class VerificationError(ValueError):
    """At least one check failed; `discrepancies` has what was measured, by check."""

    def __init__(self, message: str, discrepancies: dict[str, float]):
        super().__init__(message)
        self.discrepancies = discrepancies


class CurvatureWarning(UserWarning):
    """A check failed that sound objectives can fail too: the text says which, and both possible causes."""


@lru_cache(maxsize=1024)
def _passed(*structure: Hashable) -> set[bool]:
    # What has passed, kept as jit keeps what it has compiled: by structure, never by value, and bounded. A check that
    # raises leaves its set empty, so that the next build raises again.
    return set()


def once(check: Callable[[Risk, Params], None], risk: Risk, params: Params, *key: Hashable) -> None:
    """Run a check unless it has passed on a risk and parameters of this structure, shapes and dtypes, with `key`."""
    leaves, structure = jax.tree.flatten((risk, params))
    passed = _passed(*key, structure, *((np.shape(leaf), jnp.result_type(leaf)) for leaf in leaves))
    if not passed:
        check(risk, params)
        passed.add(True)


def precision(params: Params) -> float:
    """The largest machine epsilon of the parameters' dtypes."""
    return max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(params))


def flat(tree: Params) -> Vector:
    """`tree` as one vector on the host; what is spread over several processes is gathered."""
    return np.concatenate([np.ravel(np.asarray(_whole(leaf), np.float64)) for leaf in jax.tree.leaves(tree)])


def _whole(leaf: jax.Array) -> jax.Array | np.ndarray:
    here = leaf.is_fully_addressable or leaf.is_fully_replicated
    return leaf if here else multihost_utils.process_allgather(leaf, tiled=True)


def unflat(vector: Vector, params: Params) -> Params:
    """`vector` as a pytree with the shapes, dtypes and shardings of `params`, so that it compiles nothing anew."""
    leaves, structure = jax.tree.flatten(params)
    parts = np.split(vector, np.cumsum(leaf_sizes(params))[:-1])
    placed = [
        jax.device_put(part.reshape(leaf.shape).astype(leaf.dtype), leaf.sharding if leaf.committed else None)
        for part, leaf in zip(parts, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, placed)


def direction(params: Params, random: np.random.Generator) -> Vector:
    """A random vector of unit length."""
    vector = random.standard_normal(sum(leaf_sizes(params)))
    return vector / np.linalg.norm(vector)


def check_risk(risk: Risk, params: Params) -> None:
    """Raise `VerificationError` if the risk evaluates differently when it is traced again, and warn where the examples
    of an objective in memory are coupled; in batches that raises `ValueError`.

    Compiles the outputs of the batch and of a part of it, and no derivative.
    """
    if isinstance(risk, BatchedObjective):
        check_batches(risk, params)
        return _check_determinism(risk.batch(0), params)
    _check_determinism(risk, params)
    error, culprit = check_examples(risk, params)
    if error > precision(params) ** 0.5:
        _warn(
            f"examples: {culprit} Relative discrepancy {error:.2g}. The curvature is that of this batch as a whole, "
            "not a mean over examples. Give a single sequence a leading axis of one example; if a sum or a coupling is "
            "meant, pass check=False."
        )
    return None


def check_operator(
    linearize: Linearize, apply: Callable, gradient: Callable | None, risk: Risk, params: Params
) -> None:
    """Test `apply(linearize(risk, params), vector)` with fixed vectors; of batches the first. Compiles nothing else.

    Raises `VerificationError` where evaluations disagree or the product is not symmetric; with a `gradient`, warns
    where its central difference is not the product. A product that is not finite passes: what uses it says so.
    """
    part = risk.batch(0) if isinstance(risk, BatchedObjective) else risk
    u = direction(params, np.random.default_rng(0))

    def measure() -> tuple[Vector, float]:
        linear = linearize(part, params)  # one at a time is held: it is large

        def product(vector: Vector) -> Vector:
            return flat(apply(linear, unflat(vector, params)))

        image = product(u)
        return image, asymmetry(product, image) if np.isfinite(image).all() else 0.0

    (image, error), limit = measure(), precision(params) ** 0.5
    if not np.isfinite(image).all():
        return
    change = relative(flat(apply(linearize(part, params), unflat(u, params))) - image, image)
    if change > limit:
        raise _failure("determinism", change, limit, DISAGREE)
    if error > limit:
        raise _failure("symmetry", error, limit, ASYMMETRIC)
    if gradient is None:
        return
    error, limit = slope_error(lambda point: gradient(part, point), params, u, image), precision(params) ** 0.25
    if error > limit:
        _warn(f"finite difference: {NOT_DERIVATIVE} Relative discrepancy {error:.2g}, expected at most {limit:.2g}.")


def _check_determinism(risk: Objective, params: Params) -> None:
    # Numbers drawn while tracing are constants of the program: only where two programs differ are they run.
    if not _same_program(*(_traced(risk, params) for _ in range(2))) and (error := disagreement(risk, params)) > 0:
        raise _failure("determinism", error, 0.0, DISAGREE)


def _failure(check: str, error: float, limit: float, culprit: str) -> VerificationError:
    return VerificationError(
        f"the operator cannot be trusted: {check}: {culprit} Relative discrepancy {error:.2g}, expected at most "
        f"{limit:.2g}. `check_curvature` checks more; check=False builds it all the same.",
        {check: error},
    )


def _warn(message: str) -> None:
    """A `CurvatureWarning` at the line that builds the operator."""
    # _warn, the check, once, _build, hessian: the caller is the sixth frame.
    warnings.warn(message, CurvatureWarning, stacklevel=6)


def _traced(risk: Objective, params: Params) -> ClosedJaxpr:
    # A function of its own is traced afresh.
    return jax.make_jaxpr(lambda risk, params: risk(params))(risk, params)


def _same_program(first: ClosedJaxpr, second: ClosedJaxpr) -> bool:
    """Whether two programs are one text, addresses of functions aside, with equal constants."""
    texts = {re.sub(r"0x[0-9a-f]+", "", str(program)) for program in (first, second)}
    return len(texts) == 1 and all(map(_same_constant, first.consts, second.consts))


def _same_constant(first: Any, second: Any) -> bool:
    if first is second:
        return True
    if jnp.issubdtype(first.dtype, jax.dtypes.prng_key):
        return False
    return np.array_equal(np.asarray(first), np.asarray(second))


def disagreement(risk: Objective, params: Params) -> float:
    """The relative difference of two evaluations, each traced and compiled afresh."""
    values = [float(jax.jit(lambda risk, params: risk(params))(risk, params)) for _ in range(2)]
    return abs(values[0] - values[1]) / max(abs(values[0]), 1e-300)


def relative(difference: Vector, *sizes: Vector) -> float:
    """The length of `difference` relative to the longest of `sizes`."""
    return float(np.linalg.norm(difference)) / max(1e-300, *(float(np.linalg.norm(size)) for size in sizes))


def asymmetry(product: Callable[[Vector], Vector], start: Vector) -> float:
    """|<H x, H x> - <x, H H x>| / (|H x|^2 + |H H x|) for x along `start`, zero where it is no more than rounding.

    With y = H x it compares <y, H x> and <x, H y>. For `start` an image of H: a random x of n numbers would be almost
    orthogonal to the range of an operator of low rank, and see of its asymmetry 1 / sqrt(n).
    """
    if not (length := np.linalg.norm(start)) > 0:
        return 0.0
    x = start / length
    y = product(x)
    z = product(y)
    size = float(y @ y + np.linalg.norm(z))
    # Rounding is what linearity misses: three times the vector rounds differently. An operator that vanishes (the
    # Hessian in a key's bias) has products of rounding alone, which no symmetry binds.
    rounding = relative(product(3 * x) / 3 - y, y)
    error = abs(float(y @ y - x @ z)) / max(size, 1e-300)
    return error if error > 30 * rounding else 0.0


def longest_step(params: Params) -> float:
    """The step of a central difference whose truncation is about its rounding."""
    return precision(params) ** (1 / 3) * max(float(np.linalg.norm(flat(params))), 1.0)


def central_difference(function: Callable[[Params], PyTree], params: Params, u: Vector, step: float) -> Vector:
    """The derivative of `function` along u, flat."""
    point = flat(params)
    ahead, behind = (flat(function(unflat(point + sign * step * u, params))) for sign in (1, -1))
    return (ahead - behind) / (2 * step)


def slope_error(gradient: Callable[[Params], Params], params: Params, u: Vector, image: Vector) -> float:
    """The relative discrepancy between `image` and the central difference of `gradient` along u, |u| = 1.

    Taken with two steps. What these disagree by is truncation, rounding or a single kink between their points, and is
    subtracted: what is left no step explains.
    """
    step = longest_step(params)
    long, short = (central_difference(gradient, params, u, size) for size in (step, step / 4))
    return max(relative(long - image, image, long) - relative(long - short, image, long), 0.0)
