"""Probes find what they are shown, and their nulls do not."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.icl.baselines import baseline
from attnlab.icl.constructions import gradient_descent_stack, plus_plus_stack
from attnlab.icl.diagnostics import (
    against_nulls,
    alignment,
    copying,
    estimate,
    interpolate,
    iterated,
    noisy_risks,
    predictions,
    residual_cosine,
    risk,
    scaled_risks,
    shuffled,
    with_nulls,
)
from attnlab.icl.identification import best_family, fitted_residual, identify, identify_shuffled
from attnlab.icl.models import attention_layer, init_layer, stack_predict
from attnlab.icl.tasks import add_noise, isotropic, sample_prompts
from compare import assert_close

DIMENSION, LENGTH, BATCH = 4, 10, 256
IDENTITY = jnp.eye(DIMENSION)[None]
STEP = gradient_descent_stack(0.5 * IDENTITY)
ONE_STEP = partial(stack_predict, STEP)
ALGORITHM = baseline("gradient_descent", steps=1, step_size=0.5)


def prompts_of(seed, batch=BATCH, length=LENGTH):
    return sample_prompts(jax.random.key(seed), isotropic(DIMENSION, 0.1), length, batch)


def untrained(seed):
    return partial(stack_predict, [init_layer(jax.random.key(seed), DIMENSION + 1, 0.5)])


def test_alignment_of_the_construction_is_exact():
    found = alignment(ONE_STEP, ALGORITHM, prompts_of(1))
    assert found.prediction_difference.value < 1e-13
    assert found.sensitivity_difference.value < 1e-13
    assert_close(found.sensitivity_cosine.value, jnp.ones(()), 1e-13)


@pytest.mark.parametrize(
    ("measure", "read"),
    [
        pytest.param(alignment, lambda found: found.sensitivity_cosine, marks=pytest.mark.slow),
        (residual_cosine, lambda found: found),
    ],
    ids=["alignment", "residual_cosine"],
)
def test_nulls_score_below_the_model(measure, read):
    found = with_nulls(measure, ONE_STEP, untrained(7), ALGORITHM, prompts_of(2, length=5), jax.random.key(0))
    assert read(found.model).value > 1 - 1e-12
    for null in (read(found.untrained), read(found.shuffled)):
        assert null.value + 5 * null.standard_error < 0.95


def test_shuffled_labels_leave_no_sensitivity():
    found = with_nulls(alignment, ONE_STEP, untrained(7), ALGORITHM, prompts_of(3), jax.random.key(1))
    assert abs(found.shuffled.sensitivity_cosine.value) < 0.2


LEARNERS = {
    "gradient_descent": baseline("gradient_descent", steps=2, step_size=0.4),
    "gradient_descent_plus_plus": partial(
        stack_predict,
        plus_plus_stack(jnp.array([0.4, 0.5])[:, None, None] * IDENTITY, 0.3 * jnp.ones((2, 1, 1)) * IDENTITY),
    ),
    "newton": baseline("newton", steps=2, scale=0.05),
    "ridge": baseline("ridge", penalty=3.0),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_identification_names_the_algorithm(name):
    fits = identify(LEARNERS[name], prompts_of(4), 2, jax.random.key(0))
    assert best_family(fits) == name
    assert fits[name].held_out_error.value < 1e-10
    others = [fit.held_out_error.value for other, fit in fits.items() if other != name and "descent" not in other]
    assert all(error > 1e-4 for error in others)


def test_identified_parameters_are_the_algorithms_own():
    fit = identify(LEARNERS["newton"], prompts_of(5), 2, jax.random.key(0))["newton"]
    assert_close(fit.parameters, jnp.array([0.05]), 1e-6)
    eigenvalues = jnp.linspace(0.1, 2.0, 5)
    assert_close(fitted_residual(fit, "newton", eigenvalues, 2), (1 - 0.05 * eigenvalues**2) ** 4, 1e-6)


def test_identification_nulls():
    prompts = prompts_of(6)
    shuffled = identify_shuffled(LEARNERS["newton"], prompts, 2, jax.random.key(0))
    assert all(fit.held_out_error.value > 0.7 for fit in shuffled.values())
    fits = identify(untrained(3), prompts, 1, jax.random.key(0))
    assert all(fit.held_out_error.value > 0.05 for fit in fits.values())


@pytest.mark.parametrize(
    "measure",
    [
        lambda model: risk(model, prompts_of(11, 512)),
        lambda model: jax.tree.map(lambda x: x[1], scaled_risks(model, prompts_of(11, 512), [0.5, 1.0])),
        lambda model: jax.tree.map(lambda x: x[0], noisy_risks(model, prompts_of(11, 512), [0.2], jax.random.key(1))),
        pytest.param(
            lambda model: identify(model, prompts_of(11, 512), 1, jax.random.key(0))["gradient_descent"].held_out_error,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["risk", "scaled_risks", "noisy_risks", "identify"],
)
def test_any_probe_has_both_nulls(measure):
    found = against_nulls(measure, ONE_STEP, untrained(7), jax.random.key(3))
    for null in (found.untrained, found.shuffled):
        apart = null.value - found.model.value
        assert apart > 3 * (null.standard_error + found.model.standard_error)


# A trained model and its untrained twin, made from the weights of a stack: one probe looks at both.
REBUILT = {
    "iterated": lambda stack: iterated(partial(attention_layer, stack[0]), 2),
    "interpolated": lambda stack: partial(stack_predict, interpolate(stack, STEP, 0.5)),
}


@pytest.mark.parametrize("name", REBUILT)
def test_rebuilt_models_have_both_nulls(name):
    """A layer applied twice, and weights halfway to the construction: the risk against both nulls."""
    trained, start = gradient_descent_stack(0.3 * IDENTITY), [init_layer(jax.random.key(7), DIMENSION + 1, 0.1)]
    model, twin = map(REBUILT[name], (trained, start))
    found = against_nulls(lambda model: risk(model, prompts_of(11, 512)), model, twin, jax.random.key(3))
    for null in (found.untrained, found.shuffled):
        apart = null.value - found.model.value
        assert apart > 3 * (null.standard_error + found.model.standard_error)


def test_interpolated_weights_take_the_step_between():
    with pytest.raises(ValueError, match=r"fraction is 1\.5"):
        interpolate(STEP, STEP, 1.5)
    first, second = (gradient_descent_stack(size * IDENTITY) for size in (0.3, 0.5))
    found = predictions(partial(stack_predict, interpolate(first, second, 0.25)), prompts_of(15))
    expected = predictions(baseline("gradient_descent", steps=1, step_size=0.35), prompts_of(15))
    assert_close(found, expected, 1e-12)


def test_shuffled_models_see_every_label_once():
    prompts = prompts_of(12, 4)
    seen = jax.vmap(shuffled(lambda prompt: prompt.labels, jax.random.key(5)))(prompts)
    assert_close(jnp.sort(seen, axis=1), jnp.sort(prompts.labels, axis=1), 1e-15)
    assert not jnp.allclose(seen, prompts.labels)


def test_noise_adds_its_share_to_the_risk():
    """One step of size s on labels with noise v: s^2 v |x_q^T X^T / N|^2 more, its mean s^2 v d / N."""
    prompts, variances = prompts_of(13, 4096), [0.0, 1.0, 4.0]
    found = noisy_risks(ONE_STEP, prompts, variances, jax.random.key(2))
    unit = 0.25 * DIMENSION / LENGTH / jnp.mean(prompts.target**2)
    added = (found.value - found.value[0]) / unit
    assert jnp.all(jnp.abs(added - jnp.array(variances)) < 4.5 * found.standard_error / unit)
    assert found.value[2] > found.value[1] > found.value[0]
    with pytest.raises(ValueError, match=r"noise_variance is -1\.0"):
        add_noise(jax.random.key(0), prompts, -1.0)


def test_linear_algorithms_do_not_notice_the_scale_of_tasks():
    relative = scaled_risks(ONE_STEP, prompts_of(8), [0.5, 1.0, 4.0], "tasks").value
    assert_close(relative, jnp.full(3, relative[1]), 1e-12)
    by_input = scaled_risks(ONE_STEP, prompts_of(8), [1.0, 3.0], "inputs").value
    assert by_input[1] > 5 * by_input[0]  # a step of fixed size diverges
    with pytest.raises(ValueError, match="expected one of: inputs, tasks"):
        scaled_risks(ONE_STEP, prompts_of(8), [1.0], "task")


def test_iterating_the_layer_goes_on_descending():
    layer = partial(attention_layer, STEP[0])
    prompts = prompts_of(9)
    expected = predictions(baseline("gradient_descent", steps=3, step_size=0.5), prompts)
    assert_close(predictions(iterated(layer, 3), prompts), expected, 1e-12)


def test_copying_tells_a_shift_from_a_map():
    tokens = jax.random.normal(jax.random.key(0), (64, 9, 3))
    matrix = jax.random.normal(jax.random.key(1), (3, 3))

    def shift(z):
        return z + jnp.roll(z, 1, axis=0) @ matrix

    def own(z):
        return z + z @ matrix

    assert copying(shift, tokens).value > 0.9
    assert copying(own, tokens).value < -0.9


def test_copying_of_shuffled_labels_scores_nothing():
    """Tokens x_1, y_1, x_2, ...: a layer that copies each label one place on, and the same layer shown other labels."""
    prompts = prompts_of(14, 64)
    pairs = jnp.stack([jnp.pad(prompts.inputs, ((0, 0), (0, 0), (0, 1))), jnp.zeros((64, LENGTH, DIMENSION + 1))], 2)
    tokens = pairs.at[:, :, 1, -1].set(prompts.labels).reshape(64, 2 * LENGTH, DIMENSION + 1)
    only_label = jnp.diag(jnp.eye(DIMENSION + 1)[-1])

    def copied(z):
        return jnp.roll(z, 1, axis=0) @ only_label

    def reordered(z):
        return z.at[1::2].set(z[1::2][::-1])

    assert copying(lambda z: z + copied(z), tokens).value > 0.9
    assert abs(copying(lambda z: z + copied(reordered(z)), tokens).value) < 0.1


def test_copying_of_untrained_layers_is_below_zero():
    """The null: what attention adds at random is a map of the token's own query."""
    tokens = jax.random.normal(jax.random.key(2), (64, 9, 3))
    score = jax.jit(lambda layer: copying(partial(attention_layer, layer), tokens))
    for seed in range(8):
        found = score(init_layer(jax.random.key(seed), 3, 0.5))
        assert -1 < found.value < -3 * found.standard_error


def test_risk_covers_the_exact_one():
    exact = 1.0 * DIMENSION
    found = risk(lambda prompt: 0.0 * prompt.target, prompts_of(10, 4096))
    assert abs(found.value - exact) < 5 * found.standard_error
    assert np.isinf(estimate(jnp.ones((1,))).standard_error)


def test_models_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"output of shape \(1,\) for one prompt; expected one number"):
        predictions(lambda prompt: prompt.query[:1], prompts_of(1))
    with pytest.raises(ValueError, match="expected at least 32"):
        identify(ONE_STEP, prompts_of(1, 16), 2, jax.random.key(0))
