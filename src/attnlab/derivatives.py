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
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr
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
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), values)
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


def choose_route(build: Callable[..., Any], *arguments: PyTree) -> Route:
    """Forward over reverse if `build(route, *arguments)` can be had by it, else reverse over reverse; nothing is run.

    Raises `TypeError` where neither can be had, with the reason of each.
    """
    try:
        if not _waits_for_reverse(jax.make_jaxpr(partial(build, FORWARD))(*arguments)):
            return FORWARD
        reason = "a custom_vjp rule has no forward mode"
    except Exception as error:  # whatever JAX has against it
        reason = _first_line(error)
    try:
        jax.eval_shape(partial(build, REVERSE), *arguments)
        return REVERSE
    except Exception as error:
        if not any(word in reason for word in ("custom_vjp", "JVP", "ifferentia", "transpos")):
            raise  # nothing to do with derivatives
        raise TypeError(
            f"the model or the loss has no second derivative: forward over reverse fails ({reason}), and so does "
            f"reverse over reverse ({_first_line(error)}). Expected differentiable operations, in the backward pass of "
            "a custom_vjp rule as well (no pure_callback, no kernel without a rule of its own). Write it in jax.numpy, "
            "or give the function a jax.custom_jvp rule."
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__


def _waits_for_reverse(program: Jaxpr | ClosedJaxpr) -> bool:
    """Whether a traced program pushes tangents through a custom_vjp rule: JAX notices when it is compiled, not before.

    It then holds the primitive `custom_lin`, which only a transposition takes out again.
    """
    for equation in program.eqns:
        if equation.primitive.name == "custom_lin":
            return True
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program):
            if _is_program(inner) and _waits_for_reverse(inner):
                return True
    return False


def _is_program(value: Any) -> bool:
    return isinstance(value, Jaxpr | ClosedJaxpr)
