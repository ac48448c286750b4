"""Graph-SVM, next-token SVM, several tokens' finite part, and the joint problem."""

import numpy as np
import pytest
import scipy.optimize
from margin_cases import dense_rows, random_tokens

from attnlab.margin import (
    Status,
    attention_problem,
    equality_basis,
    equality_solution,
    finite_component,
    graph_problem,
    joint_max_margin,
    log_odds,
    max_margin,
    next_token_problem,
    priority_components,
    project_on_equalities,
)
from compare import assert_close

# Last token 0: labels 1 and 2 chase each other (1 -> 2 -> 1) above 0. Last token 3: label 0 above 3.
SEQUENCES = np.array([[1, 2, 0], [2, 1, 0], [1, 2, 0], [1, 1, 0], [0, 3, 3]])
LABELS = np.array([1, 2, 1, 1, 0])


def embeddings(seed=0, vocabulary=4, dimension=6):
    return np.random.default_rng(seed).normal(size=(vocabulary, dimension))


def test_components_by_hand():
    components = priority_components(SEQUENCES, LABELS, 4)
    assert components[0, 1] == components[0, 2] != components[0, 0]
    assert components[0, 3] == -1
    assert components[3, 0] != components[3, 3]
    assert np.all(components[1:3] == -1)


def test_graph_problem_separates_components_and_not_their_members():
    e = embeddings()
    found = max_margin(graph_problem(SEQUENCES, LABELS, e))
    scores = e @ found.solution @ e.T
    assert found.status == Status.SOLVED
    assert abs(scores[1, 0] - scores[2, 0]) < 1e-9
    assert_close(min(scores[1, 0], scores[2, 0]) - scores[0, 0], 1.0, 1e-9)
    assert_close(scores[0, 3] - scores[3, 3], 1.0, 1e-9)


def test_finite_component_minimises_the_cyclic_loss():
    e = embeddings(1)
    problem = graph_problem(SEQUENCES, LABELS, e)
    basis = equality_basis(problem)

    def loss(weights):  # over tokens 1 and 2 of last token 0 alone, from the definition
        w = np.einsum("rde,r->de", basis, weights)
        total = 0.0
        for sequence, label in zip(SEQUENCES[:4], LABELS[:4], strict=True):
            tokens = [x for x in sequence if x != 0]
            exponentials = np.exp([e[x] @ w @ e[0] for x in tokens])
            total -= np.log(exponentials[[x == label for x in tokens]].sum() / exponentials.sum())
        return total / 5

    oracle = scipy.optimize.minimize(loss, np.zeros(len(basis)), tol=1e-14)
    found = finite_component(SEQUENCES, LABELS, e)
    assert_close(found, np.einsum("rde,r->de", basis, oracle.x), 1e-6)
    # tokens 1 and 2 compete in three sequences, which 1 wins twice: its odds are 2
    assert_close((e[1] - e[2]) @ found @ e[0], np.log(2.0))
    assert_close(project_on_equalities(problem, found), found)


@pytest.mark.parametrize(
    ("sequences", "labels", "message"),
    [
        (SEQUENCES + 1, LABELS + 1, "token numbers from 1 to 4; expected 0 to 3"),
        (SEQUENCES, np.array([3, 2, 1, 1, 0]), r"labels\[0\] is 3, which is no token of sequence 0"),
        (SEQUENCES, LABELS[:2], "expected"),
    ],
)
def test_graph_refuses(sequences, labels, message):
    with pytest.raises(ValueError, match=message):
        graph_problem(sequences, labels, embeddings())


def next_token_case(seed=0, contexts=4, vocabulary=5, dimension=8):
    random = np.random.default_rng(seed)
    probabilities = random.dirichlet(np.ones(vocabulary), size=contexts)
    supports = random.random((contexts, vocabulary)) < 0.5
    supports[:, 0], supports[:, -1] = True, False
    probabilities = np.where(supports, probabilities, 0)
    return random.normal(size=(contexts, dimension)), supports, probabilities / probabilities.sum(1, keepdims=True)


def test_next_token_problem_and_its_finite_part():
    contexts, supports, probabilities = next_token_case()
    problem = next_token_problem(contexts, supports)
    found = max_margin(problem)
    finite = equality_solution(problem, log_odds(problem, probabilities))
    assert found.direction.shape == (5, 8)
    assert found.gap < 1e-10
    for h, support, p in zip(contexts, supports, probabilities, strict=True):
        logits = found.solution @ h
        assert np.ptp(logits[support]) < 1e-9
        assert logits[support].min() - logits[~support].max() > 1 - 1e-9
        kept = np.exp((finite @ h)[support])
        assert_close(kept / kept.sum(), p[support])
    # the direction is orthogonal to the span in which W stays finite
    assert np.abs(project_on_equalities(problem, found.direction)).max() < 1e-12
    assert_close(project_on_equalities(problem, finite), finite)


def test_next_token_entropy_is_approached_exponentially():
    contexts, supports, probabilities = next_token_case(1)
    problem = next_token_problem(contexts, supports)
    finite = equality_solution(problem, log_odds(problem, probabilities))
    direction = max_margin(problem).solution
    entropy = -np.sum(probabilities[supports] * np.log(probabilities[supports]))

    def excess(scale):
        logits = contexts @ (finite + scale * direction).T
        logits -= np.log(np.exp(logits).sum(1, keepdims=True))
        return -np.sum((probabilities * logits)[supports]) - entropy

    assert 0 < excess(16.0) < 1.1 * np.exp(-8.0) * excess(8.0)


def test_contradicting_values_are_refused():
    x, z, _ = random_tokens(1, 4, 2, seed=0)
    problem = attention_problem(x, z, np.array([[True, True, True, False]]))
    doubled = attention_problem(np.repeat(x, 2, 0), np.repeat(z, 2, 0), np.array([[True, True, True, False]] * 2))
    assert equality_solution(problem, np.array([1.0, 2.0])).shape == (2, 2)
    with pytest.raises(ValueError, match="contradict"):
        equality_solution(doubled, np.array([1.0, 2.0, 1.0, 3.0]))


def test_joint_problem_relaxes_the_sequences_that_do_not_support():
    x, _, selection = random_tokens(8, 4, 40, seed=3)
    direction = np.eye(40)[0]
    labels = np.where(np.arange(8) % 2, 1, -1)
    x[np.arange(8), selection] += (labels * np.linspace(1, 4, 8))[:, None] * direction  # different distances
    relaxed, strict = (joint_max_margin(x, labels, selection, relaxed=flag) for flag in (True, False))
    supporting = relaxed.classifier.support
    assert supporting.any()
    assert not supporting.all()
    rows = np.array([[x[i, selection[i]] - x[i, t] for t in range(4) if t != selection[i]] for i in range(8)])
    margins = rows @ relaxed.query.solution
    assert margins[supporting].min() > 1 - 1e-9
    assert -1e-9 < margins[~supporting].min() < 1 - 1e-3
    assert relaxed.query.margin > strict.query.margin
    assert (rows @ strict.query.solution).min() > 1 - 1e-9


def test_joint_problem_refuses_other_labels():
    x, _, selection = random_tokens(3, 4, 5, seed=3)
    with pytest.raises(ValueError, match="expected -1 and 1"):
        joint_max_margin(x, np.array([0, 1, 1]), selection)


def test_rows_helper_matches_scores():
    x, z, selection = random_tokens(2, 3, 4, seed=1)
    problem = attention_problem(x, z, selection)
    w = np.random.default_rng(0).normal(size=(4, 4))
    scores = np.einsum("ntd,de,ne->nt", x, w, z)
    expected = [scores[i, selection[i]] - scores[i, t] for i in range(2) for t in range(3) if t != selection[i]]
    assert_close(dense_rows(problem) @ w.ravel(), np.array(expected))
