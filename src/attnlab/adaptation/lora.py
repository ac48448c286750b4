"""Low-rank adaptation: chosen matrices become W + B A with B (m x r) and A (r x n) the only parameters.

Hu et al., arXiv 2106.09685. At B = 0 the gradient in A vanishes and the Hessian in (B, A) is

    [[ (I x A) H_W (I x A)^T,  C ],  [ C^T, 0 ]],   C: dA -> G dA^T,   G = d risk / d W,

so every LoRA starts at a strict saddle unless G = 0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from attnlab.checks import check_positive, check_range
from attnlab.trees import select
from attnlab.types import Params, PRNGKey

Factors = dict[str, dict[str, jax.Array]]


def lora(params: Params, block: str, rank: int, key: PRNGKey) -> tuple[Partial, Factors]:
    """The change of parameters and its start, for the matrices that belong to `block` (see `attnlab.trees`).

    Returns `change(factors) -> params` and the factors {leaf: {"B": zeros (m, r), "A": N(0, 1/r) (r, n)}}, ready for
    `reparametrise(risk, change)`: `hessian(reparametrise(risk, change), factors)` is the Hessian of a LoRA'd model.
    Raises `ValueError` for an unknown block, a leaf that is not a matrix, or a rank that is not
    positive or above that of a matrix.
    """
    check_positive(rank=rank)
    selection = select(params, block)
    factors: Factors = {}
    for number, (name, matrix) in enumerate(selection.take(params).items()):
        if jnp.ndim(matrix) != 2:
            raise ValueError(f"{name} has shape {jnp.shape(matrix)}; LoRA adapts matrices. Name a narrower block.")
        rows, columns = matrix.shape
        check_range("rank", rank, 1, min(rows, columns), f"{name} has shape {matrix.shape}, and no higher rank.")
        right = jax.random.normal(jax.random.fold_in(key, number), (rank, columns), matrix.dtype) / rank**0.5
        factors[name] = {"B": jnp.zeros((rows, rank), matrix.dtype), "A": right}

    def change(params: Params, factors: Factors) -> Params:
        adapted = selection.take(params)
        for name, factor in factors.items():
            adapted[name] = adapted[name] + factor["B"] @ factor["A"]
        return selection.put(params, adapted)

    return Partial(change, params), factors


def initial_hessian(
    curvature: Float[Array, "mn mn"], gradient: Float[Array, "m n"], right: Float[Array, "r n"]
) -> Float[Array, "k k"]:
    """The Hessian in (A, B), flattened by rows, at B = 0 from H_W, G and A: block by block, k = r (n + m).

    Derived here. dW = dB A is vec(dW) = (I_m x A^T) vec(dB), so H_BB = (I_m x A) H_W (I_m x A^T) with no second-order
    part, for W is linear in B; <G, dB dA> = sum_irj dB_ir dA_rj G_ij gives the block of A_rj and B_is G_ij [r = s];
    A alone moves nothing while B = 0.
    """
    rows, rank = gradient.shape[0], right.shape[0]
    through = jnp.kron(jnp.eye(rows, dtype=right.dtype), right)
    across = jnp.einsum("ij,rs->rjis", gradient, jnp.eye(rank, dtype=right.dtype)).reshape(right.size, -1)
    nothing = jnp.zeros((right.size, right.size), right.dtype)
    return jnp.block([[nothing, across], [across.T, through @ curvature @ through.T]])


class Inertia(NamedTuple):
    """Numbers of negative, zero and positive eigenvalues."""

    negative: int
    zero: int
    positive: int


def initial_inertia(shape: tuple[int, int], rank: int, gradient_rank: int) -> Inertia:
    """Signs of the Hessian of one LoRA'd m x n matrix at B = 0, where H_W is positive definite and A has full rank.

    Derived here. C has rank r rank(G) and kernel r (n - rank G); on the kernel of C^T the first block is positive
    definite, so by Sylvester's law there are r rank(G) negative eigenvalues, r (n - rank G) zeros and r m positive
    ones: r rank(G) with the negative ones, r (m - rank G) of the kernel.
    """
    rows, columns = shape
    return Inertia(rank * gradient_rank, rank * (columns - gradient_rank), rank * rows)


def inertia(eigenvalues: np.ndarray, tolerance: float = 1e-10) -> Inertia:
    """Signs of a spectrum; below `tolerance` of the largest magnitude an eigenvalue counts as zero."""
    small = tolerance * np.max(np.abs(eigenvalues))
    signs = np.where(np.abs(eigenvalues) <= small, 0, np.sign(eigenvalues))
    return Inertia(*(int(np.sum(signs == sign)) for sign in (-1, 0, 1)))


def certificate(gradient: Float[Array, "m n"], penalty: float) -> Float[Array, ""]:
    """||G||_op / penalty: at most 1 certifies a stationary (B, A) of risk(B A) + penalty/2 (||B||^2 + ||A||^2).

    For a convex risk with gradient G at W = B A. The penalty is that of the nuclear norm, whose subgradients have
    operator norm at most 1; where stationarity gives G A^T = -penalty B and B^T G = -penalty A, that bound alone is
    missing for W to be the global minimum over matrices of every rank.
    """
    return jnp.linalg.norm(gradient, ord=2) / penalty
