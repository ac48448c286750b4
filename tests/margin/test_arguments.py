"""Arguments that are none: each is refused by name, with what was expected and what to do."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from margin_cases import ones, random_problem, random_tokens

from attnlab.margin import (
    attention_problem,
    attention_risk,
    certify,
    correlation,
    decision_risk,
    decoupled,
    equality_solution,
    finite_component,
    frobenius_batch,
    frobenius_traced,
    imbalance,
    joint_max_margin,
    log_odds,
    margin_probe,
    margin_problem,
    max_margin,
    mirror_descent,
    next_token_problem,
    normalized_descent,
    project_on_equalities,
    regularization_path,
    rescaled,
    selected_probability,
    stack,
    vector_problem,
    with_norm,
)

X, Z, S = random_tokens(3, 4, 5, seed=3)
PROBLEM = random_problem(3, 4, 5, seed=3)
RISK = attention_risk(jnp.asarray(X), ones(3), queries=jnp.asarray(Z), readout=ones(5))
PARAMS = {"query_key": ones(5, 5)}
DELTA, OWNER = PROBLEM.differences, PROBLEM.owner
EMBEDDINGS, SEQUENCES = np.eye(4), np.array([[0, 1, 2], [1, 2, 3]])
SUPPORTS = np.array([[True, True, False], [False, True, True]])


def with_nan(array):
    array = array.copy()
    array[0, 0, 0] = np.nan
    return array


CASES = {
    "tolerance negative": (lambda: max_margin(PROBLEM, tolerance=-1), r"tolerance is -1; expected"),
    "tolerance nan": (lambda: max_margin(PROBLEM, tolerance=np.nan), r"tolerance is nan; expected"),
    "tolerance word": (lambda: max_margin(PROBLEM, tolerance="tight"), r"tolerance is 'tight'; expected"),
    "tolerance of traced": (lambda: frobenius_traced(PROBLEM, tolerance=0.0), r"tolerance is 0.0; expected"),
    "problem": (lambda: max_margin((X, Z, S)), r"problem is a tuple; expected a MarginProblem"),
    "problem of a stack": (lambda: max_margin(stack([PROBLEM] * 2)), r"shape \(2, 9, 5\).*frobenius_batch"),
    "problem traced": (lambda: jax.jit(lambda p: max_margin(p).direction)(PROBLEM), r"traced.*frobenius_traced"),
    "method": (lambda: max_margin(PROBLEM, method=3), r"no method '3'"),
    "norm exponent": (lambda: with_norm(PROBLEM, ("lp", 0.5)), r"norm is \('lp', 0.5\).*p >= 1"),
    "norm nan": (lambda: with_norm(PROBLEM, ("lp", np.nan)), r"norm is \('lp', nan\).*p >= 1"),
    "norm word": (lambda: with_norm(PROBLEM, ("lp", "2")), r"norm is \('lp', '2'\).*p >= 1"),
    "norm name": (lambda: with_norm(PROBLEM, "frobenious"), r"Did you mean 'frobenius'"),
    "norm none": (lambda: with_norm(PROBLEM, None), r"no norm 'None'"),
    "norm of traced": (lambda: frobenius_traced(with_norm(PROBLEM, "nuclear")), r"norm 'nuclear'.*max_margin"),
    "batch of one": (lambda: frobenius_batch(PROBLEM), r"shape \(9, 5\).*stack"),
    "stack of none": (lambda: stack([]), r"problems is empty"),
    "stack of shapes": (lambda: stack([PROBLEM, random_problem(2, 4, 5, seed=1)]), r"problems\[1\] has"),
    "stack of norms": (lambda: stack([PROBLEM, with_norm(PROBLEM, "nuclear")]), r"problems\[1\] has.*nuclear"),
    "tokens words": (lambda: attention_problem("abc", Z, S), r"tokens have dtype <U3.*'abc'; expected real"),
    "tokens none": (lambda: attention_problem(None, Z, S), r"tokens have dtype object.*expected real"),
    "tokens complex": (lambda: attention_problem(X + 1j, Z, S), r"tokens have dtype complex128"),
    "tokens empty": (lambda: attention_problem(X[:0], Z, S), r"tokens have shape \(0, 4, 5\)"),
    "tokens whole": (lambda: attention_problem(np.ones((3, 4, 5), int), Z, S), r"tokens have dtype int64.*embedding"),
    "tokens flat": (lambda: attention_problem(X[0], Z, S), r"tokens have shape \(4, 5\)"),
    "tokens nan": (lambda: attention_problem(with_nan(X), Z, S), r"tokens has 1 non-finite"),
    "tokens traced": (lambda: jax.jit(lambda x: attention_problem(x, Z, S))(X), r"tokens is traced.*frobenius_traced"),
    "queries word": (lambda: attention_problem(X, "z", S), r"queries have dtype"),
    "queries flat": (lambda: attention_problem(X, Z[0], S), r"queries have shape \(5,\); expected \(3, "),
    "selection float": (lambda: attention_problem(X, Z, S.astype(float)), r"selection has shape.*float64; expected 3"),
    "selection out": (lambda: attention_problem(X, Z, S * 0 + 4), r"selection\[0\] is 4; expected 0 <= selection < 4"),
    "selection short": (lambda: attention_problem(X, Z, S[:2]), r"selection has shape \(2,\)"),
    "mask whole": (lambda: attention_problem(X, Z, S, mask=np.ones((3, 4))), r"mask has .*float64.*astype\(bool\)"),
    "mask shape": (lambda: attention_problem(X, Z, S, mask=np.ones((3, 3), bool)), r"mask has shape \(3, 3\)"),
    "mask short": (lambda: attention_problem(X, Z, S, mask=np.eye(3, 4, dtype=bool)), r"sequence 0 has 1 of them"),
    "mask of the selected": (
        lambda: attention_problem(X, Z, S, mask=np.arange(4) != S[:, None]),
        r"selection\[0\] is \d, where mask is False",
    ),
    "ragged short": (lambda: attention_problem([X[0], X[1, :1], X[2]], Z, S), r"selection\[1\]|sequence 1 has 1"),
    "ragged dimensions": (lambda: attention_problem([X[0], X[1, :, :3], X[2]], Z, S), r"dimensions \[5, 3, 5\]"),
    "ragged selection": (
        lambda: attention_problem([X[0], X[1, :3], X[2]], Z, [0, 3, 0]),
        r"selection\[1\] is 3; expected 0 <= selection < 3",
    ),
    "ragged and mask": (
        lambda: attention_problem([X[0], X[1, :3], X[2]], Z, S, mask=np.ones((3, 4), bool)),
        r"mask is given and tokens is a list",
    ),
    "keys": (lambda: vector_problem(np.full((3, 4, 5), np.inf), S), r"keys has 60 non-finite"),
    "differences": (lambda: margin_problem(DELTA * np.nan, Z, owner=OWNER), r"differences has 45 non-finite"),
    "owner float": (lambda: margin_problem(DELTA, Z, owner=OWNER + 0.0), r"owner has .*float64"),
    "owner out": (lambda: margin_problem(DELTA, Z, owner=OWNER + 1), r"owner holds 1 to 3; expected 0 to 2"),
    "bound": (lambda: margin_problem(DELTA, Z, owner=OWNER, bound=np.full(9, 2.0)), r"bound has .*holds \[2.\]"),
    "equality": (lambda: margin_problem(DELTA, Z, owner=OWNER, equality=np.ones(9)), r"equality has .*float64"),
    "vector": (lambda: margin_problem(DELTA, Z, owner=OWNER, vector=True), r"queries have shape \(3, 5\).*vector"),
    "direction": (lambda: certify(PROBLEM, np.ones((5, 4)), np.ones(9)), r"direction has shape \(5, 4\)"),
    "direction zero": (lambda: certify(PROBLEM, np.zeros((5, 5)), np.ones(9)), r"direction is 0"),
    "multipliers": (lambda: certify(PROBLEM, np.ones((5, 5)), np.ones(8)), r"multipliers has shape \(8,\)"),
    "supports": (lambda: next_token_problem(Z, np.full((3, 4), 0.5)), r"supports have .*float64.*Compare"),
    "contexts": (lambda: next_token_problem(Z, SUPPORTS), r"contexts have shape \(3, 5\); expected \(2, "),
    "probabilities of odds": (
        lambda: log_odds(next_token_problem(Z[:2], SUPPORTS), np.eye(3)[:2]),
        r"probabilities are 0 or negative.*supports",
    ),
    "labels of the pair": (
        lambda: joint_max_margin(X, np.array([0, 1, 1]), S),
        r"labels hold \[0 1\].*2 \* labels - 1",
    ),
    "labels of the risk": (lambda: attention_risk(jnp.asarray(X), jnp.array([0.0, 1, 1])), r"labels hold .*-1 and 1"),
    "labels float": (lambda: attention_risk(jnp.asarray(X), jnp.array([0.3, 1, 1])), r"labels hold .*sign"),
    "token numbers": (lambda: attention_risk(ones(3, 4, 5, dtype=int), ones(3)), r"tokens have dtype int"),
    "token list": (lambda: attention_risk([X[0], X[1]], ones(2)), r"tokens is a list.*Pad"),
    "rescaled": (lambda: rescaled(RISK, jnp.array([0, 1, 9])), r"selection\[2\] is 9"),
    "probability": (
        lambda: selected_probability(PARAMS, RISK.inputs, ones(3)),
        r"selection has shape \(3,\) and dtype float64",
    ),
    "distributions": (lambda: decision_risk(jnp.asarray(X), jnp.asarray(Z), ones(3, 4)), r"probabilities hold"),
    "inside": (lambda: decoupled(RISK, ones(3, 4), ones(1, 5, 5)), r"inside has .*float64"),
    "path radii": (lambda: regularization_path(RISK, S, PARAMS, np.array([1, np.nan])), r"radii has 1 non-finite"),
    "path selection": (lambda: regularization_path(RISK, S * 1.0, PARAMS, np.ones(1)), r"selection has .*float64"),
    "probe directions": (lambda: margin_probe(ones(5, 5)), r"directions is a .*dict"),
    "correlation": (lambda: correlation(ones(5), ones(5, 5)), r"second has shape \(5, 5\); expected \(5,\)"),
    "imbalance": (lambda: imbalance(PARAMS), r"no parameter 'key'"),
    "exponent": (lambda: mirror_descent(0.1, float("nan")), r"p is nan; expected a finite number above 1"),
    "exponent word": (lambda: mirror_descent(0.1, "2"), r"p is '2'; expected"),
    "step size": (lambda: normalized_descent(-0.1), r"step_size is -0.1; expected a positive"),
    "values": (lambda: equality_solution(PROBLEM, "a"), r"values have dtype"),
    "matrix": (lambda: project_on_equalities(PROBLEM, np.ones(5)), r"matrix has shape \(5,\); expected \(5, 5\)"),
    "sequences": (
        lambda: finite_component(SEQUENCES + 0.0, SEQUENCES[:, 0], EMBEDDINGS),
        r"sequences and labels have dtypes float64",
    ),
    "embeddings": (lambda: finite_component(SEQUENCES, SEQUENCES[:, 0], np.eye(4)[0]), r"embeddings have shape \(4,\)"),
    "steps": (lambda: finite_component(SEQUENCES, SEQUENCES[:, 0], EMBEDDINGS, steps=0), r"steps is 0; expected"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_no_argument_is_named(case):
    call, message = CASES[case]
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    said = str(caught.value)
    assert re.search(message, said, flags=re.DOTALL), said
    assert type(caught.value).__module__ == "builtins"
    assert "expected" in said or "Did you mean" in said or "leave nothing to select" in said
