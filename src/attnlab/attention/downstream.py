"""What stands behind the layer: the gradient g and the curvature Λ of the loss at the layer's output.

The closed form needs nothing else of a loss or of the rest of a network. For a loss on the layer's own output both are
written out; for a layer inside a network they come from automatic differentiation of the part behind it.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.checks import is_concrete
from attnlab.derivatives import Route, choose_route, hessian_product, jacobian
from attnlab.types import PyTree, Scalar


class SecondOrder(NamedTuple):
    """What stands behind a layer, to second order, as the targets of the loss `second_order`.

    Attributes:
        outputs: f0, (*B, L, O), the layer's output where the derivatives were taken.
        gradient: g, of the same shape.
        curvature: a number times the identity, (*B, L, O, O) where tokens go one by one, or (*B, L, O, L, O).
    """

    outputs: Float[Array, "*B L O"]
    gradient: Float[Array, "*B L O"]
    curvature: Array | float


def second_order(outputs: Float[Array, "*B L O"], targets: SecondOrder) -> Scalar:
    """The loss <g, f - f0> + (f - f0)^T Curvature (f - f0) / 2 of the layer's outputs f, a sum over all tokens.

    For a layer inside a network of which only the derivatives behind the layer are at hand:
    `objective(from_linen(SelfAttention(config)), second_order, tokens, SecondOrder(outputs, gradient, curvature))`.
    Its Hessian in the layer's weights at f = f0 is the network's where Curvature is the Hessian of everything behind
    the layer, and the network's Gauss-Newton matrix is its `ggn` where Curvature is the Gauss-Newton matrix of that.

    Example:
        >>> import attnlab as al
        >>> import jax
        >>> layer = al.SelfAttention(al.AttentionConfig(key_dim=2, value_dim=3))
        >>> tokens = jax.random.normal(jax.random.key(0), (1, 4, 3))
        >>> params = layer.init(jax.random.key(1), tokens)["params"]
        >>> from attnlab.attention import SecondOrder, second_order
        >>> outputs = layer.apply({"params": params}, tokens)
        >>> behind = SecondOrder(outputs, gradient=0 * outputs, curvature=1.0)
        >>> risk = al.objective(al.from_linen(layer), second_order, tokens, behind)
        >>> float(risk(params)), al.attention_hessian(risk, params).dense().shape
        (0.0, (21, 21))
    """
    gradient, _ = second_order_derivatives(outputs, targets)
    change = outputs - targets.outputs
    return jnp.vdot(targets.gradient + (gradient - targets.gradient) / 2, change)


def second_order_derivatives(outputs: Float[Array, "*B L O"], targets: SecondOrder) -> tuple[Array, Array]:
    """Gradient and curvature of `second_order` at `outputs`; raises `ValueError` for shapes that do not fit."""
    check_second_order(outputs, targets)
    curvature = jnp.asarray(targets.curvature, outputs.dtype)
    product = _PRODUCTS[curvature.ndim and curvature.ndim - outputs.ndim + 2]
    return targets.gradient + jnp.einsum(product, curvature, outputs - targets.outputs), curvature


def check_second_order(outputs: Any, targets: SecondOrder) -> None:
    """Raise `ValueError` for shapes that do not fit those of the layer's `outputs`, `TypeError` for other targets."""
    if not isinstance(targets, SecondOrder):
        raise TypeError(f"targets is a {type(targets).__name__}; expected a SecondOrder(outputs, gradient, curvature).")
    for name in ("outputs", "gradient"):
        shape = jnp.shape(getattr(targets, name))
        if shape != outputs.shape:
            raise ValueError(f"{name} has shape {shape}; expected that of the layer's output, {outputs.shape}.")
    *batch, length, features = outputs.shape
    known = ((), (*batch, length, features, features), (*batch, length, features, length, features))
    shape = jnp.shape(targets.curvature)
    if shape not in known:
        raise ValueError(f"curvature has shape {shape}; expected one of {', '.join(map(str, known))}.")


_PRODUCTS = {0: ",...lo->...lo", 3: "...lop,...lp->...lo", 4: "...lomp,...mp->...lo"}
"""Curvature times a change of the outputs, by the number of its axes behind those of the sequences."""


def downstream_derivatives(
    rest: Callable[[Array], PyTree],
    loss: Callable[[PyTree], Array],
    outputs: Float[Array, "B L O"],
    *,
    part: Literal["hessian", "ggn"] = "hessian",
    coupled: bool = True,
) -> tuple[Float[Array, "B L O"], Array]:
    """Gradient and curvature, at the layer's output, of the rest of a network.

    `rest(outputs)` is everything behind the layer up to the logits (residual stream, later layers), `loss` the scalar
    loss of the logits (B sequences that do not see each other). `attention_hessian` of an objective does all this for a
    layer inside a linen model; for another, pass the result on as `SecondOrder(outputs, gradient, curvature)`:

    - `part="hessian"`: Λ is the Hessian of loss(rest(.)); the closed form's `hessian` is then that of the network. Its
      `ggn` is J^T Λ J of this layer, which holds the curvature of the rest.
    - `part="ggn"`: Λ = J_rest^T H_loss J_rest; the closed form's `ggn` is then that of the network (the outer-product
      Hessian of the whole network).

    `coupled=False` is for a rest that treats every token by itself, such as the MLP, norm and unembedding of the last
    block: Λ is (B, L, O, O), from O products. Otherwise (B, L, O, L, O), from L O products. Outside of `jit`, raises
    `ValueError` where sequences see each other, or tokens with `coupled=False`.
    """
    scalar = lambda out: loss(rest(out))  # noqa: E731

    def build(route: Route) -> tuple[Array, Callable[[Array], Array]]:
        _, gradient, product = hessian_product(scalar, outputs, route)
        if part == "hessian":
            return gradient, product
        curvature = lambda logits: hessian_product(loss, logits, route)[2]  # noqa: E731
        return gradient, gauss_newton_product(rest, curvature, outputs, route)

    gradient, product = build(choose_route(lambda route, outputs: build(route)[1](outputs), outputs))
    return gradient, columns(product, outputs, "what stands behind the attention layer", coupled=coupled)


def columns(product: Callable[[Array], Array], outputs: Float[Array, "B L O"], name: str, *, coupled: bool) -> Array:
    """The matrix of a linear map of arrays like `outputs`: (B, L, O, O), or coupled (B, L, O, L, O), its columns last.

    Raises `ValueError` where sequences see each other, or tokens where they are not `coupled`; not under `jit`.
    """
    check_apart(name, product, outputs, "sequences" if coupled else "tokens")
    _, length, width = outputs.shape
    if not coupled:
        # one probe for all tokens at once: no token answers for another
        probes = jnp.broadcast_to(jnp.eye(width, dtype=outputs.dtype)[:, None, None], (width, *outputs.shape))
        return jnp.moveaxis(jax.lax.map(product, probes), 0, -1)
    units = jnp.eye(length * width, dtype=outputs.dtype).reshape(-1, 1, length, width)
    probes = jnp.broadcast_to(units, (length * width, *outputs.shape))
    found = jnp.moveaxis(jax.lax.map(product, probes), 0, -1)
    return found.reshape(*found.shape[:-1], length, width)


def gauss_newton_product(
    rest: Callable[[Array], PyTree], curvature: Callable[[PyTree], Callable], outputs: Array, route: Route
) -> Callable[[Array], Array]:
    """The map from a vector like `outputs` to J^T C J times it, J the Jacobian of `rest` and C the map that `curvature`
    gives at the logits."""
    logits, outer = jacobian(rest, outputs, route)
    curve = curvature(logits)
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
    "tokens": "Pass coupled=True.",
    "sequences": "Take a loss that is a mean over sequences, or the matrix-free operators of attnlab.curvature.",
}
