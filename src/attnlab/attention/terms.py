"""The terms of every Hessian block, one row of a table each.

Per token i every parameter matrix P enters the layer's output f_i through

    df_i/dP = l_i (x) M_i,       l_i a vector on one axis of P, M_i a matrix from the other axis to the features of f_i:

    value  [a, α]   l = m_i             M = W_O^T
    query  [a, p]   l = scale x_i       M = (Σ_i W_V W_O)^T W_K      since dz_i/dQ = scale x_i (x) W_K, dm_i/dz_i = Σ_i
    key    [b, p]   l = scale q_i       M = (Σ_i W_V W_O)^T          on axis b, and l on axis p
    query_key [a,b] l = scale x_i       M = (Σ_i W_V W_O)^T
    output [α, o]   l = W_V^T m_i       M = 1

for each head. With Λ the curvature of everything downstream, the outer-product Hessian is

    H_o[P, P'] = Σ_i (l_i l'_i^T) (x) (M_i^T Λ_i M'_i)

and a double sum over tokens where Λ couples them. The functional Hessian Σ_i g_i . d²f_i follows from the same chain
rule; its terms stay within a head. For one head without projection these are the blocks of Ormaniec, Dangel, Singh
(arXiv 2410.10986, theorems 3.1 and 3.2), without their L^2 x L^2 and L x d x d^2 arrays.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.attention.kronecker import KroneckerSum, Leaf, Pairing, Term, contract
from attnlab.attention.layer import AttentionLayer, expected_shapes
from attnlab.attention.moments import AttentionMoments
from attnlab.attention.turned import TokenPairs, by_token, token_pairs, turns_of


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenQuantities:
    """What the terms are made of, tokens of all sequences in one axis N.

    x, q (scaled by the score scale), first and second moments, gradient g at the layer's output, and g pulled back to
    the values (gamma = W_O g), with the third moment along W_V W_O g (None where it is zero). A layer that turns its
    keys has pairs of tokens in place of second and third moments.
    """

    x: Float[Array, "N D"]
    q: Float[Array, "N H K"]
    first: Float[Array, "N H D"]
    second: Float[Array, "N H D D"] | None
    third: Float[Array, "N H D D"] | None
    gradient: Float[Array, "N O"]
    gamma: Float[Array, "N H V"]
    pairs: TokenPairs | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenJacobian:
    """df_i/dP = l_i (x) M_i of one parameter; axes named as in `kronecker`, `o` the output feature.

    `symbols` writes l, M^T and M. Without a vector (None, "") the derivative is no Kronecker product, and M all of it.
    """

    vector: Array | None
    matrix: Array
    vector_indices: str = field(metadata={"static": True})
    matrix_indices: str = field(metadata={"static": True})
    symbols: tuple[str, str, str] = field(metadata={"static": True})

    @property
    def side(self) -> int:
        """The axis of the parameter on which the vector stands: 0 its rows, 1 its columns."""
        return 0 if self.vector_indices.endswith("r") else 1


def token_quantities(
    point: AttentionLayer, moments: AttentionMoments, gradient: Float[Array, "B L O"]
) -> TokenQuantities:
    """The quantities of all tokens; O(L^2 D^2) operations a head."""
    scale = point.config.score_scale
    gamma = jnp.einsum("hvo,bio->bhiv", point.output, gradient)
    third = pairs = None
    if point.config.rotary is not None:
        pairs = token_pairs(point, moments, jnp.einsum("hav,bhiv->bhia", point.value, gamma))
    elif moments.bends is not None:
        third = by_token(moments.third_along(jnp.einsum("hav,bhiv->bhia", point.value, gamma)))
    x = point.inputs.reshape(-1, point.inputs.shape[-1])
    q = scale * jnp.einsum("na,hak->nhk", x, point.query)
    second = by_token(moments.second) if pairs is None else None
    first, gamma = map(by_token, (moments.first, gamma))
    return TokenQuantities(scale * x, q, first, second, third, gradient.reshape(-1, gradient.shape[-1]), gamma, pairs)


def leaves(point: AttentionLayer) -> dict[str, Leaf]:
    """How every parameter holds its heads."""
    config, shapes = point.config, expected_shapes(point.config, point.inputs.shape[-1])
    heads = {name: config.groups if name in ("key", "value") else config.heads for name in point.names}
    return {name: Leaf(shapes[name], heads[name], 0 if name == "output" else 1) for name in point.names}


def shared(block: KroneckerSum, heads: tuple[int, int]) -> KroneckerSum:
    """A block from one in which every query head has a key and a value of its own: those that queries share are summed.

    `heads` are the query heads of the row's and the column's layer. The head axis of a parameter with G heads becomes
    an axis of these and one, `e` of the row and `f` of the column, of the H / G queries that share each.
    """
    sides = (("h", "he", block.row.heads, heads[0]), ("g", "gf", block.column.heads, heads[1]))
    apart = {letter: (both, (groups, count // groups)) for letter, both, groups, count in sides if groups != count}
    if not apart:
        return block
    table: dict[int, Any] = str.maketrans({letter: both for letter, (both, _) in apart.items()})

    def split(operand: Array, index: str) -> Array:
        sizes = ((apart[a][1] if a in apart else (size,)) for a, size in zip(index, operand.shape, strict=True))
        return operand.reshape([size for group in sizes for size in group])

    terms = (
        replace(t, operands=tuple(map(split, t.operands, t.indices)), indices=t.relabelled(table)) for t in block.terms
    )
    return replace(block, terms=tuple(terms))


def token_jacobians(point: AttentionLayer, tokens: TokenQuantities) -> dict[str, TokenJacobian]:
    """The table of the module docstring."""
    values = jnp.einsum("hav,hvo->hao", point.value, point.output)
    projected = "output" in point.params
    out, outT, both, bothT = ("W_O", "W_Oᵀ", "W_V W_O", "W_Oᵀ W_Vᵀ") if projected else ("I", "I", "W_V", "W_Vᵀ")
    table = {"value": TokenJacobian(tokens.first, point.output, "nhr", "hco", ("m_i", out, outT))}
    if projected:
        mixed = jnp.einsum("nha,hav->nhv", tokens.first, point.value)
        identity = jnp.eye(point.output_features, dtype=mixed.dtype)
        table["output"] = TokenJacobian(mixed, identity, "nhr", "co", ("W_Vᵀ m_i", "I", "I"))
    if tokens.pairs is not None:
        return table | _turned_jacobians(tokens, tokens.pairs, values)
    assert tokens.second is not None
    moved = jnp.einsum("nhab,hbo->nhao", tokens.second, values)  # Σ_i W_V W_O, shared by queries and keys
    if point.config.merged:
        table["query_key"] = TokenJacobian(tokens.x, moved, "nr", "nhco", ("τ x_i", f"Σ_i {both}", f"{bothT} Σ_i"))
        return table
    through_keys = jnp.einsum("nhao,hak->nhko", moved, point.key)
    symbols = ("τ x_i", f"W_Kᵀ Σ_i {both}", f"{bothT} Σ_i W_K")
    table["query"] = TokenJacobian(tokens.x, through_keys, "nr", "nhco", symbols)
    table["key"] = TokenJacobian(tokens.q, moved, "nhc", "nhro", ("τ q_i", f"Σ_i {both}", f"{bothT} Σ_i"))
    return table


def _turned_jacobians(tokens: TokenQuantities, pairs: TokenPairs, values: Array) -> dict[str, TokenJacobian]:
    """Of scores T_ij = τ q_i . κ_ij = ρ_ij . W_K^T x_j: df_i/dT_ij = s_ij W_O^T W_V^T (x_j - m_i) for both parameters,
    dT_ij/dQ = τ x_i (x) κ_ij, and dT_ij/dK = x_j (x) ρ_ij, whose two factors both go with j."""
    moved = jnp.einsum("nhj,nhja,hao->nhjo", pairs.slopes, pairs.centred, values)
    queries = jnp.einsum("nhjk,nhjo->nhko", pairs.keys, moved)
    keys = jnp.einsum("njr,nhjc,nhjo->nhrco", pairs.tokens, pairs.queries, moved)
    return {
        "query": TokenJacobian(tokens.x, queries, "nr", "nhco", ("τ x_i", "Σκ_i W_V W_O", "(Σκ_i W_V W_O)ᵀ")),
        "key": TokenJacobian(
            None, keys, "", "nhrco", ("", "sum_j s_ij (x_j ρ_ijᵀ) ⊗ x_j", "sum_j s_ij (x_j ρ_ijᵀ) ⊗ x_j")
        ),
    }


def outer_term(row: TokenJacobian, column: TokenJacobian, curvature: Array) -> Term:
    """H_o[P, P'] = Σ_i (l_i l'_i^T) (x) (M_i^T Λ_i M'_i), or the double sum over tokens where Λ couples them.

    `curvature` is a scalar times the identity, N x O x O, or B x L x O x L x O.
    """
    pairing: Pairing = "straight" if row.side == column.side else "crossed"
    if curvature.ndim == 5:
        return _coupled_term(row, column, curvature, pairing)
    if row.vector is None or column.vector is None:
        return _term_in_factors(row, column, curvature, pairing)
    one_token = str.maketrans("hrc", "gsd")
    ours, theirs = row.matrix_indices, column.matrix_indices.translate(one_token)
    middle = "" if curvature.ndim == 0 else "nop"
    theirs = theirs if curvature.ndim == 0 else theirs.replace("o", "p")
    token = "n" if "n" in ours + middle + theirs else ""
    indices = token + "".join(letter for letter in ours + theirs if letter in "hrcgsd")
    operands = (row.matrix, curvature, column.matrix)
    matrix = jnp.einsum(f"{ours},{middle},{theirs}->{indices}", *operands, precision="highest")
    sandwich = " ".join(symbol for symbol in (row.symbols[1], "Λ_i", column.symbols[2]) if symbol != "I")
    formula = f"sum_i {row.symbols[0]} ({column.symbols[0]})ᵀ ⊗ {sandwich}"
    vectors = (row.vector_indices, column.vector_indices.translate(one_token))
    return Term((row.vector, column.vector, matrix), (*vectors, indices), pairing, formula)


def bent_term(row: TokenJacobian, column: TokenJacobian, bend: Array) -> Term:
    """The same with Λ_f, the curvature in H_f of what stands behind the layer."""
    term = outer_term(row, column, bend)
    return replace(term, formula=term.formula.replace("Λ_i", "Λf_i"))


def _term_in_factors(row: TokenJacobian, column: TokenJacobian, curvature: Array, pairing: Pairing) -> Term:
    """Σ_i J_i^T Λ_i J'_i where one derivative is no Kronecker product: it is left as it is."""
    other = str.maketrans("hrco", "gsdp" if curvature.ndim else "gsdo")
    pieces = (
        (curvature, "nop" if curvature.ndim else ""),
        (row.vector, row.vector_indices),
        (row.matrix, row.matrix_indices),
        (column.vector, column.vector_indices.translate(other)),
        (column.matrix, column.matrix_indices.translate(other)),
    )
    operands, indices = zip(*((array, index) for array, index in pieces if array is not None), strict=True)
    formula = f"sum_i {row.symbols[0]} {row.symbols[1]} Λ_i {column.symbols[2]} {column.symbols[0]}"
    return Term(operands, indices, pairing, " ".join(formula.split()))


def _coupled_term(row: TokenJacobian, column: TokenJacobian, curvature: Array, pairing: Pairing) -> Term:
    """Σ_ij (l_i l'_j^T) (x) (M_i^T Λ_ij M'_j), kept in factors: the sandwich would hold N^2 matrices."""
    second_token = str.maketrans("hrcno", "gsdmp")
    batch, length = curvature.shape[:2]
    pieces = (
        (row.vector, row.vector_indices),
        (row.matrix, row.matrix_indices),
        (column.vector, column.vector_indices.translate(second_token)),
        (column.matrix, column.matrix_indices.translate(second_token)),
    )
    operands, indices = [curvature], ["bnomp"]
    for array, index in pieces:
        if array is None:
            continue
        has_token = index[0] in "nm"
        operands.append(array.reshape(batch, length, *array.shape[1:]) if has_token else array)
        indices.append("b" + index if has_token else index)
    theirs = tuple(symbol.replace("_i", "_j") for symbol in column.symbols)
    formula = f"sum_ij {row.symbols[0]} ({theirs[0]})ᵀ ⊗ {row.symbols[1]} Λ_ij {theirs[2]}"
    return Term(tuple(operands), tuple(indices), pairing, formula)


def functional_terms(point: AttentionLayer, tokens: TokenQuantities) -> dict[tuple[str, str], tuple[Term, ...]]:
    """H_f = Σ_i g_i . d²f_i for every pair of different or equal parameters, in one order each; absent pairs are zero.

    d²(g.f)/dz² = κ̂_i (the third moment along W_V W_O g_i), d²z/dQdK = scale x_i (x) 1, and the layer is linear in the
    values and in the projection. `hg` is the identity over heads: two heads never meet in one feature of f_i.
    """
    pairs = tokens.pairs
    scores = _score_terms(point, tokens) if pairs is None else _turned_score_terms(point, tokens, pairs)
    table = scores | _mixed_terms(point, tokens, "value", (tokens.gamma, "nhc"), "γ_i", None)
    if "output" in point.params:
        table |= _output_terms(point, tokens)
    return table


def _with_heads(point: AttentionLayer, *factors: tuple[Array, str], pairing: Pairing, formula: str) -> tuple[Term, ...]:
    same_head = (jnp.eye(point.config.heads, dtype=point.inputs.dtype), "hg")
    operands, indices = zip(*factors, *([same_head] if point.config.heads > 1 else []), strict=True)
    return (Term(operands, indices, pairing, formula),)


def _score_terms(point: AttentionLayer, tokens: TokenQuantities) -> dict[tuple[str, str], tuple[Term, ...]]:
    """Second derivatives in query and key (or in their product), by way of z_i = scale W_K q_i."""
    x, q, third = tokens.x, tokens.q, tokens.third
    assert tokens.second is not None
    if point.config.merged:
        if third is None:
            return {}
        term = _with_heads(
            point, (x, "nr"), (x, "ns"), (third, "nhcd"), pairing="straight", formula="sum_i τ x_i (τ x_i)ᵀ ⊗ κ̂_i"
        )
        return {("query_key", "query_key"): term}
    slope = jnp.einsum("nhab,hbv,nhv->nha", tokens.second, point.value, tokens.gamma)
    mixed = jnp.einsum("nr,nhs->hrs", x, slope)
    identity = jnp.eye(point.config.key_dim, dtype=x.dtype)
    formula = "(sum_i τ x_i (Σ_i W_V γ_i)ᵀ) ⊗ I"
    delta = _with_heads(point, (mixed, "hrs"), (identity, "cd"), pairing="straight", formula=formula)
    if third is None:
        return {("query", "key"): delta}
    half = jnp.einsum("nhab,hak->nhkb", third, point.key)  # W_K^T κ̂
    full = jnp.einsum("nhkb,hbl->nhkl", half, point.key)
    queries = _with_heads(
        point, (x, "nr"), (x, "ns"), (full, "nhcd"), pairing="straight", formula="sum_i τ x_i (τ x_i)ᵀ ⊗ W_Kᵀ κ̂_i W_K"
    )
    keys = _with_heads(
        point, (q, "nhc"), (q, "ngd"), (third, "nhrs"), pairing="straight", formula="sum_i τ q_i (τ q_i)ᵀ ⊗ κ̂_i"
    )
    both = _with_heads(
        point, (x, "nr"), (q, "ngd"), (half, "nhcs"), pairing="crossed", formula="sum_i τ x_i (τ q_i)ᵀ ⊗ W_Kᵀ κ̂_i"
    )
    return {("query", "query"): queries, ("key", "key"): keys, ("query", "key"): both + delta}


def _score_directions(
    point: AttentionLayer, tokens: TokenQuantities
) -> dict[str, tuple[tuple[Array, str], Array, str, Pairing]]:
    """dz_i/dP for the score parameters as a column: its vector; Σ_i times its matrix, whose column axis comes last;
    that matrix's symbol; and the pairing of a term that couples the vector with a column axis of the row parameter."""
    second = tokens.second
    assert second is not None
    if point.config.merged:
        return {"query_key": ((tokens.x, "ns"), second, "Σ_i", "crossed")}
    through_keys = jnp.einsum("nhab,hbk->nhak", second, point.key)
    return {
        "query": ((tokens.x, "ns"), through_keys, "Σ_i W_K", "crossed"),
        "key": ((tokens.q, "ngd"), second, "Σ_i", "straight"),
    }


def _mixed_terms(
    point: AttentionLayer,
    tokens: TokenQuantities,
    name: str,
    vector: tuple[Array, str],
    symbol: str,
    values: Array | None,
) -> dict[tuple[str, str], tuple[Term, ...]]:
    """Second derivatives in `name` (value or output, entering linearly through `vector`) and the score parameters."""
    table = {}
    if tokens.pairs is not None:
        return _turned_mixed_terms(point, tokens, tokens.pairs, name, vector, symbol, values)
    for score, (direction, matrix, matrix_symbol, pairing) in _score_directions(point, tokens).items():
        if values is not None:
            matrix, matrix_symbol = jnp.einsum("hav,nhab->nhvb", values, matrix), f"W_Vᵀ {matrix_symbol}"
        axes = "nhrd" if pairing == "crossed" else "nhrs"
        formula = f"sum_i {symbol} (τ {'x' if score != 'key' else 'q'}_i)ᵀ ⊗ {matrix_symbol}"
        table[name, score] = _with_heads(point, vector, direction, (matrix, axes), pairing=pairing, formula=formula)
    return table


def _output_terms(point: AttentionLayer, tokens: TokenQuantities) -> dict[tuple[str, str], tuple[Term, ...]]:
    """g.f = Σ_h (W_V^T m)^T W_O g."""
    table = _mixed_terms(point, tokens, "output", (tokens.gradient, "nc"), "g_i", point.value)
    gradient_by_mean = jnp.einsum("no,nha->hoa", tokens.gradient, tokens.first)
    identity = jnp.eye(point.config.value_dim, dtype=tokens.x.dtype)
    formula = "(sum_i g_i m_iᵀ) ⊗ I"
    factors = ((gradient_by_mean, "hcs"), (identity, "rd"))
    return table | {("output", "value"): _with_heads(point, *factors, pairing="crossed", formula=formula)}


def _turned_score_terms(
    point: AttentionLayer, tokens: TokenQuantities, pairs: TokenPairs
) -> dict[tuple[str, str], tuple[Term, ...]]:
    """Second derivatives in query and key of a layer that turns them.

    d²(g.f)/dT_ij dT_il = Σ_j t_ij e_j e_j^T about the mean, and d²T_ij/dQdK = τ x_i x_j^T (x) R_i^T R_j.
    """
    x, others = tokens.x, turns_of(point)
    sinks = pairs.tokens.shape[1] - len(others)
    others = jnp.pad(others, [(0, sinks), (0, 0), (0, 0)])
    delta = ((x, "nr"), (pairs.twists, "nhj"), (pairs.tokens, "njs"), (pairs.turns, "nzc"), (others, "jzd"))
    formula = "sum_ij τ x_i t_ij x_jᵀ ⊗ R_iᵀ R_j"
    table = {("query", "key"): _with_heads(point, *delta, pairing="straight", formula=formula)}
    if pairs.bends is None:
        return table
    bends, keys, features = pairs.bends, pairs.keys, pairs.features()
    full = jnp.einsum("nhj,nhjc,nhjd->nhcd", bends, keys, keys)
    formula = "sum_i τ x_i (τ x_i)ᵀ ⊗ κ̂κ_i"
    queries = _with_heads(point, (x, "nr"), (x, "ns"), (full, "nhcd"), pairing="straight", formula=formula)
    squares = ((bends, "nhj"), (features, "nhjrc"), (features, "nhjsd"))
    both = ((x, "nr"), (bends, "nhj"), (keys, "nhjc"), (features, "nhjsd"))
    return {
        ("query", "query"): queries,
        ("key", "key"): _with_heads(
            point, *squares, pairing="straight", formula="sum_ij b_ij (x_j ρ_ijᵀ) ⊗ (x_j ρ_ijᵀ)"
        ),
        ("query", "key"): _with_heads(point, *both, pairing="straight", formula="sum_ij τ x_i b_ij κ_ijᵀ ⊗ (x_j ρ_ijᵀ)")
        + table["query", "key"],
    }


def _turned_mixed_terms(
    point: AttentionLayer,
    tokens: TokenQuantities,
    pairs: TokenPairs,
    name: str,
    vector: tuple[Array, str],
    symbol: str,
    values: Array | None,
) -> dict[tuple[str, str], tuple[Term, ...]]:
    """`_mixed_terms` of a layer that turns its keys."""
    means = pairs.centred if values is None else jnp.einsum("nhja,hav->nhjv", pairs.centred, values)
    through_keys = jnp.einsum("nhj,nhjr,nhjd->nhrd", pairs.slopes, means, pairs.keys)
    query = (vector, (tokens.x, "ns"), (through_keys, "nhrd"))
    key = (vector, (pairs.slopes, "nhj"), (means, "nhjr"), (pairs.tokens, "njs"), (pairs.queries, "nhjd"))
    return {
        (name, "query"): _with_heads(point, *query, pairing="crossed", formula=f"sum_i {symbol} (τ x_i)ᵀ ⊗ Σκ_iᵀ"),
        (name, "key"): _with_heads(point, *key, pairing="straight", formula=f"sum_ij s_ij {symbol} x_jᵀ ⊗ (x_j ρ_ijᵀ)"),
    }


def same_vectors(outer: KroneckerSum, functional: KroneckerSum) -> bool:
    """Whether both parts of a block start with sums over tokens of the same (l_i l'_i^T), times B_i and C_i.

    So it is for score parameters of softmax attention, and for every pair where H_f starts with J^T Λ_f J. A parameter
    has one vector l on each of its axes: where the axes agree (in either order: a block may be transposed), the vectors
    do.
    """
    if not functional.terms or any("o" in index for index in outer.terms[0].indices):
        return False  # nothing there, or a sum that stays in its factors, the output features among them
    ours, theirs = outer.terms[0], functional.terms[0]
    return set(ours.indices[:2]) == set(theirs.indices[:2])


def sum_of_parts(outer: KroneckerSum, functional: KroneckerSum) -> KroneckerSum:
    """H_o + H_f of one block; terms on the same vectors become one, (l_i l'_i^T) (x) (B_i + C_i): half the work."""
    if not same_vectors(outer, functional):
        return outer + functional
    ours, theirs = outer.terms[0], functional.terms[0]
    merged = ours.operands[2] + contract(theirs.indices[2:], ours.indices[2], theirs.operands[2:])
    formula = f"{ours.formula} + {theirs.formula}"
    first = replace(ours, operands=(*ours.operands[:2], merged), formula=formula)
    return replace(outer, terms=(first, *outer.terms[1:], *functional.terms[1:]))
