"""The edge of any optax chain, read off its own step: against the chain made by hand, and refused where it has none."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import oracles
from attnlab.dynamics.rules import Adam, AdamW, GradientDescent, edge_of_step, update_rule
from attnlab.dynamics.sharpness import Tracking, stability
from attnlab.training import train
from attnlab.trees import ravel
from cases import CASES
from compare import assert_close
from update_rules import LINEAR, OPTIONS, rule_of

PARAMS = {"first": jnp.linspace(-1.0, 1.0, 3), "second": jnp.array([0.5, 2.0])}
RATE = 0.05


def run(optimizer, count=3):
    """The state after so many steps, and the next gradient."""
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(PARAMS)
        for step in range(count):
            _, state = optimizer.update(gradient_at(step), state, PARAMS)
    return state, gradient_at(count)


def gradient_at(step):
    return jax.tree.map(lambda leaf: jnp.sin(leaf + step + 1.0), PARAMS)


def edge(rule, optimizer, count=3):
    state, gradient = run(optimizer, count)
    return edge_of_step(rule, optimizer, gradient, state, PARAMS)


def bare_metric(rule, scale, count):
    """P of the rule's own optimizer after count + 1 steps with gradients of that scale."""
    optimizer = rule.transformation
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(PARAMS)
        for step in range(count + 1):
            _, state = optimizer.update(jax.tree.map(lambda g: scale * g, gradient_at(step)), state, PARAMS)
    found = rule.preconditioner(state, PARAMS)
    return jax.tree.map(jnp.ones_like, PARAMS) if found is None else found


def eigenvalues(entry):
    """Of P: its diagonal, or what it is in its own basis."""
    return getattr(entry, "values", entry)


LABELS = {"first": "slow", "second": "fast"}
WRAPPED = {
    "schedule": (lambda name: rule_of(name, optax.linear_schedule(0.0, RATE * 2, 6)).transformation, (1.0, 1.0), 1.0),
    "halved before": (lambda name: optax.chain(optax.scale(0.5), rule_of(name, RATE).transformation), (0.5, 0.5), 0.5),
    "halved after": (lambda name: optax.chain(rule_of(name, RATE).transformation, optax.scale(0.5)), (0.5, 0.5), 1.0),
    "groups": (
        lambda name: optax.partition(
            {"slow": rule_of(name, RATE).transformation, "fast": rule_of(name, 3 * RATE).transformation}, LABELS
        ),
        (1.0, 3.0),
        1.0,
    ),
    "one held fixed": (
        lambda name: optax.partition({"slow": rule_of(name, RATE).transformation, "fast": optax.set_to_zero()}, LABELS),
        (1.0, 0.0),
        1.0,
    ),
    "frozen finite": (lambda name: optax.apply_if_finite(rule_of(name, RATE).transformation, 3), (1.0, 1.0), 1.0),
}
PLAIN = {name: {k: v for k, v in OPTIONS[name].items() if k != "weight_decay"} for name in LINEAR}


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("name", LINEAR)
def test_the_edge_of_a_chain_is_that_of_the_rule_at_the_rate_of_each_group(name, wrapper):
    """The largest h / P that is stable, by parameter: threshold x metric, against edge(rate) x P by hand."""
    build, factors, scale = WRAPPED[wrapper]
    rule = rule_of(name, 123.0)  # not looked at
    found = edge(rule, build(name))
    plain, decay = update_rule(name, 1.0, **OPTIONS[name]), OPTIONS[name].get("weight_decay", 0.0)
    bare = update_rule("adam", 1.0, **PLAIN[name]) if name == "adamw" else plain
    metric = bare_metric(plain, scale, 3)
    for leaf, factor in zip(("first", "second"), factors, strict=True):
        if factor == 0:
            assert np.all(np.isinf(eigenvalues(found.metric[leaf])))
            continue
        shrink = RATE * decay * (factor / scale)  # what comes before the rule leaves the decay as it is
        expected = bare.edge(RATE * factor) * eigenvalues(metric[leaf]) * (1 - shrink / 2)
        assert_close(found.threshold * eigenvalues(found.metric[leaf]), expected, 1e-7)
    assert np.max(found.mismatch) < 1e-7


def test_clipping_by_norm_scales_the_rate_by_its_factor():
    gradient = gradient_at(3)
    length = jnp.linalg.norm(ravel(gradient))
    for bound, factor in ((0.3, 0.3 / length), (100.0, 1.0)):
        optimizer = optax.chain(optax.clip_by_global_norm(bound), GradientDescent(RATE).transformation)
        assert_close(edge(GradientDescent(1.0), optimizer).threshold, 2 / (RATE * factor), 1e-12)
        optimizer = optax.chain(optax.clip_by_global_norm(bound), Adam(RATE).transformation)
        assert_close(edge(Adam(1.0), optimizer).rate, RATE * factor, 1e-7)


def test_several_steps_count_as_the_one_that_moves():
    """Two of four gradients gathered: the step to come is the rule's, with what is still missing filled in."""
    inner = Adam(RATE)
    several = optax.MultiSteps(inner.transformation, 4).gradient_transformation()
    gradient = gradient_at(0)
    with jax.numpy_dtype_promotion("standard"):
        state, alone = several.init(PARAMS), inner.transformation.init(PARAMS)
        for _ in range(6):
            _, state = several.update(gradient, state, PARAMS)
        _, alone = inner.transformation.update(gradient, alone, PARAMS)
    found = jax.jit(lambda state: edge_of_step(inner, several, gradient, state, PARAMS))(state)
    expected = edge_of_step(inner, inner.transformation, gradient, alone, PARAMS)
    assert_close(found[:3], expected[:3], 1e-7)  # optax gathers in float32


def chain_by_hand(matrix, moment, rate, decays, b1, factor):
    """(w, m) after a step of AdamW with a frozen P, frozen clipping and a decay for each parameter, written out."""
    n = len(decays)
    first = np.concatenate([factor * (1 - b1) * matrix, b1 * np.eye(n)], axis=1)
    stay = np.concatenate([np.diag(1 - rate * decays), np.zeros((n, n))], axis=1)
    return np.concatenate([stay - rate * np.diag(1 / moment) @ first, first])


def test_adamw_with_warm_up_cosine_clipping_and_a_mask_loses_stability_at_its_edge(each_key):
    """The whole chain against its iteration matrix by hand: the radius crosses 1 where the preconditioned sharpness in
    the metric crosses the threshold, within 1e-6."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.1, 4, 20)
    mask, b1 = {"first": True, "second": False}, 0.8
    adamw = optax.adamw(schedule, b1=b1, weight_decay=0.7, mask=mask)
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), adamw)
    found = edge(AdamW(1.0, b1=b1), optimizer, 6)
    root = np.asarray(jax.random.normal(each_key, (5, 5)))
    matrix, metric = root @ root.T, np.asarray(ravel(found.metric))
    sharpness = np.linalg.eigvalsh(matrix / np.sqrt(np.outer(metric, metric)))[-1]
    with jax.numpy_dtype_promotion("standard"):
        state, gradient = run(optimizer, 6)
        _, after = optimizer.update(gradient, state, PARAMS)
    counted = optax.tree.get(after[1], "nu")
    steps, rate = 7, float(schedule(6))
    moment = (1 - b1**steps) * (np.sqrt(np.asarray(ravel(counted)) / (1 - 0.999**steps)) + 1e-8)
    factor = 0.5 / float(jnp.linalg.norm(ravel(gradient)))
    decays = np.array([0.7, 0.7, 0.7, 0.0, 0.0])
    for scale, stable in ((1 - 1e-5, True), (1 + 1e-5, False)):
        at = scale * float(found.threshold) / sharpness * matrix
        radius = np.abs(np.linalg.eigvals(chain_by_hand(at, moment, rate, decays, b1, factor))).max()
        assert (radius < 1) == stable


def test_the_probe_follows_a_chain_with_warm_up_cosine_and_clipping(key):
    """Five lines for a user; held against the metric and the dense Hessian at the end of the run."""
    risk, params = CASES["softmax/square"](key)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.02, 4, 20)
    optimizer = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(schedule, weight_decay=0.1))
    rule = AdamW(1.0)
    probes = {"edge": stability(rule, Tracking(accuracy=1e-4), optimizer=optimizer)}
    run = train(risk, params, optimizer, key, steps=6, every=3, probes=probes)
    values, gradient = run.records.values["edge"], jax.grad(risk)(run.params)
    found = edge_of_step(rule, optimizer, gradient, run.state.optimizer_state, run.params)
    root = np.sqrt(ravel(found.metric))
    dense = np.linalg.eigvalsh(oracles.hessian(risk, run.params) / np.outer(root, root))[-1]
    assert np.isposinf(values["threshold"][0])
    assert_close(values["ratio"][-1], dense / found.threshold, 1e-3)
    assert_close(values["rate"][-1], schedule(6) * min(1, 0.1 / np.linalg.norm(ravel(gradient))), 1e-6)


def test_an_average_after_descent_is_that_of_the_gradients():
    optimizer = optax.chain(optax.sgd(RATE), optax.ema(0.7, debias=False))
    found = edge(update_rule("ema", 1.0, momentum=0.7), optimizer)
    assert_close(found.threshold, 2 * 1.7 / 0.3 / RATE, 1e-10)


def test_where_nothing_moves_the_edge_is_infinite():
    """As at the first step of a warm-up."""
    found = edge(Adam(1.0), Adam(optax.linear_schedule(0.0, 1.0, 10)).transformation, 0)
    assert np.isposinf(found.threshold)
    assert np.all(np.isfinite(ravel(found.metric)))


def noisy(optimizer):
    return optax.chain(optax.add_noise(0.1, 0.5, 0), optimizer)


@pytest.mark.parametrize(
    ("rule", "optimizer", "message"),
    [
        (Adam(1.0), optax.chain(optax.clip(0.3), optax.adam(RATE)), "rule adam does: the gradient that reaches"),
        (Adam(1.0), noisy(optax.adam(RATE)), "the gradient that reaches the rule is not along"),
        (Adam(1.0), optax.chain(optax.add_decayed_weights(0.3), optax.adam(RATE)), "decayed weights or noise"),
        (Adam(1.0), optax.chain(optax.adam(RATE), optax.clip(0.01)), "step is not along the rule's own: it is clipped"),
        (Adam(1.0), optax.chain(optax.adam(RATE), optax.ema(0.9)), "the step is not along the rule's own"),
        (Adam(1.0), optax.nadam(RATE), "the step is not along the rule's own"),
        (GradientDescent(1.0), optax.adam(RATE), "rule gd does: the step is not along the rule's own"),
        (update_rule("heavy_ball", 1.0), optax.adam(RATE), "holds no part of type TraceState"),
        (Adam(1.0), optax.chain(optax.adam(RATE), optax.adam(RATE)), "holds 2 parts that move first"),
        (Adam(1.0), optax.chain(optax.scale_by_adam(), optax.scale(0.1)), r"at the effective rate -0\.1"),
    ],
)
def test_what_has_no_theory_is_refused_with_the_reason(rule, optimizer, message):
    with pytest.raises(ValueError, match=message):
        edge(rule, optimizer)


def test_within_jit_the_edge_of_what_has_no_theory_is_not_a_number():
    optimizer = optax.chain(optax.clip(0.3), optax.adam(RATE))
    state, gradient = run(optimizer)
    found = jax.jit(partial(edge_of_step, Adam(1.0), optimizer))(gradient, state, PARAMS)
    assert np.isnan(found.threshold)
    assert found.mismatch[0] > 0.1
