"""A symmetric linear operator on a parameter pytree, and its products, dense matrix and blocks."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding
from jax.tree_util import Partial
from jaxtyping import Array, Float

from attnlab.checks import check_same_structure
from attnlab.derivatives import FORWARD, Route
from attnlab.display import Words, line, listed, whatever_it_holds
from attnlab.local_devices import everywhere, local_sharding, side_by_side, together_again
from attnlab.sharding import Layout
from attnlab.trees import block_slices, dimension, power_of_two
from attnlab.types import Params, PRNGKey, PyTree

Draw = Callable[[PRNGKey, tuple[int, ...], jnp.dtype], jax.Array]
"""A function of `jax.random` such as `rademacher` or `normal`."""

DENSE_LIMIT_BYTES = 4 * 2**30
ROWS_AT_ONCE_BYTES = 12 * 2**20
"""About what a cache holds: more products at once wait for memory, fewer make the matrix products thin."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Operator:
    """A symmetric linear map on parameters, as a pytree that crosses `jit`.

    Attributes:
        linear: the map; takes and returns a pytree like `point`.
        point: the parameters at which it was taken (its structure and shapes are those of its vectors).
        route: in which order derivatives are taken. Forward over reverse, but for a model or loss with a
            `jax.custom_vjp` rule, which has no forward mode: reverse over reverse, at up to twice the cost.
        layout: how flat vectors lie on the devices, where the parameters are spread over them; None is in the order of
            the parameters.
    """

    linear: Partial
    point: Params
    route: Route = field(default=FORWARD, metadata={"static": True})
    layout: Layout | None = field(default=None, metadata={"static": True})

    @whatever_it_holds
    def __repr__(self) -> str:
        """Size, dtype and the blocks of the parameters."""
        blocks, dtype = Words(f"[{listed(block_slices(self.point))}]"), Words(self.flat_dtype)
        return line("Operator", dimension=self.dimension, dtype=dtype, blocks=blocks, layout=self.layout)

    @property
    def dimension(self) -> int:
        """Number of rows."""
        return dimension(self.point)

    def mv(self, vector: Params) -> Params:
        """The product with `vector`, a pytree like `point`; raises `ValueError` if it is not one."""
        check_same_structure("vector", vector, self.point)
        return apply(self.linear, vector)

    @property
    def flat_dtype(self) -> jnp.dtype:
        """The dtype of flat vectors: the widest of the parameters', and float32 at least."""
        return flat_dtype(self.point)

    @property
    def epsilon(self) -> float:
        """The machine epsilon of the coarsest floating-point dtype that takes part in a product: of the parameters, or
        of what the linearisation saved. Tolerances are made of it."""
        return max(float(jnp.finfo(dtype).eps) for dtype in _dtypes((self.point, self.linear)))

    @property
    def flat_size(self) -> int:
        """Length of flat vectors: the dimension, or that of the layout."""
        return self.dimension if self.layout is None else self.layout.size

    def flat_mv(self, vector: Float[Array, " n"]) -> Float[Array, " n"]:
        """The product on flat vectors, in the order of `ravel`. For jitted code: it is not jitted itself.

        Vectors are of `flat_dtype`; each leaf takes part in its own dtype. Where one of them is float16, whose smallest
        number is 6e-8, the vector is brought to entries of at most 1 for the product.
        """
        dtype = self.flat_dtype
        half = any(jnp.result_type(leaf) == jnp.float16 for leaf in jax.tree.leaves(self.point))
        size = power_of_two(jnp.max(jnp.abs(vector))) if half else jnp.ones((), dtype)
        image = self.linear(self.unravel(vector / size if half else vector))
        flat = self.ravel(image)
        return flat * size if half else flat

    def ravel(self, vector: Params) -> Float[Array, " n"]:
        """A pytree like `point` as a flat vector of `flat_dtype`: leaf after leaf, or as the `layout` says."""
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(self.flat_dtype), vector)
        return ravel_pytree(wide)[0] if self.layout is None else self.layout.ravel(wide)

    def unravel(self, vector: Float[Array, " n"]) -> Params:
        """The pytree like `point`, in its dtypes, of a flat vector."""
        leaves = wide_unravel(self)(vector)
        return jax.tree.map(lambda leaf, own: leaf.astype(jnp.result_type(own)), leaves, self.point)

    def sample(self, draw: Draw, key: PRNGKey) -> Float[Array, " n"]:
        """The flat vector of `draw(key, shape, dtype)`, the same one whatever the layout."""
        numbers = draw(key, (self.dimension,), self.flat_dtype)
        return numbers if self.layout is None else self.layout.ravel(wide_unravel(self.in_order())(numbers))

    def in_order(self) -> "Operator":
        """The operator with flat vectors in the order of the parameters, which no device holds a share of."""
        return replace(self, layout=None)

    def dense(self) -> Float[Array, "n n"]:
        """The matrix, one product a row, or at once where the map has a `dense` of its own (a closed form).

        Raises `ValueError` when it would take more than 4 GiB.
        """
        _check_dense_size(self)
        own = getattr(self.linear.func, "dense", None)
        return _dense_by_products(self.in_order()) if own is None else own(*self.linear.args)

    def blocks(self) -> dict[tuple[str, str], Float[Array, "rows columns"]]:
        """The dense matrix cut at the leaves of the parameters: (row leaf, column leaf) -> block."""
        matrix, slices = self.dense(), block_slices(self.point)
        return {(row, column): matrix[slices[row], slices[column]] for row in slices for column in slices}

    def __add__(self, other: "Operator") -> "Operator":
        """The sum; both must act on parameters of one structure."""
        check_same_structure("the other operator's point", other.point, self.point)
        return replace(self, linear=Partial(_sum, self.linear, other.linear))

    def __rmul__(self, factor: float) -> "Operator":
        """The operator scaled by a number."""
        return replace(self, linear=Partial(_scaled, jnp.asarray(factor), self.linear))


@dataclass(frozen=True)
class _Matrix:
    def __call__(self, matrix: Float[Array, "n n"], vector: Params) -> Params:
        flat, unravel = ravel_pytree(vector)
        return unravel((matrix @ flat.astype(matrix.dtype)).astype(flat.dtype))

    def dense(self, matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
        return matrix


def matrix_operator(matrix: Float[Array, "n n"], point: Params) -> Operator:
    """The operator of a symmetric matrix that is there already, in the order of the leaves of `point`.

    Raises `ValueError` for a matrix of another size.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnlab.curvature import matrix_operator
        >>> operator = matrix_operator(jnp.diag(jnp.array([1.0, 2.0])), {"a": jnp.zeros(1), "b": jnp.zeros(1)})
        >>> operator.mv({"a": jnp.ones(1), "b": jnp.ones(1)})["b"].tolist()
        [2.0]
    """
    size = dimension(point)
    if matrix.shape != (size, size):
        raise ValueError(f"matrix has shape {matrix.shape}; expected ({size}, {size}), as the point has parameters.")
    return Operator(Partial(_Matrix(), matrix), point)


def wide_unravel(operator: Operator) -> Callable[[Array], PyTree]:
    """Like `Operator.unravel`, in the dtype of flat vectors: a sum has more digits than its terms."""
    if operator.layout is not None:
        return operator.layout.unravel
    wide = jax.tree.map(lambda leaf: jnp.zeros(jnp.shape(leaf), operator.flat_dtype), operator.point)
    return ravel_pytree(wide)[1]


def flat_dtype(point: Params) -> jnp.dtype:
    """The dtype of flat vectors at a point: the widest of its leaves', and float32 at least."""
    wide = max(jnp.finfo(dtype).bits for dtype in _dtypes(point)) > 32
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def _sum(first: Partial, second: Partial, vector: Params) -> Params:
    return jax.tree.map(jnp.add, first(vector), second(vector))


def _scaled(factor: jax.Array, linear: Partial, vector: Params) -> Params:
    return jax.tree.map(lambda leaf: factor.astype(leaf.dtype) * leaf, linear(vector))


def _dtypes(tree: PyTree) -> list[jnp.dtype]:
    """Of the floating-point leaves."""
    found = {jnp.result_type(leaf) for leaf in jax.tree.leaves(tree)}
    return [dtype for dtype in found if jnp.issubdtype(dtype, jnp.floating)] or [jnp.dtype(jnp.float32)]


@jax.jit
def apply(linear: Partial, vector: Params) -> Params:
    """The product as one compiled program."""
    return linear(vector)


def _dense_by_products(operator: Operator) -> Float[Array, "n n"]:
    local = local_sharding(operator, operator.dimension)
    if local is None:
        return _dense(operator, None)
    return together_again(_dense(everywhere(operator, local), local), operator)


@jax.jit(static_argnames=("sharding",))
def _dense(operator: Operator, sharding: NamedSharding | None) -> Float[Array, "n n"]:
    def rows(operator: Operator, identity: Float[Array, "rows n"]) -> Float[Array, "rows n"]:
        return jax.lax.map(operator.flat_mv, identity, batch_size=_rows_at_once(operator))

    over_devices = rows if sharding is None else side_by_side(rows, sharding)
    return over_devices(operator, jnp.eye(operator.dimension, dtype=operator.flat_dtype))


def _rows_at_once(operator: Operator) -> int:
    """As many products as keep the changes of the saved activations, one set each, within `ROWS_AT_ONCE_BYTES`."""
    saved = sum(leaf.nbytes for leaf in jax.tree.leaves(operator.linear))
    return max(1, min(ROWS_AT_ONCE_BYTES // max(saved, 1), operator.dimension))


def _check_dense_size(operator: Operator) -> None:
    n = operator.dimension
    needed = n * n * jnp.result_type(*jax.tree.leaves(operator.point)).itemsize
    if needed > DENSE_LIMIT_BYTES:
        raise ValueError(
            f"the dense matrix of dimension {n} takes {needed / 2**30:.1f} GiB; expected at most "
            f"{DENSE_LIMIT_BYTES / 2**30:.0f} GiB. Take a block of it, or its spectrum without forming it."
        )
