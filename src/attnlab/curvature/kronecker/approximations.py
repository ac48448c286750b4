"""K-FAC, EKFAC, the nearest Kronecker product, Shampoo and SOAP as operators: one row of a table each.

Each takes the pseudo-gradients G_bk of one weight, whose second moment F = sum_bk vec(G_bk) vec(G_bk)^T is its exact
block of the Gauss-Newton matrix (of the Fisher information, for a negative log-likelihood), and gives a block in a
basis of Kronecker products.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.checks import check_names
from attnlab.curvature.kronecker.factors import KroneckerApproximation, KroneckerBlock
from attnlab.curvature.kronecker.pseudo_gradients import PseudoGradients, pseudo_gradients, selection_of
from attnlab.curvature.operators import Block
from attnlab.krylov.leading import leading_eigenvector, positive
from attnlab.objectives import Objective
from attnlab.types import Params

Approximate = Callable[[PseudoGradients], KroneckerBlock]


def product(left: Float[Array, "m m"], right: Float[Array, "n n"]) -> KroneckerBlock:
    """The eigenvalues and the basis of left (x) right; both positive semidefinite."""
    (low, left_basis), (high, right_basis) = (_eigh(factor) for factor in (left, right))
    return KroneckerBlock(left_basis, right_basis, jnp.outer(low, high))


def corrected(block: KroneckerBlock, pseudo: PseudoGradients) -> KroneckerBlock:
    """The block in the same basis whose eigenvalues are nearest to F: its diagonal there, sum_bk (U^T G_bk V)^2."""
    values = pseudo.total(lambda matrices: jnp.sum(block.coordinates(matrices) ** 2, axis=0))
    return KroneckerBlock(block.left, block.right, values)


def kfac(pseudo: PseudoGradients) -> KroneckerBlock:
    """K-FAC: the mean of a a^T over examples and positions, times the sum of g g^T.

    Martens, Grosse (arXiv 1503.05671); with several positions the `expand` form of Eschenhagen et al. (arXiv
    2311.00636). Exact for independent a and g, where positions do not interact.
    """
    inputs = jnp.einsum("bti,btj->ij", pseudo.inputs, pseudo.inputs)
    inputs = inputs / (pseudo.inputs.shape[0] * pseudo.inputs.shape[1])
    slopes = jnp.einsum("kbto,kbtp->op", pseudo.slopes, pseudo.slopes)
    return product(slopes, inputs) if pseudo.turned else product(inputs, slopes)


def kfac_reduce(pseudo: PseudoGradients) -> KroneckerBlock:
    """The `reduce` form of K-FAC, for positions that one output sums over: of the mean of a and the sum of g over the
    positions of an example (Eschenhagen et al., arXiv 2311.00636)."""
    mean, total = jnp.mean(pseudo.inputs, axis=1), jnp.sum(pseudo.slopes, axis=2)
    inputs = jnp.einsum("bi,bj->ij", mean, mean) / mean.shape[0]
    slopes = jnp.einsum("kbo,kbp->op", total, total)
    return product(slopes, inputs) if pseudo.turned else product(inputs, slopes)


def ekfac(pseudo: PseudoGradients) -> KroneckerBlock:
    """EKFAC: K-FAC's basis, and in it the diagonal of F (George et al., arXiv 1806.03884)."""
    return corrected(kfac(pseudo), pseudo)


def kfoc(pseudo: PseudoGradients) -> KroneckerBlock:
    """The Kronecker product that is nearest to F in Frobenius norm (Van Loan, Pitsianis 1993; KFOC of Schnaus, Lee,
    Triebel 2021): the leading singular pair of L = sum_bk G R G^T, R = sum_bk G^T L G, by a restarted Krylov
    iteration from the identity, which keeps both factors positive semidefinite."""
    size = pseudo.matrices(pseudo.slopes[0]).shape[-1]
    to_left = lambda right: pseudo.total(lambda g: jnp.einsum("bij,jk,blk->il", g, right, g))  # noqa: E731
    to_right = lambda left: pseudo.total(lambda g: jnp.einsum("bji,jk,bkl->il", g, left, g))  # noqa: E731
    gram = lambda flat: to_right(to_left(flat.reshape(size, size))).ravel()  # noqa: E731
    identity = jnp.eye(size, dtype=pseudo.slopes.dtype)
    vector, _ = leading_eigenvector(gram, identity.ravel(), float(jnp.finfo(identity.dtype).eps) ** 0.75)
    right = vector.reshape(size, size)
    right = right * jnp.where(jnp.trace(right) < 0, -1, 1)
    # For a unit right factor the best left one is the image: |F - L (x) R|^2 = |F|^2 - |L|^2.
    return product(to_left(right), right)


def shampoo(pseudo: PseudoGradients) -> KroneckerBlock:
    """Shampoo: L^1/2 (x) R^1/2 with L = sum_bk G G^T and R = sum_bk G^T G, whose root L^1/4 (x) R^1/4 the optimizer
    divides by; of a bias R itself, as of any tensor of one axis (Gupta, Koren, Singer, arXiv 1802.09568)."""
    left, right = _sides(pseudo)
    return product(jnp.ones((1, 1), right.dtype), right) if pseudo.bias else product(_root(left), _root(right))


def shampoo_squared(pseudo: PseudoGradients) -> KroneckerBlock:
    """Shampoo with the exponent 1: L (x) R / trace L, one step of the power iteration of `kfoc` from the identity
    (Morwani et al., arXiv 2406.17748)."""
    left, right = _sides(pseudo)
    return product(left / positive(jnp.trace(left)), right)


def soap(pseudo: PseudoGradients) -> KroneckerBlock:
    """SOAP: the basis of Shampoo, and in it the diagonal of F, whose root the optimizer divides by (Vyas et al., arXiv
    2409.11321; Adam in Shampoo's basis)."""
    return corrected(product(*_sides(pseudo)), pseudo)


APPROXIMATIONS: dict[str, Approximate] = {
    "kfac": kfac,
    "kfac_reduce": kfac_reduce,
    "ekfac": ekfac,
    "kfoc": kfoc,
    "shampoo": shampoo,
    "shampoo_squared": shampoo_squared,
    "soap": soap,
}


def kronecker_approximation(
    name: str, risk: Objective, params: Params, *, block: Block | None = None
) -> KroneckerApproximation:
    """A Kronecker approximation of the Gauss-Newton matrix, weight by weight: a row of `APPROXIMATIONS`.

    Kernels W are (in, out) as they stand in x @ W, in any module that `predict` calls, attention projections
    included; a bias is a block of its own. With `block` those of the matching leaves alone, by name, as in
    `ggn(risk, params, block=...)`, whose diagonal blocks it approximates and whose scale it has. All expectations over
    labels are taken exactly, for as many gradients as an example has outputs: see `pseudo_gradients`. Positions with a
    weight of zero count in K-FAC's mean of a a^T all the same.

    Raises `ValueError` for an unknown name, a weight that is no kernel or bias of a dense layer (it is named; `block`
    leaves it out), examples that are not independent, or more than 4 GiB of output slopes; `TypeError` for another loss
    than `square_loss` and `cross_entropy`.

    Example:
        >>> import attnlab as al
        >>> import jax
        >>> from flax import linen as nn
        >>> from attnlab.curvature.kronecker import kronecker_approximation
        >>> model, inputs = nn.Dense(2, use_bias=False), jax.random.normal(jax.random.key(0), (8, 3), "float32")
        >>> params = model.init(jax.random.key(1), inputs)["params"]
        >>> risk = al.objective(al.from_linen(model), al.square_loss, inputs, inputs[:, :2])
        >>> found = kronecker_approximation("kfac", risk, params)
        >>> exact = al.ggn(risk, params).dense()  # of one layer under the square loss K-FAC is exact
        >>> bool(abs(found.operator.dense() - exact).max() < 1e-5)
        True
        >>> step = found.solve(jax.grad(risk)(params), damping=1e-3)
        >>> bool(risk(jax.tree.map(lambda w, d: w - d, params, step)) < risk(params))
        True
    """
    check_names("Kronecker approximation", [name], APPROXIMATIONS)
    params = jax.tree.map(jnp.asarray, params)
    selection = selection_of(params, block)
    found = pseudo_gradients(risk, params, selection)
    point = params if block is None else selection.take(params)
    return approximate(name, tuple(found.values()), point)


def approximate(name: str, found: tuple[PseudoGradients, ...], point: Params) -> KroneckerApproximation:
    """The same from pseudo-gradients in the order of the leaves of `point`, for several approximations of one point."""
    return KroneckerApproximation(tuple(_block(name, pseudo) for pseudo in found), point, name)


@jax.jit(static_argnums=0)
def _block(name: str, pseudo: PseudoGradients) -> KroneckerBlock:
    return APPROXIMATIONS[name](pseudo)


def _sides(pseudo: PseudoGradients) -> tuple[Array, Array]:
    return pseudo.total(lambda g: (jnp.einsum("bij,bkj->ik", g, g), jnp.einsum("bji,bjk->ik", g, g)))


def _root(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    values, basis = _eigh(matrix)
    return jnp.einsum("ik,k,jk->ij", basis, jnp.sqrt(values), basis)


def _eigh(matrix: Float[Array, "n n"]) -> tuple[Array, Array]:
    """Eigenvalues, none below zero but for rounding, which is cut off, and the basis."""
    values, basis = jnp.linalg.eigh((matrix + matrix.T) / 2)
    return jnp.maximum(values, 0), basis
