"""Risks whose minima are degenerate in a known way: products of powers, products of matrices; turned and padded."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial
from jaxtyping import Array, Float

from attnlab.checks import check_range
from attnlab.losses import square_loss
from attnlab.objectives import Objective, objective
from attnlab.trees import dimension
from attnlab.types import Params, PRNGKey


@dataclass(frozen=True)
class _ProductOfPowers:
    """Static, so that powers are products, whose derivatives at zero are numbers."""

    exponents: tuple[int, ...]

    def __call__(self, params: Float[Array, " d"], inputs: Array) -> Array:
        return inputs * jnp.prod(jnp.stack([w**k for w, k in zip(params, self.exponents, strict=True)]))


def crossing_risk(exponents: Sequence[int]) -> tuple[Objective, Float[Array, " d"]]:
    """L(w) = prod_i w_i^(2 k_i), and its minimum in the origin, where all its branches cross.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnlab.risks.degenerate import crossing_risk
        >>> risk, origin = crossing_risk((1, 2))
        >>> float(risk(jnp.array([3.0, 2.0]))), float(risk(origin))  # 3^2 x 2^4
        (144.0, 0.0)
    """
    predict = _ProductOfPowers(tuple(exponents))
    return objective(predict, square_loss, jnp.ones(1), jnp.zeros(1)), jnp.zeros(len(exponents))


def _product_of_matrices(params: list[Array], inputs: Array) -> Array:
    for matrix in params:
        inputs = inputs @ matrix.T
    return inputs


def deep_linear_risk(widths: Sequence[int], rank: int = 0) -> tuple[Objective, list[Array]]:
    """L = ||W_L ... W_1 - T||^2 / (entries of T), the population risk for white inputs, and a minimum of it.

    T is the identity on the first `rank` coordinates, and so is every W_l at the minimum. Of y = T x + noise it is the
    mean log-likelihood up to a factor. Raises `ValueError` for a rank above a width.
    """
    check_range("rank", rank, 0, min(widths), "No product has a rank above its smallest width.")
    shapes = list(zip(widths[1:], widths[:-1], strict=True))
    params = [jnp.zeros(shape).at[jnp.arange(rank), jnp.arange(rank)].set(1.0) for shape in shapes]
    inputs = jnp.eye(widths[0])
    return objective(Partial(_product_of_matrices), square_loss, inputs, _product_of_matrices(params, inputs)), params


def _turned(predict: Partial, rotation: Array, shapes: Params, params: Array, inputs: Any) -> Any:
    flat, unravel = ravel_pytree(shapes)
    return predict(unravel((rotation @ params)[: flat.shape[0]]), inputs)


def turned(key: PRNGKey, risk: Objective, params: Params, padding: int = 0) -> tuple[Objective, Float[Array, " d"]]:
    """The same risk in coordinates turned at random, with `padding` more that it does not depend on, and `params`
    there.

    Nothing that is intrinsic changes; what looks at one coordinate after the other is lost.
    """
    size = dimension(params) + padding
    rotation = jnp.linalg.qr(jax.random.normal(key, (size, size)))[0]
    moved = rotation.T @ jnp.concatenate([ravel_pytree(params)[0], jnp.zeros(padding)])
    return replace(risk, predict=Partial(_turned, risk.predict, rotation, params)), moved
