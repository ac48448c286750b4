"""Whether the module that a probe is given is the model of the objective: both are run on random numbers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from attnlab.types import Params, PyTree

TOLERANCE = 1e-4
"""Of float32 sums in another order; models that differ do so by far more at a random point."""


def same_model(first: Partial, second: Partial, params: Params, inputs: PyTree) -> bool:
    """Whether two functions of (params, inputs) return the same arrays, up to rounding.

    Asked of the functions, not of the numbers at hand, which may be tracers: at random parameters and inputs of the
    same shapes, and random numbers in the place of what the functions bind. Nothing runs where both are one function.
    """
    structures = [jax.tree.structure(function) for function in (first, second)]
    if structures[0] == structures[1] and not jax.tree.leaves((first, second)):  # type: ignore[operator]
        return True
    draw = partial(jax.tree.map, partial(_random_like, np.random.default_rng(0)))
    point = draw((params, inputs))
    with jax.ensure_compile_time_eval():
        found, expected = (_call(draw(function), *point) for function in (first, second))
    if jax.tree.structure(found) != jax.tree.structure(expected):  # type: ignore[operator]
        return False
    return all(map(_close, jax.tree.leaves(found), jax.tree.leaves(expected)))


@jax.jit
def _call(function: Partial, params: Params, inputs: PyTree) -> PyTree:
    return function(params, inputs)


def _random_like(random: np.random.Generator, leaf: jax.Array) -> np.ndarray | jax.Array:
    """Normal numbers, of a matrix with rows of length about 1; labels and switches are 0 or 1."""
    dtype = jnp.result_type(leaf)
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return leaf
    if jnp.issubdtype(dtype, jnp.inexact):
        return (random.standard_normal(leaf.shape) / max(leaf.shape[-1:], default=1) ** 0.5).astype(dtype)
    return random.integers(2, size=leaf.shape).astype(dtype)


def _close(found: jax.Array, expected: jax.Array) -> bool:
    if found.shape != expected.shape:
        return False
    scale = float(np.max(np.abs(np.nan_to_num(expected)), initial=0.0))
    tolerance = max(
        TOLERANCE, float(jnp.finfo(found.dtype).eps) ** 0.5 if jnp.issubdtype(found.dtype, jnp.inexact) else 0
    )
    return bool(np.allclose(found, expected, rtol=0, atol=tolerance * scale, equal_nan=True))
