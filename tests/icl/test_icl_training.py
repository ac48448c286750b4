"""Training on the exact risk: closed-form times, the published optimum from every seed, and bad local minima."""

import jax
import jax.numpy as jnp
import optax
import pytest
from icl_cases import assert_within_error

from attnlab.icl.landscape import balance, stationary_point, swapped_start
from attnlab.icl.models import init_effective, layer_predict
from attnlab.icl.optima import adapted_risks, optimal_risk
from attnlab.icl.population import PARAMETRIZATIONS, population_objective
from attnlab.icl.tasks import isotropic, linear_regression, sample_prompts
from attnlab.icl.training_time import direction_forces, merged_growth, staircase_times
from compare import assert_close
from nightly import nightly


def descend(risk, params, optimizer, steps):
    """The risk before every step, and the last parameters."""

    def step(state, _):
        params, memory = state
        value, gradient = jax.value_and_grad(risk)(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, memory = optimizer.update(gradient, memory, params)
            params = optax.apply_updates(params, updates)
        return (params, memory), value

    (params, _), values = jax.lax.scan(step, (params, optimizer.init(params)), length=steps)
    return values, params


def flow(risk, params, times, substeps):
    """Gradient flow at equally spaced times by Runge and Kutta's fourth order."""
    width = (times[1] - times[0]) / substeps

    def slope(params):
        return jax.tree.map(jnp.negative, jax.grad(risk)(params))

    def ahead(params, direction, size):
        return jax.tree.map(lambda p, v: p + size * v, params, direction)

    def small(params, _):
        one = slope(params)
        two = slope(ahead(params, one, width / 2))
        three = slope(ahead(params, two, width / 2))
        four = slope(ahead(params, three, width))
        mean = jax.tree.map(lambda a, b, c, d: (a + 2 * b + 2 * c + d) / 6, one, two, three, four)
        return ahead(params, mean, width), None

    def large(params, _):
        return jax.lax.scan(small, params, length=substeps)[0], params

    return jax.jit(lambda start: jax.lax.scan(large, start, length=len(times))[1])(params)


def test_merged_growth_is_gradient_flow():
    """The full merged layer from a balanced small start, against the logistic curve."""
    d, length, noise, size = 3, 8, 0.2, 0.1
    times = jnp.linspace(0.0, 1.0, 9)
    risk = population_objective(isotropic(d, noise), length)
    start = {
        "value": jnp.zeros((1, d + 1)).at[0, -1].set(size),
        "query_key": jnp.zeros((1, d + 1, d)).at[0, :d].set(size / d**0.5 * jnp.eye(d)),
    }
    path = flow(risk, start, times, 40)
    growth = path["value"][:, 0, -1] * path["query_key"][:, 0, 0, 0]
    assert_close(growth, merged_growth(times, size**2 / d**0.5, d, length, noise), 1e-6)
    assert growth[-1] > 20 * growth[0]


def test_staircase_is_gradient_flow():
    """Aligned rank-one heads: each level is reached at its closed-form time, and the flow passes near the plateaus."""
    problem, length = linear_regression(jnp.diag(jnp.array([2.0, 0.5]))), 10
    gain, curvature = direction_forces(problem, length)
    size = 0.2
    start = {"value": size * jnp.ones(2), "key": size * jnp.eye(2), "query": size * jnp.eye(2)}
    times = jnp.linspace(0.0, 20.0, 201)
    path = flow(population_objective(problem, length, "rank_one"), start, times, 10)
    levels = path["value"] ** 3
    assert_close(jnp.linalg.norm(path["key"], axis=-1), path["value"], 1e-9)  # balance is conserved
    reached = levels < 0.99 * (gain / curvature)[None, :]
    for m in range(2):
        before = int(jnp.sum(reached[:, m]))
        found = staircase_times(levels[:before, m], size**3, gain[m], curvature[m])
        assert_close(found[1:], times[1:before], 1e-5)
    plateau = adapted_risks(problem, length)[1]
    risks = problem.signal + levels**2 @ curvature - 2 * levels @ gain
    assert jnp.min(jnp.abs(risks - plateau)) < 0.05 * plateau
    assert_close(jnp.sum(gain**2 / curvature), problem.signal - optimal_risk(problem, length), 1e-12)


ANISOTROPIC = jnp.array([2.0, 1.0, 0.5, 0.25, 0.1])

# Problem, length, number of flat directions (the scale, and rotations of the swapped one), risk there and at best.
BAD_MINIMA = {
    "anisotropic": (linear_regression(jnp.diag(ANISOTROPIC), noise_variance=0.1), 20, 1, 1.935972, 0.792426),
    "isotropic_2": (isotropic(2, 0.1), 20, 2, 0.839934, 0.268398),
    "isotropic_3": (isotropic(3, 0.1), 40, 3, 1.085815, 0.278912),
}


@pytest.fixture(scope="module", params=nightly(BAD_MINIMA, ("isotropic_2",)))
def bad_minimum(request):
    problem, length, symmetries, *risks = BAD_MINIMA[request.param]
    risk = population_objective(problem, length)
    point = jax.jit(stationary_point)(risk, balance(swapped_start(problem, length)))
    return problem, length, symmetries, risks, point


def test_bad_local_minimum_is_strict(bad_minimum):
    """Gradient zero to rounding, no curvature only along the symmetries, positive along all else; far from optimal."""
    problem, length, symmetries, (bad, best), point = bad_minimum
    assert point.gradient_norm < 1e-12
    assert point.is_strict_minimum(symmetries)
    assert not point.is_strict_minimum(symmetries + 1)
    assert_close(point.risk, jnp.asarray(bad), 1e-5)
    assert_close(optimal_risk(problem, length), jnp.asarray(best), 1e-5)


def test_curvature_of_the_bad_minimum_by_differences(bad_minimum):
    """The Hessian eigenvalues from central differences of the gradient."""
    problem, length, symmetries, _, point = bad_minimum
    risk = population_objective(problem, length)
    flat, unravel = jax.flatten_util.ravel_pytree(point.params)
    gradient = jax.jit(jax.vmap(jax.grad(lambda v: risk(unravel(v)))))
    steps = 1e-4 * jnp.eye(len(flat))
    hessian = (gradient(flat[None] + steps) - gradient(flat[None] - steps)) / 2e-4
    assert_close(
        jnp.linalg.eigvalsh((hessian + hessian.T) / 2)[symmetries:], point.hessian_eigenvalues[symmetries:], 1e-6
    )


def test_bad_local_minimum_against_monte_carlo(bad_minimum):
    """Its risk and a zero mean gradient, from sampled prompts that know nothing of the closed form."""
    problem, length, _, _, point = bad_minimum
    prompts = sample_prompts(jax.random.key(8), problem, length, 50_000)

    def squared(params, prompt):
        return (layer_predict(params, prompt) - prompt.target) ** 2

    errors, gradients = jax.jit(jax.vmap(jax.value_and_grad(squared), (None, 0)))(point.params, prompts)
    assert_within_error(errors, point.risk)
    assert_within_error(gradients, jax.tree.map(jnp.zeros_like, point.params))


def test_bad_local_minimum_mixes_both_paths(bad_minimum):
    """Along one direction the value reads x and the key y; the other directions use the usual path."""
    *_, point = bad_minimum
    value, query_key = point.params["value"][0], point.params["query_key"][0]
    usual = jnp.diag(query_key[:-1]) * value[-1]
    swapped = query_key[-1] * value[:-1]
    on = jnp.argmax(jnp.abs(swapped))
    others = jnp.arange(len(swapped)) != on
    assert swapped[on] > 0.3
    assert usual[on] < 0
    assert jnp.all(usual[others] > 0.3)
    assert jnp.all(jnp.abs(swapped[others]) < 1e-8)


def test_training_returns_to_the_bad_minimum_and_random_starts_find_it(bad_minimum):
    problem, length, _, (bad, best), point = bad_minimum
    risk = population_objective(problem, length)
    kick = jax.tree.map(lambda x: x + 0.02 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), balance(point.params))
    keys = jax.random.split(jax.random.key(0), 31)
    starts = jax.vmap(lambda key: init_effective(key, problem.dimension, 0.1))(keys)
    starts = jax.tree.map(lambda one, more: jnp.concatenate([one[None], more]), kick, starts)
    schedule = optax.cosine_decay_schedule(0.03, 3000)
    values, _ = jax.jit(jax.vmap(lambda start: descend(risk, start, optax.adam(schedule), 3000)))(starts)
    finals = values[:, -1]
    assert abs(finals[0] - bad) < 1e-4
    ends_bad, ends_best = jnp.abs(finals - bad) < 1e-2, jnp.abs(finals - best) < 1e-2
    assert jnp.all(ends_bad | ends_best)
    assert 4 <= jnp.sum(ends_bad[1:]) <= 27


def test_short_contexts_have_no_such_minimum():
    """d = 3 at N = 20, where it has not yet appeared: the swapped start ends at the optimum."""
    problem = isotropic(3, 0.1)
    risk = population_objective(problem, 20)
    schedule = optax.cosine_decay_schedule(0.03, 3000)
    start = balance(swapped_start(problem, 20))
    values, _ = jax.jit(lambda start: descend(risk, start, optax.adam(schedule), 3000))(start)
    assert_close(values[-1], optimal_risk(problem, 20), 1e-6)


def test_balance_keeps_the_layer():
    start = swapped_start(linear_regression(jnp.diag(ANISOTROPIC)), 20)
    balanced = balance(start)
    risk = population_objective(linear_regression(jnp.diag(ANISOTROPIC)), 20)
    assert_close(risk(balanced), risk(start), 1e-13)
    assert_close(jnp.linalg.norm(balanced["value"]), jnp.linalg.norm(balanced["query_key"]), 1e-13)
    assert set(PARAMETRIZATIONS) == {"merged", "layer", "reduced", "rank_one"}


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="expected a start between 0 and the optimum"):
        merged_growth(jnp.zeros(1), 2.0, 3, 8)
    with pytest.raises(ValueError, match="covariance is not diagonal"):
        direction_forces(linear_regression(jnp.array([[1.0, 0.5], [0.5, 1.0]])), 8)
    with pytest.raises(ValueError, match="expected 'gaussian'"):
        direction_forces(linear_regression(jnp.eye(2), inputs="uniform"), 8)
    with pytest.raises(ValueError, match="start and levels are"):
        staircase_times(jnp.array([2.0]), 0.1, 1.0, 1.0)
