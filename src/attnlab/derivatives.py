"""First and second derivatives as linear maps, by whichever order of forward and reverse mode a function allows.

Forward over reverse is the cheaper: `jax.linearize` of a gradient. A function with a `jax.custom_vjp` rule has no
forward mode. Its reverse mode can be differentiated in reverse again: with pull(u) = J^T u, which is linear in u, the
transpose of `pull` is J itself, and the transpose of a Hessian the Hessian.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import jax
from jax.tree_util import Partial

from attnlab.types import PyTree

Route = Literal["forward over reverse", "reverse over reverse"]
FORWARD: Route = "forward over reverse"
REVERSE: Route = "reverse over reverse"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Jacobian:
    """The Jacobian J of a function at a point, as a pytree that crosses `jit`. `jacobian` makes it.

    Attributes:
        linear: J forward, J^T reverse.
        route: which of the two.
        shapes: of the function's values.
        structure: of the function's values.
    """

    linear: Any
    route: Route = field(metadata={"static": True})
    shapes: tuple[jax.ShapeDtypeStruct, ...] = field(metadata={"static": True})
    structure: jax.tree_util.PyTreeDef = field(metadata={"static": True})

    def push(self, vector: PyTree) -> PyTree:
        """J times a vector like the point."""
        if self.route == FORWARD:
            return self.linear(vector)
        values = jax.tree.unflatten(self.structure, self.shapes)
        zeros = jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), values)
        _, transposed = jax.vjp(lambda cotangent: self.linear(cotangent)[0], zeros)
        return transposed(vector)[0]

    def pull(self, cotangent: PyTree, like: PyTree) -> PyTree:
        """J^T times a vector like the function's values; `like` is any vector like the point."""
        if self.route == FORWARD:
            return jax.linear_transpose(self.linear, like)(cotangent)[0]
        return self.linear(cotangent)[0]


def jacobian(function: Callable[[PyTree], PyTree], point: PyTree, route: Route) -> tuple[PyTree, Jacobian]:
    """The value of `function` at `point`, and its Jacobian there."""
    value, linear = (jax.linearize if route == FORWARD else jax.vjp)(function, point)
    leaves, structure = jax.tree.flatten(value)
    shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    return value, Jacobian(linear, route, shapes, structure)


def hessian_product(
    function: Callable[[PyTree], jax.Array], point: PyTree, route: Route
) -> tuple[PyTree, Any, Partial]:
    """Value and gradient of a scalar function at `point`, and the map from a vector to its Hessian times that."""

    def gradient_and_value(point: PyTree) -> tuple[PyTree, jax.Array]:
        value, gradient = jax.value_and_grad(function)(point)
        return gradient, value

    if route == FORWARD:
        gradient, linear, value = jax.linearize(gradient_and_value, point, has_aux=True)
        assert isinstance(linear, Partial)  # a pytree of the saved intermediate values
        return value, gradient, linear
    gradient, pull, value = jax.vjp(gradient_and_value, point, has_aux=True)
    return value, gradient, Partial(_first, pull)


def _first(pull: Any, vector: PyTree) -> PyTree:
    return pull(vector)[0]


def choose_route(build: Callable[[Route], Any]) -> Route:
    """Forward over reverse if `build(route)` can be traced by it, else reverse over reverse; nothing is run.

    Raises `TypeError` where neither can be had, with the reason of the second.
    """
    try:
        jax.eval_shape(partial(build, FORWARD))
        return FORWARD
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
    try:
        jax.eval_shape(partial(build, REVERSE))
        return REVERSE
    except Exception as error:
        raise TypeError(
            "the model or the loss has a custom_vjp rule, which has no forward mode, and the rule itself cannot be "
            f"differentiated: {error} Expected a backward pass of differentiable operations (no pure_callback or "
            "kernel without a rule of its own). Write it in jax.numpy, or give the function a jax.custom_jvp rule."
        ) from error
