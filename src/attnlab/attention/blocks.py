"""The Hessian of a loss in the parameters of one attention layer, as an object."""

import itertools
import math
from dataclasses import dataclass, field, replace
from html import escape
from typing import Literal

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from attnlab.attention.kronecker import KroneckerSum, Leaf, Term, brought_to_scale, contract, meeting, times_power
from attnlab.attention.layer import AttentionLayer
from attnlab.attention.moments import AttentionMoments
from attnlab.attention.terms import (
    bent_term,
    functional_terms,
    leaves,
    outer_term,
    same_vectors,
    shared,
    sum_of_parts,
    token_jacobians,
    token_quantities,
)
from attnlab.checks import is_concrete, unknown_name
from attnlab.curvature.operator import Operator
from attnlab.display import Words, html_table, line, whatever_it_holds
from attnlab.types import Params

Part = Literal["hessian", "ggn", "functional"]
PARTS: tuple[Part, ...] = ("hessian", "ggn", "functional")
Pair = tuple[str, str]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionHessian:
    """Every block of H = H_o + H_f of one layer, for its parameters V, Q, K (or QK) and O; a pytree.

    `hessian` is H, the Hessian of the loss; `ggn` is H_o = J^T Λ J, the generalised Gauss-Newton matrix; `functional`
    is H_f = H - H_o, for a layer by itself sum_i g_i . d²f_i. Nothing of the size of a block is formed before `dense`
    is called. `operator(part)` is a part as an `Operator`, which spectra, traces and products take.

    Attributes:
        point: the layer: config, weights, tokens, mask.
        moments: its attention moments.
        gradient: g, the gradient of the loss at the layer's output.
        curvature: Λ, its curvature there: a scalar times the identity, (B, L, O, O), or (B, L, O, L, O).
        ggn: blocks of H_o, for pairs of parameter names in flattening order.
        functional: blocks of H_f likewise.
        bend: for a layer inside a network Λ_f, the curvature of what stands behind it in H_f, of the same shapes as
            `curvature`; None where there is none.
        positions: the query tokens that the sums run over, which `curvature` and `bend` hold; None is all.
    """

    point: AttentionLayer
    moments: AttentionMoments
    gradient: Float[Array, "B L O"]
    curvature: Array
    ggn: dict[Pair, KroneckerSum]
    functional: dict[Pair, KroneckerSum]
    bend: Array | None = None
    positions: tuple[int, ...] | None = field(default=None, metadata={"static": True})

    @whatever_it_holds
    def __repr__(self) -> str:
        """The layer's parameters and data."""
        shapes = Words(", ".join(f"{name} {tuple(self.point.params[name].shape)}" for name in self.names))
        kind, tokens = self.point.config.weights, Words(tuple(self.point.inputs.shape))
        return line("AttentionHessian", attention=kind, parameters=shapes, tokens=tokens, positions=self.positions)

    def _repr_html_(self) -> str:
        """The Frobenius norm of every block of H, H_o and H_f."""
        if not is_concrete(self.gradient):
            return escape(repr(self))
        norms = self.norms()
        rows = ((f"{row}, {column}", *(float(norms[part][row, column]) for part in PARTS)) for row, column in self.ggn)
        return html_table(("block", *PARTS), rows, "Frobenius norms")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameter blocks, in flattening order."""
        return self.point.names

    def block(self, row: str, column: str, part: Part = "hessian") -> KroneckerSum:
        """The block that couples parameter `row` with parameter `column`."""
        for name in (row, column):
            if name not in self.names:
                raise unknown_name("parameter block", name, self.names)
        if part not in PARTS:
            raise unknown_name("part of the Hessian", part, PARTS)
        if (row, column) not in self.ggn:
            return self.block(column, row, part).T
        if part != "hessian":
            return (self.ggn if part == "ggn" else self.functional)[row, column]
        return sum_of_parts(self.ggn[row, column], self.functional[row, column])

    def norms(self) -> dict[Part, dict[Pair, Float[Array, ""]]]:
        """Frobenius norm of every block of every part (for both orders of each pair): one compiled call."""
        return _norms(self)

    def traces(self) -> dict[Part, dict[str, Float[Array, ""]]]:
        """Trace of every diagonal block of every part: one compiled call."""
        return _traces(self)

    def operator(self, part: Part = "hessian") -> Operator:
        """One part as an operator on the layer's parameters, a dict of matrices; raises `ValueError` for another."""
        if part not in PARTS:
            raise unknown_name("part of the Hessian", part, PARTS)
        return Operator(Partial(_Product(part), self), self.point.params)

    def dense(self, part: Part = "hessian") -> Float[Array, "n n"]:
        """The whole matrix in the flattening order of the parameters, the order of `jax.flatten_util.ravel_pytree`.

        The one method that forms blocks; `operator(part).dense()` is the same.
        """
        if part not in PARTS:
            raise unknown_name("part of the Hessian", part, PARTS)
        return _dense(self, part)


@jax.jit
def blocks_of(
    point: AttentionLayer,
    moments: AttentionMoments,
    gradient: Float[Array, "B L O"],
    curvature: Array,
    bend: Array | None = None,
) -> AttentionHessian:
    """All blocks of a checked layer from what stands behind it; the arguments are the attributes of the result."""
    tokens = token_quantities(point, moments, gradient)
    jacobians = token_jacobians(point, tokens)
    by_token = curvature.reshape(-1, *curvature.shape[2:]) if curvature.ndim == 4 else curvature
    shapes, second = leaves(point), functional_terms(point, tokens)
    pairs = [(row, column) for i, row in enumerate(point.names) for column in point.names[i:]]
    dtype = str(point.inputs.dtype)
    ggn = {
        (row, column): KroneckerSum(
            (outer_term(jacobians[row], jacobians[column], by_token),), shapes[row], shapes[column], dtype
        )
        for row, column in pairs
    }
    functional = {pair: oriented(second, pair, shapes, dtype) for pair in pairs}
    if bend is not None:
        for (row, column), block in functional.items():
            bent = bent_term(jacobians[row], jacobians[column], bend)
            functional[row, column] = replace(block, terms=(bent, *block.terms))
    ggn, functional = (
        {pair: shared(block, (point.config.heads, point.config.heads)) for pair, block in part.items()}
        for part in (ggn, functional)
    )
    return AttentionHessian(point, moments, gradient, curvature, ggn, functional, bend)


def oriented(table: dict[Pair, tuple[Term, ...]], pair: Pair, shapes: dict[str, Leaf], dtype: str) -> KroneckerSum:
    """The block of `pair` from a table that holds each pair in one order."""
    row, column = pair
    if (column, row) in table and row != column:
        return KroneckerSum(table[column, row], shapes[column], shapes[row], dtype).T
    return KroneckerSum(table.get(pair, ()), shapes[row], shapes[column], dtype)


@jax.jit
def _norms(hessian: AttentionHessian) -> dict[Part, dict[Pair, Array]]:
    return norms_of(hessian.ggn, hessian.functional)


def norms_of(ggn: dict[Pair, KroneckerSum], functional: dict[Pair, KroneckerSum]) -> dict[Part, dict[Pair, Array]]:
    """Norms of the blocks of H_o, H_f and their sum, whose square is ||H_o||^2 + ||H_f||^2 + 2 <H_o, H_f>."""
    norms: dict[Part, dict[Pair, Array]] = {part: {} for part in PARTS}
    for pair in ggn:
        (main, rest), exponent = brought_to_scale(ggn[pair], functional[pair])
        squares = _joint_squares if same_vectors(main, rest) else _squares
        ours, theirs, mixed = squares(main, rest)
        found: dict[Part, Array] = {"ggn": ours, "functional": theirs, "hessian": ours + 2 * mixed + theirs}
        for part, square in found.items():
            norm = times_power(jnp.sqrt(jnp.maximum(square, 0)), exponent)
            norms[part][pair] = norms[part][pair[::-1]] = norm
    return norms


def _squares(ggn: KroneckerSum, functional: KroneckerSum) -> tuple[Array, Array, Array]:
    """||H_o||^2, ||H_f||^2 and <H_o, H_f> of one block."""
    return ggn.square(), functional.square(), ggn.inner(functional)


def _joint_squares(ggn: KroneckerSum, functional: KroneckerSum) -> tuple[Array, Array, Array]:
    """The same in fewer products, where the first term of H_f stands on the vectors of H_o, sum_i (l_i l'_i^T) (x) C_i
    beside sum_i (l_i l'_i^T) (x) B_i: what meets these vectors once gives the products with both B and C."""
    (term,), (first, *others) = ggn.terms, functional.terms
    ours, theirs = term.operands[2], contract(first.indices[2:], term.indices[2], first.operands[2:])
    rest = replace(functional, terms=tuple(others))
    of_ours = meeting(term, term, 2)
    of_theirs = meeting(replace(term, operands=(*term.operands[:2], theirs)), term, 2)
    of_rest = sum((meeting(other, term, 2) for other in others), jnp.zeros((), ours.dtype))
    square = jnp.sum(of_theirs * theirs) + 2 * jnp.sum(of_rest * theirs) + rest.square()
    return jnp.sum(of_ours * ours), square, jnp.sum((of_theirs + of_rest) * ours)


@jax.jit
def _traces(hessian: AttentionHessian) -> dict[Part, dict[str, Array]]:
    return {part: {name: hessian.block(name, name, part).trace() for name in hessian.names} for part in PARTS}


@dataclass(frozen=True)
class _Product:
    """The linear map of one part; hashed by the part, so that operators of one layer share their programs."""

    part: Part

    def __call__(self, hessian: AttentionHessian, vector: Params) -> Params:
        return {
            row: sum(hessian.block(row, column, self.part).mv(vector[column]) for column in hessian.names)
            for row in hessian.names
        }

    def dense(self, hessian: AttentionHessian) -> Float[Array, "n n"]:
        """The matrix from the blocks, without a product a row."""
        return _dense(hessian, self.part)


@jax.jit(static_argnames="part")
def _dense(hessian: AttentionHessian, part: Part) -> Array:
    ends = [0, *itertools.accumulate(math.prod(hessian.point.params[name].shape) for name in hessian.names)]
    start = dict(zip(hessian.names, ends, strict=False))
    matrix = jnp.zeros((ends[-1], ends[-1]), hessian.point.inputs.dtype)
    # Written block by block into one array: joining finished blocks would take the memory, and its first touch, twice.
    for row, column in hessian.ggn:
        block = hessian.block(row, column, part).dense()
        matrix = jax.lax.dynamic_update_slice(matrix, block, (start[row], start[column]))
        if row != column:
            matrix = jax.lax.dynamic_update_slice(matrix, block.T, (start[column], start[row]))
    return matrix
