"""Flows against closed forms, finite differences and the discrete optimizer; the complementarity problem by its
conditions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import oracles
from attnlab.dynamics.complementarity import basis, solve_complementarity
from attnlab.dynamics.flows import central_flow, gradient_flow, hessian_gradients, smoothed
from attnlab.dynamics.rules import RULES, RMSProp, update_rule
from attnlab.objectives import objective
from attnlab.trees import ravel
from cases import CASES
from compare import assert_close


def quadratic(curvature):
    """Half of w^T diag(curvature) w."""
    return objective(lambda w, x: x * w, lambda outputs, _: 0.5 * outputs @ outputs, curvature**0.5, curvature)


def test_gradient_flow_of_a_quadratic_decays_exponentially(key):
    curvature, times = jnp.array([0.2, 1.0, 3.0]), jnp.linspace(0.0, 2.0, 5)
    start = jax.random.normal(key, (3,))
    path = gradient_flow(quadratic(curvature), start, times)
    assert_close(path, start[None, :] * jnp.exp(-times[:, None] * curvature[None, :]), 1e-7)


@pytest.mark.parametrize("case", ["softmax/square", pytest.param("mlp/cross_entropy", marks=pytest.mark.slow)])
def test_third_derivatives_are_those_of_finite_differences(case, key):
    risk, params = CASES[case](key)
    flat = ravel(params)
    vectors = jnp.linalg.qr(jax.random.normal(key, (flat.size, 2)))[0].T
    slopes = jax.jit(hessian_gradients)(risk, params, vectors)
    unravel = jax.flatten_util.ravel_pytree(params)[1]
    direction = jax.random.normal(jax.random.fold_in(key, 1), flat.shape)
    step = 1e-4
    ahead, behind = (oracles.hessian(risk, unravel(flat + sign * step * direction)) for sign in (1, -1))
    change = vectors @ ((ahead - behind) / (2 * step)) @ vectors.T
    assert_close(slopes @ direction, np.einsum("aij,ij->a", basis(2), change), 1e-6)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_complementarity_conditions_hold(count, scale, key):
    keys, size = jax.random.split(key, 2), count * (count + 1) // 2
    root = jax.random.normal(keys[0], (size, size + 2))
    operator, offset = root @ root.T, scale * jax.random.normal(keys[1], (size,))
    solution = jax.jit(solve_complementarity)(offset, operator)
    slack_vector = offset + operator @ jnp.einsum("aij,ij->a", basis(count), solution.matrix)
    slack = jnp.einsum("a,aij->ij", slack_vector, basis(count))
    assert solution.residual <= 1e-8
    largest = np.abs(np.linalg.eigvalsh(solution.matrix)).max()
    assert np.linalg.eigvalsh(solution.matrix).min() >= -1e-12 * largest
    assert np.linalg.eigvalsh(slack).min() >= -1e-7 * scale
    assert abs(jnp.vdot(solution.matrix, slack)) <= 1e-6 * scale * max(largest, 1e-300)


def test_complementarity_of_one_number(key):
    for offset, expected in ((-3.0, 1.5), (3.0, 0.0), (0.0, 0.0)):
        solution = jax.jit(solve_complementarity)(jnp.array([offset]), jnp.array([[2.0]]))
        assert float(solution.matrix[0, 0]) == pytest.approx(expected, abs=1e-8)


def below_the_edge(key, **options):
    curvature, start = jnp.array([0.2, 1.0, 3.0, 5.0]), jax.random.normal(key, (4,))
    flow = central_flow(quadratic(curvature), start, update_rule("gd", 0.05), key, steps=20, every=5, **options)
    return curvature, start, flow


def test_smoothing_keeps_a_line_and_drops_its_oscillation(key):
    start, slope, swing = jax.random.normal(key, (3, 1, 4))
    times = jnp.arange(9.0)[:, None]
    iterates = start + times * slope + (-1.0) ** times * swing
    assert_close(smoothed({"w": iterates}), {"w": start + (times[:-2] + 1) * slope})


def test_below_the_edge_the_central_flow_is_the_gradient_flow(key):
    curvature, start, flow = below_the_edge(key, substeps=64)
    times = 0.05 * jnp.arange(0.0, 21.0, 5.0)
    exact = start[None, :] * jnp.exp(-times[:, None] * curvature[None, :])
    assert_close(flow.params, exact, 3e-3)
    assert_close(flow.sharpness, np.tile([3.0, 5.0], (5, 1)), 1e-10)
    assert np.all(flow.variance == 0)
    assert_close(flow.predicted_loss, flow.loss, 1e-14)


def sharpening(slope):
    """a^2 (1 + b^2) / 2 - slope b: curvature 1 + b^2 along a, which the slope raises."""
    return objective(
        lambda w, x: jnp.stack([w[0] ** 2 * (1 + w[1] ** 2) / 2, -x[0] * w[1]]),
        lambda outputs, _: jnp.sum(outputs),
        jnp.array([slope]),
        jnp.zeros(1),
    )


def test_the_edge_holds_with_the_variance_in_closed_form():
    """Curvature h = 1 + b^2 along a; db/dt = -eta (-c + s b) with s = <a^2>: at the edge b stands still, s = c / b."""
    rate = 0.5  # edge 4: b = sqrt 3
    flow = central_flow(
        sharpening(0.1),
        jnp.array([0.0, 1.6]),
        update_rule("gd", rate),
        jax.random.key(0),
        steps=40,
        count=1,
        substeps=8,
    )
    assert abs(flow.sharpness[-1, 0] * rate / 2 - 1) <= 1e-6
    assert_close(flow.params[-1], [0.0, 3**0.5], 1e-6)
    assert_close(flow.variance[-1, 0], 0.1 / 3**0.5, 1e-6)
    assert_close(flow.predicted_loss[-1] - flow.loss[-1], 0.1 / 3**0.5 / rate, 1e-6)


def test_gradient_descent_averages_to_the_central_flow():
    """The discrete iteration on the same problem oscillates about b = sqrt 3 with the predicted variance."""
    risk, point = sharpening(1e-3), jnp.array([0.024, 3**0.5])

    def step(point, _):
        return point - 0.5 * jax.grad(risk)(point), point

    _, path = jax.jit(lambda point: jax.lax.scan(step, point, length=4000))(point)
    late = np.asarray(path[2000:])
    assert abs(late[:, 1].mean() - 3**0.5) <= 0.02
    assert abs((late[:, 0] ** 2).mean() / (1e-3 / 3**0.5) - 1) <= 0.05


def test_rmsprop_central_flow_holds_its_edge():
    """With a second moment: P^-1/2 H P^-1/2 rises to 2 / eta and stays there; nu answers the oscillation. The third
    parameter has no gradient, and stays where it is."""
    rate = 0.02
    flow = central_flow(
        sharpening(0.1),
        jnp.array([0.0, 1.6, 3.0]),
        update_rule("rmsprop", rate, b2=0.95),
        jax.random.key(0),
        steps=400,
        every=10,
        second_moment=jnp.array([0.0016, 0.01, 0.0]),
        count=1,
        substeps=8,
    )
    assert np.all(flow.params[:, 2] == 3)
    ratio = flow.sharpness[:, 0] * rate / 2
    assert ratio[0] < 1
    active = flow.variance[:, 0] > 0
    assert active[-1]
    assert np.abs(ratio[active] - 1).max() <= 1e-3
    optimizer = optax.chain(optax.scale_by_rms(decay=0.95, eps=1e-8, eps_in_sqrt=False), optax.scale(-rate))
    found = rmsprop(sharpening(0.1), optimizer, jnp.array([1e-3, 1.6]), jnp.array([0.0016, 0.01]))
    assert_close(np.asarray(found[390:411, 1]).mean() - 1.6, flow.params[40, 1] - 1.6, 0.1)


def rmsprop(risk, optimizer, point, moment):
    """Iterates of RMSProp from a given second moment."""
    state = (optax.ScaleByRmsState(nu=moment), optimizer.init(point)[1])

    def step(carry, _):
        point, state = carry
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(jax.grad(risk)(point), state)
        return (point + updates, state), point

    _, path = jax.jit(lambda carry: jax.lax.scan(step, carry, length=420))((point, state))
    return path


def potential(function):
    """The risk that is this function of the parameters."""
    return objective(lambda w, x: w, lambda w, _: function(w), jnp.ones(1), jnp.ones(1))


def falling(w):
    """dw/dt = 4 w^3 from 1: w = (1 - 8 t)^(-1/2), infinite at time 1 / 8."""
    return -jnp.sum(w**4)


class TestDivergence:
    def test_gradient_flow_names_the_time(self):
        with pytest.raises(
            ArithmeticError, match=r"gradient flow is not finite at time 1; .* loss was -50, at time 0.1"
        ):
            gradient_flow(potential(falling), jnp.ones(2), jnp.array([0.0, 0.1, 1.0]))

    def test_central_flow_names_the_step(self, key):
        with pytest.raises(
            ArithmeticError, match=r"central flow is not finite at step 4; the last finite loss .* step 2"
        ):
            central_flow(potential(falling), jnp.ones(2), update_rule("gd", 0.1), key, steps=8, every=2, count=1)


GRADIENT_DESCENT, RMSPROP = update_rule("gd", 0.1), update_rule("rmsprop", 0.1, b2=0.9)


class TestBadInput:
    @pytest.mark.parametrize(
        ("times", "message"),
        [
            ([0.0, 1.0, 0.5], "times goes from 1 to 0.5; expected increasing times"),
            ([0.0, 1.0, 1.0], "times goes from 1 to 1; expected increasing times"),
            ([0.0, np.inf], "times has 1 non-finite of 2 values"),
            (1.0, r"times has shape \(\); expected a vector"),
        ],
    )
    def test_times_of_gradient_flow(self, times, message):
        with pytest.raises(ValueError, match=message):
            gradient_flow(quadratic(jnp.ones(2)), jnp.ones(2), jnp.array(times))

    def test_tolerance_of_gradient_flow(self):
        with pytest.raises(ValueError, match=r"tolerance is 0\.0; expected a finite number above 0"):
            gradient_flow(quadratic(jnp.ones(2)), jnp.ones(2), jnp.array([0.0, 1.0]), tolerance=0.0)

    @pytest.mark.parametrize(
        ("rule", "options", "message"),
        [
            (GRADIENT_DESCENT, {"substeps": 1}, "substeps is 1; expected at least 2"),
            (GRADIENT_DESCENT, {"every": 7}, "steps is 20; expected a multiple of every, which is 7"),
            (GRADIENT_DESCENT, {"second_moment": jnp.ones(2)}, "second_moment is given and rule is gd"),
            (RMSPROP, {}, "second_moment is missing and rule is rmsprop"),
            (RMSPROP, {"second_moment": jnp.ones(3)}, r"second_moment: .* has shape \(3,\); expected \(2,\)"),
            (RMSPROP, {"second_moment": -jnp.ones(2)}, "second_moment has a negative entry"),
            (RMSProp(0.1, b2=0.0), {}, "b2 is 0; expected a number above 0"),
            (RMSProp(0.1, eps_in_sqrt=True), {}, "eps_in_sqrt is True; the central flow is derived for"),
            (update_rule("gd", optax.constant_schedule(0.1)), {}, "is a schedule; a flow expects a number"),
            *(
                (update_rule(name, 0.1), {}, f"rule is {name}, whose central flow is not known.* expected one of gd")
                for name, row in RULES.items()
                if not row.averaged
            ),
        ],
    )
    def test_options_that_do_not_fit(self, rule, options, message, key):
        with pytest.raises(ValueError, match=message):
            central_flow(quadratic(jnp.ones(2)), jnp.ones(2), rule, key, steps=20, **{"every": 5, **options})
