"""Sums of small Kronecker products: the exact form of every block of an attention layer's Hessian.

A block couples a parameter matrix P (the row) with a parameter matrix P' (the column): it is an array
[P's row, P's column, P''s row, P''s column]. Its terms are sums over tokens of products of a factor that couples one
axis of P with one of P' and a factor that couples the remaining two. There are two ways to pair the axes,

    straight: (row, row') x (column, column'),      crossed: (row, column') x (column, row'),

and a block of the full Hessian holds both. A term is therefore kept as a small network of arrays with named axes, and
every question about the block (product with a matrix, norm, trace, inner product) is one contraction of the network,
in an order chosen by shape. The block itself is formed by `dense` alone.

Axes are named `h r c` for the row parameter (head, row, column) and `g s d` for the column parameter; all other letters
are summed, `n` being the token.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from attnlab.curvature.operator import Operator
from attnlab.display import Words, line, listed, whatever_it_holds

Pairing = Literal["straight", "crossed"]

_TRANSPOSED = str.maketrans("hrcgsd", "gsdhrc")
_DIAGONAL = str.maketrans("gsd", "hrc")
_SUMMED = "abefijklmnopqtuvwxyz"
_SECOND_COPY = str.maketrans(_SUMMED, _SUMMED.upper())
_WORKING_ELEMENTS = 2**22
"""Intermediates of an inner product beyond this size (or the largest factor's) are made in pieces over the tokens."""


@dataclass(frozen=True)
class Leaf:
    """A parameter matrix whose axis `head_axis` holds `heads` heads side by side."""

    shape: tuple[int, int]
    heads: int = 1
    head_axis: int = 1

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def order(self) -> str:
        """The axes `hrc` in the order in which they stand in the matrix."""
        return "hrc" if self.head_axis == 0 else "rhc"

    def sizes(self, letters: str) -> dict[str, int]:
        """Sizes of head, row and column axis, under three letters."""
        rows, columns = self.shape
        split = (rows // self.heads, columns) if self.head_axis == 0 else (rows, columns // self.heads)
        return dict(zip(letters, (self.heads, *split), strict=True))

    @property
    def axes(self) -> tuple[str, str]:
        """Which of the axes `hrc` make up the rows and which the columns of the matrix."""
        return ("hr", "c") if self.head_axis == 0 else ("r", "hc")

    def split(self, matrix: Float[Array, "R C"]) -> Float[Array, "H r c"]:
        """The matrix of every head."""
        rows, columns = self.shape
        if self.head_axis == 0:
            return matrix.reshape(self.heads, rows // self.heads, columns)
        return jnp.moveaxis(matrix.reshape(rows, self.heads, columns // self.heads), 1, 0)

    def merge(self, heads: Float[Array, "H r c"]) -> Float[Array, "R C"]:
        """Inverse of `split`."""
        return (heads if self.head_axis == 0 else jnp.moveaxis(heads, 0, 1)).reshape(self.shape)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Term:
    """A product of arrays with named axes, summed over all axes but `hrcgsd`; see the module.

    `pairing` says which axes its two factors pair, `formula` the term in the symbols of the theory.
    """

    operands: tuple[Array, ...]
    indices: tuple[str, ...] = field(metadata={"static": True})
    pairing: Pairing = field(default="straight", metadata={"static": True})
    formula: str = field(default="", metadata={"static": True})

    @property
    def T(self) -> "Term":
        """The term with row and column axes exchanged."""
        inner = self.formula.removeprefix("[").removesuffix("]ᵀ")
        formula = inner if self.formula.startswith("[") else f"[{self.formula}]ᵀ"
        return replace(self, indices=self.relabelled(_TRANSPOSED), formula=formula)

    def relabelled(self, table: dict[int, int]) -> tuple[str, ...]:
        """The indices after a translation of letters."""
        return tuple(index.translate(table) for index in self.indices)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KroneckerSum:
    """A block of a Hessian as a sum of terms; a pytree, so it crosses `jit`.

    Attributes:
        terms: the terms; none is the zero block.
        row: the parameter matrix of the block's rows.
        column: the parameter matrix of the block's columns.
        dtype: name of the dtype.
    """

    terms: tuple[Term, ...]
    row: Leaf = field(metadata={"static": True})
    column: Leaf = field(metadata={"static": True})
    dtype: str = field(metadata={"static": True})

    @whatever_it_holds
    def __repr__(self) -> str:
        """Shape and number of terms."""
        formulas = listed(term.formula for term in self.terms)
        return line("KroneckerSum", shape=Words(self.shape), terms=len(self.terms), formulas=formulas)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the block as a matrix."""
        return self.row.size, self.column.size

    @property
    def T(self) -> "KroneckerSum":
        """The transposed block: rows and columns change places."""
        return KroneckerSum(tuple(t.T for t in self.terms), self.column, self.row, self.dtype)

    def mv(self, matrix: Float[Array, "Rp Cp"]) -> Float[Array, "R C"]:
        """The block times a matrix of the shape of the column parameter."""
        if jnp.shape(matrix) != self.column.shape:
            raise ValueError(f"matrix has shape {jnp.shape(matrix)}; this block acts on {self.column.shape}.")
        heads = self.column.split(jnp.asarray(matrix, self.dtype))
        products = (contract((*t.indices, "gsd"), "hrc", (*t.operands, heads)) for t in self.terms)
        return sum(map(self.row.merge, products), jnp.zeros(self.row.shape, self.dtype))

    def operator(self) -> Operator:
        """A diagonal block as an operator on its parameter matrix; raises `ValueError` for another block."""
        if self.row != self.column:
            raise ValueError(f"the block couples {self.row} with {self.column}; only a diagonal block is an operator.")
        return Operator(Partial(_Product(), self), jnp.zeros(self.row.shape, self.dtype))

    def inner(self, other: "KroneckerSum") -> Float[Array, ""]:
        """Frobenius inner product of two blocks of the same parameters."""
        self._check_same_parameters(other)
        zero = jnp.zeros((), self.dtype)
        ((ours,), mine), ((others,), their) = brought_to_scale(self), brought_to_scale(other)
        total = sum((_inner(a, b) for a in ours.terms for b in others.terms), zero)
        return times_power(total, mine + their)

    def norm(self) -> Float[Array, ""]:
        """Frobenius norm: with N tokens the root of an N x N sum, not of one over the entries of the block."""
        (block,), exponent = brought_to_scale(self)
        return times_power(jnp.sqrt(jnp.maximum(block.square(), 0)), exponent)

    def square(self) -> Float[Array, ""]:
        """The square of the norm, as it stands: it leaves a dtype's range long before the norm does."""
        zero = jnp.zeros((), self.dtype)
        squares = sum((_inner(t, t) for t in self.terms), zero)
        pairs = ((a, b) for i, a in enumerate(self.terms) for b in self.terms[:i])
        mixed = sum((_inner(a, b) for a, b in pairs), zero)
        return squares + 2 * mixed

    def trace(self) -> Float[Array, ""]:
        """Sum of the diagonal of a block whose rows and columns are the same parameter."""
        if self.row != self.column:
            raise ValueError(f"the block couples {self.row} with {self.column}; only a diagonal block has a trace.")
        zero = jnp.zeros((), self.dtype)
        return sum((contract(t.relabelled(_DIAGONAL), "", t.operands) for t in self.terms), zero)

    def dense(self) -> Float[Array, "rows columns"]:
        """The block as a matrix, both parameters in row-major order."""
        output = self.row.order + self.column.order.translate(_TRANSPOSED)
        blocks = (contract(t.indices, output, t.operands).reshape(self.shape) for t in self.terms)
        return sum(blocks, jnp.zeros(self.shape, self.dtype))

    def product(
        self, left: Float[Array, "..."], right: Float[Array, "..."], pairing: Pairing = "straight"
    ) -> "KroneckerSum":
        """The Kronecker product of two matrices as a block of the same two parameters.

        `left` couples the first pair of axes of `pairing`, `right` the second (a K-FAC pair is straight: `left` of the
        inputs' second moment, `right` of the gradients'). A leading axis of both is summed.
        """
        left, right = (jnp.asarray(x, self.dtype) for x in (left, right))
        expected = tuple(tuple(math.prod(axes) for axes in self._grouped(side, pairing)) for side in (0, 1))
        if (left.shape[-2:], right.shape[-2:]) != expected or left.shape[:-2] != right.shape[:-2]:
            raise ValueError(
                f"left and right have shapes {left.shape} and {right.shape}; a {pairing} product for parameters of "
                f"shapes {self.row.shape} and {self.column.shape} takes {expected}."
            )
        token = "n" * (left.ndim - 2)
        sizes = (sum(self._grouped(side, pairing), ()) for side in (0, 1))
        operands = tuple(x.reshape(*x.shape[:-2], *size) for x, size in zip((left, right), sizes, strict=True))
        indices = tuple(token + "".join(self.axes(side, pairing)) for side in (0, 1))
        return replace(self, terms=(Term(operands, indices, pairing, "A ⊗ B"),))

    def axes(self, side: int, pairing: Pairing) -> tuple[str, str]:
        """The row's and the column's axes that factor `side` (0 left, 1 right) of a product pairs."""
        other = side if pairing == "straight" else 1 - side
        return self.row.axes[side], self.column.axes[other].translate(_TRANSPOSED)

    def _grouped(self, side: int, pairing: Pairing) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Sizes of those axes."""
        sizes = {**self.row.sizes("hrc"), **self.column.sizes("gsd")}
        row, column = self.axes(side, pairing)
        return tuple(sizes[a] for a in row), tuple(sizes[a] for a in column)

    def zeros(self, axes: str) -> Float[Array, "..."]:
        """Zeros with the sizes of the named axes."""
        sizes = {**self.row.sizes("hrc"), **self.column.sizes("gsd")}
        return jnp.zeros([sizes[a] for a in axes], self.dtype)

    def merged(self, factor: Float[Array, "..."], side: int, pairing: Pairing) -> Float[Array, "p q"]:
        """A factor with separate head axes as the matrix that `product` takes."""
        rows, columns = (math.prod(sizes) for sizes in self._grouped(side, pairing))
        return factor.reshape(rows, columns)

    def contract(self, matrix: Float[Array, "..."], axes: str, output: str) -> Float[Array, "..."]:
        """Contract the block with an array whose axes are `axes`, leaving the axes `output`."""
        parts = (contract((*t.indices, axes), output, (*t.operands, matrix)) for t in self.terms)
        return sum(parts, self.zeros(output))

    def __add__(self, other: "KroneckerSum") -> "KroneckerSum":
        self._check_same_parameters(other)
        return replace(self, terms=self.terms + other.terms)

    def __mul__(self, factor: float | Float[Array, ""]) -> "KroneckerSum":
        scaled = (replace(t, operands=(factor * t.operands[0], *t.operands[1:])) for t in self.terms)
        return replace(self, terms=tuple(scaled))

    __rmul__ = __mul__

    def __sub__(self, other: "KroneckerSum") -> "KroneckerSum":
        return self + (-1) * other

    def _check_same_parameters(self, other: "KroneckerSum") -> None:
        if (self.row, self.column) != (other.row, other.column):
            raise ValueError(
                f"the blocks couple {self.row} with {self.column} and {other.row} with {other.column}; "
                "expected the same parameters. Is one to be transposed?"
            )


@dataclass(frozen=True)
class _Product:
    """The linear map of a diagonal block."""

    def __call__(self, block: KroneckerSum, matrix: Float[Array, "R C"]) -> Float[Array, "R C"]:
        return block.mv(matrix)

    def dense(self, block: KroneckerSum) -> Float[Array, "n n"]:
        """The matrix without a product a row."""
        return block.dense()


def brought_to_scale(*blocks: KroneckerSum) -> tuple[tuple[KroneckerSum, ...], Int[Array, ""]]:
    """The blocks divided by one power of two, after which no factor of a term has an entry above 1; and its exponent.

    Sums of squares of what is left neither overflow nor lose what matters. Powers of two round nothing.
    """
    exponents = [[_exponent(x) for x in term.operands] for block in blocks for term in block.terms]
    if not exponents:
        return blocks, jnp.array(0, jnp.int32)
    common = functools.reduce(jnp.maximum, (functools.reduce(jnp.add, of_term) for of_term in exponents))
    remaining = iter(exponents)
    return tuple(replace(b, terms=tuple(_divided(t, next(remaining), common) for t in b.terms)) for b in blocks), common


_OF_ZERO = -(2**20)
"""The exponent of an array of zeros: below that of all others, so that no zero term sets the scale."""


def _exponent(array: Array) -> Int[Array, ""]:
    """e with 2^(e-1) <= max |array| < 2^e."""
    largest = jnp.max(jnp.abs(array))
    return jnp.where(largest == 0, _OF_ZERO, jnp.frexp(jnp.where(jnp.isfinite(largest), largest, 1))[1])


def times_power(number: Float[Array, "..."], exponent: Int[Array, ""]) -> Float[Array, "..."]:
    """2^exponent times a number, where zero stays zero whatever the exponent."""
    # Two factors, as one of them alone may be out of range; products by numbers, as `ldexp` of an array takes its time.
    limit = 2 * (int(jnp.finfo(number.dtype).maxexp) - 2)
    exponent = jnp.clip(exponent, -limit, limit)
    half = exponent // 2
    first, second = (jnp.ldexp(jnp.ones((), number.dtype), power) for power in (half, exponent - half))
    return number * first * second


def _divided(term: Term, exponents: list[Array], common: Array) -> Term:
    shrunk = [times_power(x, -e) for x, e in zip(term.operands, exponents, strict=True)]
    smaller = times_power(shrunk[-1], functools.reduce(jnp.add, exponents) - common)
    return replace(term, operands=(*shrunk[:-1], smaller))


def contract(indices: tuple[str, ...], output: str, operands: tuple[Array, ...]) -> Array:
    """Contract the network. Axes of size 1, of a single head above all, are left out: they cost time in transposes.

    A letter of `output` that no operand has is such an axis.
    """
    sizes = {a: n for index, x in zip(indices, operands, strict=True) for a, n in zip(index, x.shape, strict=True)}
    thin = ["".join(a for a in index if sizes[a] > 1) for index in indices]
    arrays = [x.reshape([sizes[a] for a in index]) for index, x in zip(thin, operands, strict=True)]
    kept = "".join(a for a in output if sizes.get(a, 1) > 1)
    subscripts, order = ",".join(thin) + "->" + kept, _order(thin)
    result = jnp.einsum(subscripts, *arrays, precision="highest", optimize=order)
    return result.reshape([sizes.get(a, 1) for a in output])


def _order(indices: Sequence[str]) -> Literal["optimal", "auto"]:
    """How the order of a contraction is searched: up to six arrays in full; the default's search would miss a factor 2
    in inner products."""
    return "optimal" if len(indices) <= 6 else "auto"


def _inner(first: Term, second: Term) -> Float[Array, ""]:
    """The sum over all entries of the product of two terms."""
    largest = max(range(len(second.operands)), key=lambda i: second.operands[i].size)
    return jnp.sum(meeting(first, second, largest) * second.operands[largest])


def meeting(first: Term, second: Term, last: int) -> Float[Array, "..."]:
    """The first term contracted with all of the second but its array number `last`: an array like that one.

    The sum of products of the two is the inner product of the terms. For terms sum_n a_n b_n^T (x) B_n it is a matrix
    product of the N x N array (a_n . a_m)(b_n . b_m) with the matrices B_n, as fast as matrix products come.
    """
    theirs = second.relabelled(_SECOND_COPY)
    others = [i for i in range(len(theirs)) if i != last]
    indices = (*first.indices, *(theirs[i] for i in others))
    operands = (*first.operands, *(second.operands[i] for i in others))
    shape, met = second.operands[last].shape, set("".join(indices))
    kept = "".join(a for a in theirs[last] if a in met)  # an axis that the rest lacks is one of size 1, or repeats
    found = _in_pieces(indices, kept, operands)
    return jnp.broadcast_to(jnp.expand_dims(found, [i for i, a in enumerate(theirs[last]) if a not in met]), shape)


def _in_pieces(indices: tuple[str, ...], output: str, operands: tuple[Array, ...]) -> Array:
    """`contract`, a part of the second term's tokens at a time where intermediates would be larger than the factors."""
    pieces = _pieces(indices, output, operands) if output.startswith("N") else 1
    if pieces == 1:
        return contract(indices, output, operands)
    split = [i for i, index in enumerate(indices) if index.startswith("N")]
    tokens = operands[split[0]].shape[0]
    size = math.ceil(tokens / pieces)

    def piece(parts: list[Array]) -> Array:
        replaced = dict(zip(split, parts, strict=True))
        return contract(indices, output, tuple(replaced.get(i, operand) for i, operand in enumerate(operands)))

    def cut(operand: Array) -> Array:
        filled = jnp.pad(operand, [(0, size * pieces - tokens), *[(0, 0)] * (operand.ndim - 1)])
        return filled.reshape(pieces, size, *operand.shape[1:])

    found = jax.lax.map(piece, [cut(operands[i]) for i in split])
    return found.reshape(size * pieces, *found.shape[2:])[:tokens]


def _pieces(indices: tuple[str, ...], output: str, operands: tuple[Array, ...]) -> int:
    """In how many pieces the largest intermediate is about as small as the factors."""
    plan = jnp.einsum_path(",".join(indices) + "->" + output, *operands, optimize=_order(indices))[1]
    allowed = max(_WORKING_ELEMENTS, *(x.size for x in operands))
    tokens = next(x.shape[0] for index, x in zip(indices, operands, strict=True) if index.startswith("N"))
    return min(tokens, math.ceil(plan.largest_intermediate / allowed))
