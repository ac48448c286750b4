"""Where weights meet activations: the model's program is read, each kernel found in a product, each bias in a sum.

No model has to be written for it: whatever traces to `dot_general` with a two-dimensional leaf, within `jit`, `remat`
or neither, is a site of that leaf. A zero is added to the outputs of every site; the derivative in it is that in the
outputs of the layer, which factors of Kronecker products are made of.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jaxtyping import Array, Float

from attnlab.types import PyTree

INLINED = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2")
"""Primitives whose program is read as if it stood in their place."""
KEPT = ("transpose", "convert_element_type", "copy", "sharding_constraint")
"""Primitives of which a kernel comes out as a kernel."""


@dataclass(frozen=True)
class Site:
    """One place where a leaf is met.

    Attributes:
        name: of the leaf.
        inputs: x of x W, (..., in); ones (..., 1) for a bias.
        shape: of the outputs, (..., out).
        turned: whether the leaf is W^T, (out, in), as a tied embedding is at the logits.
    """

    name: str
    inputs: Float[Array, "*rows in"]
    shape: tuple[int, ...]
    turned: bool


@dataclass(frozen=True)
class _Weight:
    """A leaf on its way through the program."""

    name: str
    value: Array
    bias: bool
    turned: bool = False


@dataclass
class _Reader:
    """Evaluates a program, notes the sites in the order in which they are met, and adds a change to their outputs."""

    changes: list[Array] | None
    sites: list[Site] = field(default_factory=list)

    def run(self, program: Jaxpr, constants: list[Any], arguments: list[Any]) -> list[Any]:
        """The outputs of `program`; some of the arguments are `_Weight`s."""
        known: dict[Any, Any] = dict(zip(program.constvars, constants, strict=True))
        known.update(zip(program.invars, arguments, strict=True))
        read = lambda atom: atom.val if isinstance(atom, Literal) else known[atom]  # noqa: E731
        for equation in program.eqns:
            values = [read(atom) for atom in equation.invars]
            known.update(zip(equation.outvars, self.step(equation, values), strict=True))
        return [read(atom) for atom in program.outvars]

    def step(self, equation: JaxprEqn, values: list[Any]) -> list[Any]:
        """The outputs of one equation."""
        weights = [value for value in values if isinstance(value, _Weight)]
        if not weights:
            return _bind(equation, values)
        kind = equation.primitive.name
        if kind in INLINED:
            inner = equation.params["jaxpr"]
            closed = isinstance(inner, ClosedJaxpr)
            return self.run(inner.jaxpr if closed else inner, inner.consts if closed else [], values)
        if len(weights) == 1 and (moved := _moved(equation, weights[0])) is not None:
            return [moved]
        if len(weights) == 1 and kind == "dot_general" and not weights[0].bias:
            return [self.multiply(equation, values)]
        if len(weights) == 1 and kind in ("add", "add_any") and weights[0].bias:
            return [self.add(equation, values, weights[0])]
        raise _no_kernel(weights[0], kind)

    def multiply(self, equation: JaxprEqn, values: list[Any]) -> Array:
        """The product with a kernel, in which it must be summed over one of its axes, and over nothing else."""
        place = 0 if isinstance(values[0], _Weight) else 1
        weight, other = values[place], values[1 - place]
        contracted, batched = equation.params["dimension_numbers"]
        if any(batched) or len(contracted[place]) != 1:
            raise _no_kernel(weight, "a product over several axes")
        (outputs,) = _bind(equation, [value.value if isinstance(value, _Weight) else value for value in values])
        turned = weight.turned != (contracted[place][0] == 1)
        inputs = jnp.moveaxis(other, contracted[1 - place][0], -1)
        axis = 0 if place == 0 else -1  # of the outputs of W^T x and of x W
        shape = jnp.moveaxis(outputs, axis, -1).shape
        return outputs + jnp.moveaxis(self.note(Site(weight.name, inputs, shape, turned), outputs.dtype), -1, axis)

    def add(self, equation: JaxprEqn, values: list[Any], weight: _Weight) -> Array:
        """The sum with a bias."""
        (outputs,) = _bind(equation, [value.value if isinstance(value, _Weight) else value for value in values])
        if outputs.shape[-1] != weight.value.shape[-1]:
            raise _no_kernel(weight, "a sum that repeats it")
        ones = jnp.ones((*outputs.shape[:-1], 1), outputs.dtype)
        return outputs + self.note(Site(weight.name, ones, outputs.shape, False), outputs.dtype)

    def note(self, site: Site, dtype: Any) -> Array:
        """Keep a site; returns the change of its outputs."""
        self.sites.append(site)
        return jnp.zeros(site.shape, dtype) if self.changes is None else self.changes[len(self.sites) - 1]


def _bind(equation: JaxprEqn, values: list[Any]) -> list[Any]:
    primitive = equation.primitive
    found = primitive.bind(*values, **primitive.get_bind_params(equation.params))
    return list(found) if primitive.multiple_results else [found]


def _moved(equation: JaxprEqn, weight: _Weight) -> _Weight | None:
    """The weight in another layout; None where it does not come out as one."""
    kind = equation.primitive.name
    if weight.bias:
        shape = equation.outvars[0].aval.shape  # type: ignore[attr-defined]
        last = equation.params.get("broadcast_dimensions", (len(shape) - 1,))[-1:] == (len(shape) - 1,)
        repeated = kind in ("broadcast_in_dim", "reshape") and last and shape[-1:] == weight.value.shape[-1:]
        if not (repeated or kind in KEPT[1:]):
            return None
    elif kind not in KEPT:
        return None
    (value,) = _bind(equation, [weight.value])
    return replace(weight, value=value, turned=weight.turned != (kind == "transpose"))


def _no_kernel(weight: _Weight, where: str) -> ValueError:
    kind = "bias" if weight.bias else "kernel"
    return ValueError(
        f"the weight '{weight.name}' is met in {where}, where it is no {kind} of a dense layer; expected x @ W with W "
        "(in, out), or a bias added to it, outside of a scan. Leave it out: block=re.compile('query|key') takes the "
        "leaves that match."
    )


def with_sites(
    function: Callable[[OrderedDict[str, Array]], PyTree], leaves: OrderedDict[str, Array]
) -> Callable[[list[Array] | None], tuple[PyTree, list[Site]]]:
    """A function of changes of the layers' outputs: what `function(leaves)` gives with them, and the sites.

    With None nothing is changed; otherwise there is one change for each site, of its `shape`, in their order. Raises
    `ValueError`, naming it, for a leaf that is met as something else than a kernel or a bias, or not at all.
    """
    for name, leaf in leaves.items():
        if jnp.ndim(leaf) not in (1, 2):
            raise _no_kernel(_Weight(name, leaf, False), f"{jnp.ndim(leaf)} axes")

    def changed(changes: list[Array] | None) -> tuple[PyTree, list[Site]]:
        program, shape = jax.make_jaxpr(function, return_shape=True)(leaves)
        weights = [_Weight(name, leaf, jnp.ndim(leaf) == 1) for name, leaf in leaves.items()]
        reader = _Reader(changes)
        outputs = reader.run(program.jaxpr, program.consts, weights)
        met = {site.name for site in reader.sites}
        for weight in weights:
            if weight.name not in met:
                raise _no_kernel(weight, "no operation")
        if stray := [value for value in outputs if isinstance(value, _Weight)]:
            raise _no_kernel(stray[0], "the outputs themselves")
        return jax.tree.unflatten(jax.tree.structure(shape), outputs), reader.sites

    return changed
