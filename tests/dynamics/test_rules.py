"""Each row of `RULES`: its threshold by the iteration matrix on a quadratic, its denominator, its state in a chain."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
from jax.flatten_util import ravel_pytree

from attnlab.dynamics.preconditioners import applied
from attnlab.dynamics.rules import RULES, Adam, GradientDescent, RMSProp, preconditioner_after_step, update_rule
from compare import assert_close
from update_rules import LINEAR, OPTIONS, dense_of, rule_of


def step_map(optimizer, matrix, state, like):
    """Jacobian of one step in (w, first moment), the second moment and the step count held."""
    floats, unravel = ravel_pytree((like, momentum_of(state)))

    def step(flat):
        w, momentum = unravel(flat)
        gradient = (matrix @ w.ravel()).reshape(w.shape)
        with jax.numpy_dtype_promotion("standard"):
            updates, after = optimizer.update(gradient, with_momentum(state, momentum), w)
        return ravel_pytree((w + updates, momentum_of(after)))[0]

    return jax.jacfwd(step)(floats)


def momentum_of(state):
    """The first moments in a state: `trace` of sgd, `ema` of an average, `mu` of Adam."""
    return [leaf for name in ("trace", "ema", "mu") for _, leaf in optax.tree.get_all_with_path(state, name)]


def with_momentum(state, momentum):
    for name in ("trace", "ema", "mu"):
        if optax.tree.get_all_with_path(state, name):
            state = optax.tree.set(state, **{name: momentum[0]})
    return state


@pytest.mark.parametrize("name", LINEAR)
def test_threshold_is_where_the_step_loses_stability(name, key):
    """On a quadratic of a matrix (2, 3), with the second moment held, the spectral radius of the optax step crosses 1
    at the threshold."""
    rule, shape = rule_of(name, 0.05), (2, 3)
    keys = jax.random.split(key, 2)
    basis = jnp.linalg.qr(jax.random.normal(keys[0], (6, 6)))[0]
    raw = basis @ jnp.diag(jnp.linspace(0.3, 1.0, 6)) @ basis.T
    w, *gradients = jax.random.normal(keys[1], (6, *shape))
    state = rule.transformation.init(w)
    with jax.numpy_dtype_promotion("standard"):
        for gradient in gradients[1:]:
            _, state = rule.transformation.update(gradient, state, w)
    found, threshold = preconditioner_after_step(rule, gradients[0], state, w)
    preconditioner = np.asarray(dense_of(found, w))
    root = scipy.linalg.sqrtm(preconditioner)
    for factor, stable in ((1 - 1e-8, True), (1 + 1e-8, False)):
        matrix = root @ raw @ root * (factor * threshold)
        radius = frozen_radius(rule, matrix, preconditioner, name, shape)
        assert (radius < 1) == stable, radius


def frozen_radius(rule, matrix, preconditioner, name, shape):
    """Spectral radius of the step with the preconditioner held: that of optax itself where there is none, else the
    matrix of the momentum rule written from its definition (its denominator is tested against optax below)."""
    options, rate, n = OPTIONS[name], 0.05, matrix.shape[0]
    identity, inverse = jnp.eye(n), jnp.linalg.inv(preconditioner)
    if name in ("gd", "heavy_ball", "nesterov", "ema"):
        step = step_map(rule.transformation, matrix, rule.transformation.init(jnp.zeros(shape)), jnp.zeros(shape))
    elif "b1" not in options:
        step = identity - rate * inverse @ matrix
    else:
        b1, decay = options["b1"], options.get("weight_decay", 0.0)
        moment = jnp.concatenate([(1 - b1) * matrix, b1 * identity], axis=1)
        stay = jnp.concatenate([(1 - rate * decay) * identity, jnp.zeros((n, n))], axis=1)
        step = jnp.concatenate([stay - rate * inverse @ moment, moment])
    return np.abs(np.linalg.eigvals(step)).max()


@pytest.mark.parametrize("shape", [(7,), (2, 3), (3, 2), (2, 2, 3)], ids=str)
@pytest.mark.parametrize("name", [name for name, row in RULES.items() if row.second_moment])
def test_preconditioner_is_the_denominator_of_the_step(name, shape, key):
    """From zero moments the first update of optax is -rate * (1 - b1^1) gradient / P (and the weight decay)."""
    rule, options = rule_of(name, 0.05), OPTIONS[name]
    w, gradient = jax.random.normal(key, (2, *shape))
    state = rule.transformation.init(w)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = rule.transformation.update(gradient, state, w)
    found, _ = preconditioner_after_step(rule, gradient, state, w)
    expected = -0.05 * ((1 - options.get("b1", 0.0)) * gradient + options.get("weight_decay", 0.0) * applied(found, w))
    assert_close(applied(found, updates), expected, 1e-9)


def steps_of(optimizer, params, count=3):
    """The last updates of so many steps, the state after them, and the last gradient."""
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(params)
        for step in range(count):
            gradient = jax.tree.map(lambda leaf, step=step: jnp.sin(leaf + step), params)
            updates, state = optimizer.update(gradient, state, params)
    return updates, state, gradient


PARAMS = {"first": jnp.linspace(-1.0, 1.0, 3), "second": jnp.array([0.5, 2.0])}


@pytest.mark.parametrize(
    "rule",
    [Adam(1.0), Adam(1.0, b1=0.5, b2=0.9, eps=1e-2, eps_root=1e-3), RMSProp(1.0), RMSProp(1.0, eps_in_sqrt=True)],
    ids=["adam", "other adam", "rmsprop", "eps in the root"],
)
def test_a_step_is_the_first_moment_over_the_preconditioner(rule):
    updates, state, gradient = steps_of(rule.transformation, PARAMS)
    moved = jax.tree.map(lambda update, scale: -update * scale, updates, rule.preconditioner(state, PARAMS))
    assert_close(moved, gradient if rule.first_moment is None else rule.moments(state, PARAMS).first, 1e-12)


WRAPPERS = {
    "chain": lambda inner: optax.chain(optax.clip_by_global_norm(1e9), optax.chain(inner, optax.identity())),
    "partition": lambda inner: optax.partition({"all": inner}, {"first": "all", "second": "all"}),
    "masked": lambda inner: optax.masked(inner, {"first": True, "second": True}),
    "several steps": lambda inner: optax.MultiSteps(inner, 1).gradient_transformation(),
    "finite": lambda inner: optax.apply_if_finite(inner, 3),
}


@pytest.mark.parametrize("name", LINEAR)
def test_the_state_is_found_inside_any_chain(name):
    """Around the rule stands what leaves the gradients alone: all that it remembers is as without."""
    rule = rule_of(name, 0.05)
    alone = steps_of(rule.transformation, PARAMS)[1]
    for wrap in WRAPPERS.values():
        state = steps_of(wrap(rule.transformation), PARAMS)[1]
        assert_close(rule.threshold(state), rule.edge(0.05), 1e-12)
        assert_close(rule.moments(state, PARAMS), rule.moments(alone, PARAMS), 1e-12)
        if rule.second_moment is not None:
            assert_close(rule.preconditioner(state, PARAMS), rule.preconditioner(alone, PARAMS), 1e-12)
        else:
            assert rule.preconditioner(state, PARAMS) is None


def test_a_state_that_holds_none_or_two_is_refused():
    adam, twice = Adam(0.1), optax.chain(Adam(0.1).transformation, Adam(0.1).transformation)
    with pytest.raises(ValueError, match="has taken no step"):
        adam.preconditioner(adam.transformation.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="holds no part of type ScaleByAdamState"):
        adam.preconditioner(GradientDescent(0.1).transformation.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="holds 2 parts that move first"):
        adam.moments(twice.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="holds 2 learning rates; expected one"):
        adam.threshold(twice.init(PARAMS))


def test_rules_are_equal_where_their_numbers_are():
    """So that what is compiled for one serves the other; a rate on the device is a number too."""
    assert Adam(0.1, b1=0.8) == update_rule("adam", jnp.array(0.1), b1=0.8)
    assert len({Adam(0.1), Adam(0.1), Adam(0.2), RMSProp(0.1), RMSProp(jnp.array(0.1))}) == 3
    assert [rule_of(name, 0.1).name for name in RULES] == list(RULES)


@pytest.mark.parametrize(
    ("name", "rate", "options", "message"),
    [
        ("gd", -0.1, {}, r"learning_rate is -0\.1; expected a finite number above 0"),
        ("gd", 0.0, {}, r"learning_rate is 0\.0"),
        ("rmsprop", jnp.array(np.inf), {}, "learning_rate is inf"),
        ("heavy_ball", 0.1, {"momentum": 1.0}, r"momentum is 1\.0; expected a number of at least 0 and below 1"),
        ("nesterov", 0.1, {"momentum": -0.1}, r"momentum is -0\.1"),
        ("adam", 0.1, {"b1": 1}, "b1 is 1; expected a number of at least 0 and below 1"),
        ("rmsprop", 0.1, {"b2": 1.5}, r"b2 is 1\.5"),
        ("adam", 0.1, {"eps": -1e-8}, "eps is -1e-08; expected a finite number of at least 0"),
        ("adamw", optax.constant_schedule(0.1), {"weight_decay": np.nan}, "weight_decay is nan"),
        ("adafactor", 0.1, {"min_dim_size_to_factor": 0}, "min_dim_size_to_factor is 0; expected a whole number of at"),
        ("adafactor", 0.1, {"decay_rate": -0.8}, r"decay_rate is -0\.8; expected a finite number of at least 0"),
        ("soap", 0.1, {"frequency": 1.5}, r"frequency is 1\.5; expected a whole number of at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused(name, rate, options, message):
    with pytest.raises(ValueError, match=message):
        update_rule(name, rate, **options)


def test_a_rule_in_a_norm_has_no_drift():
    with pytest.raises(ValueError, match=r"the rule muon has no drift.* such as gd or adam"):
        update_rule("muon", 0.1).drift(0.1, *[jnp.ones((2, 2))] * 4)
