"""Claims about the Hessian through the product of queries and keys, and in one merged matrix, by autodiff.

Source: Ormaniec, Dangel, Singh, arXiv 2410.10986.
"""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from attnlab.attention import attention_hessian
from attnlab.claims.instances import (
    LINEAR,
    PAPER,
    SOFTMAX,
    WIDTH,
    instance,
    layer_objective,
)
from attnlab.claims.registry import claim
from attnlab.curvature import ggn, hessian
from attnlab.expectation import Expectation, at_least, at_most, equal
from attnlab.losses import square_loss
from attnlab.models.adapters import from_linen
from attnlab.models.attention import SelfAttention
from attnlab.objectives import objective
from attnlab.types import PRNGKey


class ThroughProduct(NamedTuple):
    """The Hessian in (W_Q, W_K) minus J^T U J, with U the Hessian in the product M = W_Q W_K^T and J the Jacobian of
    that product; J^T U J itself; U; and the gradient in M."""

    remainder: Array
    chained: Array
    inner: Array
    gradient: Array


def query_key_remainder(key: PRNGKey) -> ThroughProduct:
    """How the Hessian passes through the product of queries and keys, by autodiff."""
    merged = replace(SOFTMAX, merged=True)
    params, inputs, targets = instance(key, SOFTMAX)
    factors = {name: params[name] for name in ("key", "query")}
    predict = from_linen(SelfAttention(merged))

    def of_product(product: Array) -> Array:
        outputs = predict({"query_key": product, "value": params["value"]}, inputs)
        return square_loss(outputs, targets)

    flat, unravel = ravel_pytree(factors)

    def product(vector: Array) -> Array:
        pair = unravel(vector)
        return pair["query"] @ pair["key"].T

    point = product(flat)
    size = point.size
    jacobian = jax.jacobian(product)(flat).reshape(size, flat.size)
    inner = jax.hessian(of_product)(point).reshape(size, size)
    whole = jax.hessian(lambda vector: of_product(product(vector)))(flat)
    chained = jacobian.T @ inner @ jacobian
    return ThroughProduct(whole - chained, chained, inner, jax.grad(of_product)(point))


@claim(
    statement=r"H = J^\top U J + \begin{pmatrix}0 & B\\ B^\top & 0\end{pmatrix} \otimes I_k \text{ in } (W_Q, W_K):"
    r" \text{ the second term has eigenvalues } \pm s_i(B), \text{ each } k \text{ times},\ B = \partial\ell/\partial(W_Q W_K^\top)",
    source=f"{PAPER}, section 3, and the chain rule; derived here",
    tolerance=1e-10,
    because="an identity in float64; U by autodiff in the merged matrix",
    slow=True,
)
def separate_query_and_key_add_paired_eigenvalues(key: PRNGKey) -> Expectation:
    """What separate query and key matrices add to the curvature of their product."""
    found = jax.jit(query_key_remainder)(key)
    singular = jnp.linalg.svd(found.gradient, compute_uv=False)
    predicted = jnp.sort(jnp.repeat(jnp.concatenate([singular, -singular]), SOFTMAX.key_dim))
    return equal("eigenvalues of H - J^T U J", jnp.linalg.eigvalsh(found.remainder), predicted, unit="relative")


@claim(
    statement=r"U = \partial^2 \ell / \partial(W_Q W_K^\top)^2 \text{ is itself indefinite for softmax}",
    source=f"{PAPER}, theorem 3.2 for one matrix W_QK: third moments have no sign",
    because="beyond zero by more than rounding: 1e-6 of the largest, of either sign",
)
def the_curvature_in_the_product_is_indefinite(key: PRNGKey) -> list[Expectation]:
    """Extreme eigenvalues of the Hessian in the product of queries and keys, by autodiff, over the largest."""
    eigenvalues = np.linalg.eigvalsh(jax.jit(query_key_remainder)(key).inner)
    relative = eigenvalues / np.abs(eigenvalues).max()
    return [
        at_most("lowest over largest |eigenvalue|", relative[0], -1e-6),
        at_least("highest over largest |eigenvalue|", relative[-1], 1e-6),
    ]


@claim(
    statement=r"H_f[QK, QK] = \tau^2 \sum_i x_i x_i^\top \otimes \hat\kappa_i \text{ for one matrix } W_{QK}:"
    r" \text{ no term } B \otimes I;\ 0 \text{ for linear attention}",
    source=f"{PAPER}, theorem 3.2; for one merged matrix derived here",
    tolerance=1e-10,
    because="an identity in float64; measured as H - GGN by autodiff",
    slow=True,
)
def a_merged_matrix_has_no_paired_eigenvalues(key: PRNGKey) -> Expectation:
    """Functional curvature of a merged query-key matrix, over the norm of its Gauss-Newton block."""
    predicted, measured = [], []
    for config in (SOFTMAX, LINEAR):
        merged = replace(config, merged=True)
        params, inputs, targets = instance(key, merged)
        risk = objective(from_linen(SelfAttention(merged)), square_loss, inputs, targets)
        whole, outer = (part(risk, params, block="query_key", check=False).dense() for part in (hessian, ggn))
        exact = attention_hessian(layer_objective(merged, inputs, targets), params)
        third = exact.moments.third_along(jnp.einsum("av,biv->bia", params["value"], exact.gradient)[:, None])[0, 0]
        x = merged.score_scale * inputs
        terms = jnp.einsum("ir,is,icd->rcsd", x, x, third).reshape(whole.shape)
        size = jnp.linalg.norm(outer)
        predicted.append(terms / size if config is SOFTMAX else jnp.zeros_like(terms))
        measured.append((whole - outer) / size)
    return equal(
        "H - GGN over ||GGN||: softmax and linear attention", jnp.stack(measured), jnp.stack(predicted), unit="relative"
    )


@claim(
    statement=r"\mathrm{rank}\,J = 2kd - k^2 \text{ for } k < d,\ \text{ and } \mathrm{rank}(J^\top U J) = \mathrm{rank}\,J"
    r"\text{ where } U \text{ has full rank } d^2;\ \text{ the whole Hessian is beyond it}",
    source="dimension of the matrices of rank k; derived here",
    tolerance=0.0,
    because="counts of eigenvalues above 1e-13 of the largest, between some 1e-11 and 1e-16; 21 of 30 parameters and 25 entries of "
    "the product. The control, the Hessian with its second term, has rank 30",
)
def curvature_through_the_product_is_rank_deficient(key: PRNGKey) -> Expectation:
    """Ranks of the curvature that passes through the product W_Q W_K^T, of that in the product, and of the whole."""
    found = jax.jit(query_key_remainder)(key)
    width = SOFTMAX.key_dim
    matrices = found.chained, found.inner, found.chained + found.remainder
    ranks = [np.linalg.matrix_rank(matrix, rtol=1e-13, hermitian=True) for matrix in matrices]
    return equal(
        "ranks: through the product, in the product, of the whole",
        ranks,
        [2 * width * WIDTH - width**2, WIDTH**2, 2 * width * WIDTH],
    )
