"""The regularization path against a general constrained solver, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from margin_cases import random_tokens

from attnlab.margin import attention_problem, attention_risk, max_margin, regularization_path
from compare import assert_close


def case(seed=3):
    """A risk, its best tokens (which can win) and the solution's direction; labels of both signs."""
    tokens, queries, _ = random_tokens(4, 5, 8, seed)
    readout = np.random.default_rng(seed).normal(size=8)
    labels = np.array([1.0, -1.0, 1.0, -1.0])
    best = (labels[:, None] * (tokens @ readout)).argmax(1)
    risk = attention_risk(
        jnp.asarray(tokens), jnp.asarray(labels), queries=jnp.asarray(queries), readout=jnp.asarray(readout)
    )
    return risk, jnp.asarray(best), max_margin(attention_problem(tokens, queries, best))


def test_minimisers_agree_with_constrained_minimisation_of_the_plain_loss():
    risk, best, solution = case()
    radius = 3.0 / solution.margin
    path = regularization_path(risk, best, {"query_key": jnp.asarray(solution.direction)}, np.array([radius]))
    slopes = jax.jit(jax.value_and_grad(lambda w: risk({"query_key": w.reshape(8, 8)})))
    oracle = scipy.optimize.minimize(
        lambda w: tuple(map(np.asarray, slopes(jnp.asarray(w)))),
        radius * solution.direction.ravel(),
        jac=True,
        constraints={"type": "ineq", "fun": lambda w: radius**2 - w @ w, "jac": lambda w: -2 * w},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    found = path.params["query_key"][0]
    assert_close(jnp.linalg.norm(found), radius, 1e-12)
    assert_close(found.ravel(), oracle.x, 1e-5)
    assert path.slope[0] < 0
    values = np.asarray(risk.inputs["tokens"] @ risk.inputs["readout"])[np.arange(4), best]
    limit = np.mean(np.log1p(np.exp(-np.asarray(risk.targets) * values)))
    assert_close(np.exp(path.log_excess[0]), float(risk({"query_key": found})) - limit, 1e-10)


def test_path_goes_far_beyond_where_the_loss_is_exact():
    risk, best, solution = case()
    radii = np.array([20.0, 200.0, 2000.0]) / solution.margin
    path = regularization_path(risk, best, {"query_key": jnp.asarray(solution.direction)}, radii)
    angles = 1 - np.einsum("rde,de->r", path.params["query_key"], solution.direction) / radii
    assert angles[2] < 1e-6
    assert angles[2] < 0.05 * angles[1]
    assert_close(path.slope[2], -solution.margin, 1e-3)
    assert path.log_excess[2] < -1900


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"radii": np.array([1.0, 1.0])}, "expected positive numbers, one larger than the other"),
        ({"radii": np.array([0.0, 1.0])}, "expected positive numbers"),
        ({"start": {"query_key": jnp.zeros((8, 8))}}, "start is 0, which has no direction"),
        ({"selection": jnp.array([0, 0, 0, 0])}, "expected the best token of every sequence"),
    ],
)
def test_refusals(change, message):
    risk, best, solution = case()
    arguments = {"selection": best, "start": {"query_key": jnp.asarray(solution.direction)}, "radii": np.array([9.0])}
    with pytest.raises(ValueError, match=message):
        regularization_path(risk, **{**arguments, **change})
