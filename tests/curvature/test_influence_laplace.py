"""Influence against the derivative of a refitted model, Laplace's method against Gaussian conditioning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import attnlab as al
from attnlab.curvature import matrix_operator
from attnlab.curvature.influence import influence
from attnlab.curvature.kronecker import kronecker_approximation, preconditioned_solve
from attnlab.curvature.laplace import laplace_evidence, laplace_variance
from attnlab.risks.networks import clusters
from nightly import nightly

KEYS = jax.random.split(jax.random.key(0), 5)
INPUTS, TARGETS = jax.random.normal(KEYS[0], (9, 3)), jax.random.normal(KEYS[1], (9, 2))
ELSEWHERE, WANTED = jax.random.normal(KEYS[2], (4, 3)), jax.random.normal(KEYS[3], (4, 2))
RIDGE = 0.3


def predict(params, inputs):
    return inputs @ params["w"]


def fitted(weights):
    """The minimum of the weighted mean of squares over both outputs, plus the ridge."""
    shares = weights / jnp.sum(weights)
    normal = INPUTS.T @ (shares[:, None] * INPUTS) + RIDGE * jnp.eye(3)
    return jnp.linalg.solve(normal, INPUTS.T @ (shares[:, None] * TARGETS))


def test_influence_is_the_derivative_of_the_refitted_loss_in_the_weight():
    weights = jnp.array([1.0, 2.0, 0.5, 1.0, 1.0, 3.0, 1.0, 1.0, 0.2])
    test = al.objective(predict, al.square_loss, ELSEWHERE, WANTED)
    slopes = jax.grad(lambda weights: test({"w": fitted(weights)}))(weights)
    risk = al.objective(predict, al.square_loss, INPUTS, TARGETS, weights=weights)
    params = {"w": fitted(weights)}
    for operator in (al.hessian(risk, params), al.ggn(risk, params)):
        found = influence(risk, params, test, operator, damping=RIDGE, tolerance=1e-12)
        shares = weights / jnp.sum(weights)
        np.testing.assert_allclose(found.changes * (1 - shares), -weights * slopes, rtol=1e-7)
        assert found.residual < 1e-9


RISK, PARAMS = clusters(jax.random.key(0), 3, count=30, width=4, hidden=(5,))


@pytest.mark.slow
@pytest.mark.parametrize("block", nightly((None, "layer_1"), (None,)))
def test_a_preconditioner_changes_the_products_and_not_the_answer(block):
    test = al.objective(RISK.predict, al.cross_entropy, RISK.inputs[:4], RISK.targets[:4])
    operator = al.ggn(RISK, PARAMS, block=block)
    near = kronecker_approximation("ekfac", RISK, PARAMS, block=block)
    plain = influence(RISK, PARAMS, test, operator, damping=1e-3, tolerance=1e-10)
    found = influence(RISK, PARAMS, test, operator, damping=1e-3, preconditioner=near, tolerance=1e-10)
    np.testing.assert_allclose(found.changes, plain.changes, rtol=1e-6, atol=1e-9)
    assert found.products < plain.products


def test_influence_refuses_what_does_not_fit():
    test = al.objective(RISK.predict, al.cross_entropy, RISK.inputs[:4], RISK.targets[:4])
    operator = al.ggn(RISK, PARAMS)
    part = kronecker_approximation("kfac", RISK, PARAMS, block="layer_0")
    with pytest.raises(ValueError, match="the preconditioner's point has the structure"):
        influence(RISK, PARAMS, test, operator, damping=0.1, preconditioner=part)
    with pytest.raises(ValueError, match=r"solved to a residual of .* at damping 0\.0.*Raise the damping"):
        few = al.objective(RISK.predict, al.cross_entropy, RISK.inputs[5:8], RISK.targets[5:8])
        influence(few, PARAMS, test, al.ggn(few, PARAMS), damping=0.0)
    with pytest.raises(ValueError, match=r"acts on 'other' of shape \(2,\), and params have None there"):
        influence(RISK, PARAMS, test, matrix_operator(jnp.eye(2), {"other": jnp.zeros(2)}), damping=0.1)
    one = al.objective(RISK.predict, al.cross_entropy, RISK.inputs[:1], RISK.targets[:1])
    with pytest.raises(ValueError, match="an example has all of the weight"):
        influence(one, PARAMS, test, al.ggn(one, PARAMS), damping=0.1)
    whole = kronecker_approximation("kfac", RISK, PARAMS)
    with pytest.raises(ValueError, match="it is singular"):
        preconditioned_solve(operator, PARAMS, whole, damping=0.0)


def linear_evidence(inputs, targets, alpha, variance):
    covariance = variance * np.eye(len(inputs)) + inputs @ inputs.T / alpha
    return sum(scipy.stats.multivariate_normal(cov=covariance).logpdf(column) for column in np.asarray(targets).T)


def posterior(inputs, alpha, variance):
    return np.linalg.inv(inputs.T @ inputs / variance + alpha * np.eye(inputs.shape[1]))


ALPHA, VARIANCE = 0.7, 0.4


def test_evidence_and_variance_of_a_linear_model_are_exact():
    covariance = posterior(np.asarray(INPUTS), ALPHA, VARIANCE)
    params = {"w": jnp.asarray(covariance @ np.asarray(INPUTS).T @ np.asarray(TARGETS) / VARIANCE)}
    risk = al.objective(predict, al.square_loss, INPUTS, TARGETS)
    options = {"prior_precision": ALPHA, "noise_variance": VARIANCE}
    found = laplace_evidence(risk, params, **options)
    assert float(found.value) == pytest.approx(linear_evidence(INPUTS, TARGETS, ALPHA, VARIANCE), rel=1e-12)
    assert float(found.standard_error) == 0
    variance = laplace_variance(risk, params, ELSEWHERE, **options)
    wanted = np.einsum("ni,ij,nj->n", ELSEWHERE, covariance, ELSEWHERE)
    np.testing.assert_allclose(variance.value, np.stack([wanted, wanted], axis=1), rtol=1e-12)


def test_beyond_the_dense_limit_both_are_within_their_errors(monkeypatch):
    params = {"w": jnp.zeros((3, 2))}
    risk = al.objective(predict, al.square_loss, INPUTS, TARGETS)
    options = {"prior_precision": ALPHA, "noise_variance": VARIANCE}
    exact, variance = laplace_evidence(risk, params, **options), laplace_variance(risk, params, ELSEWHERE, **options)
    monkeypatch.setattr("attnlab.curvature.laplace.DENSE_DIMENSION", 1)
    with pytest.raises(ValueError, match="key is missing; 6 parameters are more than 1"):
        laplace_evidence(risk, params, **options)
    for seed in range(3):
        found = laplace_evidence(risk, params, **options, key=jax.random.key(seed), samples=20)
        assert abs(found.value - exact.value) <= 4 * found.error + 1e-9
        assert found.samples == 20
    sampled = laplace_variance(risk, params, ELSEWHERE, **options)
    assert np.all(np.abs(sampled.value - variance.value) <= sampled.bound + 1e-12)
    assert np.max(sampled.bound) < 1e-3


@pytest.mark.slow
def test_evidence_of_classes_is_laplace_s_method_on_the_posterior():
    labels = jnp.array([0, 1, 1, 0, 1, 0, 0, 1, 1])
    risk = al.objective(lambda w, x: jnp.stack([x @ w, jnp.zeros(len(x))], axis=-1), al.cross_entropy, INPUTS, labels)
    log_posterior = lambda w: -9 * risk(w) - ALPHA * jnp.sum(w**2) / 2  # noqa: E731
    mode = jnp.zeros(3)
    for _ in range(20):
        mode = mode - jnp.linalg.solve(jax.hessian(log_posterior)(mode), jax.grad(log_posterior)(mode))
    curvature = -jax.hessian(log_posterior)(mode)
    wanted = log_posterior(mode) + 1.5 * jnp.log(ALPHA) - jnp.linalg.slogdet(curvature)[1] / 2
    assert float(laplace_evidence(risk, mode, prior_precision=ALPHA).value) == pytest.approx(float(wanted), rel=1e-12)
    with pytest.raises(ValueError, match=r"noise_variance is 1\.0; the cross-entropy has no noise"):
        laplace_evidence(risk, mode, prior_precision=ALPHA, noise_variance=1.0)


def test_bad_arguments_of_laplace_are_named():
    risk = al.objective(predict, al.square_loss, INPUTS, TARGETS)
    params = {"w": jnp.zeros((3, 2))}
    with pytest.raises(ValueError, match="prior_precision is 0; expected a positive number"):
        laplace_evidence(risk, params, prior_precision=0, noise_variance=1.0)
    with pytest.raises(ValueError, match="noise_variance is missing"):
        laplace_variance(risk, params, ELSEWHERE, prior_precision=1.0)
    custom = al.objective(predict, lambda outputs, targets: jnp.mean(outputs), INPUTS, TARGETS)
    with pytest.raises(TypeError, match="the evidence needs a negative log-likelihood"):
        laplace_evidence(custom, params, prior_precision=1.0)
