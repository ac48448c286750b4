"""What is tested when an operator is built: sound objectives pass in silence, and what fails is named, once."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.curvature import (
    CurvatureWarning,
    VerificationError,
    batched,
    empirical_fisher,
    functional,
    ggn,
    hessian,
    self_checks,
)
from attnlab.losses import cross_entropy, square_loss
from attnlab.objectives import objective
from cases import CASES

INPUTS = np.random.default_rng(0).standard_normal((6, 3))
TARGETS = np.random.default_rng(1).standard_normal((6, 2))
PARAMS = {"weights": jnp.asarray(np.random.default_rng(2).standard_normal((3, 2)))}


def tanh(params, inputs):
    return jnp.tanh(inputs @ params["weights"])


def centred(outputs):
    return outputs - jnp.broadcast_to(jnp.mean(outputs, axis=0), outputs.shape)


def risk_of(predict, loss=square_loss):
    return objective(predict, loss, INPUTS, TARGETS)


@pytest.fixture(autouse=True)
def nothing_remembered():
    self_checks._passed.cache_clear()


def checks_made():
    """How many checks of a structure have been made since the test began; those that did not raise have passed."""
    return self_checks._passed.cache_info().currsize


@pytest.mark.parametrize("build", [hessian, ggn, empirical_fisher])
def test_sound_objectives_pass_in_silence(build):
    # In the key bias of softmax attention the Hessian is nothing but rounding: neither symmetric nor a derivative.
    risk, params = CASES["biases/square"](jax.random.key(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(risk, params)
        if build is hessian:
            build(risk, params, block="key_bias")
    assert checks_made() == (3 if build is hessian else 2)  # the risk, the operator and its block


def test_relu_does_not_raise_and_rarely_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hessian(risk_of(lambda params, inputs: jax.nn.relu(inputs @ params["weights"])), PARAMS)
    assert checks_made() == 2


def test_kinks_in_great_number_warn():
    random = np.random.default_rng(0)
    inputs, targets = jnp.float32(random.standard_normal((5000, 3))), jnp.float32(5 + random.standard_normal((5000, 2)))
    risk = objective(lambda params, x: jax.nn.relu(x @ params["weights"]), square_loss, inputs, targets)
    single = {"weights": jnp.float32(PARAMS["weights"])}
    with pytest.warns(CurvatureWarning, match=r"finite difference: .* kinks \(relu\).* or a wrong derivative rule"):
        hessian(risk, single)


@jax.custom_vjp
def askew(x):
    return jnp.sin(x)


askew.defvjp(lambda x: (jnp.sin(x), x), lambda x, cotangent: (cotangent * jnp.cos(jnp.roll(x, 1, axis=1)),))


@jax.custom_jvp
def slope(x):
    return x**2


@slope.defjvp
def _(primals, tangents):  # of a function that is itself a derivative: wrong in the second order only, yet symmetric
    return primals[0] ** 2, 5 * primals[0] * tangents[0]


@jax.custom_jvp
def cubic(x):
    return x**3 / 3


@cubic.defjvp
def _(primals, tangents):
    return primals[0] ** 3 / 3, slope(primals[0]) * tangents[0]


def test_a_wrong_rule_that_breaks_symmetry_raises_every_time():
    risk = risk_of(lambda params, inputs: askew(inputs @ params["weights"]))
    for _ in range(2):
        with pytest.raises(VerificationError, match="symmetry: <u, Hv> and <v, Hu> differ") as caught:
            hessian(risk, PARAMS)
    assert caught.value.discrepancies["symmetry"] > 1e-3


def test_a_wrong_second_derivative_warns_where_the_operator_is_built():
    risk = risk_of(lambda params, inputs: cubic(inputs @ params["weights"]))
    with pytest.warns(CurvatureWarning, match="finite difference: .*wrong derivative rule") as caught:
        hessian(risk, PARAMS)
    assert caught[0].filename == __file__


def test_numbers_drawn_while_tracing_raise():
    random = np.random.default_rng(0)
    for draw in (random.uniform, lambda: random.uniform(size=(6, 2)), lambda: jnp.asarray(random.uniform(size=(6, 2)))):
        risk = risk_of(lambda params, inputs, draw=draw: inputs @ params["weights"] * draw())
        with pytest.raises(VerificationError, match="determinism: two evaluations disagree: dropout or sampling"):
            ggn(risk, PARAMS)


def test_numbers_drawn_while_running_raise():
    random = np.random.default_rng(0)

    def predict(params, inputs):
        shape = jax.ShapeDtypeStruct((), jnp.float64)
        scale = jax.pure_callback(lambda: np.array(random.uniform()), shape)
        return inputs @ params["weights"] * scale

    with (
        pytest.warns(CurvatureWarning, match="examples"),
        pytest.raises(VerificationError, match="determinism"),
    ):
        hessian(risk_of(predict), PARAMS)


COUPLED = {
    "batch norm": (lambda p, x: centred(tanh(p, x)), square_loss, r"depend on the other examples \(batch norm"),
    "only those before": (lambda p, x: jnp.cumsum(tanh(p, x), axis=0), square_loss, "outputs depend on"),
    "only those after": (
        lambda p, x: jnp.cumsum(tanh(p, x)[::-1], axis=0)[::-1],
        square_loss,
        "outputs depend on",
    ),
    "dropout": (
        lambda p, x: jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, (len(x), 2)), tanh(p, x), 0),
        square_loss,
        r"depend on the place in the batch \(dropout",
    ),
    "sum": (tanh, lambda outputs, targets: jnp.sum((outputs - targets) ** 2), "Average, do not sum"),
    "one vector of all": (lambda p, x: jnp.mean(tanh(p, x), axis=0), lambda o, t: jnp.mean((o - t[0]) ** 2), "depend"),
}


@pytest.mark.parametrize("name", COUPLED)
def test_what_couples_the_examples_warns_and_in_batches_raises(name):
    predict, loss, message = COUPLED[name]
    with pytest.warns(CurvatureWarning, match=f"examples: .*{message}"):
        ggn(risk_of(predict, loss), PARAMS)
    with pytest.raises(ValueError, match=message):
        ggn(batched(predict, loss, [(INPUTS, TARGETS)]), PARAMS)


def test_a_model_of_one_batch_size_is_not_split():
    scales = jnp.asarray(INPUTS[:, :2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ggn(risk_of(lambda params, inputs: tanh(params, inputs) * scales), PARAMS)
    assert checks_made() == 2


def test_examples_of_several_rows_are_split():
    inputs = INPUTS.reshape(3, 2, 3)
    risk = objective(lambda p, x: tanh(p, x.reshape(-1, 3)), cross_entropy, inputs, np.zeros((3, 2), int))
    flat = objective(risk.predict, lambda o, t: cross_entropy(o, t.ravel()), risk.inputs, risk.targets)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ggn(flat, PARAMS)
    assert checks_made() == 2


def test_a_product_that_is_not_finite_is_left_to_what_uses_it():
    risk = risk_of(lambda params, inputs: jnp.sqrt(inputs**2 @ params["weights"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operator = hessian(risk, {"weights": jnp.zeros((3, 2))})
    assert not np.isfinite(operator.mv(PARAMS)["weights"]).all()


def test_switched_off_nothing_is_tested():
    random = np.random.default_rng(0)
    bad = [
        (hessian, risk_of(lambda params, inputs: askew(inputs @ params["weights"]))),
        (ggn, risk_of(lambda params, inputs: tanh(params, inputs) * random.uniform())),
        (functional, risk_of(*COUPLED["sum"][:2])),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for build, risk in bad:
            build(risk, PARAMS, check=False)
    assert checks_made() == 0


def test_under_a_transformation_nothing_is_tested():
    predict, loss, _ = COUPLED["sum"]
    risk = risk_of(predict, loss)
    points = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), PARAMS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.jit(lambda params: hessian(risk, params).mv(params))(PARAMS)
        jax.jit(lambda vector: hessian(risk, PARAMS).mv(vector))(PARAMS)
        jax.vmap(lambda params: hessian(risk, params).mv(params)["weights"])(points)
    assert checks_made() == 0


def test_a_second_point_and_other_data_compile_nothing_and_are_not_tested(caplog):
    build = lambda risk, params: hessian(risk, params).mv(params)  # noqa: E731
    build(risk_of(tanh), PARAMS)
    moved, other = jax.tree.map(lambda leaf: 1.5 * leaf, PARAMS), objective(tanh, square_loss, INPUTS + 1.0, TARGETS)
    with jax.log_compiles():
        build(other, moved)
    assert [record.getMessage() for record in caplog.records if "Compiling" in record.getMessage()] == []
    assert checks_made() == 2
