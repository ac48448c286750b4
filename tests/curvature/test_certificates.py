"""Repeated eigenvalues, exhausted spaces, scales and low precision: the kinds that a single Krylov space misses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from attnlab.curvature import (
    CurvatureWarning,
    condition_number,
    eigenpairs,
    frobenius_norm,
    log_determinant,
    solve,
    spectral_density,
    trace,
    xtrace,
)
from attnlab.curvature.operator import Operator
from attnlab.krylov.restarts import MISSED
from compare import assert_close
from nightly import nightly


def scaled(diagonal, vector):
    return diagonal * vector


def diagonal_operator(values, dtype=jnp.float64):
    return Operator(Partial(scaled, jnp.asarray(values, dtype)), jnp.zeros(len(values), dtype))


REPEATED = {
    "tenfold": np.repeat(np.random.default_rng(0).exponential(size=60), 10),
    "cycle": 1 - np.cos(2 * np.pi * np.arange(600) / 600),
    "identity": np.ones(600),
    "zero": np.zeros(600),
    "low_rank": np.r_[np.ones(5), 2.0, 2.0, np.zeros(593)],
    "two_ends": np.r_[np.full(5, -3.0), np.linspace(-1, 1, 590), np.full(5, 3.0)],
}


@pytest.mark.parametrize("dtype", [jnp.float64, pytest.param(jnp.float32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("which", nightly(("high", "both"), ("both",)))
@pytest.mark.parametrize("name", REPEATED)
def test_all_copies_of_repeated_eigenvalues_are_found(name, which, dtype):
    if name == "cycle" and dtype == jnp.float32:
        pytest.skip("its doubles differ by less than the tolerance")
    values, count = np.sort(REPEATED[name]), 5
    pairs = eigenpairs(diagonal_operator(values, dtype), jax.random.key(1), count, which=which)
    expected = np.r_[values[:count] if which == "both" else [], values[-count:]]
    scale = max(np.abs(values).max(), 1e-30)
    found, vectors = (np.asarray(part, float) for part in (pairs.values, pairs.vectors))
    assert np.max(np.abs(found - expected)) <= 2 * jnp.finfo(dtype).eps ** 0.5 * scale
    assert_close(vectors @ vectors.T, np.eye(len(expected)), 1e3 * float(jnp.finfo(dtype).eps))
    assert_close(pairs.missed, MISSED, 1e-6)


def test_nothing_is_missing_over_many_seeds():
    """The bound is 0.001: of 100 seeds at most two may miss with a probability above 0.0002."""
    values = np.sort(np.r_[np.linspace(0, 0.9, 594), 0.95, 1.0, 1.0, 1.0, 1.2, 1.2])
    operator = diagonal_operator(values)
    found = [eigenpairs(operator, jax.random.key(seed), 6, tolerance=1e-4).values for seed in range(100)]
    wrong = [np.max(np.abs(values[-6:] - row)) > 3e-4 for row in np.asarray(found)]
    assert np.sum(wrong) <= 2


@pytest.mark.parametrize("damping", nightly((1.0, 1e-3, 1e-6), (1e-3,)))
def test_log_determinants_of_low_rank_lie_in_their_intervals(damping):
    random = np.random.default_rng(0)
    factor = random.standard_normal((120, 5))
    matrix = factor @ factor.T
    operator = Operator(Partial(jnp.dot, jnp.asarray(matrix)), jnp.zeros(120))
    _, exact = np.linalg.slogdet(matrix + damping * np.eye(120))
    inside = []
    for seed in range(40):
        found = log_determinant(operator, jax.random.key(seed), damping=damping)
        low, high = found.interval(0.99)
        assert found.bound <= 1e-6 * abs(exact)
        inside.append(low <= exact <= high)
    assert np.mean(inside) >= 0.9
    jitted = jax.jit(lambda operator: log_determinant(operator, jax.random.key(3), damping=damping))(operator)
    assert_close(jitted.value, log_determinant(operator, jax.random.key(3), damping=damping).value, 1e-8)


@pytest.mark.parametrize("steps", [1, None])
def test_operators_that_vanish(steps):
    zero, key = diagonal_operator(np.zeros(30)), jax.random.key(0)
    assert log_determinant(zero, key, damping=2.0, steps=steps, samples=3).value == pytest.approx(30 * np.log(2.0))
    share = spectral_density(zero, key, samples=3, steps=steps).negative_share()
    assert (share.value, share.standard_error) == (0, 0)
    assert condition_number(zero, key, damping=1.0).value == 1
    assert trace(zero, key).value == xtrace(zero, key).value == frobenius_norm(zero, key).value == 0


SPECTRUM = np.r_[np.linspace(0.5, 1, 596), 2.0, 3.0, 4.0, 5.0]
MEASURES = {
    "trace": lambda operator, key: trace(operator, key).value,
    "trace_error": lambda operator, key: xtrace(operator, key).standard_error,
    "xtrace": lambda operator, key: xtrace(operator, key).value,
    "norm": lambda operator, key: frobenius_norm(operator, key).value,
    "eigenpairs": lambda operator, key: eigenpairs(operator, key, 3, which="both").values,
    "mean": lambda operator, key: spectral_density(operator, key, samples=3).moment(1).value,
    "nodes": lambda operator, key: jnp.max(spectral_density(operator, key, samples=3).nodes, axis=1),
}


@pytest.mark.parametrize("scale", nightly((1e-30, 1e-20, 1e-12, 1e12, 1e20, 1e30), (1e-30, 1e30)))
@pytest.mark.parametrize("name", MEASURES)
def test_numbers_scale_with_the_operator_in_float32(name, scale):
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((600, 600)))[0]
    matrix, key = (basis * SPECTRUM) @ basis.T, jax.random.key(1)
    measure = jax.jit(MEASURES[name])

    def at(scale):
        return measure(Operator(Partial(jnp.dot, jnp.asarray(scale * matrix, jnp.float32)), jnp.zeros(600, "f4")), key)

    assert_close(np.asarray(at(scale), np.float64) / scale, np.asarray(at(1.0), np.float64), 2e-3)


@pytest.mark.parametrize("scale", nightly((1e-25, 1e-12, 1e12, 1e25), (1e12,)))
def test_solutions_and_condition_numbers_do_not_see_the_scale(scale):
    operator = diagonal_operator(scale * SPECTRUM, jnp.float32)
    target = jnp.asarray(scale * SPECTRUM, jnp.float32)
    solution = solve(operator, target)
    assert_close(np.asarray(solution.vector, np.float64), np.ones(600), 1e-4)
    assert_close(condition_number(operator, jax.random.key(1)).value, np.float32(10.0), 1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("n", nightly((60, 600), (60,)))
def test_low_precision_is_right_to_its_precision(n, dtype):
    values = np.asarray(jnp.asarray(np.r_[np.linspace(0.5, 1, n - 2), 2.0, 4.0], dtype), np.float64)
    operator, key, epsilon = diagonal_operator(values, dtype), jax.random.key(1), float(jnp.finfo(dtype).eps)
    with pytest.warns(CurvatureWarning, match="products are rounded"):
        pairs = eigenpairs(operator, key, 2)
    assert_close(pairs.values, np.array([2.0, 4.0], np.float32), epsilon)
    assert_close(trace(operator, key).value, np.float32(values.sum()), epsilon)
    moment = spectral_density(operator, key, samples=3).moment(2).value
    assert_close(moment, np.float32(np.mean(values**2)), 4 * epsilon)
    assert (
        solve(operator, operator.unravel(jnp.asarray(values, jnp.float32)), tolerance=epsilon).residual <= 2 * epsilon
    )


SPIKE = np.r_[np.full(199, 1e-3), 1.0]


@pytest.mark.parametrize(("name", "least", "values"), [("spike", 0.8, SPIKE), ("bulk", 0.89, np.linspace(-1, 2, 200))])
def test_intervals_of_the_trace_cover(name, least, values):
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((200, 200)))[0]
    operator = Operator(Partial(jnp.dot, jnp.asarray((basis * values) @ basis.T)), jnp.zeros(200))
    for estimator, options in ((trace, {"samples": 10}), (xtrace, {"products": 48})):
        found = [estimator(operator, jax.random.key(seed), **options).interval() for seed in range(80)]
        covered = np.mean([low <= values.sum() <= high for low, high in found])
        assert covered >= least - 3 * (0.1 * 0.9 / 80) ** 0.5
    # Most of the spike is in the space of XTrace: its error is far below the spike.
    assert name != "spike" or abs(xtrace(operator, jax.random.key(0)).value - values.sum()) <= 1e-3


BAD = {
    "an old key": (TypeError, "key is an array of jax.random.PRNGKey", lambda o: trace(o, jax.random.PRNGKey(0))),
    "an integer key": (TypeError, "key is 0, a int", lambda o: spectral_density(o, 0)),
    "a float count": (TypeError, r"count is 2\.0, a float", lambda o: eigenpairs(o, jax.random.key(0), 2.0)),
    "no sample": (ValueError, "samples is 0", lambda o: trace(o, jax.random.key(0), samples=0)),
    "a float of steps": (TypeError, r"steps is 4\.5", lambda o: spectral_density(o, jax.random.key(0), steps=4.5)),
    "a wrong end": (ValueError, "end of the spectrum 'top'", lambda o: eigenpairs(o, jax.random.key(0), which="top")),
    "damping": (ValueError, "damping is nan", lambda o: log_determinant(o, jax.random.key(0), damping=float("nan"))),
    "tolerance": (ValueError, "tolerance is nan", lambda o: eigenpairs(o, jax.random.key(0), tolerance=float("nan"))),
    "a string": (TypeError, "tolerance is 'low'", lambda o: eigenpairs(o, jax.random.key(0), tolerance="low")),
    "a matrix": (TypeError, "operator is a ndarray", lambda o: eigenpairs(np.eye(3), jax.random.key(0))),
    "odd products": (ValueError, "products is 5", lambda o: xtrace(o, jax.random.key(0), products=5)),
}


@pytest.mark.parametrize("name", BAD)
def test_arguments_that_are_none_are_named(name):
    kind, message, call = BAD[name]
    with pytest.raises(kind, match=message):
        call(diagonal_operator(np.linspace(0, 1, 20)))
