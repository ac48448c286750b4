"""The nearest Kronecker product to a block, matrix-free (Van Loan and Pitsianis 1993)."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.attention.kronecker import KroneckerSum, Pairing, brought_to_scale, times_power
from attnlab.krylov.leading import leading_eigenvector, positive


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NearestKronecker:
    """The product `left ⊗ right` and how far the block is from it.

    Attributes:
        left: factor of the first pair of axes, of the same norm as `right`, with a trace that is not negative.
        right: factor of the second pair.
        relative_error: ||block - left ⊗ right|| / ||block|| in Frobenius norm. Exact for the returned factors, whatever
            the iteration did, down to the square root of the rounding error; 0 for the zero block.
        residual: relative residual of the singular pair; small where `left ⊗ right` is the nearest product.
        pairing: which axes the factors pair.
    """

    left: Float[Array, "p pp"]
    right: Float[Array, "q qp"]
    relative_error: Float[Array, ""]
    residual: Float[Array, ""]
    pairing: Pairing = field(metadata={"static": True})


@jax.jit(static_argnames=("pairing",))
def nearest_kronecker(
    block: KroneckerSum, *, pairing: Pairing = "straight", tolerance: float | None = None
) -> NearestKronecker:
    """Best approximation of `block` by one Kronecker product, the K-FAC form.

    The block rearranged with one pair of axes as rows and the other pair as columns is a matrix R, of which a Kronecker
    product is a rank-one piece: the answer is R's leading singular pair, found by a restarted Krylov iteration on R^T R
    with products that cost no more than `block.mv`. `straight` pairs rows with rows and columns with columns of the two
    parameters (what K-FAC does), `crossed` rows with columns. Iterates until the relative residual is `tolerance`
    (default: the rounding error to the power 3/4), at most 50 times.

    Example:
        >>> import attnlab as al
        >>> import jax
        >>> layer = al.SelfAttention(al.AttentionConfig(key_dim=2, value_dim=3))
        >>> tokens = jax.random.normal(jax.random.key(0), (1, 4, 3))
        >>> params = layer.init(jax.random.key(1), tokens)["params"]
        >>> risk = al.objective(al.from_linen(layer), al.square_loss, tokens, 0 * tokens)
        >>> block = al.attention_hessian(risk, params).block("value", "value")
        >>> bool(al.nearest_kronecker(block).relative_error < 1e-3)  # one product already
        True
    """
    tolerance = float(jnp.finfo(block.dtype).eps) ** 0.75 if tolerance is None else tolerance
    (block,), exponent = brought_to_scale(block)
    left_axes, right_axes = ("".join(block.axes(side, pairing)) for side in (0, 1))
    size = block.zeros(right_axes)
    to_left = lambda y: block.contract(y, right_axes, left_axes)  # noqa: E731
    to_right = lambda x: block.contract(x, left_axes, right_axes)  # noqa: E731
    gram = lambda y: to_right(to_left(y.reshape(size.shape))).ravel()  # noqa: E731
    start = jax.random.normal(jax.random.key(0), (size.size,), size.dtype)
    vector, residual = leading_eigenvector(gram, start, tolerance)

    unit = to_left(vector.reshape(size.shape))
    unit = unit / positive(jnp.linalg.norm(unit.ravel()))
    # For a unit a the best right factor is R^T a, and ||R - a (R^T a)^T||^2 = ||R||^2 - ||R^T a||^2: exact for any a.
    other = to_right(unit)
    scale, norm = jnp.linalg.norm(other.ravel()), block.norm()
    error = jnp.where(norm > 0, jnp.sqrt(jnp.maximum(1 - (scale / positive(norm)) ** 2, 0)), 0)
    # Half of the exponent for each factor; where it is odd, the root of two keeps their norms alike.
    odd = jnp.where(exponent % 2, 2**0.5, 1).astype(size.dtype)
    left = block.merged(times_power(odd * unit * jnp.sqrt(scale), exponent // 2), 0, pairing)
    right = block.merged(times_power(odd * other / positive(jnp.sqrt(scale)), exponent // 2), 1, pairing)
    sign = jnp.where(jnp.trace(left) < 0, -1, 1).astype(left.dtype)
    return NearestKronecker(sign * left, sign * right, error, residual, pairing)
