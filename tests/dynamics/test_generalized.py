"""Sharpness in a norm: brackets against brute force and another optimizer, rules on both sides of their edge."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from jax.tree_util import Partial

from attnlab.curvature.operator import Operator
from attnlab.dynamics.generalized import Search, generalized_sharpness, generalized_stability
from attnlab.dynamics.norms import NORMS, LargestBlock, LargestEntry, LargestMatrix, Norm, norm_by_name, polar
from attnlab.dynamics.rules import Adam, edge_of_step, update_rule
from attnlab.training import train
from attnlab.trees import ravel
from cases import CASES
from compare import assert_close
from update_rules import GEOMETRIC, rule_of

THOROUGH = Search(restarts=12, rounds=300, tolerance=1e-12, products=30)
POINT = {"a": jnp.zeros((2, 3)), "b": jnp.zeros((3, 2))}
SCALED = LargestMatrix(scaled=True)


def product(matrix, tree):
    flat, unravel = jax.flatten_util.ravel_pytree(tree)
    return unravel(matrix @ flat)


def operator_of(matrix, point):
    return Operator(Partial(product, matrix), point)


def positive(key, n, rank):
    root = jax.random.normal(key, (n, rank))
    return root @ root.T


def indefinite(key, n):
    root = jax.random.normal(key, (n, n))
    return root + root.T


bracket = jax.jit(
    lambda matrix, key, norm: generalized_sharpness(operator_of(matrix, POINT), norm, key, THOROUGH), static_argnums=2
)


@pytest.mark.parametrize("kind", ["positive", "indefinite"])
def test_the_largest_entry_against_all_signs(kind, each_key):
    """2^12 corners: the lower bound is the best of them, and the upper one is above it, by little where H >= 0."""
    matrix = positive(each_key, 12, 4) if kind == "positive" else indefinite(each_key, 12)
    found = bracket(matrix, each_key, LargestEntry())
    corners = np.array(list(itertools.product((1.0, -1.0), repeat=12)))
    best = np.einsum("ci,ij,cj->c", corners, matrix, corners).max()
    assert found.lower <= best * (1 + 1e-12)
    assert found.upper >= best
    assert_close(found.lower, best, 1e-10)
    assert_close(ravel(found.direction) @ matrix @ ravel(found.direction), found.lower, 1e-10)
    if kind == "positive":
        assert found.upper <= np.pi / 2 * best  # Nesterov's factor


def best_in_spectral_ball(matrix, key, norm, starts=15):
    """By L-BFGS over matrices divided by their own norm, from many starts: independent of polar factors."""

    def value(flat):
        tree = jax.flatten_util.ravel_pytree(POINT)[1](flat)
        unit = jax.tree.map(lambda leaf: leaf * norm.scale(leaf) / jnp.linalg.svd(leaf, compute_uv=False)[0], tree)
        return -ravel(unit) @ matrix @ ravel(unit)

    slope = jax.jit(jax.value_and_grad(value))
    points = np.asarray(jax.random.normal(key, (starts, 12)))
    ends = [scipy.optimize.minimize(lambda x: [np.asarray(v) for v in slope(x)], x, jac=True).fun for x in points]
    return -min(ends)


def test_the_largest_matrix_against_another_optimizer(key):
    matrix = positive(key, 12, 5)
    best = best_in_spectral_ball(matrix, key, SCALED)
    found = bracket(matrix, key, SCALED)
    assert_close(found.lower, best, 1e-4)
    assert found.lower >= best * (1 - 1e-8)  # L-BFGS stops at a kink
    assert found.lower <= found.upper <= 1.2 * found.lower
    assert_close(SCALED.size(found.direction), 1.0, 1e-10)


def test_a_block_against_the_dense_blocks(key):
    for matrix in (positive(key, 12, 12), indefinite(key, 12)):
        found = bracket(matrix, key, LargestBlock())
        tops = [np.linalg.eigvalsh(matrix[s, s])[-1] for s in (slice(0, 6), slice(6, 12))]
        lowest = np.linalg.eigvalsh(matrix)[0]
        assert_close(found.lower, max(tops), 1e-8)
        assert_close(found.upper, max(tops) + max(-lowest, 0), 1e-6)
        assert_close(LargestBlock().size(found.direction), 1.0, 1e-10)


@pytest.mark.parametrize("norm", [LargestEntry(), SCALED, LargestMatrix(), LargestBlock()], ids=repr)
def test_the_steepest_direction_attains_the_dual(norm, key):
    """In the unit ball nothing has a larger inner product, and the direction lies in it."""
    draws = jax.random.normal(key, (200, 15))
    point = {"a": jnp.zeros((2, 3)), "b": jnp.zeros((2, 2, 1)), "c": jnp.zeros(4), "d": jnp.zeros(())}
    unravel = jax.flatten_util.ravel_pytree(point)[1]
    slope, others = unravel(draws[0]), jax.vmap(unravel)(draws[1:])
    steepest = norm.steepest(slope)
    assert_close(norm.size(steepest), 1.0, 1e-10)
    assert_close(ravel(slope) @ ravel(steepest), norm.dual(slope), 1e-10)
    sizes = jax.vmap(norm.size)(others)
    assert np.all(draws[1:] @ ravel(slope) <= norm.dual(slope) * sizes + 1e-12)
    assert_close(ravel(norm.descent(slope)), norm.dual(slope) * ravel(steepest), 1e-12)


def ray(key, norm):
    """A quadratic, a direction that is the steepest of its own slope, and the curvature along it."""
    matrix = positive(key, 12, 12) + 0.5 * jnp.eye(12)
    found = bracket(matrix, key, norm)
    direction = found.direction
    for _ in range(200):
        direction = norm.steepest(product(matrix, direction))
    sharpness = ravel(direction) @ matrix @ ravel(direction)
    assert_close(norm.dual(product(matrix, direction)), sharpness, 1e-10)
    return matrix, direction, sharpness


@pytest.mark.parametrize(
    ("rule", "decay"),
    [
        (update_rule("sign", 0.01), 0.0),
        (update_rule("sign", 0.01, momentum=0.6), 0.0),
        (update_rule("lion", 0.01, b1=0.5, b2=0.8, weight_decay=0.0), 0.0),
        (update_rule("lion", 0.01, b1=0.5, b2=0.8, weight_decay=0.3), 0.3),
        (update_rule("muon", 0.01, momentum=0.6, nesterov=False, exact=True), 0.0),
        (update_rule("muon", 0.01, momentum=0.6, exact=True), 0.0),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_steps_of_fixed_length_oscillate_at_their_edge(rule, decay, key):
    """Optax's own step swaps w = r d and -r d, at any curvature: there the sharpness is the threshold, to 1e-8; nearer
    to the minimum it is above it, farther away below."""
    matrix, direction, sharpness = ray(key, rule.norm)
    radius = 0.01 / (2 - 0.01 * decay)
    back = (1 - rule.averaging) / (1 + rule.averaging)  # m = -back g swaps its sign too
    optimizer = rule.transformation

    @jax.jit
    def step(radius):
        w = jax.tree.map(lambda leaf: radius * leaf, direction)
        gradient = product(matrix, w)
        moment = jax.tree.map(lambda leaf: -back * leaf, gradient)
        state = optax.tree.set(optimizer.init(w), **{rule.first_moment[1]: moment})
        state = jax.tree.map(lambda leaf: leaf + 2000 if jnp.issubdtype(leaf.dtype, jnp.integer) else leaf, state)
        edge = edge_of_step(rule, optimizer, gradient, state, w)
        with jax.numpy_dtype_promotion("standard"):
            updates, after = optimizer.update(gradient, state, w)
        memory = optax.tree.get(after, rule.first_moment[1])
        return optax.apply_updates(w, updates), memory, moment, edge

    after, memory, moment, edge = step(radius)
    assert_close(ravel(after), -radius * ravel(direction), 1e-8)
    assert_close(ravel(memory), -ravel(moment), 1e-8)
    assert_close(edge.threshold, sharpness, 1e-8)
    assert step(0.99 * radius)[-1].threshold < sharpness < step(1.01 * radius)[-1].threshold


@pytest.mark.parametrize(
    "rule",
    [update_rule("spectral", 0.1), update_rule("spectral", 0.1, momentum=0.6), update_rule("block_coordinate", 0.1)],
    ids=["spectral", "spectral with momentum", "block coordinate"],
)
def test_steepest_descent_converges_below_its_edge_and_grows_above(rule, key):
    """The map (w, m) on the ray is linear: its spectral radius, by optax's own steps, crosses 1 within 1e-8; and
    iterated from a point off the ray it falls below the edge."""
    matrix, direction, sharpness = ray(key, rule.norm)
    matrix = matrix * rule.edge(0.1) / sharpness
    optimizer, remembers = rule.transformation, rule.first_moment is not None

    @jax.jit
    def step(factor, w, moment):
        state = optimizer.init(w)
        state = optax.tree.set(state, ema=moment) if remembers else state
        with jax.numpy_dtype_promotion("standard"):
            updates, after = optimizer.update(product(factor * matrix, w), state, w)
        return optax.apply_updates(w, updates), optax.tree.get(after, "ema", moment)

    slope = product(matrix, direction)
    part = lambda tree, whole: ravel(tree) @ ravel(direction) / (ravel(whole) @ ravel(direction))  # noqa: E731
    scaled = lambda tree, number: jax.tree.map(lambda leaf: number * leaf, tree)  # noqa: E731
    for factor, stable in ((1 - 1e-8, True), (1 + 1e-8, False)):
        ends = [step(factor, scaled(direction, x), scaled(slope, 1 - x)) for x in (1.0, 0.0)]
        columns = np.array([(part(w, direction), part(m, slope)) for w, m in ends]).T
        size = 2 if remembers else 1
        assert (np.abs(np.linalg.eigvals(columns[:size, :size])).max() < 1) == stable
    point = jax.flatten_util.ravel_pytree(POINT)[1](jax.random.normal(key, (12,)))
    start = scaled(point, 0.0)
    walk = jax.jit(lambda factor, w, steps: jax.lax.fori_loop(0, steps, lambda _, c: step(factor, *c), (w, start))[0])
    assert jnp.linalg.norm(ravel(walk(0.95, point, 3000))) < 1e-3 * jnp.linalg.norm(ravel(point))
    assert jnp.linalg.norm(ravel(walk(1.05, direction, 300))) > 10


def test_newton_schulz_of_muon_against_the_exact_factor(key):
    """Five steps leave singular values around 1, the exact coefficients leave 1."""
    matrices = {"a": jax.random.normal(key, (4, 6)), "b": jax.random.normal(key, (2, 5, 3))}
    for exact, low, high in ((False, 0.6, 1.3), (True, 1 - 1e-10, 1 + 1e-10)):
        rule = update_rule("muon", 1.0, momentum=0.0, exact=exact)
        optimizer = rule.transformation
        state = optimizer.init(matrices)
        with jax.numpy_dtype_promotion("standard"):
            updates, _ = optimizer.update(matrices, state, matrices)
        for name, leaf in updates.items():
            factor = -leaf / rule.norm.scale(leaf)
            values = jnp.linalg.svd(factor, compute_uv=False)
            assert low < np.min(values) <= np.max(values) < high
            if exact:
                assert_close(factor, polar(matrices[name]), 1e-8)
        found = edge_of_step(rule, optimizer, matrices, state, matrices)
        assert 0 <= found.mismatch[2] + 1e-12 < (1e-9 if exact else 0.35)
        assert_close(found.rate * rule.norm.dual(matrices), 1.0, 1e-8 if exact else 0.3)


def test_muon_is_that_of_optax(key):
    """The chain of optax.contrib itself is one of the rule's."""
    rule, optimizer = update_rule("muon", 1.0), optax.contrib.muon(0.02)
    params = jax.tree.map(lambda leaf: leaf + 1.0, POINT)
    gradient = jax.flatten_util.ravel_pytree(POINT)[1](jax.random.normal(key, (12,)))
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(params)
        for _ in range(3):
            _, state = optimizer.update(gradient, state, params)
    found = edge_of_step(rule, optimizer, gradient, state, params)
    assert_close(found.threshold, rule.edge_at(found.rate, jnp.array(4)), 1e-12)
    read = 0.95 * (1 - 0.95**4) / (1 - 0.95**5) + 0.05 / (1 - 0.95**4)  # the average of equal gradients is one of them
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(gradient, state, params)
    slope = -ravel(gradient) @ ravel(updates)
    assert_close(found.rate, slope / (read * rule.norm.dual(gradient) ** 2), 1e-6)


@pytest.mark.parametrize(
    "name", [name if name == "muon" else pytest.param(name, marks=pytest.mark.slow) for name in GEOMETRIC]
)
def test_the_probe_records_the_bracket_and_the_edge(name, key):
    risk, params = CASES["softmax/square"](key)
    rule = rule_of(name, 1e-3)
    probes = {"edge": generalized_stability(rule, Search(2, 4, 1e-3, 6))}
    run = train(risk, params, rule.transformation, key, steps=2, probes=probes)
    values = run.records.values["edge"]
    assert np.all(values["lower"] <= values["upper"])
    assert np.all(np.isfinite(values["ratio"]))
    assert_close(values["ratio"], values["lower"] / values["threshold"], 1e-12)
    assert np.max(values["mismatch"]) < 1e-6


class NoDual:
    """A norm without a direction."""


class TestBadInput:
    def test_a_norm_without_a_dual(self, key):
        operator = operator_of(jnp.eye(12), POINT)
        with pytest.raises(TypeError, match="a NoDual, without a dual; expected one of entry, matrix, block"):
            generalized_sharpness(operator, NoDual(), key)
        with pytest.raises(ValueError, match="no norm with a known dual 'nuclear'; expected one of: entry"):
            generalized_sharpness(operator, "nuclear", key)
        with pytest.raises(TypeError, match="no bound from above; expected a LargestPart"):
            generalized_sharpness(operator, _Euclidean(), key)
        assert [norm_by_name(name).name for name in NORMS] == list(NORMS)

    def test_a_rule_without_a_norm(self):
        with pytest.raises(TypeError, match="rule is adam, whose step is the steepest in no norm"):
            generalized_stability(Adam(0.1))

    def test_a_vector_has_no_orthogonal_factor(self):
        optimizer, bias = update_rule("muon", 0.1).optimizer(0.1), {"bias": jnp.zeros(3)}
        with pytest.raises(ValueError, match=r"bias has shape \(3,\); expected matrices"):
            optimizer.update(bias, optimizer.init(bias), bias)

    def test_search_of_nothing(self):
        with pytest.raises(ValueError, match="restarts is 0"):
            Search(restarts=0)


class _Euclidean(Norm):
    name = "euclidean"

    def size(self, tree):
        return jnp.linalg.norm(ravel(tree))

    def steepest(self, slope):
        return jax.tree.map(lambda leaf: leaf / self.size(slope), slope)
