"""Sampled learning coefficients against integrals at the same n and gamma; diagnostics, refusals, resumption."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

import attnlab as al
from attnlab.degeneracy.diagnostics import effective_size, error_of_mean, split_rhat
from attnlab.degeneracy.estimate import LearningCoefficientWarning, at_temperatures
from attnlab.degeneracy.laplace import laplace
from attnlab.degeneracy.posterior import SAMPLERS
from attnlab.degeneracy.probe import learning_coefficient_probe
from attnlab.degeneracy.quadrature import crossing_energy, two_layer_energy
from attnlab.degeneracy.run import DivergedChainError
from attnlab.objectives import batched, objective
from attnlab.risks.degenerate import crossing_risk, deep_linear_risk, turned
from attnlab.runs.session import Session
from nightly import nightly

COUNT = 10_000
SCALE = COUNT / np.log(COUNT)


def linear(weights, inputs):
    return inputs @ weights if jnp.ndim(inputs) else inputs * weights


def regression(key, count=300, width=4, noise=1.0):
    keys = jax.random.split(key, 3)
    inputs = jax.random.normal(keys[0], (count, width))
    targets = inputs @ jnp.ones(width) + noise * jax.random.normal(keys[2], (count,))
    return objective(Partial(linear), al.square_loss, inputs, targets), jnp.linalg.lstsq(inputs, targets)[0]


RISK, BEST = regression(jax.random.key(0))
CROSSING = crossing_risk((1, 1))
measure = partial(al.learning_coefficient, RISK, BEST, jax.random.key(1))


def quiet(*arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LearningCoefficientWarning)
        return al.learning_coefficient(*arguments, **options)


BATCHES = [(name, batch) for name, row in SAMPLERS.items() for batch in (None, 32) if batch is None or not row.adjusted]


@pytest.mark.parametrize("way", nightly(BATCHES, [("hmc", None), ("rmsprop_sgld", 32)]))
def test_a_quadratic_risk_has_the_coefficient_of_its_spectrum(way):
    sampler, batch = way
    found = measure(sampler=sampler, batch=batch)
    expected = laplace(RISK, BEST, 300 * found.inverse_temperature).coefficient
    assert abs(found.value - expected) < 4 * found.summary.sampling
    assert found.summary.sampling < 0.25
    assert found.rhat < 1.2


CASES = {
    "crossing 1, 1": (lambda: crossing_risk((1, 1)), lambda scale: crossing_energy((1, 1), scale)),
    "crossing 1, 2": (lambda: crossing_risk((1, 2)), lambda scale: crossing_energy((1, 2), scale)),
    "crossing 2, 2": (lambda: crossing_risk((2, 2)), lambda scale: crossing_energy((2, 2), scale)),
    "crossing 1, 1, 1": (lambda: crossing_risk((1, 1, 1)), lambda scale: crossing_energy((1, 1, 1), scale)),
    "2 x 2 x 2": (lambda: deep_linear_risk((2, 2, 2)), lambda scale: two_layer_energy(2, 2, 2, scale / 4)),
    "3 x 2 x 4": (lambda: deep_linear_risk((3, 2, 4)), lambda scale: two_layer_energy(3, 4, 2, scale / 12)),
    "4 x 1 x 3": (lambda: deep_linear_risk((4, 1, 3)), lambda scale: two_layer_energy(4, 3, 1, scale / 12)),
}


@pytest.mark.slow
@pytest.mark.parametrize("padding", [None, 4])
@pytest.mark.parametrize("name", CASES)
def test_a_degenerate_minimum_has_the_coefficient_of_the_integral(name, padding, each_key):
    build, energy = CASES[name]
    risk, params = build()
    if padding is not None:
        risk, params = turned(each_key, risk, params, padding)
    found = quiet(risk, params, each_key, count=COUNT, steps=8192)
    assert abs(found.value - energy(SCALE)) < 4 * found.error


@pytest.mark.slow
def test_a_bar_covers_over_forty_seeds():
    """Of 95 % intervals of regression with fresh noise, and of HMC on a crossing, at most 6 of 40 miss."""
    risk, params = CROSSING
    expected = crossing_energy((1, 1), SCALE)
    covered = {"crossing": 0, "regression": 0}
    for seed in range(40):
        low, high = quiet(risk, params, jax.random.key(seed), count=COUNT).estimate.interval()
        covered["crossing"] += bool(low <= expected <= high)
        low, high = quiet(*regression(jax.random.key(seed), 1000), jax.random.key(seed)).estimate.interval()
        covered["regression"] += bool(low <= 2.0 <= high)
    assert min(covered.values()) >= 34, covered


def test_the_bound_says_what_a_baseline_off_the_minimum_loses():
    truth = jnp.ones(4)
    off = measure()
    at_truth = quiet(RISK, truth, jax.random.key(1))
    lost = 300 * off.inverse_temperature * float(RISK(truth) - RISK(BEST))
    assert off.value - at_truth.value == pytest.approx(lost, rel=0.01)  # the same chains
    assert float(at_truth.summary.baseline) == pytest.approx(lost, rel=0.15)
    assert float(off.summary.baseline) < 1e-6


@pytest.mark.slow
def test_the_error_of_the_data_is_that_of_paired_differences():
    """Of regression at least squares E[l_i(w)] - l_i(w*) is x_i^T C x_i, C the covariance of w."""
    found = measure(steps=8192)
    scale, inputs = 300 * found.inverse_temperature, RISK.inputs
    covariance = jnp.linalg.inv(scale * 2 * inputs.T @ inputs / 300 + jnp.eye(4))
    pairs = jnp.einsum("ni,ij,nj->n", inputs, covariance, inputs)
    expected = scale * jnp.std(pairs) / 300**0.5
    # 128 draws of w leave noise in the means, which adds to their spread.
    assert expected < found.summary.data < 3 * expected


@pytest.mark.slow
def test_drift_is_the_derivative_in_the_localization():
    risk, origin = crossing_risk((1,))
    found = quiet(risk, origin, jax.random.key(2), count=100, localization=20.0, steps=8192)
    law = lambda log: crossing_energy((1,), 100 / np.log(100), np.exp(log))  # noqa: E731
    slope = (law(np.log(20.0) + 0.01) - law(np.log(20.0) - 0.01)) / 0.02
    assert found.drift == pytest.approx(slope, rel=0.2)


def test_a_killed_run_goes_on_with_the_same_numbers(tmp_path):
    class Killed(BaseException):
        pass

    def kill(progress):
        if progress.products > progress.total / 2:
            raise Killed

    short = partial(measure, steps=64, sampler="mala")
    with pytest.raises(Killed):
        short(session=Session(tmp_path, report=kill))
    told = []
    resumed, whole = short(session=Session(tmp_path, report=told.append)), short()
    assert told[0].products > told[0].total / 2
    np.testing.assert_array_equal(resumed.summary.losses, whole.summary.losses)
    assert resumed.value == whole.value
    with pytest.raises(ValueError, match="holds another run"):
        short(session=Session(tmp_path), localization=2.0)


def test_temperatures_side_by_side_have_the_coefficients_of_their_spectrum():
    betas = (0.05, 0.2, 1.0)
    found = at_temperatures(RISK, BEST, jax.random.key(1), betas, localization=3.0)
    for one, beta in zip(found, betas, strict=True):
        expected = laplace(RISK, BEST, 300 * beta, 3.0).coefficient
        assert (one.inverse_temperature, one.localization) == (beta, 3.0)
        assert abs(one.value - expected) < 4 * one.summary.sampling
    assert found[0].value < found[2].value
    with pytest.raises(ValueError, match="inverse_temperatures is empty"):
        at_temperatures(RISK, BEST, jax.random.key(1), ())
    with pytest.raises(ValueError, match=r"inverse_temperature is 0\.0; expected"):
        at_temperatures(RISK, BEST, jax.random.key(1), (1.0, 0))


@pytest.mark.slow
def test_single_precision_stays_single():
    risk = RISK.on(lambda leaf: leaf.astype(jnp.float32))
    found = quiet(risk, BEST.astype(jnp.float32), jax.random.key(1), steps=512)
    assert found.summary.losses.dtype == jnp.float32
    assert abs(found.value - laplace(RISK, BEST, 300 * found.inverse_temperature).coefficient) < 5 * found.error


@pytest.mark.slow
def test_weighted_examples_count_as_many_as_weigh_anything():
    weights = jnp.ones(300).at[100:].set(0.0)
    part = RISK.on(lambda leaf: leaf[:100])
    best = jnp.linalg.lstsq(part.inputs, part.targets)[0]
    weighted = objective(RISK.predict, al.square_loss, RISK.inputs, RISK.targets, weights=weights)
    found, expected = (quiet(risk, best, jax.random.key(1), steps=512) for risk in (weighted, part))
    assert found.count == expected.count == 100
    assert found.value == pytest.approx(expected.value)
    assert float(found.summary.data) == pytest.approx(float(expected.summary.data))


def test_it_shows_itself_briefly():
    found = measure(steps=64)
    assert repr(found).startswith("LearningCoefficient(")
    assert len(repr(found)) < 100
    value, error = found.estimate
    assert (value, error) == (found.value, found.error)


@pytest.mark.slow
def test_the_probe_measures_what_the_function_does():
    options = {"steps": 2, "every": 2, "probes": {"llc": learning_coefficient_probe(300, steps=512)}}
    values = al.train(RISK, BEST, optax.sgd(0.1), jax.random.key(0), **options).records.values["llc"]
    expected = laplace(RISK, BEST, 300 / np.log(300)).coefficient
    assert (abs(values["value"] - expected) < 4 * values["error"]).all()


def test_rhat_and_effective_size_of_known_series(each_key):
    noise = jax.random.normal(each_key, (4, 4000))
    assert 0.8 < float(effective_size(noise)) / noise.size < 1.25
    assert float(split_rhat(noise)) < 1.01

    def step(state, kick):
        state = 0.9 * state + kick
        return state, state

    chain = jax.lax.scan(step, jnp.zeros(4), noise.T)[1].T
    assert 0.7 < float(effective_size(chain)) / (noise.size / 19) < 1.4  # (1 - .9) / (1 + .9)
    assert float(error_of_mean(chain)) == pytest.approx(10 / noise.size**0.5, rel=0.5)
    trend = noise + jnp.linspace(0, 3, 4000)[None]
    assert float(split_rhat(trend)) > 1.2
    assert float(split_rhat(jnp.ones((2, 10)))) == 1.0


WARNED = {
    "a point that is no minimum": ({"params": BEST + 1}, "L\\(w\\*\\) is not the least|negative"),
    "a step that nothing accepts": ({"step": 100.0}, "acceptance is 0.0.*the step is too large"),
    "a step that moves nothing": ({"step": 1e-5}, "acceptance is 1.000: the step is too small"),
    "chains that have not met": ({"step": 1e-3, "steps": 64}, "R-hat is .*the chains differ"),
    "a value made by gamma": ({"localization": 100.0}, "a gamma larger by a factor e changes it"),
}


@pytest.mark.parametrize("name", WARNED)
def test_what_is_not_to_be_trusted_is_said(name):
    options, message = WARNED[name]
    params = options.get("params", BEST)
    options = {key: value for key, value in options.items() if key != "params"}
    with pytest.warns(LearningCoefficientWarning, match=message):
        al.learning_coefficient(RISK, params, jax.random.key(1), **options)


REFUSED = {
    "a temperature of zero": ({"inverse_temperature": 0.0}, ValueError, "inverse_temperature is 0.0; expected"),
    "a negative temperature": ({"inverse_temperature": -1.0}, ValueError, "inverse_temperature is -1.0; expected"),
    "a temperature in words": ({"inverse_temperature": "hot"}, TypeError, "inverse_temperature is 'hot'"),
    "no localization": ({"localization": 0.0}, ValueError, "localization is 0.0; expected"),
    "one example": ({"count": 1}, ValueError, "count is 1; expected n of at least 2"),
    "no chains": ({"chains": 0}, ValueError, "chains is 0; expected a positive"),
    "one chain": ({"chains": 1}, ValueError, "chains is 1; expected at least 2"),
    "too few steps": ({"steps": 10}, ValueError, "steps is 10; expected at least 64"),
    "an unknown sampler": ({"sampler": "hcm"}, ValueError, "no sampler 'hcm'.*Did you mean 'hmc'"),
    "minibatches of HMC": ({"batch": 8}, ValueError, "batch is 8 with the sampler 'hmc'"),
    "minibatches above n": ({"batch": 500, "sampler": "sgld"}, ValueError, "batch is 500; expected at most the 300"),
    "minibatches of no examples": (
        {"batch": 8, "sampler": "sgld", "count": 10},
        ValueError,
        "batch is 8, and the risk has weights, ignored labels or no examples",
    ),
    "a step of zero": ({"step": 0.0}, ValueError, "step is 0.0; expected"),
    "a step too large": ({"step": 1e3, "sampler": "sgld"}, DivergedChainError, "is not finite within steps"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    options, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        measure(**options)


def test_a_risk_without_examples_asks_for_their_number():
    risk, origin = deep_linear_risk((3, 2, 2))
    with pytest.raises(TypeError, match="risk is a function; expected an Objective"):
        al.learning_coefficient(lambda params: risk(params), origin, jax.random.key(0))
    scalar = objective(linear, lambda outputs, targets: outputs @ targets, jnp.float64(1.0), jnp.ones(4))
    with pytest.raises(ValueError, match="Of a population risk pass count=n"):
        al.learning_coefficient(scalar, BEST, jax.random.key(0))
    parts = batched(linear, al.square_loss, [(RISK.inputs[:150], RISK.targets[:150])] * 2)
    with pytest.raises(ValueError, match="Pass count=n"):
        al.learning_coefficient(parts, BEST, jax.random.key(0))


def test_the_probe_refuses_too():
    with pytest.raises(ValueError, match="count is 1; expected n"):
        learning_coefficient_probe(1)
    with pytest.raises(ValueError, match=r"localization is 0\.0"):
        learning_coefficient_probe(100, localization=0.0)
