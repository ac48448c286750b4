"""The Lanczos recurrences on matrices with known spectra."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from attnlab.curvature.spectrum import BESIDE
from attnlab.krylov.lanczos import gauss_quadrature, inner_products, tridiagonalize
from attnlab.krylov.restarts import MISSED, first_state, restart_cycle, thick_restart
from attnlab.krylov.ritz import FEWEST, plan_restarts
from compare import assert_close


def symmetric(eigenvalues, key):
    """A matrix with the given eigenvalues and random eigenvectors."""
    n = len(eigenvalues)
    basis, _ = np.linalg.qr(jax.random.normal(key, (n, n)))
    return jnp.asarray((basis * eigenvalues) @ basis.T)


@jax.jit(static_argnames=("plan",))
def extreme(matrix, start, plan, tolerance, key):
    return thick_restart(lambda vector: matrix @ vector, start, plan, tolerance, key)


SPECTRA = {
    "separated": np.r_[np.linspace(-1, 1, 190), -8, -5, -3, 2, 4, 6, 9, 12, 15, 18],
    "clustered": np.r_[np.linspace(-1, 1, 190), 2 + 1e-3 * np.arange(10)],
    "repeated": np.r_[np.zeros(150), np.ones(30), np.repeat([5.0, 7.0], 10)],
    "two_ends_repeated": np.r_[np.repeat(-3.0, 6), np.linspace(-1, 1, 188), np.repeat(4.0, 6)],
    "slow_decay": 1 / np.arange(1, 201) ** 0.5,
    "slow_decay_doubled": np.repeat(1 / np.arange(1, 101) ** 0.5, 2),
    "slow_decay_tripled": np.r_[np.repeat(1 / np.arange(1, 67) ** 0.5, 3), 0.0, 0.0],
    "identity": np.ones(200),
    "zero": np.zeros(200),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize(
    ("low", "high"), [(0, 5), pytest.param(5, 0, marks=pytest.mark.slow), pytest.param(4, 4, marks=pytest.mark.slow)]
)
def test_thick_restart_finds_the_ends_with_multiplicity(name, low, high, key):
    if name.startswith("slow_decay") and low:
        pytest.skip("its low end is dense: no gap for a Krylov method to see")
    eigenvalues = np.sort(SPECTRA[name])
    matrix = symmetric(eigenvalues, key)
    start_key, key = jax.random.split(key)  # the draws fold the cycle into the key: no fold of it may be the start's
    start = jax.random.normal(start_key, (200,))
    pairs = extreme(matrix, start, plan_restarts(low, high, 200), 1e-9, key)
    expected = np.r_[eigenvalues[:low], eigenvalues[200 - high :]]
    scale = max(np.abs(eigenvalues).max(), 1e-14)
    assert np.all(np.abs(pairs.values - expected) <= 1e-9 * scale)
    true_residuals = np.linalg.norm(pairs.vectors @ matrix - pairs.values[:, None] * pairs.vectors, axis=1)
    assert np.all(true_residuals <= pairs.residuals + 1e-13 * scale)
    assert_close(pairs.vectors @ pairs.vectors.T, np.eye(low + high), 1e-12)


@pytest.mark.parametrize(
    ("name", "low", "high"), [("repeated", 0, 5), pytest.param("separated", 4, 4, marks=pytest.mark.slow)]
)
def test_a_small_basis_changed_column_by_column_finds_the_same(name, low, high, key):
    eigenvalues = np.sort(SPECTRA[name])
    matrix = symmetric(eigenvalues, key)
    plan = plan_restarts(low, high, 200, basis=low + high + FEWEST, slab=37)  # 200 is no multiple of it
    pairs = extreme(matrix, jax.random.normal(key, (200,)), plan, 1e-9, jax.random.fold_in(key, 1))
    expected = np.r_[eigenvalues[:low], eigenvalues[200 - high :]]
    assert pairs.missed <= MISSED
    assert_close(pairs.values, expected, 1e-9)
    assert_close(pairs.vectors @ pairs.vectors.T, np.eye(low + high), 1e-12)


def test_a_cycle_holds_the_basis_once():
    n, plan = 10_000_000, plan_restarts(0, 2, 10_000_000, basis=8)
    diagonal, start = (jax.ShapeDtypeStruct((n,), np.float32) for _ in range(2))
    state = jax.eval_shape(lambda start: first_state(start, plan), start)

    @partial(jax.jit, donate_argnames="state")
    def cycle(diagonal, state, key):
        return restart_cycle(lambda vector: diagonal * vector, state, plan, 1e-4, key)

    memory = cycle.lower(diagonal, state, jax.eval_shape(lambda: jax.random.key(0))).compile().memory_analysis()
    operator, slabs = 4 * n, 2 * 4 * plan.size * plan.slab
    taken = memory.argument_size_in_bytes + memory.temp_size_in_bytes - operator - slabs
    assert memory.alias_size_in_bytes >= 4 * n * (plan.size + 1)
    assert taken <= 4 * n * (plan.size + BESIDE)


def test_residuals_bound_the_error_when_the_iteration_is_cut_short(key):
    eigenvalues = np.sort(SPECTRA["slow_decay"])
    matrix = symmetric(eigenvalues, key)
    plan = plan_restarts(0, 5, 200, cycles=1)
    pairs = extreme(matrix, jax.random.normal(key, (200,)), plan, 1e-12, key)
    assert np.max(pairs.residuals) > 1e-6
    nearest = np.min(np.abs(eigenvalues[None, :] - pairs.values[:, None]), axis=1)
    assert np.all(nearest <= pairs.residuals)


def test_inner_products_of_long_vectors_do_not_lose_their_sums():
    rows = np.random.default_rng(0).standard_normal((2, 2**22), np.float32)
    exact = rows.astype(np.float64) @ rows[0].astype(np.float64)
    assert_close(np.asarray(inner_products(jnp.asarray(rows), jnp.asarray(rows[0])), np.float64), exact, 1e-6)


def test_tridiagonal_matrix_is_the_projection(key):
    matrix = symmetric(np.linspace(-1, 2, 40), key)
    start = jax.random.normal(key, (40,))
    projection = tridiagonalize(lambda vector: matrix @ vector, start, 8)
    krylov = np.column_stack([np.linalg.matrix_power(matrix, power) @ start for power in range(8)])
    basis, _ = np.linalg.qr(krylov)
    expected = np.abs(basis.T @ matrix @ basis)
    assert_close(jnp.abs(projection.dense()), np.triu(np.tril(expected, 1), -1), 1e-6)


def test_gauss_rule_integrates_polynomials_exactly(key):
    matrix = symmetric(np.linspace(-1, 2, 40), key)
    start = jax.random.normal(key, (40,))
    nodes, weights = gauss_quadrature(tridiagonalize(lambda vector: matrix @ vector, start, 5))
    unit = start / jnp.linalg.norm(start)
    for degree in range(10):
        expected = unit @ np.linalg.matrix_power(matrix, degree) @ unit
        assert abs(nodes**degree @ weights - expected) <= 1e-12
    assert abs(nodes**10 @ weights - unit @ np.linalg.matrix_power(matrix, 10) @ unit) > 1e-8


def test_an_invariant_space_ends_the_rule_without_a_trace(key):
    eigenvalues = np.r_[np.zeros(30), 1.0, 2.0]
    matrix = symmetric(eigenvalues, key)
    start = np.ones(32)
    nodes, weights = gauss_quadrature(tridiagonalize(lambda vector: matrix @ vector, jnp.asarray(start), 20))
    exact_nodes, vectors = scipy.linalg.eigh(matrix)
    exact = (vectors.T @ start) ** 2 / 32
    for power in range(5):
        assert abs(nodes**power @ weights - exact_nodes**power @ exact) <= 1e-12
    assert np.isfinite(nodes).all()
    assert abs(jnp.sum(weights) - 1) <= 1e-14
