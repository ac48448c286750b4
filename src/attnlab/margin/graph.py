"""Graph-SVM: the token-priority graph of next-token prediction with one attention layer (arXiv 2403.08081).

For each last token k the edges y -> x lead from the label y of a sequence that ends in k to every token x of that
sequence. Inside a strongly connected component no token can win, so scores stay finite; between components the
earlier one must win.
"""

import numpy as np
import scipy.sparse
import scipy.special
from jaxtyping import Float, Int

from attnlab.checks import check_positive
from attnlab.margin.checking import host_array, real_array
from attnlab.margin.equalities import equality_basis
from attnlab.margin.problems import AnyArray, MarginProblem, Norm, margin_problem

ABSENT = -1


def priority_components(
    sequences: Int[AnyArray, "n T"], labels: Int[AnyArray, " n"], vocabulary: int
) -> Int[AnyArray, "vocabulary vocabulary"]:
    """Entry (k, x): the strongly connected component of token x in the graph of last token k; -1 if x is not in it."""
    sequences, labels = _check(sequences, labels, vocabulary)
    components = np.full((vocabulary, vocabulary), ABSENT)
    for last in np.unique(sequences[:, -1]):
        ours = sequences[:, -1] == last
        present = np.unique(sequences[ours])
        edges = scipy.sparse.coo_matrix(
            (np.ones(sequences[ours].size), (np.repeat(labels[ours], sequences.shape[1]), sequences[ours].ravel())),
            shape=(vocabulary, vocabulary),
        )
        component = scipy.sparse.csgraph.connected_components(edges, connection="strong")[1]
        components[last, present] = component[present]
    return components


def graph_problem(
    sequences: Int[AnyArray, "n T"],
    labels: Int[AnyArray, " n"],
    embeddings: Float[AnyArray, "vocabulary d"],
    *,
    norm: Norm = "frobenius",
) -> MarginProblem:
    """minimise ||W|| : (e_x - e_x')^T W e_k = 0 inside a component of the graph of k, >= 1 along edges between two.

    The label of a sequence must be one of its tokens. Raises `ValueError` where it is not, for token numbers outside
    the vocabulary, and if every edge stays inside a component (then there is only the finite part).

    >>> import numpy as np
    >>> from attnlab.margin import graph_problem, max_margin
    >>> sequences, labels = np.array([[1, 2, 0], [2, 1, 0]]), np.array([1, 2])  # tokens 1 and 2 win in turn
    >>> solution = max_margin(graph_problem(sequences, labels, embeddings=np.eye(3))).solution
    >>> np.round(solution[:, 0], 6).tolist()  # the scores of the tokens after a 0
    [-0.666667, 0.333333, 0.333333]
    """
    embeddings = real_array("embeddings", embeddings, 2, "(vocabulary, token dimension)")
    components = priority_components(sequences, labels, len(embeddings))
    sequences, labels = np.asarray(sequences), np.asarray(labels)
    pairs: list[tuple[int, int]] = []
    owner: list[int] = []
    equality: list[bool] = []
    for last in np.unique(sequences[:, -1]):
        component = components[last]
        for members in (np.flatnonzero(component == c) for c in np.unique(component[component != ABSENT])):
            pairs += [(members[0], other) for other in members[1:]]
            equality += [True] * (len(members) - 1)
        ours = sequences[:, -1] == last
        edges = {(y, x) for y, row in zip(labels[ours], sequences[ours], strict=True) for x in row}
        strict = sorted((int(y), int(x)) for y, x in edges if component[y] != component[x])
        pairs += strict
        equality += [False] * len(strict)
        owner += [last] * (len(pairs) - len(owner))
    first, second = np.array(pairs, int).reshape(-1, 2).T
    return margin_problem(
        embeddings[first] - embeddings[second],
        embeddings,
        owner=np.array(owner),
        equality=np.array(equality),
        norm=norm,
    )


def finite_component(
    sequences: Int[AnyArray, "n T"],
    labels: Int[AnyArray, " n"],
    embeddings: Float[AnyArray, "vocabulary d"],
    *,
    steps: int = 100,
) -> Float[AnyArray, "d d"]:
    """W_fin: the minimiser, in the span of the equality rows, of the loss of what the components leave undecided,

        mean_i -log sum_{t: x_it = y_i} softmax((e_{x_it}^T W e_{k_i})_{t in the component of y_i})_t,

    convex there, by Newton's method to rounding (arXiv 2403.08081, for the log loss). Zero if nothing is
    cyclic.
    """
    embeddings = real_array("embeddings", embeddings, 2, "(vocabulary, token dimension)")
    check_positive(steps=steps)
    basis = equality_basis(graph_problem(sequences, labels, embeddings))
    sequences, labels = np.asarray(sequences), np.asarray(labels)
    components = priority_components(sequences, labels, len(embeddings))
    last = sequences[:, -1]
    inside = components[last[:, None], sequences] == components[last, labels][:, None]
    # features_itr: score of token t of sequence i under basis matrix r, less that of its label
    features = np.einsum(
        "itd,rde,ie->itr", embeddings[sequences] - embeddings[labels][:, None], basis, embeddings[last], optimize=True
    )
    weights = np.zeros(len(basis))
    for _ in range(steps):
        # loss_i = log sum_{t inside} exp(features . weights) - log(copies of the label)
        probabilities = scipy.special.softmax(np.where(inside, features @ weights, -np.inf), axis=1)
        means = np.einsum("it,itr->ir", probabilities, features)
        gradient = means.mean(0)
        second = np.einsum("it,itr,its->rs", probabilities, features, features) / len(features)
        hessian = second - means.T @ means / len(features)
        step = np.linalg.lstsq(hessian, gradient, rcond=1e-14)[0]
        weights = weights - step / (1 + np.sqrt(max(gradient @ step, 0.0)))  # damped as for self-concordant functions
        if np.abs(step).max(initial=0.0) <= 1e-14 * (1 + np.abs(weights).max(initial=0.0)):
            break
    return np.einsum("rde,r->de", basis, weights)


def _check(sequences: AnyArray, labels: AnyArray, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    sequences = host_array("sequences", sequences, "(n, T) token numbers")
    labels = host_array("labels", labels, "(n,) token numbers")
    if sequences.dtype.kind not in "iu" or labels.dtype.kind not in "iu" or not sequences.size:
        raise ValueError(
            f"sequences and labels have dtypes {sequences.dtype} and {labels.dtype} and shapes {sequences.shape} and "
            f"{labels.shape}; expected token numbers, none of them empty. Use .astype(int)."
        )
    if sequences.ndim != 2 or labels.shape != sequences.shape[:1]:
        raise ValueError(
            f"sequences and labels have shapes {sequences.shape} and {labels.shape}; expected (n, T) and (n,)."
        )
    if sequences.min() < 0 or sequences.max() >= vocabulary:
        raise ValueError(
            f"sequences hold token numbers from {sequences.min()} to {sequences.max()}; "
            f"expected 0 to {vocabulary - 1}, one row of the embeddings each."
        )
    absent = ~(sequences == labels[:, None]).any(axis=1)
    if absent.any():
        i = int(absent.argmax())
        raise ValueError(f"labels[{i}] is {labels[i]}, which is no token of sequence {i}; expected one of its tokens.")
    return sequences, labels
