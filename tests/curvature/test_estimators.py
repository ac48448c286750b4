"""Estimates against dense matrices: within their own error bars, which cover as often as they should."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

from attnlab.curvature.estimators import (
    condition_number,
    diagonal,
    frobenius_norm,
    log_determinant,
    square_root,
    squared_frobenius_norm,
    trace,
)
from attnlab.curvature.guards import NonFiniteProductError
from attnlab.curvature.linear_systems import solve
from attnlab.curvature.operator import Operator
from attnlab.curvature.operators import ggn, hessian
from attnlab.curvature.spectrum import spectral_density
from attnlab.losses import square_loss
from attnlab.models.adapters import from_linen
from attnlab.models.attention import AttentionConfig, SelfAttention
from attnlab.objectives import objective
from attnlab.statistics import Estimate
from compare import assert_close
from nightly import nightly


@cache
def layer():
    """An attention layer of 144 parameters, its Hessian and GGN, and their matrices."""
    inputs, targets = jax.random.normal(jax.random.key(0), (2, 4, 6, 6))
    module = SelfAttention(AttentionConfig(key_dim=6, value_dim=6, output_dim=6))
    params = module.init(jax.random.key(1), inputs)["params"]
    risk = objective(from_linen(module), square_loss, inputs, targets)
    operators = {"hessian": hessian(risk, params), "ggn": ggn(risk, params)}
    return operators, {name: np.asarray(operator.dense()) for name, operator in operators.items()}


STOCHASTIC = {
    "trace": (trace, np.trace),
    "squared_frobenius_norm": (squared_frobenius_norm, lambda matrix: np.sum(matrix**2)),
    "frobenius_norm": (frobenius_norm, np.linalg.norm),
    "diagonal": (diagonal, np.diag),
}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_bars_of_two_standard_errors_cover_as_often_as_they_should(name):
    estimate, exact = STOCHASTIC[name]
    operators, matrices = layer()
    covered, deviations = [], []
    for seed in range(60):
        found = estimate(operators["hessian"], jax.random.key(seed))
        value, error = (ravel_pytree(part)[0] for part in (found.value, found.standard_error))
        difference = value - exact(matrices["hessian"])
        covered.append(np.abs(difference) <= 2 * error)
        deviations.append(difference / error)
    assert 0.90 <= np.mean(covered) <= 0.99
    # No bias: the mean of 60 deviations of unit variance has a standard error of 0.13.
    assert np.max(np.abs(np.mean(deviations, axis=0))) <= 4.5 * 60**-0.5


def test_one_probe_bounds_nothing():
    operators, _ = layer()
    assert np.isinf(trace(operators["hessian"], jax.random.key(1), samples=1).standard_error)


def test_the_root_of_an_estimate():
    found = square_root(Estimate(9.0, 0.6, 10))
    root, error = found.value, found.standard_error
    assert_close(root, 3.0, 1e-14)
    # A change of the square by its error changes the root by its error, to first order.
    assert_close(error, (9 + 0.6e-6) ** 0.5 * 1e6 - 3e6, 1e-6)
    zero = square_root(Estimate(0.0, 4.0, 10))
    assert (zero.value, zero.standard_error, zero.samples) == (0.0, 2.0, 10)


def test_the_trace_of_a_diagonal_operator_is_exact(key):
    matrix = Operator(Partial(lambda d, v: d * v, jnp.arange(1.0, 21.0)), jnp.zeros(20))
    found = trace(matrix, key, samples=3)
    assert_close(found.value, 210.0, 1e-14)
    assert found.standard_error <= 1e-12


@pytest.mark.parametrize("damping", [1.0, 1e-3])
def test_log_determinant_lies_in_its_error(damping):
    operators, matrices = layer()
    _, exact = np.linalg.slogdet(matrices["ggn"] + damping * np.eye(144))
    deviations = []
    for seed in range(10):
        found = log_determinant(operators["ggn"], jax.random.key(seed), damping=damping, steps=40)
        deviations.append(float((found.value - exact) / np.hypot(found.standard_error, found.bound)))
    assert np.mean(np.abs(deviations) <= 2.3) >= 0.8
    assert np.max(np.abs(deviations)) <= 5


def test_the_log_determinant_says_what_a_short_quadrature_misses(each_key):
    operators, matrices = layer()
    _, exact = np.linalg.slogdet(matrices["ggn"] + 1e-6 * np.eye(144))
    found = log_determinant(operators["ggn"], each_key, damping=1e-6, steps=8, samples=100)
    assert abs(found.value - exact) <= 1.2 * np.hypot(found.standard_error, found.bound)


def test_the_log_determinant_of_a_whole_krylov_space_is_exact(key):
    """As many steps as rows leave nothing out: no bracket is left, and no error but that of the samples."""
    operator = Operator(Partial(jnp.multiply, jnp.arange(1.0, 7.0)), jnp.zeros(6))
    found = log_determinant(operator, key, damping=0.5, steps=6, samples=3)
    assert_close(found.value, np.sum(np.log(np.arange(1.0, 7.0) + 0.5)), 1e-12)
    assert found.bound == 0


def test_an_indefinite_matrix_has_no_log_determinant(key):
    operators, _ = layer()
    with pytest.raises(ValueError, match=r"zero or negative at damping 0\.0.*Raise the damping, or take the ggn"):
        log_determinant(operators["hessian"], key, damping=0.0)


def test_condition_number(each_key):
    operators, matrices = layer()
    values = np.linalg.eigvalsh(matrices["ggn"]) + 1e-3
    found = condition_number(operators["ggn"], each_key, damping=1e-3)
    assert abs(found.value - values[-1] / values[0]) <= found.bound + 1e-9 * found.value
    with pytest.raises(ValueError, match="expected a positive one"):
        condition_number(operators["hessian"], each_key)


def test_negative_share(each_key):
    operators, matrices = layer()
    values = np.linalg.eigvalsh(matrices["hessian"])
    exact = -values[values < 0].sum() / np.abs(values).sum()
    found = spectral_density(operators["hessian"], each_key, samples=30, steps=40).negative_share()
    share, error = found.value, found.standard_error
    assert abs(share - exact) <= 3 * error
    assert 0 < error < 0.1
    positive = spectral_density(operators["ggn"], each_key, samples=3, steps=20).negative_share()
    assert positive.value <= 1e-10


@pytest.mark.parametrize(("name", "damping"), [("hessian", 0.0), ("hessian", 1e-2), ("ggn", 1e-2)])
def test_solutions_of_linear_systems(name, damping, key):
    operators, matrices = layer()
    exact = np.random.default_rng(0).standard_normal(144)
    matrix = matrices[name] + damping * np.eye(144)
    unravel = ravel_pytree(operators[name].point)[1]
    solution = solve(operators[name], unravel(jnp.asarray(matrix @ exact)), damping=damping, tolerance=1e-9, steps=3000)
    found = ravel_pytree(solution.vector)[0]
    residual = np.linalg.norm(matrix @ (found - exact)) / np.linalg.norm(matrix @ exact)
    assert_close(solution.residual, residual, 1e-4)
    assert residual <= 2e-9
    if damping:
        assert_close(found, exact, 1e-5)


def test_the_residual_of_minres_is_the_smallest_in_the_krylov_space(key):
    operators, matrices = layer()
    target = jax.random.normal(key, (144,))
    unravel = ravel_pytree(operators["hessian"].point)[1]
    solution = solve(operators["hessian"], unravel(target), tolerance=0.0, steps=5)
    krylov = np.column_stack([np.linalg.matrix_power(matrices["hessian"], power) @ target for power in range(1, 6)])
    basis, _ = np.linalg.qr(krylov)
    expected = np.linalg.norm(target - basis @ (basis.T @ target)) / np.linalg.norm(target)
    assert_close(solution.residual, expected, 1e-8)
    assert solution.products == 6


def test_an_equation_without_a_solution():
    """A Gauss-Newton matrix of rank 72: MINRES ends at the least residual, and does not blow up behind it."""
    operators, matrices = layer()
    target = np.random.default_rng(0).standard_normal(144)
    closest = matrices["ggn"] @ np.linalg.lstsq(matrices["ggn"], target, rcond=1e-10)[0]
    solution = solve(operators["ggn"], ravel_pytree(operators["ggn"].point)[1](jnp.asarray(target)))
    assert_close(solution.residual, np.linalg.norm(target - closest) / np.linalg.norm(target), 1e-10)
    assert 72 < solution.products < 500


@pytest.mark.parametrize("damping", nightly((1e-3, 1.0, 1e3), (1e-3,)))
def test_a_krylov_space_that_is_exhausted_is_not_asymmetric(damping):
    """Eight eigenvalues all but equal: after two steps the Lanczos vectors are mostly rounding."""
    values = np.concatenate([1 + 1e-9 * np.arange(8), np.zeros(592)])
    basis, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((600, 600)))
    operator = Operator(Partial(jnp.dot, jnp.asarray((basis * values) @ basis.T)), jnp.zeros(600))
    target = np.random.default_rng(1).standard_normal(600)
    solution = solve(operator, jnp.asarray(target), damping=damping, tolerance=0.0, steps=40)
    assert_close(solution.vector, basis @ ((basis.T @ target) / (values + damping)), 1e-11)


def test_a_right_hand_side_of_zeros():
    operators, _ = layer()
    solution = solve(operators["ggn"], jax.tree.map(jnp.zeros_like, operators["ggn"].point))
    assert solution.products == 1
    assert np.all(ravel_pytree(solution.vector)[0] == 0)


def test_products_that_are_not_finite(key):
    risk = objective(lambda params, x: jnp.sqrt(params) * x, square_loss, jnp.ones(4), jnp.zeros(4))
    operator = hessian(risk, jnp.array([0.0, 1.0, 2.0, 3.0]))
    with pytest.raises(NonFiniteProductError, match="not finite for sample 0 of 48") as caught:
        trace(operator, key)
    assert caught.value.partial is None
    with pytest.raises(NonFiniteProductError, match="not finite within"):
        solve(operator, jnp.ones(4))
    with pytest.raises(ValueError, match=r"vector:  has shape \(3,\)"):
        solve(operator, jnp.ones(3))


def test_probes_before_a_failure_are_kept(key):
    samples = jax.vmap(lambda key: jax.random.rademacher(key, (20,), float))(jax.random.split(key, 8))
    matrix = jax.random.normal(key, (20, 20))
    matrix = matrix + matrix.T

    def product(matrix, bad, vector):
        return jnp.where(jnp.all(vector == bad), jnp.nan, matrix @ vector)

    operator = Operator(Partial(product, matrix, samples[5]), jnp.zeros(20))
    for estimate, of_each in ((trace, np.sum), (diagonal, np.asarray)):
        rows = np.array([of_each(z * (matrix @ z)) for z in samples[:5]])
        with pytest.raises(NonFiniteProductError, match="not finite for sample 5 of 8") as caught:
            estimate(operator, key, samples=8)
        assert_close(caught.value.partial.value, rows.mean(axis=0), 1e-12)
        assert_close(caught.value.partial.standard_error, rows.std(axis=0, ddof=1) / 5**0.5, 1e-12)
    found = jax.jit(lambda operator: trace(operator, key, samples=8))(operator)
    assert np.isnan(found.value)
    assert np.isnan(found.standard_error)


def test_numbers_that_make_no_sense(key):
    operator = Operator(Partial(lambda d, v: d * v, jnp.arange(1.0, 21.0)), jnp.zeros(20))
    with pytest.raises(ValueError, match="samples is 0; expected a positive whole number"):
        trace(operator, key, samples=0)
    with pytest.raises(ValueError, match="steps is 0; expected a positive whole number"):
        solve(operator, jnp.ones(20), steps=0)
    for wrong in (-1e-5, float("nan")):
        with pytest.raises(ValueError, match=f"tolerance is {wrong}; expected 0 <= tolerance"):
            solve(operator, jnp.ones(20), tolerance=wrong)
        with pytest.raises(ValueError, match=f"tolerance is {wrong}; expected 0 <= tolerance"):
            condition_number(operator, key, tolerance=wrong)
