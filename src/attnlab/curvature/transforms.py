"""Operators made of operators: preconditioned by an optimizer, and the blocks off the diagonal."""

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial
from jaxtyping import Array, Float

from attnlab.checks import check_finite, check_same_structure, is_concrete, lowest
from attnlab.curvature.operators import Block, Operator
from attnlab.trees import Selection, dimension, leaf_names, select, zeros_like
from attnlab.types import Params, PyTree


def precondition(operator: Operator, preconditioner: Params) -> Operator:
    """P^-1/2 A P^-1/2 for the diagonal, positive P of an optimizer whose steps are -P^-1 gradient.

    It is symmetric and has the eigenvalues of P^-1 A, which decide the stability of the optimizer (Cohen et al.,
    arXiv 2207.14484). `preconditioner` is a pytree like all parameters; for the operator of a block its part is taken.
    Raises `ValueError` for another structure, an entry that is not finite and positive, or parameters that the
    optimizer holds fixed.
    """
    leaves = dict(zip(leaf_names(preconditioner), jax.tree.leaves(preconditioner), strict=True))
    if isinstance(operator.point, OrderedDict) and set(operator.point) <= set(leaves):
        preconditioner = OrderedDict((name, leaves[name]) for name in operator.point)
    fixed = [name for name in leaf_names(operator.point) if name not in leaves]
    if fixed and _holds_fixed(preconditioner):
        raise ValueError(
            f"preconditioner has no entry for {', '.join(fixed)}, which the optimizer holds fixed; expected an "
            "operator on the parameters that it moves. Build that of their block: hessian(risk, params, block=...)."
        )
    check_same_structure("preconditioner", preconditioner, operator.point)
    check_finite("preconditioner", preconditioner)
    if is_concrete(preconditioner) and lowest(preconditioner) <= 0:
        raise ValueError("preconditioner has an entry that is zero or negative; expected positive ones. Raise eps.")
    factors = jax.tree.map(lambda leaf, x: jax.lax.rsqrt(leaf).astype(x.dtype), preconditioner, operator.point)
    return replace(operator, linear=Partial(_preconditioned, factors, operator.linear))


def _is_masked(node: PyTree) -> bool:
    return isinstance(node, optax.MaskedNode)


def _holds_fixed(preconditioner: Params) -> bool:
    return any(map(_is_masked, jax.tree.leaves(preconditioner, is_leaf=_is_masked)))


def _preconditioned(factors: Params, linear: Partial, vector: Params) -> Params:
    def scale(tree: Params) -> Params:
        return jax.tree.map(jnp.multiply, factors, tree)

    return scale(linear(scale(vector)))


def adam_preconditioner(
    state: optax.OptState, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, eps_root: float = 0.0
) -> Params:
    """P of Adam or AdamW from its optax state after a step: P = (1 - b1^t) (sqrt(nu / (1 - b2^t) + eps_root) + eps).

    Adam moves by -learning_rate m / P, with m the plain moving average of the gradients (m's own bias correction is the
    factor 1 - b1^t). The hyperparameters, which the state does not hold, are named and preset as in `optax.adam`.

    Of an optimizer of several groups (`optax.partition`) each group's own state counts; a group with hyperparameters of
    its own has its P from its `inner_states[label]`. Parameters that no Adam moves have no entry: take the operator of
    the block that is moved. Raises `ValueError` where `state` holds no Adam state, one before the first step, or two of
    one parameter.
    """

    def preconditioner(adam: optax.ScaleByAdamState) -> Params:
        if is_concrete(adam.count) and int(adam.count) == 0:
            raise ValueError("the Adam state has taken no step; expected at least one: before it, P is zero.")

        def entry(nu: Array) -> Array:
            count = adam.count.astype(nu.dtype)
            corrected = nu / (1 - jnp.asarray(b2, nu.dtype) ** count)
            return (1 - jnp.asarray(b1, nu.dtype) ** count) * (jnp.sqrt(corrected + eps_root) + eps)

        return jax.tree.map(entry, adam.nu)

    return _of_groups([preconditioner(adam) for adam in _find(state, optax.ScaleByAdamState)])


def rmsprop_preconditioner(state: optax.OptState, *, eps: float = 1e-8, eps_in_sqrt: bool = True) -> Params:
    """P of RMSProp from its optax state after a step: sqrt(nu + eps), or sqrt(nu) + eps unless `eps_in_sqrt`.

    The hyperparameters are named and preset as in `optax.rmsprop`, without `bias_correction`. Raises `ValueError` where
    `state` holds no RMSProp state. Several groups as of `adam_preconditioner`.
    """
    nu = _of_groups([part.nu for part in _find(state, optax.ScaleByRmsState)])
    return jax.tree.map(lambda leaf: jnp.sqrt(leaf + eps) if eps_in_sqrt else jnp.sqrt(leaf) + eps, nu)


def _find(state: optax.OptState, kind: type) -> list[Any]:
    """The parts of a composed optax state that are of this `kind`: one, or one for each group of parameters."""
    parts = [part for part in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kind)) if isinstance(part, kind)]
    if not parts:
        raise ValueError(
            f"the optimizer state holds no part of type {kind.__name__}; expected one, or one for each group of "
            "parameters. Pass the state that optimizer.update returned."
        )
    return parts


def _of_groups(parts: list[Params]) -> Params:
    """One tree from those of several groups, each of which masks the parameters of the others."""

    def join(path: tuple, *entries: PyTree) -> PyTree:
        held = [entry for entry in entries if not _is_masked(entry)]
        if len(held) > 1:
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"the optimizer state holds {len(held)} parts that move {where}; expected one for each parameter. Pass "
                "the part that is meant."
            )
        return held[0] if held else entries[0]

    return jax.tree.map_with_path(join, *parts, is_leaf=_is_masked)


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
