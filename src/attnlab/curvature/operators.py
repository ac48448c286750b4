"""Symmetric linear operators on parameter pytrees: the Hessian of an objective and its two parts.

H = J^T (d2 loss / d outputs^2) J  +  sum_n (d loss / d outputs)_n d2 outputs_n / d params^2
  = GGN (outer-product part)       +  functional part.

Each is built by one jitted linearisation at the point, whose linear part is a pytree: data, weights and saved
activations travel as arguments, so that one compiled product serves every point of the same shapes.
"""

import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial
from jaxtyping import Array, Float

from attnlab.checks import check_same_structure
from attnlab.objective import Objective, check_objective, restrict_to
from attnlab.trees import Selection, block_slices, dimension, select, zeros_like
from attnlab.types import Params, PyTree

Block = str | re.Pattern[str]

DENSE_LIMIT_BYTES = 4 * 2**30


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Operator:
    """A symmetric linear map on parameters, as a pytree that crosses `jit`.

    Attributes:
        linear: the map; takes and returns a pytree like `point`.
        point: the parameters at which it was taken (its structure and shapes are those of its vectors).
    """

    linear: Partial
    point: Params

    @property
    def dimension(self) -> int:
        """Number of rows."""
        return dimension(self.point)

    def mv(self, vector: Params) -> Params:
        """The product with `vector`, a pytree like `point`; raises `ValueError` if it is not one."""
        check_same_structure("vector", vector, self.point)
        return _apply(self.linear, vector)

    def flat_mv(self, vector: Float[Array, " n"]) -> Float[Array, " n"]:
        """The product on flat vectors, in the flattening order of `point`. For jitted code: it is not jitted itself."""
        unravel = ravel_pytree(self.point)[1]
        return ravel_pytree(self.linear(unravel(vector)))[0]

    def dense(self) -> Float[Array, "n n"]:
        """The matrix, one product a row. Raises `ValueError` when it would take more than 4 GiB."""
        _check_dense_size(self)
        return _dense(self)

    def blocks(self) -> dict[tuple[str, str], Float[Array, "rows columns"]]:
        """The dense matrix cut at the leaves of the parameters: (row leaf, column leaf) -> block."""
        matrix, slices = self.dense(), block_slices(self.point)
        return {(row, column): matrix[slices[row], slices[column]] for row in slices for column in slices}

    def __add__(self, other: "Operator") -> "Operator":
        """The sum; both must act on parameters of one structure."""
        check_same_structure("the other operator's point", other.point, self.point)
        return Operator(Partial(_sum, self.linear, other.linear), self.point)

    def __rmul__(self, factor: float) -> "Operator":
        """The operator scaled by a number."""
        return Operator(Partial(_scaled, jnp.asarray(factor), self.linear), self.point)


def hessian(risk: Objective, params: Params, *, block: Block | None = None) -> Operator:
    """The Hessian of `risk` at `params`.

    With `block` (a name such as `query` or `layer_0/attention`, or a compiled regular expression) it is the diagonal
    block of the matching parameters, linearised in them alone: its vectors are dicts from leaf name to leaf.
    Raises `ValueError` for an unknown block or non-finite parameters, `TypeError` for a loss that is not a scalar.
    """
    risk, params = _prepare(risk, params, block)
    return Operator(_linearize_gradient(risk, params), params)


def ggn(risk: Objective, params: Params, *, block: Block | None = None) -> Operator:
    """The generalized Gauss-Newton matrix J^T (d2 loss / d outputs^2) J: the outer-product part H_o of the Hessian.

    Schraudolph (2002); H_o of Ormaniec, Dangel, Singh (arXiv 2410.10986). Arguments and errors as for `hessian`.
    """
    risk, params = _prepare(risk, params, block)
    return Operator(_linearize_ggn(risk, params), params)


def functional(risk: Objective, params: Params, *, block: Block | None = None) -> Operator:
    """The functional part H_f = H - GGN: the Hessian of <g, outputs> with g = d loss / d outputs held fixed.

    Its own product, not a difference: where H_f vanishes it is zero to rounding of H_f itself. Arguments and errors as
    for `hessian`.
    """
    risk, params = _prepare(risk, params, block)
    return Operator(_linearize_functional(risk, params), params)


PARTS = {"hessian": hessian, "ggn": ggn, "functional": functional}


def restrict(operator: Operator, rows: Block) -> Operator:
    """The diagonal block of any operator. For one of an objective, `hessian(risk, params, block=...)` costs less."""
    selection = select(operator.point, rows)
    linear = Partial(_Restricted(selection), operator.linear, zeros_like(operator.point))
    return Operator(linear, selection.take(operator.point))


def _prepare(risk: Objective, params: Params, block: Block | None) -> tuple[Objective, Params]:
    params = jax.tree.map(jnp.asarray, params)
    check_objective(risk, params)
    return (risk, params) if block is None else restrict_to(risk, params, select(params, block))


@jax.jit
def _linearize_gradient(risk: Objective, params: Params) -> Partial:
    _, linear = jax.linearize(jax.grad(risk), params)
    return _as_partial(linear)


@jax.jit
def _linearize_ggn(risk: Objective, params: Params) -> Partial:
    outputs, jacobian = jax.linearize(risk.outputs, params)
    loss_gradient = jax.grad(lambda outputs: risk.loss(outputs, risk.targets))
    _, loss_hessian = jax.linearize(loss_gradient, outputs)
    return Partial(_apply_ggn, _as_partial(jacobian), _as_partial(loss_hessian))


@jax.jit
def _linearize_functional(risk: Objective, params: Params) -> Partial:
    cotangent = jax.grad(risk.loss)(risk.outputs(params), risk.targets)
    return _linearize_gradient(Objective(risk.predict, Partial(_inner_product), risk.inputs, cotangent), params)


def _as_partial(linear: Callable) -> Partial:
    # jax.linearize returns its linear part as a Partial: a pytree of the saved intermediate values.
    assert isinstance(linear, Partial)
    return linear


def _apply_ggn(jacobian: Partial, loss_hessian: Partial, vector: Params) -> Params:
    transposed = jax.linear_transpose(jacobian, vector)
    return transposed(loss_hessian(jacobian(vector)))[0]


def _inner_product(left: PyTree, right: PyTree) -> jax.Array:
    products = jax.tree.map(jnp.vdot, left, right)
    return jax.tree.reduce(jnp.add, products)


def _sum(first: Partial, second: Partial, vector: Params) -> Params:
    return jax.tree.map(jnp.add, first(vector), second(vector))


def _scaled(factor: jax.Array, linear: Partial, vector: Params) -> Params:
    return jax.tree.map(lambda leaf: factor.astype(leaf.dtype) * leaf, linear(vector))


@dataclass(frozen=True)
class _Restricted:
    selection: Selection

    def __call__(self, linear: Partial, zeros: Params, block: OrderedDict[str, PyTree]) -> OrderedDict[str, PyTree]:
        return self.selection.take(linear(self.selection.put(zeros, block)))


@jax.jit
def _apply(linear: Partial, vector: Params) -> Params:
    return linear(vector)


@jax.jit
def _dense(operator: Operator) -> Float[Array, "n n"]:
    identity = jnp.eye(operator.dimension, dtype=ravel_pytree(operator.point)[0].dtype)
    return jax.lax.map(operator.flat_mv, identity)


def _check_dense_size(operator: Operator) -> None:
    n = operator.dimension
    needed = n * n * jnp.result_type(*jax.tree.leaves(operator.point)).itemsize
    if needed > DENSE_LIMIT_BYTES:
        raise ValueError(
            f"the dense matrix of dimension {n} takes {needed / 2**30:.1f} GiB; expected at most "
            f"{DENSE_LIMIT_BYTES / 2**30:.0f} GiB. Take a block of it, or its spectrum without forming it."
        )
