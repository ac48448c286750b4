"""Problems made of the others: next-token prediction, and attention trained jointly with its classifier."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from attnlab.margin.certificates import MaxMargin, Status
from attnlab.margin.checking import check_same_shape, check_signs, host_array, real_array, whole_array
from attnlab.margin.problems import AnyArray, MarginProblem, Norm, attention_problem, margin_problem, vector_problem
from attnlab.margin.solve import max_margin


def next_token_problem(
    contexts: Float[AnyArray, "n d"], supports: Bool[AnyArray, "n vocabulary"], *, norm: Norm = "frobenius"
) -> MarginProblem:
    """The next-token SVM of a linear decoder W (arXiv 2402.18551, NTP-SVM), for contexts h_j with several next tokens,

        minimise ||W|| : (e_x - e_x')^T W h_j = 0 for x, x' in the support of h_j, >= 1 for x in it and x' out of it.

    It is the attention SVM on one-hot tokens with the supports as selected sets; W is (vocabulary, d). Equality rows:
    first token of the support against each other one, in order.

    >>> import numpy as np
    >>> from attnlab.margin import max_margin, next_token_problem
    >>> contexts = np.eye(2)
    >>> supports = np.array([[True, True, False], [False, False, True]])  # the second context has one next token
    >>> found = max_margin(next_token_problem(contexts, supports))
    >>> np.round(found.solution @ contexts.T, 6).T.tolist()
    [[0.333333, 0.333333, -0.666667], [-0.333333, -0.333333, 0.666667]]
    """
    supports = host_array("supports", supports, "(contexts, vocabulary) booleans")
    if supports.ndim != 2 or not np.isin(supports, (0, 1)).all():
        raise ValueError(
            f"supports have shape {supports.shape} and dtype {supports.dtype}; expected booleans of shape (contexts, "
            "vocabulary), the next tokens of each context. Compare probabilities with 0 first."
        )
    supports = supports.astype(bool)
    contexts = real_array("contexts", contexts, 2, f"({len(supports)}, dimension), one for each support")
    if len(contexts) != len(supports):
        raise ValueError(f"contexts have shape {contexts.shape}; expected ({len(supports)}, dimension), as supports.")
    tokens = np.broadcast_to(np.eye(supports.shape[1]), (*supports.shape, supports.shape[1]))
    return attention_problem(tokens, contexts, supports, norm=norm)


def log_odds(problem: MarginProblem, probabilities: Float[AnyArray, "n vocabulary"]) -> Float[AnyArray, " q"]:
    """log(p(x) / p(x')) for the equality rows of a next-token problem.

    With these values `equality_solution` is W*, whose odds inside each support are those of the data. Raises
    `ValueError` for shapes that do not agree, and where a token of a support has no probability.
    """
    rows = np.flatnonzero(np.asarray(problem.equality))
    differences, owner = np.asarray(problem.differences)[rows], np.asarray(problem.owner)[rows]
    probabilities = real_array("probabilities", probabilities, 2, "(contexts, vocabulary)")
    shape = (len(problem.queries), problem.shape[0])
    check_same_shape("probabilities", probabilities, shape, "the problem's contexts and vocabulary")
    chosen = probabilities[owner]
    first, second = differences.argmax(axis=1), differences.argmin(axis=1)
    at = np.arange(len(rows))
    if not (chosen[at, first] > 0).all() or not (chosen[at, second] > 0).all():
        raise ValueError(
            "probabilities are 0 or negative at a token of a support; expected positive ones there. Build the problem "
            "with supports = probabilities > 0."
        )
    return np.log(chosen[at, first]) - np.log(chosen[at, second])


@dataclass(frozen=True)
class JointMargin:
    """The pair that attention with a trained classifier converges to: classifier v and query p."""

    classifier: MaxMargin
    query: MaxMargin


def joint_max_margin(
    tokens: Float[AnyArray, "n T d"],
    labels: Float[AnyArray, " n"],
    selection: Int[AnyArray, " n"],
    *,
    keys: Float[AnyArray, "n T d"] | None = None,
    relaxed: bool = True,
) -> JointMargin:
    """v is the SVM of the selected tokens with labels +-1; p selects them (arXiv 2306.13596).

    minimise ||v|| : Y_i v^T x_{i alpha_i} >= 1. Then p: p^T (k_{i alpha_i} - k_it) >= 1 for sequences i that support v,
    and with `relaxed` only >= 0 for the others, whose attention need not saturate; else >= 1 for all. `keys` are the
    tokens by default. Raises `ValueError` for labels other than -1 and 1, or if no v classifies the selected tokens.

    >>> import numpy as np
    >>> from attnlab.margin import joint_max_margin
    >>> tokens = np.array([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], [[-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]])
    >>> pair = joint_max_margin(tokens, labels=np.array([1, -1]), selection=np.array([0, 0]))
    >>> pair.classifier.solution.round(6).tolist(), pair.query.solution.round(6).tolist()
    ([1.0, 0.0, 0.0], [0.0, -1.0, -1.0])
    """
    tokens = real_array("tokens", tokens, 3, "(sequences, tokens, token dimension)")
    n = len(tokens)
    labels = host_array("labels", labels, f"{n} signs")
    check_same_shape("labels", labels, (n,), "the sequences")
    check_signs("labels", labels)
    selection = whole_array("selection", selection, (n,), "the index of one token for each sequence")
    if keys is not None:
        check_same_shape("keys", keys, tokens.shape, "the tokens")
    problem = vector_problem(tokens if keys is None else keys, selection)
    selected = tokens[np.arange(n), selection]
    classes = margin_problem(selected * labels[:, None], np.ones((1, 1)), owner=np.zeros(n, int), vector=True)
    classifier = max_margin(classes)
    if classifier.status == Status.INFEASIBLE:
        raise ValueError("no v classifies the selected tokens: select others, or use a larger token dimension.")
    bound = np.where(classifier.support[problem.owner], 1.0, 0.0) if relaxed else problem.bound
    query = margin_problem(problem.differences, problem.queries, owner=problem.owner, bound=bound, vector=True)
    return JointMargin(classifier, max_margin(query))
