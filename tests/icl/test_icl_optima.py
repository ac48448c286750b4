"""Optimal weights and risks against stationarity, other formulas of the literature, and Monte Carlo."""

import jax
import jax.numpy as jnp
import pytest
from icl_cases import DIMENSION, PROBLEMS, assert_within_error

from attnlab.icl.correlated import (
    alignment_moments,
    alignment_risk_approximation,
    retrieval_moments,
    retrieval_risk_approximation,
    state_space_filter,
    state_space_risk,
    unweighted_risk,
)
from attnlab.icl.models import reduced_predict, state_space_predict
from attnlab.icl.optima import (
    adapted_preconditioner,
    adapted_risks,
    fit_preconditioner,
    length_generalization_risk,
    optimal_preconditioner,
    optimal_risk,
    reduced_risk,
    spectral_risk,
    task_diversity_risk,
)
from attnlab.icl.population import merged_weights, population_risk, reduced_weights
from attnlab.icl.tasks import (
    Prompt,
    aligned_prompts,
    drifting_prompts,
    isotropic,
    linear_regression,
    retrieval_prompts,
    sample_prompts,
)
from compare import assert_close
from nightly import nightly

LENGTH = 6


@pytest.mark.parametrize("name", PROBLEMS)
def test_optimum_is_stationary_and_has_the_stated_risk(name):
    problem = PROBLEMS[name]()
    optimum = optimal_preconditioner(problem, LENGTH)
    value, gradient = jax.value_and_grad(reduced_risk)(optimum, problem, LENGTH)
    assert_close(gradient, jnp.zeros_like(gradient), 1e-12, scale=1.0)
    assert_close(value, optimal_risk(problem, LENGTH), 1e-12)


@pytest.mark.parametrize("name", ["gaussian", "uniform"])
def test_optimum_is_stationary_for_the_full_layer(name):
    problem = PROBLEMS[name]()
    optimum = reduced_weights({"preconditioner": optimal_preconditioner(problem, LENGTH)})
    gradient = jax.grad(lambda params: population_risk(merged_weights(params), problem, LENGTH))(optimum)
    assert_close(gradient, jax.tree.map(jnp.zeros_like, gradient), 1e-12, scale=1.0)


def test_gaussian_optimum_is_the_published_one():
    problem = PROBLEMS["gaussian"]()
    L, O, identity = problem.covariance, problem.task_moment, jnp.eye(DIMENSION)
    S = jnp.trace(L @ O) + problem.noise_variance
    published = jnp.linalg.solve((1 + 1 / LENGTH) * O @ L + S / LENGTH * identity, O)
    assert_close(optimal_preconditioner(problem, LENGTH), published, 1e-12)


def test_risk_from_the_spectrum():
    problem = PROBLEMS["gaussian"]()
    eigenvalues = jnp.linalg.eigvals(problem.covariance @ problem.task_moment).real
    found = spectral_risk(eigenvalues, LENGTH, problem.noise_variance)
    assert_close(found, optimal_risk(problem, LENGTH), 1e-12)


@pytest.mark.parametrize(("d", "length", "noise"), [(10, 10, 0.0), (4, 30, 0.5)])
def test_isotropic_risk(d, length, noise):
    expected = jnp.asarray(d * (d + 1 + noise) / (length + d + 1 + noise))
    assert_close(optimal_risk(isotropic(d, noise), length), expected, 1e-13)


def test_uniform_inputs_in_the_setting_of_von_oswald():
    """d = N = 10, x ~ U(-1/2, 1/2): half the risk is 0.20623 and the step size 6.0606; q = (d + 1 - 6/5) / N."""
    problem = linear_regression(jnp.eye(10) / 12, inputs="uniform")
    q = (11 - 1.2) / 10
    assert_close(optimal_risk(problem, 10), jnp.asarray(10 / 12 * q / (1 + q)), 1e-13)
    assert_close(optimal_preconditioner(problem, 10), 12 / (1 + q) * jnp.eye(10), 1e-12)
    assert abs(float(optimal_risk(problem, 10)) / 2 - 0.20623) < 5e-6


@pytest.mark.parametrize("name", ["gaussian", "uniform", "finite_tasks"])
def test_low_rank_adaptation(name):
    """The stated risk is attained, and no gradient step on the factors from there lowers it."""
    problem = PROBLEMS[name]()
    start = 0.3 * jnp.ones((DIMENSION, DIMENSION))
    risks = adapted_risks(problem, LENGTH, start)
    assert_close(risks[0], reduced_risk(start, problem, LENGTH), 1e-12)
    assert_close(risks[-1], optimal_risk(problem, LENGTH), 1e-12)
    for rank in range(DIMENSION + 1):
        adapted = adapted_preconditioner(problem, LENGTH, rank, start)
        assert jnp.linalg.matrix_rank(adapted - start, rtol=1e-9) <= rank
        assert_close(reduced_risk(adapted, problem, LENGTH), risks[rank], 1e-11)
    left, values, right = jnp.linalg.svd(adapted_preconditioner(problem, LENGTH, 1, start) - start)

    def of_factors(factors):
        return reduced_risk(start + jnp.outer(*factors), problem, LENGTH)

    factors = (left[:, 0] * values[0], right[0])
    assert_close(jax.grad(of_factors)(factors), jax.tree.map(jnp.zeros_like, factors), 1e-11, scale=1.0)


def test_staircase_levels():
    problem = linear_regression(jnp.diag(jnp.array([4.0, 2.0, 1.0, 0.5])))
    assert_close(adapted_risks(problem, 31), jnp.array([7.5, 3.839483, 2.105218, 1.320408, 0.990620]), 1e-6)


def test_length_generalization(each_key):
    d, train, test, noise = 4, 12, 5, 0.4
    problem = isotropic(d, noise)
    g = train / (train + d + 1 + noise)
    expected = jnp.asarray(d * ((1 - g) ** 2 + g**2 * (d + 1 + noise) / test))
    found = length_generalization_risk(problem, train, test)
    assert_close(found, expected, 1e-12)
    prompts = sample_prompts(each_key, problem, test, 20_000)
    optimum = optimal_preconditioner(problem, train)
    errors = (jax.vmap(lambda prompt: reduced_predict(optimum, prompt))(prompts) - prompts.target) ** 2
    assert_within_error(errors, found)


def test_task_diversity_law(key):
    """With N to infinity the risk is exactly d - M for generic tasks, whatever they are."""
    d = 5
    for count in (1, 3, 5, 8):
        tasks = jax.random.normal(key, (count, d))
        found = task_diversity_risk(isotropic(d), tasks, 1e9)
        assert abs(float(found) - max(d - count, 0)) < 1e-6


def test_fit_interpolates_below_d_squared_prompts_and_recovers_a_teacher(key):
    d = 3
    teacher = jax.random.normal(key, (d, d))
    prompts = sample_prompts(key, isotropic(d), LENGTH, 40)
    taught = Prompt(
        prompts.inputs, prompts.labels, prompts.query, jax.vmap(lambda p: reduced_predict(teacher, p))(prompts)
    )
    assert_close(fit_preconditioner(taught), teacher, 1e-10)
    few = jax.tree.map(lambda x: x[:8], prompts)
    fitted = fit_preconditioner(few)
    assert_close(jax.vmap(lambda p: reduced_predict(fitted, p))(few), few.target, 1e-9)


def test_double_descent_in_the_number_of_prompts():
    """The risk of the fitted preconditioner peaks where the prompts are as many as its d^2 entries."""
    d, length = 4, 20

    @jax.jit
    def risks(key):
        prompts = sample_prompts(key, isotropic(d), length, 64)
        fits = [fit_preconditioner(jax.tree.map(lambda x, n=n: x[:n], prompts)) for n in (5, d * d, 64)]
        return jnp.stack([reduced_risk(fit, isotropic(d), length) for fit in fits])

    below, peak, above = jnp.median(jax.vmap(risks)(jax.random.split(jax.random.key(0), 20)), axis=0)
    assert peak > 5 * below > 5 * above


@pytest.mark.parametrize("power", [1.5, 2.0, 3.0])
def test_power_law_spectra(power):
    """s_i = i^-p: the risk falls as N^-(1 - 1/p), read off between N = 1,000 and 4,000."""
    spectrum = jnp.arange(1, 1_000_001.0) ** -power
    tail = 1_000_000.0 ** (1 - power) / (power - 1)  # eigenvalues beyond the last are not learned
    risks = [spectral_risk(spectrum, length, tail) + tail for length in (1_000, 4_000)]
    assert abs(float(jnp.log(risks[1] / risks[0]) / jnp.log(4.0)) + (1 - 1 / power)) < 0.03


CORRELATED = {
    "retrieval": (retrieval_prompts, retrieval_moments),
    "alignment": (aligned_prompts, alignment_moments),
}


@pytest.mark.parametrize("alignment", nightly((0.0, 0.3, 0.7), (0.7,)))
@pytest.mark.parametrize("name", CORRELATED)
def test_moments_of_correlated_prompts(name, alignment):
    d, length, noise = 4, 6, 0.3
    sample, moments = CORRELATED[name]
    exact = moments(d, length, alignment, noise)
    prompts = sample(jax.random.key(5), d, length, 100_000, alignment, noise)
    step = jnp.einsum("bnd,bd,bn->b", prompts.inputs, prompts.query, prompts.labels)
    samples = (prompts.target**2, prompts.target * step, step**2, (prompts.target - exact.step_size * step) ** 2)
    assert_within_error(samples, (*(jnp.asarray(float(m)) for m in exact), jnp.asarray(exact.risk)))


def test_uncorrelated_prompts_are_isotropic_regression():
    for moments in (retrieval_moments, alignment_moments):
        assert_close(jnp.asarray(moments(7, 9, 0.0, 0.4).risk), optimal_risk(isotropic(7, 0.4), 9), 1e-13)


@pytest.mark.parametrize(("alignment", "error"), [(0.0, 0.0), (0.1, 0.0203), (0.2, 0.1072), (0.3, 0.3143)])
def test_error_of_the_published_approximation(alignment, error):
    exact = alignment_moments(20, 20, alignment).risk
    assert abs(abs(alignment_risk_approximation(20, 20, alignment) / exact - 1) - error) < 1e-4
    relative = retrieval_risk_approximation(20, 20, alignment) / retrieval_moments(20, 20, alignment).risk - 1
    assert -0.04 < relative <= 0


def _forgetting(rate, length):
    positions = jnp.arange(length + 1)
    return rate ** jnp.abs(positions[:, None] - positions[None, :]).astype(float)


def test_state_space_against_attention():
    """Values at d = 10, N = 20, correlation 0.9^|i - j|, noise 0.1; with the noise of the target, 0.1, added."""
    correlation = _forgetting(0.9, 20)
    assert abs(state_space_risk(correlation, 10, 0.1) + 0.1 - 7.913) < 5e-4
    assert abs(unweighted_risk(correlation, 10, 0.1) + 0.1 - 8.692) < 5e-4


def test_state_space_risk_against_monte_carlo(each_key):
    d, noise = 3, 0.2
    correlation = _forgetting(0.7, 5)
    params = {"filter": state_space_filter(correlation, d, noise), "preconditioner": jnp.eye(d)}
    prompts = drifting_prompts(each_key, d, correlation, 50_000, noise)
    errors = (jax.vmap(lambda prompt: state_space_predict(params, prompt))(prompts) - prompts.target) ** 2
    assert_within_error(errors, state_space_risk(correlation, d, noise))


def test_equal_tasks_need_no_filter():
    correlation = jnp.ones((7, 7))
    expected = optimal_risk(isotropic(4, 0.3), 6)
    assert_close(state_space_risk(correlation, 4, 0.3), expected, 1e-12)
    assert_close(unweighted_risk(correlation, 4, 0.3), expected, 1e-12)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="rank is 4"):
        adapted_preconditioner(isotropic(3), 5, 4)
    with pytest.raises(ValueError, match="start has shape"):
        adapted_risks(isotropic(3), 5, jnp.eye(2))
    with pytest.raises(ValueError, match="task_correlation has the eigenvalue"):
        state_space_risk(jnp.array([[1.0, 2.0], [2.0, 1.0]]), 3)
    with pytest.raises(ValueError, match=r"expected \(N \+ 1, N \+ 1\)"):
        state_space_risk(jnp.eye(1), 3)
    with pytest.raises(ValueError, match=r"alignment is 1\.2"):
        retrieval_moments(3, 3, 1.2)
    with pytest.raises(ValueError, match="expected at least 1 each"):
        alignment_moments(3, 0, 0.2)
