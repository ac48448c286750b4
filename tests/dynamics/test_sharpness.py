"""Tracked eigenvalues against dense spectra, thresholds against the spectral radius of the optimizers' own steps."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
from jax.tree_util import Partial

import oracles
from attnlab.curvature.operator import Operator
from attnlab.dynamics.rules import preconditioner_after_step, update_rule
from attnlab.dynamics.sharpness import (
    Tracking,
    block_norms,
    block_sharpness,
    fastest_batching,
    stability,
    top_eigenvalues,
)
from attnlab.krylov.tracking import (
    DOUBT,
    Course,
    TopPairs,
    cold_top_pairs,
    followed_top_pairs,
    upper_bound,
    warm_top_pairs,
)
from attnlab.objectives import objective
from attnlab.training import Probe, TrainingState, probe, train
from attnlab.trees import block_slices, leaf_names
from cases import CASES
from compare import assert_close
from nightly import nightly
from update_rules import LINEAR, dense_of, rule_of


def symmetric(eigenvalues, key):
    n = len(eigenvalues)
    basis, _ = np.linalg.qr(jax.random.normal(key, (n, n)))
    return jnp.asarray((basis * eigenvalues) @ basis.T)


SPECTRUM = np.r_[-4.0, np.linspace(-1, 1, 117), 5.0, 6.0]


@jax.jit
def warm(matrix, start):
    return warm_top_pairs(lambda vector: matrix @ vector, start)


@jax.jit(static_argnames=("certified", "batched"))
def follow_on(matrix, course, accuracy, certified=1, batched=False):
    """The pairs after one measurement, and the course from there: one program a shape, for all tests."""
    options = {"accuracy": accuracy, "certified": certified, "batched": batched, "rounds": 30}
    return followed_top_pairs(lambda: lambda vector: matrix @ vector, course, jax.random.key(0), **options)


def follow(matrix, start, accuracy, certified=1, batched=False):
    return follow_on(matrix, Course(start, start), accuracy, certified, batched)[0]


def check_certificates(pairs, matrix):
    exact = np.linalg.eigvalsh(matrix)
    distance = np.abs(exact[None, :] - np.asarray(pairs.values)[:, None]).min(axis=1)
    assert np.all(distance <= pairs.residuals)
    assert np.all(pairs.values <= exact[-len(distance) :] + 1e-12)
    assert_close(pairs.vectors @ pairs.vectors.T, np.eye(len(distance)), 1e-12)
    true = jnp.linalg.norm(pairs.vectors @ matrix - pairs.values[:, None] * pairs.vectors, axis=1)
    assert_close(pairs.residuals, true, 1e-9)
    return np.abs(pairs.values / exact[-len(distance) :] - 1)


@pytest.mark.slow
def test_one_round_after_a_small_move_is_accurate_and_certified(key):
    matrix = symmetric(SPECTRUM, key)
    cold = jax.jit(lambda m: cold_top_pairs(lambda v: m @ v, 120, 2, key, m.dtype))(matrix)
    assert_close(cold.values, SPECTRUM[-2:], 1e-6)
    moved = matrix + 1e-2 * symmetric(SPECTRUM[::-1], jax.random.fold_in(key, 1))
    assert check_certificates(warm(moved, cold.vectors), moved).max() <= 1e-5


@pytest.mark.parametrize(
    ("certified", "batched"),
    [(1, False), (2, True), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, True), (2, False)))],
)
@pytest.mark.parametrize("accuracy", [1e-2, 1e-4])
@pytest.mark.parametrize("move", nightly((1e-2, 0.5), (0.5,)))
def test_followed_pairs_are_as_accurate_as_asked_and_certified(move, accuracy, certified, batched, key):
    _, vectors = np.linalg.eigh(symmetric(SPECTRUM, key))
    moved = symmetric(SPECTRUM, key) + move * symmetric(SPECTRUM[::-1], jax.random.fold_in(key, 1))
    pairs = follow(moved, jnp.asarray(vectors[:, -3:].T), accuracy, certified, batched)
    assert check_certificates(pairs, moved)[-certified:].max() <= accuracy


def test_a_good_start_costs_one_product_a_pair_and_a_bad_one_more(key):
    """Counted where the product is called; one linearisation serves until rounds are needed."""
    matrix, calls = symmetric(SPECTRUM, key), []

    def product(vector):
        jax.debug.callback(lambda: calls.append("product"))
        return matrix @ vector

    _, vectors = np.linalg.eigh(matrix)
    start = {"good": jnp.asarray(vectors[:, -2:].T), "bad": jnp.asarray(np.linalg.qr(vectors[:, :2] + 0.1)[0].T)}
    measured = jax.jit(lambda v: followed_top_pairs(lambda: product, Course(v, v), key, accuracy=1e-12)[0])
    for name, counts in (("good", [2]), ("bad", range(4, 23, 2))):
        calls.clear()
        jax.block_until_ready(measured(start[name]))
        jax.effects_barrier()
        assert len(calls) in counts


@pytest.mark.parametrize("speed", [0.02, -0.1])
def test_the_course_leads_a_turning_eigenvector(speed):
    """Two eigenvectors that turn steadily: at no more than one product a pair, the error falls far below what the last
    vectors would give, (3 - 2) sin^2(angle turned)."""
    base, course = np.r_[np.linspace(-0.5, 0.5, 36), [0.6, 1.5, 2.0, 3.0]], Course(jnp.eye(40)[-2:], jnp.eye(40)[-2:])
    for power in range(8):
        frame, (sine, cosine) = np.eye(40), (np.sin(speed * power), np.cos(speed * power))
        frame[np.ix_([36, 39], [36, 39])] = [[cosine, -sine], [sine, cosine]]
        pairs, course = follow_on(jnp.asarray((frame * base) @ frame.T), course, 1.0)
    assert 0 <= 3.0 - pairs.values[-1] <= 0.05 * 2.4 * np.sin(speed) ** 2
    assert_close(course.ahead @ course.ahead.T, np.eye(2), 1e-12)


def test_a_guard_notices_the_eigenvalue_that_overtakes(key):
    """Two eigenvalues cross without coupling: the vector that was highest is still an eigenvector."""
    before, after = (np.r_[np.linspace(0, 1, 38), pair] for pair in ((2.0, 3.0), (3.5, 3.0)))
    start = jnp.eye(40)[-2:]
    assert_close(follow(jnp.diag(jnp.asarray(before)), start, 0.01).values[-1], 3.0, 1e-12)
    assert_close(follow(jnp.diag(jnp.asarray(after)), start, 0.01).values[-1], 3.5, 1e-12)
    assert_close(follow(jnp.diag(jnp.asarray(after)), start[-1:], 0.01).values[-1], 3.0, 1e-12)


def test_an_eigenvalue_that_rises_from_outside_of_the_pairs_is_found(key):
    """The pairs are exact and stay so: only what is drawn anew has anything of the direction that overtakes."""
    options = {"accuracy": 0.01, "certified": 1}

    @jax.jit
    def step(course, rising, key):
        product = lambda vector: jnp.r_[jnp.linspace(0, 1, 97), rising, 2.0, 3.0] * vector  # noqa: E731
        return followed_top_pairs(lambda: product, course, key, **options)

    start = jnp.eye(100)[-2:]
    course, found = Course(start, start), []
    for number in range(20):
        pairs, course = step(course, 1.0 + 0.5 * number, jax.random.fold_in(key, number))
        found.append(float(pairs.values[-1]))
    assert_close(np.array(found[12:]), 1.0 + 0.5 * np.arange(12, 20), 0.01)


SPECTRA = {
    "one outside": np.r_[np.linspace(0, 1, 98), 2.0, 3.0],
    "close": np.r_[np.linspace(0, 1, 98), 2.9, 3.0],
    "negative": -1.0 / np.arange(1, 101),
}


@pytest.mark.parametrize("steps", [4, 12, 30])
def test_an_eigenvalue_above_the_bound_is_as_rare_as_it_says(steps):
    """The pair that is followed is the second highest: the highest lies outside, and the bound has to find it."""

    @partial(jax.jit, static_argnums=3)
    def bounds(spectrum, place, keys, steps):
        pairs = TopPairs(spectrum[place][None], jnp.eye(100)[place][None], jnp.zeros(1))
        return jax.vmap(lambda key: upper_bound(lambda vector: spectrum * vector, pairs, key, steps))(keys)

    keys, count = jax.random.split(jax.random.key(1), 2000), 2000
    for name, spectrum in SPECTRA.items():
        found = np.asarray(bounds(jnp.asarray(spectrum), np.argsort(spectrum)[-2], keys, steps))
        assert np.mean(found < spectrum.max()) <= DOUBT + 4 * (DOUBT / count) ** 0.5
        if steps >= 12:
            assert abs(np.median(found) / spectrum.max() - 1) <= 1e-3 or name == "negative"
            # Where many eigenvalues crowd at the top the bound comes nearer with the square of the steps.
            assert_close(np.median(found), spectrum.max(), 8 / steps**2, np.abs(spectrum).max())


def test_the_bound_holds_for_pairs_with_residuals(key):
    """A vector that is no eigenvector: what it has of the highest eigenvalue is in its residual."""
    spectrum = jnp.asarray(SPECTRA["one outside"])
    vector = jnp.zeros(100).at[-1].set(0.8).at[-2].set(0.6)
    value = jnp.vdot(vector, spectrum * vector)
    residual = jnp.linalg.norm(spectrum * vector - value * vector)
    pairs = TopPairs(value[None], vector[None], residual[None])
    assert value < 3.0 <= upper_bound(lambda vector: spectrum * vector, pairs, key, 12) <= 3.3


@pytest.mark.slow
def test_the_record_says_what_is_known_of_an_eigenvalue_from_outside(key):
    """Of a risk whose curvature rises outside of the pairs: missed for a while, and within the bound of a search."""
    curvatures = jnp.r_[jnp.linspace(0, 1, 70), 2.0, 3.0]
    risk = objective(lambda params, inputs: jnp.sqrt(inputs) * params, half_square, curvatures, jnp.zeros(72))
    params, memory = jnp.ones(72), Course(jnp.eye(72)[-3:-1], jnp.eye(72)[-3:-1])
    state = TrainingState(jnp.array(0), params, (), key, {})
    for search, upper in ((0, np.inf), (12, 3.0)):
        probe = top_eigenvalues(Tracking(accuracy=0.5, search=search))
        values, _ = probe.measure(risk, state, memory, key)
        assert values["values"][-1] < 2.5
        assert values["upper"] == upper if search == 0 else abs(values["upper"] - upper) < 0.01


def half_square(outputs, targets):
    return jnp.sum((outputs - targets) ** 2) / 2


def test_tracking_recovers_from_an_operator_that_is_not_finite(key):
    matrix, start = symmetric(SPECTRUM, key), jnp.eye(120)[:2]
    bad, course = follow_on(jnp.nan * matrix, Course(start, start), 0.01)
    assert np.all(np.isnan(bad.values))
    good, course = follow_on(matrix, course, 0.01)
    assert np.all(np.isfinite(course.last))
    assert_close(good.values[-1], 6.0, 0.01)


@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_operators_with_hardly_more_dimensions_than_pairs(dimension, key):
    matrix = symmetric(np.arange(1.0, dimension + 1), key)
    start = jnp.linalg.qr(jax.random.normal(key, (dimension, dimension)))[0][: min(2, dimension)]
    assert_close(follow(matrix, start, 1e-3).values[-1], float(dimension), 1e-3)
    assert np.all(follow(jnp.zeros_like(matrix), start, 1e-3).values == 0)


def test_converged_pairs_stay_converged(key):
    matrix = symmetric(SPECTRUM, key)
    _, vectors = np.linalg.eigh(matrix)
    pairs = warm(matrix, jnp.asarray(vectors[:, -2:].T))
    assert_close(pairs.values, SPECTRUM[-2:], 1e-13)
    assert np.max(pairs.residuals) <= 1e-12
    assert_close(pairs.vectors @ pairs.vectors.T, np.eye(2), 1e-12)


def test_exactly_converged_pairs_of_a_diagonal_matrix_stay_so():
    """Nothing at all is left to extend the space by."""
    diagonal = jnp.linspace(1.0, 3.0, 40)
    start = jnp.eye(40)[:2][::-1]
    pairs = warm(jnp.diag(diagonal[::-1]), start)
    assert_close(pairs.vectors @ pairs.vectors.T, np.eye(2), 1e-12)
    assert np.all(pairs.values <= 3 + 1e-12)
    assert_close(pairs.values[-1], 3.0, 1e-12)


def test_the_faster_batching_gives_the_same_pairs(key):
    """Whichever the timing prefers: both are the products of the matrix."""
    operator = Operator(Partial(jnp.matmul, symmetric(SPECTRUM, key)), jnp.zeros(120))
    vectors = jax.random.normal(key, (2, operator.dimension))
    one_by_one = jnp.stack([operator.flat_mv(vector) for vector in vectors])
    at_once = jax.vmap(operator.flat_mv)(vectors)
    assert_close(at_once if fastest_batching(operator) else one_by_one, one_by_one, 1e-12)
    assert_close(at_once, one_by_one, 1e-12)


def check_pairs(measured, matrix, tolerance):
    """The highest value is close to the matrix's, and each lies within its residual of an eigenvalue."""
    exact, values = np.linalg.eigvalsh(matrix), np.asarray(measured["values"])
    distance = np.abs(exact[None, :] - values[:, None]).min(axis=1)
    assert np.all(distance <= measured["residuals"] + 1e-12 * np.abs(exact).max())
    assert abs(values[-1] / exact[-1] - 1) <= tolerance


def measured(probe, risk, params, key):
    """What a probe records at the start of a run."""
    state = TrainingState(jnp.array(0), params, (), key, {})
    memory = jax.jit(probe.start)(risk, state, key)
    return jax.jit(probe.measure)(risk, state, memory, key)[0]


def test_top_eigenvalues_along_training(key):
    risk, params = CASES["mlp/cross_entropy"](key)
    probes = {"top": top_eigenvalues(), "point": probe(lambda risk, params: params)}
    records = train(risk, params, optax.sgd(0.01), key, steps=15, every=5, probes=probes).records
    for i in range(4):
        point = jax.tree.map(lambda leaf, i=i: leaf[i], records.values["point"])
        check_pairs(jax.tree.map(lambda leaf, i=i: leaf[i], records.values["top"]), oracles.hessian(risk, point), 5e-3)


@pytest.mark.parametrize(
    "name", [name if name == "adam" else pytest.param(name, marks=pytest.mark.slow) for name in LINEAR]
)
def test_stability_probe_is_the_dense_preconditioned_sharpness(name, key):
    risk, params = CASES["softmax/square"](key)
    rule = rule_of(name, 0.01)
    run = train(risk, params, rule.transformation, key, steps=9, every=3, probes={"edge": stability(rule)})
    found, threshold = preconditioner_after_step(
        rule, jax.grad(risk)(run.params), run.state.optimizer_state, run.params
    )
    root = np.linalg.inv(scipy.linalg.sqrtm(np.asarray(dense_of(found, run.params))))
    dense = root @ oracles.hessian(risk, run.params) @ root
    values = jax.tree.map(lambda leaf: leaf[-1], run.records.values["edge"])
    check_pairs(values, dense, 1e-2)
    assert values["threshold"] == threshold
    assert values["ratio"] == pytest.approx(float(values["values"][-1] / threshold))


@pytest.mark.slow
def test_threshold_follows_a_schedule_and_an_ensemble(key):
    risk, params = CASES["softmax/square"](key)
    scheduled = update_rule("gd", optax.linear_schedule(0.01, 0.04, 3))

    def measure(risk, state, memory, key):
        after = preconditioner_after_step(scheduled, state.params, state.optimizer_state, state.params)
        return after[1], memory

    records = train(risk, params, scheduled.transformation, key, steps=3, probes={"edge": Probe(measure)}).records
    assert_close(records.values["edge"], 2 / np.array([0.01, 0.02, 0.03, 0.04]), 1e-6)
    rule = update_rule("gd", 1.0)
    points = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params)
    rates = jnp.array([0.01, 0.02])
    records = train(
        risk,
        points,
        rule.transformation,
        jax.random.split(key, 2),
        steps=1,
        probes={"edge": stability(rule)},
        hyperparameters={"learning_rate": rates},
    ).records
    assert_close(records.values["edge"]["threshold"], np.tile(2 / rates, (2, 1)), 1e-12)


def test_block_sharpness_is_that_of_the_diagonal_blocks(key):
    risk, params = CASES["mlp/square"](key)
    blocks = ("layer_1_bias", re.compile("layer_[12]"))
    values, dense = measured(block_sharpness(blocks), risk, params, key), oracles.hessian(risk, params)
    for name, block in zip(("layer_1_bias", "layer_[12]"), blocks, strict=True):
        rows = np.r_[tuple(rows for leaf, rows in block_slices(params).items() if re.search(block, leaf))]
        check_pairs(values[name], dense[np.ix_(rows, rows)], 1e-2)


def test_block_norms_cover_the_dense_ones(key):
    risk, params = CASES["softmax/square"](key)
    norms = measured(block_norms(400), risk, params, key)
    squared, error = norms["squared"], norms["error"]
    dense, slices = oracles.hessian(risk, params), block_slices(params)
    exact = np.array([[np.sum(dense[slices[a], slices[b]] ** 2) for b in slices] for a in slices])
    assert tuple(slices) == leaf_names(params)
    assert np.all(np.abs(squared - exact) <= 4.5 * error + 1e-12)
    assert np.max(error / exact) <= 0.1


class TestBadInput:
    def test_optimizer_without_a_known_threshold(self):
        with pytest.raises(ValueError, match=r"no optimizer with a known stability threshold 'adma'.*mean 'adam'"):
            update_rule("adma", 0.1)

    def test_optimizer_that_only_optax_knows(self):
        with pytest.raises(TypeError, match=r"GradientTransformation.*, whose stability threshold is not known.*gd"):
            stability(optax.lion(0.1))

    def test_run_with_another_optimizer_than_the_probe(self, key):
        risk, params = CASES["softmax/square"](key)
        with pytest.raises(ValueError, match="is for 'adam', and the run trains with an optimizer of another state"):
            train(risk, params, optax.sgd(0.1), key, steps=1, probes={"edge": stability(update_rule("adam", 0.1))})

    def test_block_that_does_not_exist(self, key):
        risk, params = CASES["softmax/square"](key)
        with pytest.raises(ValueError, match="no parameter block 'quary'"):
            train(risk, params, optax.sgd(0.1), key, steps=1, probes={"blocks": block_sharpness(("quary",))})

    def test_tracking_of_no_pair(self):
        with pytest.raises(ValueError, match="count is 0"):
            Tracking(count=0)

    def test_more_certified_pairs_than_there_are(self):
        with pytest.raises(ValueError, match=r"certified is 3; expected 1 <= certified <= 2\. Only count = 2"):
            Tracking(certified=3)


@pytest.mark.slow
def test_quadratic_sharpness_to_1e_5(key):
    """Preconditioned sharpness of a diagonal quadratic, where it is known in closed form: max h_i / P_i."""
    curvature = jnp.linspace(0.1, 3.0, 40)
    risk = objective(lambda w, x: x * w, lambda outputs, _: 0.5 * outputs @ outputs, curvature**0.5, curvature)
    rule = update_rule("adam", 1e-3)
    probes = {"edge": stability(rule, Tracking(accuracy=1e-6))}
    w = jax.random.normal(key, (40,))
    run = train(risk, w, rule.transformation, key, steps=20, every=5, probes=probes)
    diagonal, _ = preconditioner_after_step(rule, jax.grad(risk)(run.params), run.state.optimizer_state, run.params)
    assert_close(run.records.values["edge"]["values"][-1, -1], jnp.max(curvature / diagonal), 1e-5)
