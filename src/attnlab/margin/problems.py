"""Max-margin problems of attention as data: which token of which sequence must win, and in which norm.

Every problem here reads

    minimise ||W||  subject to  <a_k, W> >= bound_k  (or = 0),   a_k = Delta_k z_{o(k)}^T,

with Delta_k a difference of two tokens and z a query, so that <a_k, W> = Delta_k^T W z is a difference of two attention
scores. The a_k are never formed: a problem keeps the differences, the queries and the owner o(k) of every row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from attnlab.checks import is_concrete, unknown_name
from attnlab.margin.checking import check_floating_vectors, check_index, host_array, real_array, whole_array

AnyArray = np.ndarray | jax.Array
"""Problems and answers are NumPy arrays on the host and JAX arrays in traced functions."""

Norm = str | tuple[str, float]
"""`"frobenius"`, `"nuclear"`, or `("lp", p)` with p >= 1: the entrywise norm (sum_ij |W_ij|^p)^(1/p)."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MarginProblem:
    """Minimise ||W|| subject to <Delta_k z_{owner_k}^T, W> >= bound_k, or = 0 where `equality`.

    A pytree: problems of one shape stack along a leading axis and go through `vmap`. Rows of one owner stand together.

    Attributes:
        differences: Delta, one token difference a row.
        queries: z, one a sequence.
        owner: which query a row belongs to, non-decreasing.
        bound: 1 where a row demands a margin, 0 where it only demands a sign (or equality).
        equality: rows that hold with equality (their multipliers are free).
        norm: see `Norm`; static.
        shape: shape of the solution: (d, e), or (d,) for a vector problem; static.

    >>> import numpy as np
    >>> from attnlab.margin import attention_problem
    >>> tokens = np.array([[[2.0, 0.0], [0.0, 0.0], [0.0, 1.0]]])
    >>> problem = attention_problem(tokens, np.ones((1, 1)), np.array([0]))
    >>> problem.differences.tolist(), problem.owner.tolist(), problem.shape, problem.norm
    ([[2.0, 0.0], [2.0, -1.0]], [0, 0], (2, 1), 'frobenius')
    """

    differences: Float[AnyArray, "m d"]
    queries: Float[AnyArray, "n e"]
    owner: Int[AnyArray, " m"]
    bound: Float[AnyArray, " m"]
    equality: Bool[AnyArray, " m"]
    norm: Norm = field(metadata={"static": True}, default="frobenius")
    shape: tuple[int, ...] = field(metadata={"static": True}, default=())


def check_norm(norm: Norm) -> Norm:
    """`norm` if it is one; raises `ValueError` for an unknown name or an exponent below 1."""
    if isinstance(norm, tuple | list) and len(norm) == 2 and norm[0] == "lp":
        p = norm[1]
        if isinstance(p, bool) or not isinstance(p, int | float | np.number) or not p >= 1:
            raise ValueError(
                f"norm is ('lp', {p!r}), which is no norm; expected an exponent p >= 1, as in ('lp', 1.5)."
            )
        return "frobenius" if p == 2 else ("lp", float(p))
    if norm not in ("frobenius", "nuclear"):
        raise unknown_name("norm", str(norm), ("frobenius", "nuclear", "('lp', p)"))
    return norm


def exponent(norm: Norm) -> float:
    """p of an entrywise norm."""
    return 2.0 if norm == "frobenius" else float(norm[1])


def dual_exponent(norm: Norm) -> float:
    """q with 1/p + 1/q = 1."""
    p = exponent(norm)
    return np.inf if p == 1 else 1.0 if p == np.inf else p / (p - 1)


def check_problem(problem: MarginProblem) -> MarginProblem:
    """`problem` if it is one, on the host; raises `TypeError` otherwise."""
    if not isinstance(problem, MarginProblem):
        raise TypeError(
            f"problem is a {type(problem).__name__}; expected a MarginProblem. Build it with attention_problem, "
            "vector_problem or margin_problem."
        )
    if not (isinstance(problem.differences, np.ndarray) or is_concrete(problem)):
        raise TypeError(
            "problem is traced; expected concrete arrays. Inside jit, vmap and grad use frobenius_traced instead."
        )
    if np.ndim(problem.differences) != 2:
        raise ValueError(
            f"problem has differences of shape {np.shape(problem.differences)}; expected (rows, token dimension). "
            "Solve a stack of problems with frobenius_batch, or one by one."
        )
    return problem


def attention_problem(
    tokens: Float[AnyArray, "n T d"] | Sequence[Float[AnyArray, "_ d"]],
    queries: Float[AnyArray, "n e"],
    selection: Int[AnyArray, " n"] | Bool[AnyArray, "n T"] | Sequence[Bool[AnyArray, " _"]],
    *,
    mask: Bool[AnyArray, "n T"] | None = None,
    norm: Norm = "frobenius",
) -> MarginProblem:
    """The attention SVM: in each sequence i the selected token must beat every other by a margin of 1,

        minimise ||W|| : (x_{i alpha_i} - x_it)^T W z_i >= 1 for all t != alpha_i

    (Att-SVM of arXiv 2308.16898; the nuclear norm belongs to the factors W = K Q^T). `selection` is the index
    alpha_i, or a mask of several selected tokens: then scores are equal inside the selected set and larger by 1 than
    those outside it. Sequences of unequal lengths are a list of (T_i, d) arrays, with indices or a list of (T_i,) masks
    as selection; or padded to one length, with the `mask` True at the tokens that count. Raises `ValueError` for a
    selection outside the sequence, one-token sequences, a token that equals the selected one (no W separates them), and
    values that are not finite; `TypeError` for token numbers in place of vectors, and for what is traced.

    >>> import numpy as np
    >>> from attnlab.margin import attention_problem, max_margin
    >>> random = np.random.default_rng(0)
    >>> tokens, queries = random.normal(size=(3, 4, 8)), random.normal(size=(3, 8))
    >>> problem = attention_problem(tokens, queries, selection=np.array([0, 1, 2]))
    >>> scores = np.einsum("ntd,de,ne->nt", tokens, max_margin(problem).solution, queries)
    >>> scores.argmax(axis=1).tolist()
    [0, 1, 2]
    """
    return _problem("tokens", tokens, queries, selection, mask, norm)


def _problem(name: str, tokens: Any, queries: Any, selection: Any, mask: Any, norm: Norm) -> MarginProblem:
    tokens, selection, mask = _padded(name, tokens, selection, mask)
    tokens = real_array(name, tokens, 3, "(sequences, tokens, token dimension)")
    n, length, d = tokens.shape
    queries = real_array("queries", queries, 2, f"({n}, query dimension), one a sequence")
    selection = host_array("selection", selection, f"{n} indices, or a boolean mask of shape {(n, length)}")
    _check_shapes(name, tokens, queries, selection, mask)
    several = selection.dtype == bool
    if several:
        first = _first_selected(selection, mask)
    else:
        check_index("selection", selection, length)
        first = selection
    other = np.arange(length) != first[:, None]  # every token but the first selected one, row by row
    if mask is not None:
        _check_counted(mask, first)
        other &= mask
    differences = (tokens[np.arange(n), first][:, None] - tokens)[other]
    owner = np.repeat(np.arange(n), length - 1) if mask is None else np.nonzero(other)[0]
    equality = selection[other] if several else np.zeros(len(owner), bool)
    _check_distinct(differences, equality, first, other)
    if several:
        return margin_problem(differences, queries, owner=owner, equality=equality, norm=norm)
    return MarginProblem(
        differences, queries, owner, np.ones(len(owner)), equality, check_norm(norm), (d, queries.shape[1])
    )


def vector_problem(
    keys: Float[AnyArray, "n T d"] | Sequence[Float[AnyArray, "_ d"]],
    selection: Int[AnyArray, " n"] | Bool[AnyArray, "n T"] | Sequence[Bool[AnyArray, " _"]],
    *,
    mask: Bool[AnyArray, "n T"] | None = None,
    norm: Norm = "frobenius",
) -> MarginProblem:
    """The same for a trainable query p: minimise ||p|| : p^T (k_{i alpha_i} - k_it) >= 1 (arXiv 2306.13596, Att-SVM).

    It is the matrix problem with the scalar query 1; the solution has shape (d,).

    >>> import numpy as np
    >>> from attnlab.margin import max_margin, vector_problem
    >>> problem = vector_problem(np.array([[[2.0, 0.0], [0.0, 0.0]]]), selection=np.array([0]))
    >>> max_margin(problem).solution.tolist()
    [0.5, 0.0]
    """
    count = keys.shape[:1] if hasattr(keys, "shape") else (len(keys),)
    problem = _problem("keys", keys, np.ones((*(count or (1,)), 1)), selection, mask, norm)
    return replace(problem, shape=problem.shape[:1])


def margin_problem(
    differences: Float[AnyArray, "m d"],
    queries: Float[AnyArray, "n e"],
    *,
    owner: Int[AnyArray, " m"],
    bound: Float[AnyArray, " m"] | None = None,
    equality: Bool[AnyArray, " m"] | None = None,
    norm: Norm = "frobenius",
    vector: bool = False,
) -> MarginProblem:
    """A problem from its rows. `bound` is 1 by default, and always 0 where `equality`.

    `vector` with scalar queries gives the solution the shape (d,). Raises `ValueError` if no row has the bound 1, for
    bounds other than 0 and 1, owners that are no query, and values that are not finite.

    >>> import numpy as np
    >>> from attnlab.margin import margin_problem, max_margin
    >>> differences, queries = np.array([[1.0, 0.0], [0.0, 1.0]]), np.ones((1, 1))
    >>> problem = margin_problem(differences, queries, owner=np.array([0, 0]), equality=np.array([False, True]))
    >>> max_margin(problem).solution.round(9).tolist()
    [[1.0], [0.0]]
    """
    differences = real_array("differences", differences, 2, "(rows, token dimension)")
    queries = real_array("queries", queries, 2, "(sequences, query dimension)")
    m = len(differences)
    owner = whole_array("owner", owner, (m,), "the query of each row")
    if owner.min() < 0 or owner.max() >= len(queries):
        raise ValueError(
            f"owner holds {owner.min()} to {owner.max()}; expected 0 to {len(queries) - 1}, numbers of the queries."
        )
    equality = np.zeros(m, bool) if equality is None else host_array("equality", equality, f"{m} booleans")
    if equality.shape != (m,) or equality.dtype != bool:
        raise ValueError(
            f"equality has shape {equality.shape} and dtype {equality.dtype}; expected a boolean for each of {m} rows."
        )
    bound = np.ones(m) if bound is None else real_array("bound", bound, 1, f"({m},), 1 or 0 for each row")
    if bound.shape != (m,) or not np.isin(bound, (0, 1)).all():
        raise ValueError(
            f"bound has shape {bound.shape} and holds {np.unique(bound)[:5]}; expected 1 (a margin) or 0 (a sign) for "
            f"each of {m} rows. Another demand is a row of another length: divide the difference by it."
        )
    bound = np.where(equality, 0.0, bound)
    if not bound.any():
        raise ValueError(f"none of the {m} rows demands a margin; expected at least one token outside the selection.")
    if vector and queries.shape[1] != 1:
        raise ValueError(f"queries have shape {queries.shape}; expected (sequences, 1) where vector=True.")
    if (np.diff(owner) < 0).any():
        order = np.argsort(owner, kind="stable")
        differences, owner, bound, equality = differences[order], owner[order], bound[order], equality[order]
    shape = (differences.shape[1],) if vector else (differences.shape[1], queries.shape[1])
    return MarginProblem(differences, queries, owner, bound, equality, check_norm(norm), shape)


def with_norm(problem: MarginProblem, norm: Norm) -> MarginProblem:
    """The same constraints in another norm.

    >>> import numpy as np
    >>> from attnlab.margin import max_margin, vector_problem, with_norm
    >>> problem = vector_problem(np.array([[[2.0, 1.0], [0.0, 0.0]]]), selection=np.array([0]))
    >>> {p: round(float(max_margin(with_norm(problem, ("lp", p))).margin), 6) for p in (1, 2, float("inf"))}
    {1: 2.0, 2: 2.236068, inf: 3.0}
    """
    return replace(check_problem(problem), norm=check_norm(norm))


def stack(problems: Sequence[MarginProblem]) -> MarginProblem:
    """Problems of one shape and norm as one batch, along a new leading axis.

    Raises `ValueError` for an empty list, and for problems that differ in shape or norm.
    """
    problems = [check_problem(problem) for problem in problems]
    if not problems:
        raise ValueError("problems is empty; expected at least one problem.")
    kinds = [(np.shape(p.differences), np.shape(p.queries), p.norm) for p in problems]
    if len(set(kinds)) > 1:
        i = next(i for i, kind in enumerate(kinds) if kind != kinds[0])
        raise ValueError(
            f"problems[{i}] has rows, queries and norm {kinds[i]}, problems[0] has {kinds[0]}; expected the same of "
            "all. Solve those of different shapes one by one."
        )
    return jax.tree.map(lambda *leaves: np.stack(leaves), *problems)


def _padded(name: str, tokens: Any, selection: Any, mask: Any) -> tuple[Any, Any, np.ndarray | None]:
    """A list of sequences, and of masks of what is selected in them, as arrays with a mask; arrays as they are."""
    if isinstance(tokens, list | tuple) and len({np.shape(part) for part in tokens}) > 1:
        if mask is not None:
            raise ValueError(
                f"mask is given and {name} is a list of sequences of unequal lengths; expected one of the two. Leave "
                "the mask out."
            )
        parts = [real_array(f"{name}[{i}]", part, 2, "(tokens, token dimension)") for i, part in enumerate(tokens)]
        for i, part in enumerate(tokens):
            check_floating_vectors(f"{name}[{i}]", np.asarray(part))
        if len({part.shape[1] for part in parts}) > 1:
            raise ValueError(
                f"{name} have the dimensions {[part.shape[1] for part in parts][:5]}; expected one of all."
            )
        lengths = np.array([len(part) for part in parts])
        if isinstance(selection, list | tuple) and any(np.ndim(part) for part in selection):
            selection = _pad_selection(selection, lengths)
        elif np.shape(selection) == lengths.shape:
            check_index("selection", selection, lengths)
        padded = np.zeros((len(parts), lengths.max(), parts[0].shape[1]))
        for row, part in zip(padded, parts, strict=True):
            row[: len(part)] = part
        return padded, selection, np.arange(lengths.max()) < lengths[:, None]
    array = host_array(name, tokens, "(sequences, tokens, token dimension)")
    check_floating_vectors(name, array)
    if mask is None:
        return array, selection, None
    mask = host_array("mask", mask, "a boolean for each token")
    if mask.shape != array.shape[:2] or mask.dtype != bool:
        raise ValueError(
            f"mask has shape {mask.shape} and dtype {mask.dtype}; expected a boolean for each token, of shape "
            f"{array.shape[:2]}, True where it counts. Use .astype(bool) for 0 and 1."
        )
    return (np.where(mask[..., None], array, 0.0) if array.ndim == 3 else array), selection, mask


def _pad_selection(selection: Sequence[Any], lengths: np.ndarray) -> np.ndarray:
    padded = np.zeros((len(lengths), lengths.max()), bool)
    shapes = [np.shape(part) for part in selection]
    if shapes != [(length,) for length in lengths] or any(np.asarray(part).dtype != bool for part in selection):
        raise ValueError(
            f"selection has parts of shapes {shapes[:5]}; expected a boolean for each token, shapes "
            f"{[(int(length),) for length in lengths[:5]]}, or one index a sequence."
        )
    for row, part in zip(padded, selection, strict=True):
        row[: len(part)] = part
    return padded


def _check_shapes(
    name: str, tokens: np.ndarray, queries: np.ndarray, selection: np.ndarray, mask: np.ndarray | None
) -> None:
    n, length, _ = tokens.shape
    counts = np.full(n, length) if mask is None else mask.sum(axis=1)
    if counts.min() < 2:
        raise ValueError(
            f"{name} have shape {tokens.shape} and sequence {int(counts.argmin())} has {counts.min()} of them: "
            "sequences of one token leave nothing to select from. Leave them out."
        )
    if len(queries) != n:
        raise ValueError(f"queries have shape {queries.shape}; expected ({n}, query dimension), one a sequence.")
    wanted = (n, length) if selection.dtype == bool else (n,)
    if selection.shape != wanted or selection.dtype.kind not in "iub":
        raise ValueError(
            f"selection has shape {selection.shape} and dtype {selection.dtype}; expected {n} indices, "
            f"or a boolean mask of shape {(n, length)}."
        )


def _check_counted(mask: np.ndarray, first: np.ndarray) -> None:
    padding = ~mask[np.arange(len(mask)), first]
    if padding.any():
        i = int(padding.argmax())
        raise ValueError(f"selection[{i}] is {first[i]}, where mask is False; expected a token that counts.")


def _first_selected(selection: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    if mask is not None and (selection & ~mask).any():
        i, t = (int(index) for index in np.argwhere(selection & ~mask)[0])
        raise ValueError(f"selection[{i}] holds token {t}, where mask is False; expected tokens that count.")
    if not selection.any(axis=1).all():
        i = int((~selection.any(axis=1)).argmax())
        raise ValueError(f"selection[{i}] selects no token; expected at least one in every sequence.")
    return selection.argmax(axis=1)


def _check_distinct(differences: np.ndarray, equality: np.ndarray, first: np.ndarray, other: np.ndarray) -> None:
    same = ~(differences.any(axis=1) | equality)
    if same.any():
        i, t = (int(index) for index in np.argwhere(other)[same][0])
        raise ValueError(
            f"tokens {first[i]} (selected) and {t} of sequence {i} are equal, so no parameters separate "
            "them: the problem is infeasible. Remove the duplicate, or select both."
        )
