"""What a layer's Hessian is made of: each term with its factors, and which of them is data, a weight or a moment."""

import re
from dataclasses import dataclass, replace
from io import StringIO

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from attnlab.attention.blocks import AttentionHessian
from attnlab.attention.kronecker import KroneckerSum, Pairing
from attnlab.attention.turned import token_pairs
from attnlab.display import Words, line, whatever_it_holds


@dataclass(frozen=True)
class Factor:
    """An array that a term is built from.

    Attributes:
        symbol: as it stands in the term's formula; an index i means one per token.
        role: `data`, `weight`, `first moment`, `second moment`, `third moment`, `loss gradient` or `loss curvature`
            (for a layer inside a network, seen through what stands behind it), `downstream curvature` for that of what
            stands behind it, or `data and weight` for the queries.
        array: its values.
    """

    symbol: str
    role: str
    array: Array

    @whatever_it_holds
    def __repr__(self) -> str:
        """Symbol, role and shape."""
        return line("Factor", symbol=Words(self.symbol), role=self.role, array=self.array)


@dataclass(frozen=True)
class TermDescription:
    """One term of one block: A ⊗ B summed over tokens, with the norm of the whole sum."""

    row: str
    column: str
    part: str
    pairing: Pairing
    formula: str
    factors: tuple[Factor, ...]
    norm: Float[Array, ""]

    @whatever_it_holds
    def __repr__(self) -> str:
        """Where it stands, its formula, what that is made of, and its norm."""
        block, made_of = Words(f"{self.row} x {self.column}"), Words(f"[{', '.join(self.roles)}]")
        formula = Words(self.formula)
        return line("Term", block=block, part=self.part, formula=formula, made_of=made_of, norm=self.norm)

    @property
    def roles(self) -> tuple[str, ...]:
        """The distinct roles of the factors, in order of appearance."""
        return tuple(dict.fromkeys(factor.role for factor in self.factors))


def describe(hessian: AttentionHessian) -> tuple[TermDescription, ...]:
    """Every term of the `ggn` and the `functional` blocks of `hessian`, each pair of parameters once.

    Formulas are per head; ⊗ pairs the parameters' axes as `pairing` says. Here γ_i = W_O g_i is the gradient at the
    head's values, κ̂_i the third moment along W_V γ_i, and τ the scale of the scores. In a layer that turns its queries
    and keys, T_ij = τ q_i . κ_ij = ρ_ij . W_K^T x_j: what a query's block holds of the keys are moments of the κ_ij
    (Σκ_i with the tokens, κ̂κ_i the third), and its Kronecker form stays; a key's block is a double sum over tokens, of
    products x_j ρ_ijᵀ that go with both. For a layer inside a network Λ_i is Λ_o and Λf_i is Λ_f, and what has an index
    i holds the tokens that the loss reads.

    Example:
        >>> import attnlab as al
        >>> import jax
        >>> layer = al.SelfAttention(al.AttentionConfig(key_dim=2, value_dim=3, merged=True))
        >>> tokens = jax.random.normal(jax.random.key(0), (1, 4, 3))
        >>> params = layer.init(jax.random.key(1), tokens)["params"]
        >>> risk = al.objective(al.from_linen(layer), al.square_loss, tokens, 0 * tokens)
        >>> al.describe(al.attention_hessian(risk, params))[0].formula
        'sum_i τ x_i (τ x_i)ᵀ ⊗ Σ_i W_V Λ_i W_Vᵀ Σ_i'
    """
    known = _factors(hessian)
    places = [
        (row, column, part, replace(block, terms=(term,)))
        for part, blocks in (("ggn", hessian.ggn), ("functional", hessian.functional))
        for (row, column), block in blocks.items()
        for term in block.terms
    ]
    rows = []
    for (row, column, part, block), norm in zip(places, _norms([block for *_, block in places]), strict=True):
        (term,) = block.terms
        used = tuple(factor for factor in known if factor.symbol in _symbols(term.formula))
        rows.append(TermDescription(row, column, part, term.pairing, term.formula, used, norm))
    return tuple(rows)


@jax.jit
def _norms(blocks: list[KroneckerSum]) -> list[Float[Array, ""]]:
    """All in one program: a program for each would take longer to compile than to run."""
    return [block.norm() for block in blocks]


class TermTable(Table):
    """A table of terms, which `print` shows as well as `rich.print`."""

    def __str__(self) -> str:
        console = Console(file=StringIO(), width=WIDTH, color_system=None)
        console.print(self)
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


WIDTH = 160
"""Of a table in plain characters, which fits its content up to there."""


def describe_table(hessian: AttentionHessian) -> TermTable:
    """`describe` as a table for the terminal: `print(describe_table(hessian))`."""
    table = TermTable("block", "part", "pairing", "term", "made of", "norm")
    for row in describe(hessian):
        cells = (f"{row.row} x {row.column}", row.part, row.pairing, escape(row.formula), ", ".join(row.roles))
        table.add_row(*cells, f"{float(row.norm):.3g}")
    return table


def _factors(hessian: AttentionHessian) -> list[Factor]:
    """Everything that a formula may name, at the query tokens that the sums run over."""
    point, moments = hessian.point, hessian.moments
    read = slice(None) if hessian.positions is None else np.asarray(hessian.positions)
    gamma = jnp.einsum("hvo,bio->bhiv", point.output, hessian.gradient)
    factors = [
        Factor("x_i", "data", point.inputs[:, read]),
        Factor("q_i", "data and weight", jnp.einsum("bia,hak->bhik", point.inputs, point.query)[:, :, read]),
        Factor("m_i", "first moment", moments.first[:, :, read]),
        *_moment_factors(hessian, jnp.einsum("hav,bhiv->bhia", point.value, gamma), read),
        Factor("W_K", "weight", point.key),
        Factor("W_V", "weight", point.value),
        Factor("W_O", "weight", point.output),
        Factor("γ_i", "loss gradient", gamma[:, :, read]),
        Factor("g_i", "loss gradient", hessian.gradient[:, read]),
        Factor("Λ_i", "loss curvature", hessian.curvature),
    ]
    return factors if hessian.bend is None else [*factors, Factor("Λf_i", "downstream curvature", hessian.bend)]


def _moment_factors(
    hessian: AttentionHessian, direction: Float[Array, "B H L D"], read: slice | np.ndarray
) -> list[Factor]:
    """Second and third moments; of a layer that turns its keys, what they are made of."""
    moments = hessian.moments
    if hessian.point.config.rotary is None:
        second, third = (x[:, :, read] for x in (moments.second, moments.third_along(direction)))
        return [Factor("Σ_i", "second moment", second), Factor("κ̂_i", "third moment", third)]
    pairs = token_pairs(hessian.point, hessian.moments, direction)
    batch, length, _ = hessian.point.inputs.shape
    named = [
        ("κ_i", "data and weight", pairs.keys),
        ("ρ_i", "data and weight", pairs.queries),
        ("R_i", "position", pairs.turns),
        ("R_iᵀ", "position", pairs.turns),
        ("s_i", "second moment", pairs.slopes),
        ("t_i", "second moment", pairs.twists),
        ("Σκ_i", "second moment", jnp.einsum("nhj,nhjc,nhja->nhca", pairs.slopes, pairs.keys, pairs.centred)),
    ]
    if pairs.bends is not None:
        third = jnp.einsum("nhj,nhjc,nhjd->nhcd", pairs.bends, pairs.keys, pairs.keys)
        named += [("b_i", "third moment", pairs.bends), ("κ̂κ_i", "third moment", third)]
    return [Factor(symbol, role, x.reshape(batch, length, *x.shape[1:])[:, read]) for symbol, role, x in named]


def _symbols(formula: str) -> set[str]:
    """The symbols of a formula; the second token j of a coupled curvature counts as i."""
    words = re.split(r"[\s()\[\]]+", formula)
    return {word.rstrip("ᵀ").replace("_ij", "_i").replace("_j", "_i") for word in words}
