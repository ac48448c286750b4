"""Operators made of operators: preconditioned by an optimizer, and the blocks off the diagonal."""

from collections import OrderedDict
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial
from jaxtyping import Array, Float

from attnlab.checks import check_finite, check_same_structure, is_concrete, lowest
from attnlab.curvature.operator import Operator
from attnlab.curvature.operators import Block
from attnlab.trees import Selection, dimension, leaf_names, select, zeros_like
from attnlab.types import Params, PyTree


def precondition(operator: Operator, preconditioner: Params) -> Operator:
    """P^-1/2 A P^-1/2 for the diagonal, positive P of an optimizer whose steps are -P^-1 gradient.

    It is symmetric and has the eigenvalues of P^-1 A, which decide the stability of the optimizer (Cohen et al.,
    arXiv 2207.14484). `preconditioner` is a pytree like all parameters; for the operator of a block its part is taken.
    Raises `ValueError` for another structure, an entry that is not finite and positive, or parameters without an entry,
    as of an optimizer that holds them fixed.
    """
    leaves = dict(zip(leaf_names(preconditioner), jax.tree.leaves(preconditioner), strict=True))
    if isinstance(operator.point, OrderedDict) and set(operator.point) <= set(leaves):
        preconditioner = OrderedDict((name, leaves[name]) for name in operator.point)
    names = leaf_names(operator.point)
    fixed = [name for name in names if name not in leaves]
    if fixed and set(leaves) <= set(names):
        raise ValueError(
            f"preconditioner has no entry for {', '.join(fixed)}, as of parameters which the optimizer holds fixed; "
            "expected an operator on those that it moves. Build that of their block: hessian(risk, params, block=...)."
        )
    check_same_structure("preconditioner", preconditioner, operator.point)
    check_finite("preconditioner", preconditioner)
    if is_concrete(preconditioner) and lowest(preconditioner) <= 0:
        raise ValueError("preconditioner has an entry that is zero or negative; expected positive ones. Raise eps.")
    factors = jax.tree.map(lambda leaf, x: jax.lax.rsqrt(leaf).astype(x.dtype), preconditioner, operator.point)
    return replace(operator, linear=Partial(_preconditioned, factors, operator.linear))


def _preconditioned(factors: Params, linear: Partial, vector: Params) -> Params:
    def scale(tree: Params) -> Params:
        return jax.tree.map(jnp.multiply, factors, tree)

    return scale(linear(scale(vector)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CrossBlock:
    """The rectangular block A[rows, columns] of an operator, as a pytree that crosses `jit`.

    Attributes:
        linear: from a dict of the column leaves to one of the row leaves.
        rows: the row leaves at the operator's point, by name.
        columns: the column leaves.
    """

    linear: Partial
    rows: OrderedDict[str, Array]
    columns: OrderedDict[str, Array]

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of rows and columns."""
        return dimension(self.rows), dimension(self.columns)

    def mv(self, vector: OrderedDict[str, Array]) -> OrderedDict[str, Array]:
        """The product with `vector`, like `columns`; raises `ValueError` if it is not."""
        check_same_structure("vector", vector, self.columns)
        return _apply(self.linear, vector)

    def dense(self) -> Float[Array, "rows columns"]:
        """The matrix, one product a column."""
        return _dense(self)

    @property
    def transpose(self) -> "CrossBlock":
        """The block A[columns, rows], which is this one's transpose, since A is symmetric."""
        taken = self.linear.func
        assert isinstance(taken, _Cross)
        return CrossBlock(Partial(_Cross(taken.columns, taken.rows), *self.linear.args), self.columns, self.rows)

    def gram(self) -> Operator:
        """B^T B, B this block, at two products each: its trace is ||B||_F^2, its largest eigenvalue ||B||_2^2."""
        return Operator(Partial(_composed, self.transpose.linear, self.linear), self.columns)


def cross(operator: Operator, rows: Block, columns: Block) -> CrossBlock:
    """The block of `operator` between two blocks of parameters, A[rows, columns], at one of its products each.

    The operator of their union alone, as in `hessian(risk, params, block=re.compile("query|key"))`, is cheaper than
    that of all parameters. Raises `ValueError` for an unknown block.
    """
    selected = select(operator.point, rows), select(operator.point, columns)
    linear = Partial(_Cross(*selected), operator.linear, zeros_like(operator.point))
    return CrossBlock(linear, *(selection.take(operator.point) for selection in selected))


@dataclass(frozen=True)
class _Cross:
    rows: Selection
    columns: Selection

    def __call__(self, linear: Partial, zeros: Params, vector: OrderedDict[str, PyTree]) -> OrderedDict[str, PyTree]:
        return self.rows.take(linear(self.columns.put(zeros, vector)))


def _composed(outer: Partial, inner: Partial, vector: Params) -> Params:
    return outer(inner(vector))


@jax.jit
def _apply(linear: Partial, vector: Params) -> Params:
    return linear(vector)


@jax.jit
def _dense(block: CrossBlock) -> Float[Array, "rows columns"]:
    flat, unravel = ravel_pytree(block.columns)
    columns = jax.lax.map(
        lambda vector: ravel_pytree(block.linear(unravel(vector)))[0], jnp.eye(flat.size, dtype=flat.dtype)
    )
    return columns.T
