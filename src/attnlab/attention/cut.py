"""An objective cut at one of its attention layers: what the layer sees, and the map from its output to the prediction.

The model is run once with an eye on its layers, however it is written around them, and `rest` runs it again with the
layer's output replaced.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.module import InterceptorContext
from jaxtyping import Array, Float

from attnlab.attention.layer import AttentionLayer, checked_layer
from attnlab.checks import unknown_name
from attnlab.models.adapters import positions_read
from attnlab.models.attention import AttentionConfig, SelfAttention
from attnlab.objectives import Objective
from attnlab.types import Params, PyTree

Rest = Callable[[Array], PyTree]


@dataclass(frozen=True)
class Cut:
    """An objective cut at one attention layer.

    Attributes:
        layer: the layer, its weights and the tokens it sees (after a pre-norm, say).
        outputs: its output.
        predicted: what the model predicts.
        rest: everything behind, from outputs of that shape to `predicted`.
        behind: names of the attention layers that the model calls after it; there tokens meet again.
        positions: the tokens whose outputs the objective reads, where its model is one of `at_positions`; None is all.
    """

    layer: AttentionLayer
    outputs: Float[Array, "*B L O"]
    predicted: PyTree
    rest: Rest
    behind: tuple[str, ...]
    positions: tuple[int, ...] | None


class _Call(NamedTuple):
    name: str
    config: AttentionConfig
    weights: dict[str, Array]
    arguments: tuple
    options: dict
    outputs: Array


def cut_at_attention(risk: Objective, params: Params, layer: str | None = None) -> Cut:
    """Cut the objective's model at the `SelfAttention` called `layer`.

    `layer` is its path in the module, such as `transformer/layer_0/attention`; None is the only one that there is. The
    model may be written in any way around linen modules. Raises `ValueError` where the model does not call an attention
    layer of that name once, or where its weights are not arrays of `params` (bound, or changed on the way to it).
    """
    calls: list[_Call] = []
    predicted = _run(risk, params, _noting(calls))
    chosen = _chosen(layer, calls, params)

    def rest(outputs: Array) -> PyTree:
        order = itertools.count()
        return _run(risk, params, lambda call: outputs if next(order) == chosen else call.outputs)

    call, behind = calls[chosen], tuple(other.name for other in calls[chosen + 1 :])
    return Cut(_checked(call), call.outputs, predicted, rest, behind, positions_read(risk.predict))


def _noting(calls: list[_Call]) -> Callable[[_Call], Array]:
    def see(call: _Call) -> Array:
        calls.append(call)
        return call.outputs

    return see


def bare_layer(risk: Objective, params: Params) -> tuple[AttentionLayer, tuple[int, ...]] | None:
    """The layer of an objective whose model is one `SelfAttention` and nothing around it, with the shape of its tokens
    (sequences..., L); None for another model.

    Nothing is computed: the model is only looked at.
    """
    calls: list[_Call] = []
    whole: list[bool] = []

    def look() -> PyTree:
        predicted = _run(risk, params, _noting(calls))
        whole.append(len(calls) == 1 and predicted is calls[0].outputs)
        return predicted

    jax.eval_shape(look)
    if whole != [True]:
        return None
    (call,) = calls
    given = (call.arguments, call.options, call.weights)
    known = {id(leaf) for leaf in jax.tree.leaves((risk, params))}
    if any(id(leaf) not in known for leaf in jax.tree.leaves(given)):
        return None  # something is done on the way to the layer
    return _checked(call), jnp.shape(call.arguments[0])[:-1]


def _checked(call: _Call) -> AttentionLayer:
    tokens, *mask = call.arguments
    return checked_layer(call.config, call.weights, tokens, call.options.get("mask", *mask or [None]))


def _run(risk: Objective, params: Params, see: Callable[[_Call], Array]) -> PyTree:
    """The prediction, where every attention layer returns what `see` says of its call."""

    def intercept(call: Callable, arguments: tuple, options: dict, context: InterceptorContext) -> PyTree:
        module = context.module
        if not isinstance(module, SelfAttention) or context.method_name != "__call__":
            return call(*arguments, **options)
        outputs = call(*arguments, **options)
        weights = dict(module.variables["params"])
        return see(_Call("/".join(module.path), module.config, weights, arguments, options, outputs))

    with nn.intercept_methods(intercept):
        return risk.outputs(params)


def _chosen(layer: str | None, calls: list[_Call], params: Params) -> int:
    """The place of the wanted layer among the calls."""
    if not calls:
        raise ValueError(
            "the objective's model calls no SelfAttention of attnlab.models; expected one. Take the matrix-free "
            "operators of attnlab.curvature for another model."
        )
    known = {id(leaf) for leaf in jax.tree.leaves(params)}
    own = [i for i, call in enumerate(calls) if all(id(weight) in known for weight in call.weights.values())]
    if not own:
        raise ValueError(
            f"the weights of the attention layers {', '.join(map(_named, calls))} are not arrays of params; expected "
            "a layer to be given those of params as they stand. Bind nothing of it, and change nothing (a dtype, a "
            "scale) on the way to it."
        )
    found = [i for i in own if layer is None or calls[i].name == layer]
    if not found:
        raise unknown_name("attention layer", str(layer), [_named(calls[i]) for i in own])
    names = [_named(calls[i]) for i in found]
    if len(set(names)) > 1:
        raise ValueError(f"layer is None and the model has {len(names)}; expected one of: {', '.join(names)}.")
    if len(names) > 1:
        raise ValueError(
            f"the model calls the attention layer {names[0]} {len(names)} times; expected once: the closed form has no "
            "layers that share their weights. Take the matrix-free operators of attnlab.curvature."
        )
    return found[0]


def _named(call: _Call) -> str:
    return call.name or "(the model itself)"
