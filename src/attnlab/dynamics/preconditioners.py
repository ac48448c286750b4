"""Preconditioners of optimizers: parameter by parameter a diagonal, or one in a rotated basis of a matrix.

P is a pytree like the parameters whose entries are arrays, P's diagonal, or `KroneckerBlock`s: P = Q diag(p) Q^T with
Q = U (x) V of Shampoo's and SOAP's bases. P^-1 and P^-1/2 are P's with other eigenvalues.
"""

from collections.abc import Callable
from dataclasses import replace

import jax
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array

from attnlab.checks import check_finite, is_concrete
from attnlab.curvature.kronecker.factors import KroneckerBlock
from attnlab.curvature.operator import Operator
from attnlab.curvature.transforms import precondition
from attnlab.types import Params, PyTree

Preconditioner = PyTree
"""Like the parameters, of arrays and `KroneckerBlock`s."""


def is_block(node: PyTree) -> bool:
    """Whether this is the entry of a matrix in a rotated basis."""
    return isinstance(node, KroneckerBlock)


def on_eigenvalues(function: Callable[..., Array], preconditioner: Preconditioner, *trees: Params) -> Preconditioner:
    """The same basis with other eigenvalues: `function` of them, and of the leaves of `trees`, entry by entry."""

    def one(entry: Array | KroneckerBlock, *leaves: Array) -> Array | KroneckerBlock:
        if isinstance(entry, KroneckerBlock):
            return replace(entry, values=function(entry.values, *leaves))
        return function(entry, *leaves)

    return jax.tree.map(one, preconditioner, *trees, is_leaf=is_block)


def applied(preconditioner: Preconditioner, vector: Params) -> Params:
    """P times a vector like the parameters."""

    def one(entry: Array | KroneckerBlock, leaf: Array) -> Array:
        return entry.scaled(entry.values, leaf) if isinstance(entry, KroneckerBlock) else entry * leaf

    return jax.tree.map(one, preconditioner, vector, is_leaf=is_block)


def divided(vector: Params, preconditioner: Preconditioner) -> Params:
    """P^-1 times a vector like the parameters."""

    def one(entry: Array | KroneckerBlock, leaf: Array) -> Array:
        return entry.scaled(1 / entry.values, leaf) if isinstance(entry, KroneckerBlock) else leaf / entry

    return jax.tree.map(one, preconditioner, vector, is_leaf=is_block)


def whitened(operator: Operator, preconditioner: Preconditioner | None) -> Operator:
    """P^-1/2 A P^-1/2, whose eigenvalues decide the stability of steps -P^-1 gradient; None is the identity.

    A diagonal P may have more parameters than the operator of a block (`curvature.transforms.precondition`); one with
    rotated bases is like the operator's. Raises `ValueError` for another structure, and for an eigenvalue of P that is
    not finite and positive.
    """
    if preconditioner is None:
        return operator
    entries, structure = jax.tree.flatten(preconditioner, is_leaf=is_block)
    if not any(is_block(entry) for entry in entries):
        return precondition(operator, preconditioner)
    _check_entries(entries, structure, operator.point)
    roots = on_eigenvalues(jax.lax.rsqrt, preconditioner)
    return replace(operator, linear=Partial(_between, roots, operator.linear))


def _between(roots: Preconditioner, linear: Partial, vector: Params) -> Params:
    return applied(roots, linear(applied(roots, vector)))


def _check_entries(entries: list[Array | KroneckerBlock], structure: PyTree, point: Params) -> None:
    sizes = [(entry.values if isinstance(entry, KroneckerBlock) else entry).size for entry in entries]
    expected = [leaf.size for leaf in jax.tree.leaves(point)]
    if structure != jax.tree.structure(point) or sizes != expected:
        raise ValueError(
            f"preconditioner has entries of sizes {sizes} in {structure}; expected {expected}, one for each parameter "
            "of the operator. Build the operator of the parameters that the optimizer moves: hessian(risk, params, "
            "block=...)."
        )
    values = [entry.values if isinstance(entry, KroneckerBlock) else entry for entry in entries]
    check_finite("preconditioner", values)
    if is_concrete(values) and min(float(np.min(value)) for value in values) <= 0:
        raise ValueError(
            "preconditioner has an eigenvalue that is zero or negative; expected positive ones. Raise eps."
        )
