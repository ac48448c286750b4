"""How many numbers a model can fit: the rank of its Jacobian, and that rank of attention by counting gauges."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial
from jaxtyping import Array, Float

from attnlab.checks import check_finite, check_key, check_number, check_positive, check_range
from attnlab.models.adapters import from_function
from attnlab.models.heads import softmax_weights
from attnlab.types import Params, Predict, PRNGKey, PyTree


def jacobian_rank(predict: Predict, params: Params, inputs: PyTree, tolerance: float = 1e-11) -> int:
    """Rank of the Jacobian of all outputs in all parameters: that of the empirical tangent kernel.

    Singular values below `tolerance` of the largest count as zero: take 64 bits. Parameters minus this rank are flat
    directions. The Jacobian is formed densely.

    Raises `ValueError` for parameters or inputs that are not finite, and for a tolerance outside of [0, 1].
    """
    check_number("tolerance", tolerance, 0, 1, "It is relative to the largest singular value.")
    check_finite("params", params)
    check_finite("inputs", inputs)
    values = np.linalg.svd(np.asarray(_jacobian(from_function(predict), params, inputs)), compute_uv=False)
    return int(np.sum(values > tolerance * values[0]))


@jax.jit
def _jacobian(predict: Partial, params: Params, inputs: PyTree) -> Float[Array, "m n"]:
    flat, unravel = ravel_pytree(params)
    return jax.jacrev(lambda vector: ravel_pytree(predict(unravel(vector), inputs))[0])(flat)


def scalar_heads(params: Params, inputs: tuple[Float[Array, "m d"], Float[Array, "m n d"]]) -> Float[Array, " m"]:
    """Sum over heads of sum_j softmax_j(q^T W_Q W_K^T x_j) w . x_j: a query and a context in, a number out.

    Parameters: `query`, `key` (H, d, d_h) and `value` (H, d).
    """

    def one(query: Array, context: Array) -> Array:
        return jnp.einsum("hn,nd,hd->", _weights(params, query, context), context, params["value"])

    return jax.vmap(one)(*inputs)


def _weights(params: Params, query: Float[Array, " d"], context: Float[Array, "n d"]) -> Float[Array, "H n"]:
    left = jnp.einsum("d,hdk->hk", query, params["query"])
    right = jnp.einsum("nd,hdk->hnk", context, params["key"])
    return softmax_weights(jnp.einsum("hk,hnk->hn", left, right))


def scalar_head_params(key: PRNGKey, heads: int, width: int, head_dim: int) -> Params:
    """Gaussian parameters of `scalar_heads`, with variance 1 / width."""
    check_positive(heads=heads, width=width, head_dim=head_dim)
    shapes = {"query": (heads, width, head_dim), "key": (heads, width, head_dim), "value": (heads, width)}
    keys = jax.random.split(key, 3)
    return {n: jax.random.normal(k, s) / width**0.5 for k, (n, s) in zip(keys, shapes.items(), strict=True)}


def rank_with_random_contexts(heads: int, width: int, head_dim: int) -> int:
    """H (2 d d_h - d_h^2 + d): the parameters of `scalar_heads` less the gauge GL(d_h) of every query-key pair.

    Derived here, for d_h <= d, generic parameters and enough generic contexts. Raises `ValueError` for sizes that are
    not positive, or d_h > d.
    """
    check_positive(heads=heads, width=width, head_dim=head_dim)
    check_range("head_dim", head_dim, 1, width, "More dimensions than the width add no rank: take the width.")
    return heads * (2 * width * head_dim - head_dim**2 + width)


def rank_with_shared_context(heads: int, width: int, head_dim: int, tokens: int) -> int:
    """H [rho (d + r - rho) + r] + (1 if n <= d), r = min(n - 1, d), rho = min(d_h, r), for one context of n tokens.

    Derived here, for generic parameters and enough generic queries. The centred context C X has rank r. A head sees its
    query-key matrix through the score differences C X W_K W_Q^T: matrices of rank rho with columns in a space of r
    dimensions and rows in one of d. Its values X w fill a space of min(n, d) dimensions: n <= d tokens can have any n
    values, and a shift of all of them adds the same constant in every head, which counts once: H (n - 1) + 1. Of n > d
    tokens the values are d numbers a head, among them no shift: H d.

    Raises `ValueError` for sizes that are not positive.
    """
    check_positive(heads=heads, width=width, head_dim=head_dim, tokens=tokens)
    differences = min(tokens - 1, width)
    rank = min(head_dim, differences)
    return heads * (rank * (width + differences - rank) + differences) + (tokens <= width)


def published_capacity(heads: int, tokens: int, head_dim: int) -> int:
    """H (min(n, d_h) - 1) + 1 examples that `heads` heads can memorize, a lower bound.

    The order, Omega(H min(n, d_h)), is that of Mahdavi, Liao, Thrampoulidis (arXiv 2306.02010). The constants follow
    from `readout_rank`, derived here, which is as large or larger. Raises `ValueError` for sizes that are not positive.
    """
    check_positive(heads=heads, tokens=tokens, head_dim=head_dim)
    return heads * (min(tokens, head_dim) - 1) + 1


def memorization_error(
    key: PRNGKey, shape: tuple[int, int, int], count: int, tokens: int = 5, evaluations: int = 1000
) -> float:
    """Mean squared error over mean square that `scalar_heads` reach on `count` random labels in random contexts.

    `shape` is (heads, width, head_dim). Levenberg-Marquardt in a trust region from a random start, with at most
    `evaluations` of the residual: an upper bound of the least error.

    Raises `ValueError` for sizes that are not positive.
    """
    check_key(key)
    check_positive(count=count, tokens=tokens, evaluations=evaluations)
    keys = jax.random.split(key, 4)
    contexts = jax.random.normal(keys[1], (count, tokens, shape[1]))
    data = (jax.random.normal(keys[0], (count, shape[1])), contexts), jax.random.normal(keys[2], (count,))
    start = ravel_pytree(scalar_head_params(keys[3], *shape))[0]
    residual, jacobian = (partial(each, shape) for each in (_residual, _residual_jacobian))
    end = scipy.optimize.least_squares(residual, start, jacobian, args=data, max_nfev=evaluations)
    return float(np.mean(end.fun**2) / np.mean(np.asarray(data[1]) ** 2))


@partial(jax.jit, static_argnums=0)
def _residual(shape: tuple[int, int, int], vector: Array, inputs: tuple[Array, Array], targets: Array) -> Array:
    unravel = ravel_pytree(scalar_head_params(jax.random.key(0), *shape))[1]
    return scalar_heads(unravel(vector), inputs) - targets


_residual_jacobian = jax.jit(jax.jacfwd(_residual, argnums=1), static_argnums=0)


def attention_features(params: Params, inputs: tuple[Float[Array, "m d"], Float[Array, "n d"]]) -> Float[Array, "m p"]:
    """The weights that every head gives the tokens of one context, side by side, (m, H n), from queries and context."""
    queries, context = inputs
    return jax.vmap(lambda query: _weights(params, query, context).ravel())(queries)


def readout_rank(heads: int, tokens: int) -> int:
    """H (n - 1) + 1, the rank of `attention_features` on enough generic queries.

    With fixed attention weights a layer with free values of every token and head is linear in them, and memorizes as
    many examples. Derived here: H vectors of n weights, of which each sums to one, are otherwise independent. Raises
    `ValueError` for sizes that are not positive.
    """
    check_positive(heads=heads, tokens=tokens)
    return heads * (tokens - 1) + 1
