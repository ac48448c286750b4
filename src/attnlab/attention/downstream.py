"""What stands behind the layer: the gradient g and the curvature Λ of the loss at the layer's output.

The closed form needs nothing else of a loss or of the rest of a network. For a loss on the layer's own output both are
written out; for a layer inside a network they come from automatic differentiation of the part behind it.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnlab.checks import unknown_name
from attnlab.losses import LOSSES
from attnlab.types import PyTree


def square_derivatives(outputs: Float[Array, "B L O"], targets: Float[Array, "B L O"]) -> tuple[Array, Array]:
    """Gradient and curvature of the mean squared difference: 2 (F - Y) / n and the scalar 2 / n, n entries."""
    return 2 * (outputs - targets) / outputs.size, jnp.asarray(2 / outputs.size, outputs.dtype)


def cross_entropy_derivatives(
    outputs: Float[Array, "B L O"], targets: Int[Array, "B L"] | Float[Array, "B L O"]
) -> tuple[Array, Array]:
    """Gradient (w p - y) / n and curvature w (diag p - p p^T) / n of the cross-entropy over n positions.

    w = sum_c y_c is 1 for labels and distributions. Where a prediction is all but certain, 1 - p_o is taken as the sum
    of the other probabilities, which has digits that the difference has lost.
    """
    if jnp.issubdtype(targets.dtype, jnp.integer):
        targets = jax.nn.one_hot(targets, outputs.shape[-1], dtype=outputs.dtype)
    positions = outputs.shape[0] * outputs.shape[1]
    p = jax.nn.softmax(outputs, axis=-1)
    identity = jnp.eye(p.shape[-1], dtype=p.dtype)
    others = 1 - identity
    # (diag p - p p^T) has p_o (1 - p_o) on the diagonal; w p_o - y_o = p_o sum_{c != o} y_c - y_o sum_{c != o} p_c
    diagonal = jnp.einsum("blo,op->blop", p * (p @ others), identity)
    curvature = diagonal - jnp.einsum("blo,blp,op->blop", p, p, others)
    weight = jnp.sum(targets, axis=-1)[..., None, None] / positions
    return (p * (targets @ others) - targets * (p @ others)) / positions, weight * curvature


DERIVATIVES: dict[str, Callable[[Array, Array], tuple[Array, Array]]] = {
    "square": square_derivatives,
    "cross_entropy": cross_entropy_derivatives,
}


def loss_derivatives(loss: str, outputs: Float[Array, "B L O"], targets: Array) -> tuple[Array, Array]:
    """Gradient (B, L, O) and curvature (a scalar, or B, L, O, O) of a loss of `attnlab.losses` at the outputs.

    Raises `ValueError` for another loss, or targets whose shape does not fit.
    """
    if loss not in DERIVATIVES:
        raise unknown_name("loss with a closed-form curvature", loss, DERIVATIVES)
    jax.eval_shape(LOSSES[loss], outputs, targets)  # the loss's own check of the shapes
    return DERIVATIVES[loss](outputs, targets)


def downstream_derivatives(
    rest: Callable[[Array], PyTree],
    loss: Callable[[PyTree], Array],
    outputs: Float[Array, "B L O"],
    *,
    part: Literal["full", "outer"] = "full",
    coupled: bool = True,
) -> tuple[Float[Array, "B L O"], Array]:
    """Gradient and curvature, at the layer's output, of the rest of a network.

    `rest(outputs)` is everything behind the layer up to the logits (residual stream, later layers), `loss` the scalar
    loss of the logits (B sequences that do not see each other). Pass the result to `attention_hessian_from_downstream`:

    - `part="full"`: Λ is the Hessian of loss(rest(.)); the closed form's full blocks are then those of the network's
      Hessian. Its outer part is J^T Λ J of this layer, which holds the curvature of the rest.
    - `part="outer"`: Λ = J_rest^T H_loss J_rest; the closed form's outer blocks are then those of the network's
      generalised Gauss-Newton matrix (the outer-product Hessian of the whole network).

    `coupled=False` is for a rest that treats every token by itself, such as the MLP, norm and unembedding of the last
    block: Λ is (B, L, O, O), from O products. Otherwise (B, L, O, L, O), from L O products.
    """
    scalar = lambda out: loss(rest(out))  # noqa: E731
    gradient, hessian_product = jax.linearize(jax.grad(scalar), outputs)
    product = hessian_product if part == "full" else _gauss_newton_product(rest, loss, outputs)
    _, length, width = outputs.shape
    if not coupled:
        # one probe for all tokens at once: no token answers for another
        probes = jnp.broadcast_to(jnp.eye(width, dtype=outputs.dtype)[:, None, None], (width, *outputs.shape))
        return gradient, jnp.moveaxis(jax.lax.map(product, probes), 0, -1)
    units = jnp.eye(length * width, dtype=outputs.dtype).reshape(-1, 1, length, width)
    probes = jnp.broadcast_to(units, (length * width, *outputs.shape))
    columns = jnp.moveaxis(jax.lax.map(product, probes), 0, -1)
    return gradient, columns.reshape(*outputs.shape, length, width)


def _gauss_newton_product(rest: Callable, loss: Callable, outputs: Array) -> Callable[[Array], Array]:
    logits, push = jax.linearize(rest, outputs)
    _, pull = jax.vjp(rest, outputs)
    _, curve = jax.linearize(jax.grad(loss), logits)
    return lambda vector: pull(curve(push(vector)))[0]
