"""Rod flow against the steps of Adam that it is made of, the edge of Adam, and a run of Adam at it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attnlab.dynamics.rods import Rod, rod_between, rod_flow, rod_velocity
from attnlab.dynamics.rules import Adam
from attnlab.objectives import objective
from attnlab.risks.digits import digits_attention
from attnlab.trees import ravel
from compare import assert_close
from update_rules import AVERAGED, rule_of

RULE = Adam(0.05, 0.6, 0.98, 1e-3)
CURVATURE = jnp.array([0.1, 0.5, 2.0])


def quartic():
    """Half of w^T diag(curvature) w, and a little of the fourth power."""
    return objective(
        lambda w, x: x * w, lambda out, _: 0.5 * out @ out + 0.1 * jnp.sum(out**4), CURVATURE**0.5, CURVATURE
    )


def iterates(risk, params, optimizer, steps):
    """Parameters and optimizer states at every step, before it."""

    def step(carry, _):
        params, state = carry
        with jax.numpy_dtype_promotion("standard"):
            updates, after = optimizer.update(jax.grad(risk)(params), state, params)
        return (optax.apply_updates(params, updates), after), carry

    with jax.numpy_dtype_promotion("standard"):
        start = (params, optimizer.init(params))
    return jax.jit(lambda start: jax.lax.scan(step, start, length=steps)[1])(start)


def at(path, step):
    return jax.tree.map(lambda leaf: leaf[step], path)


def test_an_euler_step_of_the_rod_is_two_steps_of_adam(key):
    """With the denominator held, from the definition of a step."""
    risk, (w, m) = quartic(), jax.random.normal(key, (2, 3))
    nu, count = jnp.abs(jax.random.normal(jax.random.fold_in(key, 1), (3,))), jnp.array(7.0)
    denominator = (1 - 0.6**7) * (jnp.sqrt(nu / (1 - 0.98**7)) + 1e-3)
    points = [jnp.stack([w, m])]
    for _ in range(2):
        w, m = points[-1]
        m = 0.6 * m + 0.4 * jax.grad(risk)(w)
        points.append(jnp.stack([w - 0.05 * m / denominator, m]))
    rod = Rod((points[0] + points[1]) / 2, (points[0] - points[1]) / 2, nu, count)
    velocity = rod_velocity(risk, w, rod, RULE)
    assert_close(rod.centre + velocity.centre, (points[1] + points[2]) / 2, 1e-12)
    assert_close(rod.half + velocity.half, -(points[1] - points[2]) / 2, 1e-12)
    squares = [jax.grad(risk)(point[0]) ** 2 for point in points[:2]]
    assert_close(velocity.nu, 0.02 * ((squares[0] + squares[1]) / 2 - nu), 1e-12)


@pytest.mark.parametrize("name", AVERAGED)
def test_a_rod_without_length_moves_as_optax_does(name, key):
    """The drift of each rule is the step of optax, with the second moment that the step divides by."""
    risk, rule = quartic(), rule_of(name, 0.05)
    path = iterates(risk, jax.random.normal(key, (3,)), rule.transformation, 6)
    (w, state), (w_next, after) = at(path, 4), at(path, 5)
    before, then = rule.moments(state, w), rule.moments(after, w_next)
    rod = Rod(jnp.stack([w, before.first]), jnp.zeros((2, 3)), then.second, then.steps.astype(float))
    velocity = rod_velocity(risk, w, rod, rule)
    assert_close(velocity.centre[0], w_next - w, 1e-10, np.abs(w).max())
    assert_close(before.first + velocity.centre[1], then.first, 1e-12)
    assert np.all(velocity.half == 0)
    assert np.any(velocity.nu) == (rule.second_moment is not None)


def test_a_rod_lies_between_two_iterates(key):
    path = iterates(quartic(), jax.random.normal(key, (3,)), RULE.transformation, 6)
    rod = rod_between(RULE, at(path, 3), at(path, 4))
    assert_close(rod.centre[0] + rod.half[0], at(path, 3)[0], 1e-14)
    assert_close(rod.centre[1] - rod.half[1], optax.tree.get(at(path, 4)[1], "mu"), 1e-14)
    assert (float(rod.steps), rod.nu.shape) == (4.0, (3,))


@pytest.mark.parametrize("excess", [0.9, 1.1])
def test_a_rod_grows_beyond_the_edge_only(excess):
    """A quadratic whose preconditioned curvature is so many times the threshold; the second moment stands still."""
    rule = Adam(0.05, 0.6, 1 - 1e-9)
    threshold = float(rule.edge(0.05))
    curvature = excess * threshold * (1 - 0.6**50)
    risk = objective(lambda w, x: w, lambda out, _: 0.5 * curvature * out @ out, jnp.ones(1), jnp.ones(1))
    nu = jnp.ones(1) * -jnp.expm1(50 * jnp.log1p(-1e-9))  # the corrected one is 1
    start = Rod(jnp.zeros((2, 1)), jnp.array([[1e-3], [0.0]]), nu, jnp.array(50.0))
    half = rod_flow(risk, jnp.ones(1), start, rule, steps=60, every=20).half[:, 0]
    assert (abs(half[-1]) > abs(half[1])) == (excess > 1)


def test_below_the_edge_the_flow_follows_adam(key):
    """Slow steps: the flow's error is of the order of one of them."""
    rule = Adam(1e-3, 0.9, 0.99)
    path = iterates(quartic(), jax.random.normal(key, (3,)), rule.transformation, 260)
    flow = rod_flow(quartic(), jnp.ones(3), rod_between(rule, at(path, 50), at(path, 51)), rule, steps=200, every=200)
    mean = (at(path, 250)[0] + at(path, 251)[0]) / 2
    assert_close(flow.params[-1], mean, 2e-3, np.abs(at(path, 50)[0] - mean).max())


@pytest.mark.slow
def test_at_the_edge_adam_stays_with_the_rod_and_leaves_the_stable_flow(key):
    """Sixteen digits, 250 steps from step 300."""
    rule = Adam(5e-3, 0.9, 0.99)
    risk, params = digits_attention(key, key, 16)
    path = iterates(risk, params, rule.transformation, 560)
    rod = rod_between(rule, at(path, 300), at(path, 301))
    mean = (ravel(at(path, 550)[0]) + ravel(at(path, 551)[0])) / 2
    starts = {"rod": rod, "stable": rod._replace(half=jnp.zeros_like(rod.half))}
    ends = {
        name: ravel(at(rod_flow(risk, params, start, rule, steps=250, every=250).params, -1))
        for name, start in starts.items()
    }
    distances = {name: float(jnp.linalg.norm(end - mean)) for name, end in ends.items()}
    assert distances["stable"] >= 3 * distances["rod"], distances


START = Rod(jnp.ones((2, 3)), jnp.zeros((2, 3)), jnp.ones(3), jnp.array(5.0))


def test_a_rod_flow_that_diverges_names_the_step():
    """Uphill without a bound, beyond the range of the numbers."""
    risk = objective(lambda w, x: w, lambda w, _: -jnp.sum(jnp.exp(w**2)), jnp.ones(1), jnp.ones(1))
    with pytest.raises(ArithmeticError, match=r"rod flow is not finite at step 20; the last finite loss .* at step 0"):
        rod_flow(risk, jnp.ones(3), START, Adam(1.0), steps=20, every=20)


class TestBadInput:
    @pytest.mark.parametrize(
        ("rule", "start", "every", "message"),
        [
            (RULE, START, 4, "steps is 10; expected a multiple of every, which is 4"),
            (
                Adam(optax.constant_schedule(0.1)),
                START,
                5,
                "rule adam is a schedule; a flow expects a number",
            ),
            (
                RULE,
                START._replace(half=jnp.zeros((2, 4))),
                5,
                r"start has leaves of shapes .*\(2, 4\).* expected a centre",
            ),
            (RULE, START._replace(nu=jnp.full(3, np.nan)), 5, "start: nu has 3 non-finite of 3 values"),
        ],
    )
    def test_options_that_do_not_fit(self, rule, start, every, message):
        with pytest.raises(ValueError, match=message):
            rod_flow(quartic(), jnp.ones(3), start, rule, steps=10, every=every)
