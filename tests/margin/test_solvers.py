"""The solvers against scipy, scikit-learn, and weak duality on rows written out."""

from itertools import pairwise

import numpy as np
import pytest
import scipy.optimize
from margin_cases import SHAPES, dense_rows, random_problem, random_tokens, unplanned_problem

from attnlab.margin import (
    METHODS,
    SOLVERS,
    PrimalDual,
    Status,
    attention_problem,
    certify,
    margin_problem,
    max_margin,
    vector_problem,
    with_norm,
)
from attnlab.margin.rows import Rows
from attnlab.margin.solvers import frobenius_solution, solver
from compare import assert_close

NORMS = ["frobenius", "nuclear", ("lp", 1), ("lp", 1.3), ("lp", 1.75), ("lp", 3), ("lp", 8), ("lp", np.inf)]


def least_distance(rows, bound):
    """min ||w|| : rows w >= bound as a non-negative least-squares problem (Lawson and Hanson, chapter 23)."""
    stacked = np.vstack([rows.T, bound])
    inside, _ = scipy.optimize.nnls(stacked, np.eye(len(stacked))[-1], maxiter=100 * len(bound))
    residual = stacked @ inside - np.eye(len(stacked))[-1]
    return -residual[:-1] / residual[-1]


def linear_margin(rows):
    """max t : rows w >= t, |w| <= 1. Positive exactly if the rows are feasible."""
    m, size = rows.shape
    found = scipy.optimize.linprog(
        -np.eye(size + 1)[-1],
        A_ub=np.hstack([-rows, np.ones((m, 1))]),
        b_ub=np.zeros(m),
        bounds=[(-1, 1)] * size + [(None, 1)],
        method="highs",
    )
    return found.x[-1]


def naive_bounds(problem, direction, multipliers):
    """Weak duality with the rows written out and LAPACK's norms."""
    rows = dense_rows(problem)
    if problem.norm == "nuclear":
        size, dual = np.linalg.norm(direction, "nuc"), lambda m: np.linalg.norm(m, 2)
    else:
        p = 2 if problem.norm == "frobenius" else problem.norm[1]
        q = np.inf if p == 1 else 1 if p == np.inf else p / (p - 1)
        size, dual = np.linalg.norm(direction.ravel(), p), lambda m: np.linalg.norm(m.ravel(), q)
    assert np.all(multipliers[~problem.equality] >= 0)
    strict = problem.bound > 0
    lower = (rows @ direction.ravel())[strict].min() / size
    return lower, dual((rows.T @ multipliers).reshape(direction.shape)) / multipliers[strict].sum()


@pytest.mark.parametrize("method", [None, *METHODS])
@pytest.mark.parametrize("shape", SHAPES)
def test_frobenius_agrees_with_nonnegative_least_squares(shape, method):
    problem = random_problem(*shape, seed=1)
    found = max_margin(problem, method=method)
    expected = least_distance(dense_rows(problem), problem.bound)
    assert found.status == Status.SOLVED
    assert found.gap < 1e-12
    assert_close(found.solution.ravel(), expected, 1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_multipliers_make_the_solution_and_stand_on_the_support(shape):
    problem = random_problem(*shape, seed=2)
    found = max_margin(problem)
    rows = dense_rows(problem)
    assert_close(rows.T @ found.multipliers, found.solution.ravel(), 1e-10)
    assert_close((rows @ found.solution.ravel())[found.support], np.ones(found.support.sum()), 1e-10)
    assert np.all(found.multipliers[~found.support] == 0)


def test_frobenius_agrees_with_the_one_class_svm():
    svm = pytest.importorskip("sklearn.svm")
    problem = random_problem(6, 8, 10, seed=3)
    rows = dense_rows(problem)
    # nu -> 1/m makes the one-class SVM hard: the nearest point of the rows' hull to the origin, the same direction.
    machine = svm.OneClassSVM(kernel="linear", nu=0.5 / len(rows), tol=1e-12).fit(rows)
    expected = machine.dual_coef_ @ machine.support_vectors_
    assert_close(max_margin(problem).direction.ravel(), expected.ravel() / np.linalg.norm(expected), 1e-6)


@pytest.mark.parametrize("norm", NORMS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_certificates_hold_in_every_norm(shape, norm):
    problem = random_problem(*shape, seed=1, norm=norm)
    found = max_margin(problem)
    lower, upper = naive_bounds(problem, found.direction, np.maximum(found.multipliers, 0))
    assert found.status == Status.SOLVED
    assert 1 - lower / upper < 1e-9
    assert_close(found.margin, lower, 1e-10)
    assert_close(found.certificate.bound, upper, 1e-10)


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_every_solver_takes_rows_and_a_start_to_a_primal_dual_pair(norm):
    problem = random_problem(3, 4, 6, seed=1, norm=norm)
    rows = Rows(problem)
    found = solver(norm)(rows, frobenius_solution(rows, None))
    lower, upper = naive_bounds(problem, found.primal, np.where(found.support, found.dual, 0) / rows.scale)
    assert isinstance(found, PrimalDual)
    assert 1 - lower / upper < 1e-9
    assert_close(found.certificate.margin, lower, 1e-10)
    assert_close(found.certificate.bound, upper, 1e-10)


def test_every_solver_serves_a_norm():
    assert {solver(norm) for norm in NORMS} == set(SOLVERS.values())


@pytest.mark.parametrize("p", [1.75, 3])
def test_lp_agrees_with_sequential_quadratic_programming(p):
    problem = random_problem(2, 4, 3, seed=4, norm=("lp", p))
    rows = dense_rows(problem)
    oracle = scipy.optimize.minimize(
        lambda w: np.sum(np.abs(w) ** p),
        least_distance(rows, problem.bound),
        jac=lambda w: p * np.sign(w) * np.abs(w) ** (p - 1),
        constraints={"type": "ineq", "fun": lambda w: rows @ w - 1, "jac": lambda w: rows},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    assert_close(max_margin(problem).solution.ravel(), oracle.x, 1e-5)
    assert_close(1 / max_margin(problem).margin, np.linalg.norm(oracle.x, p), 1e-9)


def test_margins_of_nested_norms_are_ordered():
    problem = random_problem(6, 8, 10, seed=5)
    margins = [max_margin(with_norm(problem, ("lp", p))).margin for p in (1, 1.5, 2, 4, np.inf)]
    assert all(small < large for small, large in pairwise(margins))  # ||W||_p falls with p
    assert max_margin(with_norm(problem, "nuclear")).margin < margins[2]


def test_working_set_of_the_nuclear_solver():
    problem = random_problem(40, 15, 6, seed=1, norm="nuclear")
    found = max_margin(problem)
    lower, upper = naive_bounds(problem, found.direction, np.maximum(found.multipliers, 0))
    assert len(problem.owner) > 500
    assert 1 - lower / upper < 1e-10


@pytest.mark.parametrize("shape", [(5, 5, 2), (8, 5, 3), (12, 6, 4)])
def test_feasibility_near_the_threshold_is_proved_either_way(shape):
    verdicts = set()
    for seed in range(12):
        problem = unplanned_problem(*shape, seed=seed)
        rows, found = dense_rows(problem), max_margin(problem)
        verdicts.add(found.status)
        if linear_margin(rows) > 1e-9:
            assert found.status == Status.SOLVED
            assert (rows @ found.direction.ravel()).min() > 0
        else:  # Gordan: lambda >= 0, sum 1, and no combination left
            assert found.status == Status.INFEASIBLE
            assert found.multipliers.min() >= 0
            assert_close(found.multipliers.sum(), 1.0)
            assert np.linalg.norm(rows.T @ found.multipliers) < 1e-10
    assert Status.INFEASIBLE in verdicts


@pytest.mark.slow
def test_a_thousand_verdicts_near_the_threshold():
    """Half of such problems are feasible: every verdict is proved, and is that of linear programming."""
    feasible = 0
    for seed in range(1000):
        problem = unplanned_problem(6, 5, 3, seed=seed)
        rows, found = dense_rows(problem), max_margin(problem)
        possible = scipy.optimize.linprog(
            np.zeros(9), A_ub=-rows, b_ub=-np.ones(len(rows)), bounds=(None, None), method="highs"
        )
        assert found.status == (Status.SOLVED if possible.status == 0 else Status.INFEASIBLE), seed
        if found.status == Status.SOLVED:
            assert (rows @ found.direction.ravel()).min() > 0
            assert found.gap < 1e-9
        else:
            assert found.multipliers.min() >= 0
            assert_close(found.multipliers.sum(), 1.0)
            assert np.linalg.norm(rows.T @ found.multipliers) < 1e-10
        feasible += found.status == Status.SOLVED
    assert 150 < feasible < 850


def test_other_norms_inherit_infeasibility():
    problem = next(p for p in (unplanned_problem(12, 6, 3, s) for s in range(9)) if max_margin(p).status)
    for norm in ("nuclear", ("lp", 3), ("lp", 1)):
        assert max_margin(with_norm(problem, norm)).status == Status.INFEASIBLE


@pytest.mark.parametrize("norm", ["frobenius", "nuclear", ("lp", 3), ("lp", 1.75)], ids=str)
def test_several_selected_tokens(norm):
    x, z, first = random_tokens(4, 6, 12, seed=6)
    mask = np.arange(6) == first[:, None]
    mask[:, 0] = True
    found = max_margin(attention_problem(x, z, mask, norm=norm))
    scores = np.einsum("ntd,de,ne->nt", x, found.solution, z)
    assert found.status == Status.SOLVED
    for row, chosen in zip(scores, mask, strict=True):
        assert np.ptp(row[chosen]) < 1e-7
        assert row[chosen].min() - row[~chosen].max() > 1 - 1e-7


def test_equalities_agree_with_eliminating_them():
    x, z, first = random_tokens(4, 6, 12, seed=7)
    mask = np.arange(6) == first[:, None]
    mask[:, 0] = True
    problem = attention_problem(x, z, mask)
    rows = dense_rows(problem)
    # minimise within the null space of the equality rows
    null = scipy.linalg.null_space(rows[problem.equality])
    expected = null @ least_distance(rows[~problem.equality] @ null, np.ones((~problem.equality).sum()))
    assert_close(max_margin(problem).solution.ravel(), expected, 1e-9)


def test_rows_that_demand_a_sign_only():
    problem = random_problem(4, 6, 5, seed=8)
    bound = np.where(problem.owner % 2, 1.0, 0.0)
    mixed = margin_problem(problem.differences, problem.queries, owner=problem.owner, bound=bound)
    assert_close(max_margin(mixed).solution.ravel(), least_distance(dense_rows(mixed), bound), 1e-9)


def test_vector_problem_is_the_svm_of_the_differences():
    x, _, _ = random_tokens(4, 5, 12, seed=9)
    problem = vector_problem(x, np.array([0, 1, 2, 3]))
    found = max_margin(problem)
    assert found.direction.shape == (12,)
    assert_close(found.solution, least_distance(problem.differences, problem.bound), 1e-9)


def test_repeated_rows_are_no_obstacle():
    x, z, selection = random_tokens(3, 4, 6, seed=10)
    once, twice = (
        max_margin(attention_problem(np.repeat(x, k, axis=0), np.repeat(z, k, axis=0), np.repeat(selection, k)))
        for k in (1, 2)
    )
    assert twice.gap < 1e-12
    assert_close(once.direction, twice.direction, 1e-10)


def test_scale_of_the_tokens_does_not_matter():
    x, z, selection = random_tokens(6, 8, 10, seed=11)
    small = max_margin(attention_problem(1e-6 * x, 1e4 * z, selection))
    assert small.gap < 1e-12
    assert_close(small.direction, max_margin(attention_problem(x, z, selection)).direction, 1e-9)


def test_certificate_of_any_direction_bounds_the_margin():
    problem = random_problem(6, 8, 10, seed=12)
    found = max_margin(problem)
    random = np.random.default_rng(0)
    poor = certify(problem, found.direction + 0.01 * random.normal(size=(10, 10)), random.normal(size=42))
    assert poor.margin < found.margin < poor.bound


def test_unknown_method():
    with pytest.raises(ValueError, match=r"no method 'simplex'.*active set"):
        max_margin(random_problem(3, 4, 6, seed=1), method="simplex")


def test_contradiction_within_one_sequence_is_proved():
    """The selected token of sequence 0 lies inside the hull of the others: four rows contradict, of twenty-four."""
    random = np.random.default_rng(0)
    tokens, queries = random.normal(size=(6, 5, 3)), random.normal(size=(6, 3))
    tokens[0, 0] = random.dirichlet(np.ones(4)) @ tokens[0, 1:]
    found = max_margin(attention_problem(tokens, queries, np.zeros(6, int)))
    assert found.status == Status.INFEASIBLE
    assert found.certificate.residual < 1e-13


@pytest.mark.parametrize("shape", [(6, 6, 10), (6, 32, 10), (8, 5, 3)])
def test_few_rows_of_unequal_lengths_agree_with_the_interior_point(shape):
    random = np.random.default_rng(1)
    for seed in range(8):
        x, z, selection = random_tokens(*shape, seed=seed)
        sizes = 10 ** random.uniform(-1, 1, size=(2, shape[0], 1))
        problem = attention_problem(sizes[0][:, None] * x, sizes[1] * z, selection)
        short, long = max_margin(problem), max_margin(problem, method="interior point")
        assert short.gap < 1e-10
        assert_close(short.direction, long.direction, 1e-8)
        assert_close(short.certificate.residual, long.certificate.residual, 1e-6)
