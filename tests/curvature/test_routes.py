"""Models and losses with a custom_vjp rule: every operator equals that of the plain function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.attention.downstream import downstream_derivatives
from attnlab.curvature.operators import FISHERS, PARTS, hessian
from attnlab.derivatives import FORWARD, REVERSE
from attnlab.losses import square_loss
from attnlab.objectives import batched, objective
from compare import assert_close
from nightly import nightly


@jax.custom_vjp
def gated(u, gate):
    return jnp.tanh(u) * jax.nn.sigmoid(gate)


def backward(kept, cotangent):
    t, s = jnp.tanh(kept[0]), jax.nn.sigmoid(kept[1])
    return cotangent * s * (1 - t**2), cotangent * t * s * (1 - s)


gated.defvjp(lambda u, gate: (gated(u, gate), (u, gate)), backward)


def plain(u, gate):
    return jnp.tanh(u) * jax.nn.sigmoid(gate)


def network(unit, nested):
    """The unit under `scan` and `checkpoint` inside `jit`, or bare."""

    def predict(params, inputs):
        step = lambda x, w: (unit(x @ w, params["gate"] * jnp.ones_like(x)), None)  # noqa: E731
        if nested:
            return jax.jit(lambda x: jax.lax.scan(jax.checkpoint(step), x, params["weights"])[0])(inputs)
        return step(step(inputs, params["weights"][0])[0], params["weights"][1])[0]

    return predict


@jax.custom_vjp
def loss_with_a_rule(outputs, targets):
    return square_loss(outputs, targets)


loss_with_a_rule.defvjp(
    lambda o, t: (square_loss(o, t), (o, t)), lambda kept, ct: (ct * 2 * (kept[0] - kept[1]) / kept[0].size, None)
)


def problem():
    random = np.random.default_rng(0)
    params = {"weights": jnp.asarray(random.standard_normal((2, 3, 3))), "gate": jnp.asarray(0.3)}
    return params, random.standard_normal((4, 3)), random.standard_normal((4, 3))


CASES = {
    "model": (gated, False, square_loss),
    "nested": (gated, True, square_loss),
    "both": (gated, False, loss_with_a_rule),
}


@pytest.mark.parametrize("part", [*PARTS, *FISHERS])
@pytest.mark.parametrize("case", nightly(CASES, ("nested",)))
def test_operators_of_a_model_with_a_custom_rule(case, part):
    if (case, part) == ("both", "fisher"):
        pytest.skip("a loss of one's own has no likelihood")
    unit, nested, loss = CASES[case]
    params, inputs, targets = problem()
    build = {**PARTS, **FISHERS}[part]
    found = build(objective(network(unit, nested), loss, inputs, targets), params)
    expected = build(objective(network(plain, nested), square_loss, inputs, targets), params)
    assert_close(found.dense(), expected.dense(), 1e-10)
    assert (found.route, expected.route) == (REVERSE, FORWARD)
    assert (2 * found).route == found.route


def test_batches_of_a_model_with_a_custom_rule():
    params, inputs, targets = problem()
    parts = batched(network(gated, True), square_loss, [(inputs[:3], targets[:3]), (inputs[3:], targets[3:])])
    whole = objective(network(plain, True), square_loss, inputs, targets)
    assert_close(hessian(parts, params).dense(), hessian(whole, params).dense(), 1e-10)


@pytest.mark.parametrize("part", ["hessian", "ggn"])
def test_what_stands_behind_a_layer_may_have_a_custom_rule(part):
    outputs = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 3)))
    loss = lambda o: jnp.mean(o**2)  # noqa: E731
    behind = [lambda x, unit=unit: unit(x, jnp.full_like(x, 0.3)) for unit in (gated, plain)]
    found, expected = (downstream_derivatives(rest, loss, outputs, part=part, coupled=False) for rest in behind)
    assert_close(found, expected, 1e-12)


@jax.custom_vjp
def opaque(x):
    return jnp.sin(x)


opaque.defvjp(
    lambda x: (opaque(x), x),
    lambda x, ct: (ct * jax.pure_callback(np.cos, jax.ShapeDtypeStruct(x.shape, x.dtype), x),),
)


def test_a_rule_that_cannot_be_differentiated_is_named():
    risk = objective(lambda p, x: opaque(p * x), square_loss, np.ones(3), np.ones(3))
    with pytest.raises(
        TypeError, match=r"no second derivative: .*Pure callbacks do not support JVP.* and so does reverse"
    ):
        hessian(risk, jnp.asarray(0.5))
