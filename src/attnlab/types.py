"""Names for the types that cross module boundaries."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float, Key

PyTree = Any
"""Any nesting of dicts, lists, tuples and registered dataclasses with arrays as leaves."""

Params = PyTree
"""A pytree of real floating-point arrays: the point at which curvature is taken."""

PRNGKey = Key[Array, ""]
"""A typed key of `jax.random.key`."""

Scalar = Float[Array, ""]

Real = int | float | Array
"""A real number as an argument: Python's own, or an array without axes, which may be traced."""

Predict = Callable[[Params, PyTree], PyTree]
"""`predict(params, inputs) -> outputs`, pure."""

LossFunction = Callable[..., jax.Array]
"""`loss(outputs, targets) -> scalar`, pure; with weights of the positions `loss(outputs, targets, weights)`."""
