"""What stands behind the layer: the gradient g and the curvature Λ of the loss at the layer's output.

The closed form needs nothing else of a loss or of the rest of a network. For a loss on the layer's own output both are
written out; for a layer inside a network they come from automatic differentiation of the part behind it.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.checks import is_concrete, unknown_name
from attnlab.derivatives import Route, choose_route, hessian_product, jacobian
from attnlab.losses import LOSSES, Loss
from attnlab.types import PyTree


def loss_derivatives(
    loss: str | Loss, outputs: Float[Array, "B L O"], targets: Array, weights: Array | None = None
) -> tuple[Array, Array]:
    """Gradient (B, L, O) and curvature (a scalar, or B, L, O, O) of a loss of `attnlab.losses` at the outputs.

    Raises `ValueError` for another loss, targets or weights that do not fit, labels that are no class.
    """
    return named_loss(loss).derivatives(outputs, targets, weights)


def named_loss(loss: str | Loss) -> Loss:
    """A loss with a closed-form curvature, given by its name or itself; raises `ValueError` for another."""
    if isinstance(loss, Loss):
        return loss
    if not isinstance(loss, str) or loss not in LOSSES:
        raise unknown_name("loss with a closed-form curvature", loss if isinstance(loss, str) else repr(loss), LOSSES)
    return LOSSES[loss]


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
    block: Λ is (B, L, O, O), from O products. Otherwise (B, L, O, L, O), from L O products. Outside of `jit`, raises
    `ValueError` where sequences see each other, or tokens with `coupled=False`.
    """
    scalar = lambda out: loss(rest(out))  # noqa: E731

    def build(route: Route) -> tuple[Array, Callable[[Array], Array]]:
        _, gradient, product = hessian_product(scalar, outputs, route)
        return gradient, product if part == "full" else gauss_newton_product(rest, loss, outputs, route)

    gradient, product = build(choose_route(lambda route, outputs: build(route)[1](outputs), outputs))
    check_apart("what stands behind the attention layer", product, outputs, "sequences" if coupled else "tokens")
    _, length, width = outputs.shape
    if not coupled:
        # one probe for all tokens at once: no token answers for another
        probes = jnp.broadcast_to(jnp.eye(width, dtype=outputs.dtype)[:, None, None], (width, *outputs.shape))
        return gradient, jnp.moveaxis(jax.lax.map(product, probes), 0, -1)
    units = jnp.eye(length * width, dtype=outputs.dtype).reshape(-1, 1, length, width)
    probes = jnp.broadcast_to(units, (length * width, *outputs.shape))
    columns = jnp.moveaxis(jax.lax.map(product, probes), 0, -1)
    return gradient, columns.reshape(*outputs.shape, length, width)


def gauss_newton_product(
    rest: Callable[[Array], PyTree], loss: Callable[[PyTree], Array], outputs: Array, route: Route
) -> Callable[[Array], Array]:
    """The map from a vector like `outputs` to J^T (d²loss/dlogits²) J times it, J the Jacobian of `rest`."""
    logits, outer = jacobian(rest, outputs, route)
    _, _, curve = hessian_product(loss, logits, route)
    return lambda vector: outer.pull(curve(outer.push(vector)), vector)


def check_apart(
    name: str, product: Callable[[Array], Array], like: Float[Array, "B L C"], what: Literal["sequences", "tokens"]
) -> None:
    """Raise `ValueError` if the linear map `product` lets one sequence (or one token) answer for another.

    Every closed form asks this of what stands behind its layer. Skipped under `jit`, where nothing can be looked at.
    """
    if not is_concrete(like):
        return
    noise, coin = jax.random.split(jax.random.key(0))
    probe = jax.random.normal(noise, like.shape, like.dtype)
    # Signs of whole tokens (or sequences) go through a map that keeps them apart, and come back out.
    shape = like.shape[:2] if what == "tokens" else (like.shape[0], 1)
    signs = jax.random.rademacher(coin, (*shape, 1), like.dtype)
    # A single coin may fall alike for all of a small batch: the second one is of alternating signs.
    alternating = jnp.where(jnp.add(*jnp.ogrid[: shape[0], : shape[1]]) % 2, -1, 1)
    alone = product(probe)
    for sign in (signs, alternating[..., None].astype(like.dtype)):
        error = float(jnp.linalg.norm(alone - sign * product(sign * probe)))
        size = float(jnp.linalg.norm(alone))
        if error > float(jnp.finfo(like.dtype).eps) ** 0.5 * size:
            raise ValueError(
                f"{name} couples different {what} (by {error / size:.2g} of its size); expected each by itself. "
                + REMEDIES[what]
            )


REMEDIES = {
    "tokens": "Use downstream_derivatives(..., coupled=True).",
    "sequences": "Take a loss that is a mean over sequences, or the matrix-free operators of attnlab.curvature.",
}
