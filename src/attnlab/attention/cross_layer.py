"""Blocks of the Gauss-Newton matrix that couple the weights of two attention layers of one network, in closed form.

With J_a the Jacobian of layer a in its own weights and Z_a that of the network's outputs in layer a's output,

    H_o[a, b] = J_a^T Λ_ab J_b,    Λ_ab = Z_a^T (d²loss/doutputs²) Z_b,

a double sum over tokens of Kronecker products, as within one layer whose tokens are coupled behind it. The functional
part has no such form here: it needs derivatives of layer b's Jacobian in the tokens that layer a changes.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.attention.blocks import Pair
from attnlab.attention.cut import Cut, cut_at_attention
from attnlab.attention.downstream import columns
from attnlab.attention.kronecker import KroneckerSum
from attnlab.attention.moments import moments_of
from attnlab.attention.terms import TokenJacobian, leaves, outer_term, shared, token_jacobians, token_quantities
from attnlab.derivatives import Route, choose_route, jacobian
from attnlab.objectives import Objective, curvature_in_outputs
from attnlab.types import Params


def cross_layer_ggn(risk: Objective, params: Params, row: str, column: str) -> dict[Pair, KroneckerSum]:
    """The blocks of the Gauss-Newton matrix between every weight of attention layer `row` and every one of `column`.

    Args:
        risk: the objective, whose model calls both layers with tokens of shape (B, L, D).
        params: its parameters.
        row: path of a layer in the module, such as `layer_0/attention`.
        column: path of another, or of the same.

    Takes L x O products with the network for the coupling Λ, (B, L, O, L, O) numbers. Raises `ValueError` for a path
    that is not an attention layer's and, outside of `jit`, for a loss or a model that couples sequences.
    """
    first, second = (cut_at_attention(risk, params, path) for path in (row, column))
    coupling = _coupling(first, second, risk)
    ours, theirs = _jacobians(first), _jacobians(second)
    shapes, others = leaves(first.layer), leaves(second.layer)
    dtype, heads = str(first.layer.inputs.dtype), (first.layer.config.heads, second.layer.config.heads)
    return {
        (mine, other): shared(
            KroneckerSum((outer_term(ours[mine], theirs[other], coupling),), shapes[mine], others[other], dtype), heads
        )
        for mine in ours
        for other in theirs
    }


def _jacobians(cut: Cut) -> dict[str, TokenJacobian]:
    # The Jacobian of the layer alone: the gradient behind it plays no part.
    tokens = token_quantities(cut.layer, moments_of(cut.layer), jnp.zeros_like(cut.outputs))
    jacobians = token_jacobians(cut.layer, tokens)
    return {name: jacobians[name] for name in cut.layer.names}


def _coupling(first: Cut, second: Cut, risk: Objective) -> Float[Array, "B L O L P"]:
    """Λ_ab, one unit vector of layer b's output (of all sequences at once) after another."""

    def build(route: Route) -> Callable[[Array], Array]:
        logits, behind = jacobian(second.rest, second.outputs, route)
        _, curve = curvature_in_outputs(risk, logits, route)
        _, outer = jacobian(first.rest, first.outputs, route)
        return lambda probe: outer.pull(curve(behind.push(probe)), first.outputs)

    product = build(choose_route(lambda route, outputs: build(route)(outputs), second.outputs))
    return columns(product, second.outputs, "the loss or the model", coupled=True)
