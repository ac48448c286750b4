"""What an approximation of attention costs: relative errors of the output, of the gradient and of the curvature."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from attnlab.approximation.approximate import Attention
from attnlab.curvature import hessian
from attnlab.losses import square_loss
from attnlab.objectives import Objective, objective
from attnlab.trees import ravel
from attnlab.types import Params, PRNGKey


class Errors(NamedTuple):
    """Relative errors ||approximate - exact|| / ||exact|| in the Euclidean (Frobenius) norm."""

    output: Float[Array, ""]
    gradient: Float[Array, ""]
    curvature: Float[Array, ""]
    score_curvature: Float[Array, ""]


def one_head(attention: Attention) -> Partial:
    """`predict(params, tokens)` of a head with `query`, `key` (D x d) and `value` (D x v) and the given attention."""

    return Partial(_one_head, attention if isinstance(attention, Partial) else Partial(attention))


def _one_head(attention: Partial, params: Params, tokens: Float[Array, "n L D"]) -> Float[Array, "n L v"]:
    def one(x: Array) -> Array:
        return attention(x @ params["query"], x @ params["key"], x @ params["value"])

    return jax.vmap(one)(tokens)


def head_params(key: PRNGKey, width: int, key_dim: int, value_dim: int) -> Params:
    """Gaussian weights with variance 1 / width."""
    shapes = {"query": (width, key_dim), "key": (width, key_dim), "value": (width, value_dim)}
    keys = jax.random.split(key, 3)
    return {n: jax.random.normal(k, s) / width**0.5 for k, (n, s) in zip(keys, shapes.items(), strict=True)}


def approximation_errors(
    approximate: Attention,
    reference: Attention,
    params: Params,
    tokens: Float[Array, "n L D"],
    targets: Float[Array, "n L v"],
) -> Errors:
    """Errors of a head under the square loss when `approximate` takes the place of `reference`, at the same weights.

    The curvature is the whole Hessian in query, key and value weights, formed densely: for small widths; the score
    curvature is its block of query and key weights.
    """
    risks = [objective(one_head(attention), square_loss, tokens, targets) for attention in (approximate, reference)]
    found, wanted = (_quantities(risk, params) for risk in risks)
    return Errors(*(jnp.linalg.norm(a - b) / jnp.linalg.norm(b) for a, b in zip(found, wanted, strict=True)))


def _quantities(risk: Objective, params: Params) -> tuple[Array, ...]:
    outputs, gradient = _first_order(risk, params)
    matrix, scores = hessian(risk, params).dense(), params["query"].size + params["key"].size
    return outputs.ravel(), ravel(gradient), matrix.ravel(), matrix[:scores, :scores].ravel()  # key, query, value


@jax.jit
def _first_order(risk: Objective, params: Params) -> tuple[Array, Params]:
    return risk.outputs(params), jax.grad(risk)(params)
