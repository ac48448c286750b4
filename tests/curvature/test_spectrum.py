"""Eigenpairs and densities of operators, against dense eigenvalues and exact traces."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

from attnlab.curvature import density
from attnlab.curvature.estimators import condition_number
from attnlab.curvature.guards import NonFiniteProductError
from attnlab.curvature.operator import Operator
from attnlab.curvature.operators import empirical_fisher, ggn, hessian
from attnlab.curvature.self_checks import CurvatureWarning
from attnlab.curvature.spectrum import eigenpairs, residuals, spectral_density
from attnlab.losses import square_loss
from attnlab.models.adapters import from_linen
from attnlab.models.attention import AttentionConfig, SelfAttention
from attnlab.objectives import objective
from attnlab.runs.session import Session
from attnlab.statistics import standard_error
from cases import CASES
from compare import assert_close
from nightly import nightly


@cache
def wide_attention():
    """An attention layer with 736 parameters: beyond the dimension where eigenpairs are taken densely."""
    inputs, targets = jax.random.normal(jax.random.key(0), (2, 4, 6, 16))
    module = SelfAttention(AttentionConfig(key_dim=15, value_dim=16))
    params = module.init(jax.random.key(1), inputs)["params"]
    operator = hessian(objective(from_linen(module), square_loss, inputs, targets), params)
    return operator, np.linalg.eigvalsh(operator.dense())


@pytest.mark.slow
@pytest.mark.parametrize("which", nightly(("low", "high", "both"), ("both",)))
def test_eigenpairs_of_a_wide_layer(which, each_key):
    operator, exact = wide_attention()
    pairs = eigenpairs(operator, each_key, 5, which=which)
    expected = {"low": exact[:5], "high": exact[-5:], "both": np.r_[exact[:5], exact[-5:]]}[which]
    assert np.max(np.abs(pairs.values - expected)) <= 1e-8 * exact[-1]
    for i, value in enumerate(pairs.values):
        vector = jax.tree.map(lambda leaf, i=i: leaf[i], pairs.vectors)
        image = ravel_pytree(operator.mv(vector))[0]
        residual = np.linalg.norm(image - value * ravel_pytree(vector)[0])
        assert residual <= pairs.residuals[i] + 1e-13 * exact[-1]


@pytest.mark.slow
def test_a_small_basis_finds_the_same_pairs(key):
    operator, exact = wide_attention()
    pairs = eigenpairs(operator, key, 2, basis=6)
    assert np.max(np.abs(pairs.values - exact[-2:])) <= 1e-8 * exact[-1]
    assert pairs.missed <= 1e-3
    with pytest.raises(ValueError, match="basis is 5; expected 6 <= basis"):
        eigenpairs(operator, key, 2, basis=5)


def test_residuals_of_pairs_that_an_operator_in_bfloat16_found(key):
    """Its own residuals are of the iteration; one product in float64 bounds the distance to the true eigenvalues."""
    random = np.random.default_rng(0)
    values = np.r_[np.linspace(-1, 1, 590), np.arange(2.0, 12.0)]
    basis = np.linalg.qr(random.standard_normal((600, 600)))[0]
    matrix = (basis * values) @ basis.T

    def low(matrix, vector):
        return (matrix.astype(jnp.bfloat16) @ vector.astype(jnp.bfloat16)).astype(vector.dtype)

    coarse = Operator(Partial(low, jnp.asarray(matrix, jnp.bfloat16)), jnp.zeros(600, jnp.float32))
    with pytest.warns(CurvatureWarning, match="products are rounded to 0.0078"):
        pairs = eigenpairs(coarse, key, 4, tolerance=1e-4)
    errors = np.min(np.abs(values[None] - np.asarray(pairs.values, float)[:, None]), axis=1)
    assert np.any(errors > np.asarray(pairs.residuals))
    checked = residuals(Operator(Partial(jnp.dot, jnp.asarray(matrix)), jnp.zeros(600)), pairs)
    vectors = np.asarray(pairs.vectors, float)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    exact = np.linalg.norm(vectors @ matrix - np.asarray(pairs.values, float)[:, None] * vectors, axis=1)
    assert_close(checked, exact, 1e-12)
    assert np.all(errors <= checked)
    with pytest.raises(ValueError, match=r"pairs.vectors\[0\].*has shape \(600,\); expected \(736,\)"):
        residuals(Operator(Partial(jnp.dot, jnp.eye(736)), jnp.zeros(736)), pairs)


def test_small_operators_are_solved_densely(key):
    operator = hessian(*CASES["softmax/square"](key))
    pairs = eigenpairs(operator, key, 3, which="both")
    exact = np.linalg.eigvalsh(operator.dense())
    assert_close(pairs.values, np.r_[exact[:3], exact[-3:]], 1e-12)
    assert pairs.products == operator.dimension


def test_a_tolerance_out_of_reach_is_said(key):
    operator, exact = wide_attention()
    with pytest.warns(UserWarning, match="eigenpairs have residuals above"):
        pairs = eigenpairs(operator, key, 2, tolerance=1e-18)
    assert abs(pairs.values[-1] - exact[-1]) <= 1e-10 * exact[-1]


def test_moments_of_the_density_lie_in_their_own_error_band():
    operator, exact = wide_attention()
    deviations = []
    for seed in range(20):
        density = spectral_density(operator, jax.random.key(seed), samples=12, steps=12)
        for power in (1, 2, 3, 4):
            found = density.moment(power)
            deviations.append((found.value - np.mean(exact**power)) / found.standard_error)
    # Student's t with 11 degrees of freedom: 2.2 standard errors cover 95 %.
    assert 0.85 <= np.mean(np.abs(deviations) <= 2.2) <= 1.0
    assert np.max(np.abs(deviations)) > 0.5


def test_first_two_moments_are_exact_for_each_probe(each_key):
    # <z, A z> and |A z|^2 by the Gauss rule: degrees 1 and 2 need two steps.
    operator, _ = wide_attention()
    density = spectral_density(operator, each_key, samples=3, steps=2)
    keys = jax.random.split(each_key, 3)
    for row, probe_key in enumerate(keys):
        z = jax.random.rademacher(probe_key, (operator.dimension,), float)
        image = operator.flat_mv(z)
        for power, expected in ((0, 1.0), (1, z @ image / z.size), (2, image @ image / z.size)):
            assert abs(density.nodes[row] ** power @ density.weights[row] - expected) <= 1e-12


def test_density_and_cumulative_agree_with_the_exact_spectrum(each_key):
    operator, exact = wide_attention()
    density = spectral_density(operator, each_key, samples=40, steps=60)
    grid = jnp.linspace(1.1 * exact[0], 1.1 * exact[-1], 200)
    width = 0.05 * (exact[-1] - exact[0])
    found = density.density(grid, width)
    smooth, error = found.value, found.standard_error
    kernel = np.exp(-0.5 * ((np.asarray(grid)[:, None] - exact) / width) ** 2) / (width * np.sqrt(2 * np.pi))
    expected = kernel.mean(axis=1)
    assert np.mean(np.abs(smooth - expected) <= 3 * error + 1e-3 * expected.max()) >= 0.95
    fraction = density.cumulative(grid).value
    assert np.all(np.diff(fraction) >= -1e-12)
    assert abs(fraction[-1] - 1) <= 1e-12
    middle = 0.5 * exact[-1]
    found = density.cumulative(jnp.array([middle]))
    assert abs(found.value[0] - np.mean(exact <= middle)) <= 4 * found.standard_error[0] + 1e-3


def test_copies_of_a_converged_node_share_its_weight(each_key):
    """On a diagonal operator every sample of signs has the weight 1/n at each eigenvalue."""
    values = np.concatenate([np.linspace(0, 1, 198), [5.0, 10.0]])
    operator = Operator(Partial(jnp.multiply, jnp.asarray(values)), jnp.zeros(200))
    density = spectral_density(operator, each_key, samples=2, steps=60)
    for value in (5.0, 10.0):
        copies = np.abs(density.nodes - value) <= 1e-6
        assert np.all(np.sum(copies, axis=1) > 1)
        assert_close(np.sum(density.weights, axis=1, where=copies), np.full(2, 1 / 200), 1e-12)
    assert_close(density.integral(jnp.log1p).value, np.mean(np.log1p(values)), 1e-12)


def test_scaling_the_loss_scales_the_spectrum(key):
    risk, params = CASES["softmax/square"](key)
    tiny = objective(risk.predict, lambda o, t: 1e-6 * square_loss(o, t), risk.inputs, risk.targets)
    whole, scaled = (spectral_density(hessian(r, params), key, samples=2, steps=10) for r in (risk, tiny))
    assert_close(1e6 * scaled.nodes, whole.nodes, 1e-8)
    assert_close(scaled.weights, whole.weights, 1e-6)


def test_one_probe_bounds_nothing():
    assert np.isinf(standard_error(jnp.ones((1, 3)))).all()


def test_a_second_point_compiles_nothing(key):
    risk, params = CASES["softmax/square"](key)
    spectral_density(hessian(risk, params), key, samples=2, steps=5)
    compiled = density._in_one_program._cache_size()
    moved = jax.tree.map(lambda leaf: 2.0 * leaf, params)
    spectral_density(hessian(risk, moved), key, samples=2, steps=5)
    assert density._in_one_program._cache_size() == compiled


class TestBadInput:
    def test_too_many_steps(self, key):
        operator = ggn(*CASES["softmax/square"](key))
        with pytest.raises(ValueError, match="steps is 19; expected 1 <= steps <= 18"):
            spectral_density(operator, key, steps=19)

    def test_no_probe(self, key):
        with pytest.raises(ValueError, match="samples is 0"):
            spectral_density(ggn(*CASES["softmax/square"](key)), key, samples=0)

    @pytest.mark.parametrize(("which", "count"), [("high", 19), ("both", 10), ("low", 0)])
    def test_counts_that_do_not_fit(self, which, count, key):
        with pytest.raises(ValueError, match=f"count is {count}; expected 1 <= count <= "):
            eigenpairs(ggn(*CASES["softmax/square"](key)), key, count, which=which)

    def test_unknown_end(self, key):
        with pytest.raises(ValueError, match=r"no end of the spectrum 'highest'.*Did you mean 'high'"):
            eigenpairs(ggn(*CASES["softmax/square"](key)), key, which="highest")

    def test_a_product_that_is_not_finite(self, key):
        risk = objective(lambda params, x: jnp.sqrt(params) * x, square_loss, jnp.ones(4), jnp.zeros(4))
        operator = hessian(risk, jnp.array([0.0, 1.0, 2.0, 3.0]))
        with pytest.raises(NonFiniteProductError, match="not finite at step 0 of sample 0"):
            spectral_density(operator, key, steps=3)
        with pytest.raises(NonFiniteProductError, match="not finite within 4 products"):
            eigenpairs(operator, key)

    def test_probes_that_do_not_run_together_evenly(self, key):
        with pytest.raises(ValueError, match="together is 3; expected a divisor of samples, which is 10"):
            spectral_density(ggn(*CASES["softmax/square"](key)), key, steps=3, session=Session(together=3))


@pytest.mark.slow
def test_a_space_that_is_exhausted_but_for_rounding(key):
    """Eight examples, a matrix of rank eight: the remainders of Lanczos fade into rounding, not to zero."""
    random = np.random.default_rng(0)
    inputs, targets = random.standard_normal((2, 8, 6, 16))
    module = SelfAttention(AttentionConfig(key_dim=15, value_dim=16))
    shapes = jax.eval_shape(module.init, key, inputs)["params"]
    params = jax.tree.map(lambda leaf: jnp.asarray(0.6 * random.standard_normal(leaf.shape)), shapes)
    operator = empirical_fisher(objective(from_linen(module), square_loss, inputs, targets), params, check=False)
    highest = np.linalg.eigvalsh(operator.dense())[-1]
    assert_close(condition_number(operator, key, damping=0.1).value, (highest + 0.1) / 0.1, 1e-8)
