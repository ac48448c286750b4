"""The examples in docstrings run, and those of what a user meets first are there."""

import doctest

import pytest

from attnlab import margin

FIRST = (
    "MarginProblem",
    "attention_problem",
    "attention_risk",
    "certify",
    "frobenius_batch",
    "graph_problem",
    "joint_max_margin",
    "margin_probe",
    "margin_problem",
    "max_margin",
    "mirror_descent",
    "next_token_problem",
    "normalized_descent",
    "regularization_path",
    "rescaled",
    "vector_problem",
    "with_norm",
)


def examples(name):
    found = getattr(margin, name)
    return doctest.DocTestFinder(recurse=False).find(found, name) if callable(found) else []


NAMES = [name for name in margin.__all__ if any(test.examples for test in examples(name))]


@pytest.mark.parametrize("name", NAMES)
def test_examples_run(name):
    (test,) = examples(name)
    test.globs = {}
    said = []
    results = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=said.append)
    assert results.attempted
    assert not results.failed, "".join(said)


def test_what_is_met_first_has_an_example():
    assert set(FIRST) <= set(NAMES)
