"""Tokens and queries of any size pose the same problem: margins scale, directions stay; also sequence by sequence."""

from fractions import Fraction
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from margin_cases import dense_rows, random_tokens

from attnlab.margin import (
    Status,
    attention_problem,
    attention_risk,
    correlation,
    frobenius_batch,
    margin_probe,
    max_margin,
    regularization_path,
    stack,
    vector_problem,
)
from attnlab.training import TrainingState
from compare import assert_close

NORMS = ["frobenius", "nuclear", *(("lp", p) for p in (1, 1.2, 1.5, 2, 3, 8, 20, np.inf))]
BATCH = 8
SIZES = [(1e-12, 1.0), (1.0, 1e-12), (1e-12, 1e-12), (1e-12, 1e12), (1e12, 1.0), (1e12, 1e12)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_margins_scale_with_tokens_and_queries(norm, dtype):
    x, z, selection = random_tokens(4, 5, 4, seed=1)
    for tokens, queries in SIZES:
        small, large = (x * tokens).astype(dtype), (z * queries).astype(dtype)
        found = max_margin(attention_problem(small, large, selection, norm=norm))
        # the rounding of float32 is in the data: the same numbers at size 1
        plain = max_margin(
            attention_problem(small.astype(float) / tokens, large.astype(float) / queries, selection, norm=norm)
        )
        assert found.status == Status.SOLVED
        assert_close(found.margin / (tokens * queries), plain.margin, 1e-9)
        assert_close(found.direction, plain.direction, 1e-5)


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_queries_over_twelve_decades(norm):
    """Bounds over ten decades and more: what an interior point leaves of a large one is many times a small one."""
    for seed in range(13 if norm == "nuclear" else 4):
        x, z, selection = random_tokens(3 + seed % 3, 5, 4, seed=seed)
        sizes = 10 ** np.random.default_rng(seed).uniform(-6, 6, size=(len(z), 1))
        problem = attention_problem(x, z * sizes, selection, norm=norm)
        assert max_margin(problem).status == Status.SOLVED


def test_a_token_almost_the_selected_one():
    """It demands its margin of 1 across 1e-9, so that it alone decides: W is nearly that row over its squared norm."""
    random = np.random.default_rng(0)
    x, z, selection = random_tokens(4, 5, 6, seed=2)
    x[0, (selection[0] + 1) % 5] = x[0, selection[0]] + 1e-9 * random.normal(size=6)
    problem = attention_problem(x, z, selection)
    found = max_margin(problem)
    rows = dense_rows(problem)
    sizes = np.linalg.norm(rows, axis=1)
    stacked = np.vstack([(rows / sizes[:, None]).T, sizes.min() / sizes])
    inside, _ = scipy.optimize.nnls(stacked, np.eye(len(stacked))[-1])
    left = stacked @ inside - np.eye(len(stacked))[-1]
    assert found.status == Status.SOLVED
    assert_close(found.margin / sizes.min(), 1 / np.linalg.norm(left[:-1] / left[-1]), 1e-9)


@pytest.mark.parametrize("norm", ["frobenius", "nuclear", ("lp", 1), ("lp", 3)], ids=str)
@pytest.mark.filterwarnings("error")
def test_a_zero_query_is_a_contradiction(norm):
    x, z, selection = random_tokens(4, 5, 6, seed=3)
    for queries in (z * (np.arange(4) != 2)[:, None], 0 * z):
        found = max_margin(attention_problem(x, queries, selection, norm=norm))
        assert found.status == Status.INFEASIBLE
        assert found.certificate.residual == 0
        assert found.gap == np.inf
        assert_close(found.multipliers.sum(), 1.0)
        void = np.repeat(~queries.any(axis=1), 4)
        assert np.all(found.multipliers[~void] == 0)


@pytest.mark.parametrize("p", [1.01, 1.05, 1.2, 1.4, 10, 20, 50])
def test_norms_far_from_euclidean_are_proved(p):
    for seed in range(15):
        problem = attention_problem(*random_tokens(2 + seed % 6, 3 + seed % 5, 2 + seed % 7, seed=seed), norm=("lp", p))
        found, rows = max_margin(problem), dense_rows(problem)
        q = p / (p - 1)
        lower = (rows @ found.direction.ravel()).min() / np.linalg.norm(found.direction.ravel(), p)
        upper = np.linalg.norm(rows.T @ np.maximum(found.multipliers, 0), q) / np.maximum(found.multipliers, 0).sum()
        assert found.status == Status.SOLVED
        assert 1 - lower / upper < 1e-8


def least_norm_in_the_plane(rows, p):
    """min ||w||_p : rows w >= 1 in two dimensions, p = 1 or infinity, in fractions: of all vertices the best."""
    rows = [[Fraction(float(value)) for value in row] for row in rows]
    bends = [(1, 0), (0, 1)] if p == 1 else [(1, 1), (1, -1)]
    lines = [(*row, 1) for row in rows] + [(*bend, 0) for bend in bends]
    found = []
    for (a, b, c), (d, e, f) in combinations(lines, 2):
        if determinant := a * e - b * d:
            w = (c * e - b * f) / determinant, (a * f - c * d) / determinant
            if all(row[0] * w[0] + row[1] * w[1] >= 1 for row in rows):
                found.append(abs(w[0]) + abs(w[1]) if p == 1 else max(abs(w[0]), abs(w[1])))
    return min(found)


@pytest.mark.parametrize("p", [1, np.inf])
def test_linear_programs_at_the_edge(p):
    """Two sequences of three tokens whose rows contradict each other up to 4e-10; queries that are powers of two, so
    that the rows written out are exact."""
    tokens = np.array(
        [
            [
                [-0.8241096123314939, 1.7223488286393058],
                [-1.118496218810949, 1.0363641991372328],
                [-0.9713029156940772, 1.3793565139409922],
            ],
            [
                [0.04717755892665064, -0.19767931806184227],
                [-0.5293438781047538, 0.7520247942328009],
                [-0.19922860774283285, 0.2613649722402389],
            ],
        ]
    )
    problem = attention_problem(tokens, np.array([[-0.5], [1.0]]), np.array([2, 0]), norm=("lp", p))
    found = max_margin(problem)
    assert found.status == Status.SOLVED
    assert found.certificate.residual < 1e-8
    assert_close(found.margin, float(1 / least_norm_in_the_plane(dense_rows(problem), p)), 1e-9)


def test_the_batch_scales_too():
    data = [random_tokens(4, 5, 6, seed=seed) for seed in range(BATCH)]
    plain = frobenius_batch(stack([attention_problem(*one) for one in data]))
    for tokens, queries in SIZES:
        found = frobenius_batch(stack([attention_problem(x * tokens, z * queries, s) for x, z, s in data]))
        assert np.all(found.status == Status.SOLVED)
        assert_close(found.margin / (tokens * queries), plain.margin, 1e-12)
        assert_close(found.multipliers * (tokens * queries) ** 2, plain.multipliers, 1e-9)


def test_a_batch_of_zero_queries_is_infeasible():
    x, z, selection = random_tokens(4, 5, 6, seed=3)
    found = frobenius_batch(stack([attention_problem(x, 0 * z, selection)] * BATCH))
    assert np.all(found.status == Status.INFEASIBLE)


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.float64, marks=pytest.mark.slow)])
def test_probes_do_not_underflow(dtype):
    x, z, selection = random_tokens(4, 5, 6, seed=4)
    matrix = np.random.default_rng(0).normal(size=(6, 6))
    risk = attention_risk(jnp.asarray(x, dtype), jnp.ones(4, dtype), queries=jnp.asarray(z, dtype))
    watch = margin_probe({"other": jnp.asarray(1e-12 * matrix.T, dtype)}, jnp.asarray(selection))
    expected = (dense_rows(attention_problem(x, z, selection)) @ matrix.ravel()).min() / np.linalg.norm(matrix)

    @jax.jit
    def measure(params):
        state = TrainingState(0, params, (), jax.random.key(0), {})
        return watch.measure(risk, state, (), jax.random.key(0))[0]

    for size in (1e-30, 1e-12, 1.0, 1e12, 1e30):
        params = {"query_key": jnp.asarray(size * matrix, dtype)}
        values = measure(params)
        tolerance = 1e-5 if dtype == jnp.float32 else 1e-12
        assert_close(values["smallest_margin"], expected, tolerance)
        assert_close(values["norm"] / size, np.linalg.norm(matrix), tolerance)
        assert_close(
            values["correlation/other"], np.vdot(matrix, matrix.T) / np.linalg.norm(matrix) ** 2, 10 * tolerance
        )


def test_correlation_of_tiny_single_precision_matrices():
    tiny = jnp.full((3, 3), 1e-25, jnp.float32)
    assert_close(correlation(tiny, tiny), 1.0, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_the_path_scales_with_its_radii(size):
    random = np.random.default_rng(0)
    x, z = random.normal(size=(3, 4, 3)), random.normal(size=(3, 3))
    v = random.normal(size=3)
    start = {"query_key": jnp.asarray(random.normal(size=(3, 3)))}
    best, radii = jnp.asarray((x @ v).argmax(1)), np.array([1.0, 5.0, 25.0])
    paths = [
        regularization_path(
            attention_risk(jnp.asarray(x), jnp.ones(3), queries=jnp.asarray(s * z), readout=jnp.asarray(v)),
            best,
            jax.tree.map(lambda leaf, s=s: leaf / s**3, start),
            radii / s,
        )
        for s in (1.0, size)
    ]
    assert_close(paths[1].params["query_key"] * size, paths[0].params["query_key"], 1e-4)
    assert_close(paths[1].log_excess, paths[0].log_excess, 1e-8)


def ragged(lengths=(3, 5, 2, 4)):
    random = np.random.default_rng(5)
    tokens = [random.normal(size=(length, 6)) for length in lengths]
    return tokens, random.normal(size=(len(lengths), 6)), np.array([length - 1 for length in lengths])


def padded(tokens):
    whole = np.full((len(tokens), 5, 6), np.nan)
    for row, part in zip(whole, tokens, strict=True):
        row[: len(part)] = part
    return whole, np.arange(5) < np.array([len(part) for part in tokens])[:, None]


@pytest.mark.parametrize("norm", ["frobenius", "nuclear", ("lp", 3)], ids=str)
def test_ragged_sequences_are_their_rows(norm):
    tokens, queries, selection = ragged()
    rows = [(part[-1] - part[t], i) for i, part in enumerate(tokens) for t in range(len(part) - 1)]
    whole, mask = padded(tokens)
    for problem in (
        attention_problem(tokens, queries, selection, norm=norm),
        attention_problem(whole, queries, selection, mask=mask, norm=norm),
        attention_problem(jnp.asarray(whole), jnp.asarray(queries), selection, mask=jnp.asarray(mask), norm=norm),
    ):
        np.testing.assert_array_equal(problem.differences, [row for row, _ in rows])
        np.testing.assert_array_equal(problem.owner, [i for _, i in rows])
        found = max_margin(problem)
        assert found.status == Status.SOLVED
        scores = dense_rows(problem) @ found.solution.ravel()
        assert_close(scores.min(), 1.0, 1e-8)


def test_ragged_sequences_with_several_selected_tokens():
    tokens, queries, _ = ragged()
    several = [np.arange(len(part)) >= max(1, len(part) - 2) for part in tokens]
    whole, mask = padded(tokens)
    chosen = np.zeros(mask.shape, bool)
    for row, part in zip(chosen, several, strict=True):
        row[: len(part)] = part
    first = attention_problem(tokens, queries, several)
    second = attention_problem(whole, queries, chosen, mask=mask)
    np.testing.assert_array_equal(first.differences, second.differences)
    np.testing.assert_array_equal(first.equality, second.equality)
    found = max_margin(first)
    for part, query, selected in zip(tokens, queries, several, strict=True):
        scores = part @ found.solution @ query
        assert np.ptp(scores[selected]) < 1e-9
        assert scores[selected].min() - scores[~selected].max() > 1 - 1e-9


def test_ragged_keys_of_a_vector_problem():
    tokens, _, selection = ragged()
    found = max_margin(vector_problem(tokens, selection))
    assert found.direction.shape == (6,)
    for part in tokens:
        scores = part @ found.solution
        assert scores[-1] - scores[:-1].max() > 1 - 1e-9
