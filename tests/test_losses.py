"""Losses with weights and ignored labels: against sums written out, and the same data without what does not count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from attnlab.attention import attention_hessian
from attnlab.curvature.operators import FISHERS, PARTS, empirical_fisher, fisher, ggn, hessian
from attnlab.dynamics.frequency import group_losses
from attnlab.dynamics.gradients import gradient_noise
from attnlab.losses import LOSSES, cross_entropy, square_loss
from attnlab.models.adapters import from_linen
from attnlab.models.attention import AttentionConfig, SelfAttention
from attnlab.objectives import batched, objective
from attnlab.training import minibatches, train
from compare import assert_close
from nightly import nightly

SEQUENCES, LENGTH, CLASSES = 4, 3, 3
WEIGHTS = {
    "positions": np.array([[1.0, 0.5, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.25, 1.0, 3.0]]),
    "examples": np.array([1.0, 0.0, 2.5, 0.5]),
    "mask": np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 1, 1]], bool),
}


def predict(params, inputs):
    return jnp.tanh(inputs @ params["in"]) @ params["out"]


def problem(loss, seed=0):
    random = np.random.default_rng(seed)
    params = {
        "in": jnp.asarray(random.standard_normal((2, 3))),
        "out": jnp.asarray(random.standard_normal((3, CLASSES))),
    }
    inputs = random.standard_normal((SEQUENCES, LENGTH, 2))
    labels = random.integers(CLASSES, size=(SEQUENCES, LENGTH))
    return params, inputs, labels if loss == "cross_entropy" else random.standard_normal((SEQUENCES, LENGTH, CLASSES))


def entry_losses(name, outputs, targets):
    """The loss of every position, written out."""
    if name == "square":
        return jnp.mean((outputs - targets) ** 2, axis=-1)
    chosen = jnp.sum(outputs * jax.nn.one_hot(targets, CLASSES), axis=-1)
    return jnp.log(jnp.sum(jnp.exp(outputs), axis=-1)) - chosen


def by_hand(name, inputs, targets, weights):
    """The weighted mean over positions as a function of the parameters."""
    full = np.broadcast_to(np.reshape(weights, weights.shape + (1,) * (2 - weights.ndim)), (SEQUENCES, LENGTH)) * 1.0
    return lambda params: jnp.sum(full * entry_losses(name, predict(params, inputs), targets)) / full.sum()


def dense(function, params):
    flat, unravel = ravel_pytree(params)
    return jax.jit(jax.hessian(lambda vector: function(unravel(vector))))(flat)


@pytest.mark.parametrize("weighting", WEIGHTS)
@pytest.mark.parametrize("name", LOSSES)
def test_weighted_risk_and_its_operators(name, weighting):
    params, inputs, targets = problem(name)
    weights = WEIGHTS[weighting]
    risk = objective(predict, LOSSES[name], inputs, targets, weights=weights)
    expected = by_hand(name, inputs, targets, weights)
    assert_close(risk(params), expected(params), 1e-14)
    assert_close(hessian(risk, params).dense(), dense(expected, params), 1e-13)
    parts = {part: build(risk, params, check=False).dense() for part, build in PARTS.items()}
    assert_close(parts["ggn"] + parts["functional"], parts["hessian"], 1e-13)
    assert_close(fisher(risk, params, check=False).dense(), parts["ggn"], 1e-14)


@pytest.mark.parametrize("name", LOSSES)
def test_empirical_fisher_weighs_examples_by_their_share(name):
    params, inputs, targets = problem(name)
    weights = WEIGHTS["positions"]  # the third sequence has none
    risk = objective(predict, LOSSES[name], inputs, targets, weights=weights)
    expected = 0
    for n in (0, 1, 3):
        share = weights[n].sum() / weights.sum()
        loss = lambda p, n=n: jnp.sum(weights[n] * entry_losses(name, predict(p, inputs[n]), targets[n]))  # noqa: E731
        gradient = ravel_pytree(jax.grad(loss)(params))[0] / weights[n].sum()
        expected += share * np.outer(gradient, gradient)
    assert_close(empirical_fisher(risk, params).dense(), expected, 1e-13)
    noise = gradient_noise().measure(risk, type("State", (), {"params": params}), (), jax.random.key(0))[0]
    gradient = ravel_pytree(jax.grad(risk)(params))[0]
    assert_close(noise["trace"], np.trace(expected) - gradient @ gradient, 1e-12)


@pytest.mark.parametrize("ignored", [-1, -100, 2])
def test_an_ignored_label_is_a_weight_of_zero(ignored):
    params, inputs, labels = problem("cross_entropy")
    marked = np.where(WEIGHTS["mask"], np.minimum(labels, 1), ignored)
    risk = objective(predict, cross_entropy.ignoring(ignored), inputs, marked)
    expected = by_hand("cross_entropy", inputs, np.maximum(marked, 0), WEIGHTS["mask"])
    assert_close(risk(params), expected(params), 1e-14)
    assert_close(hessian(risk, params).dense(), dense(expected, params), 1e-13)
    assert_close(float(risk.total()), 8.0)


def test_an_ignored_label_and_weights_together():
    params, inputs, labels = problem("cross_entropy")
    marked = np.where(WEIGHTS["mask"], labels, -1)
    risk = objective(predict, cross_entropy.ignoring(-1), inputs, marked, weights=WEIGHTS["examples"])
    weights = WEIGHTS["mask"] * WEIGHTS["examples"][:, None]
    assert_close(risk(params), by_hand("cross_entropy", inputs, labels, weights)(params), 1e-14)
    assert_close(float(risk.total()), weights.sum())


def test_an_ignored_value_of_the_square_loss():
    params, inputs, targets = problem("square")
    keep = np.random.default_rng(1).random(targets.shape) < 0.6
    risk = objective(predict, square_loss.ignoring(-9.0), inputs, np.where(keep, targets, -9.0))
    keep = keep.astype(float)
    by_hand = lambda p: jnp.sum(keep * (predict(p, inputs) - targets) ** 2) / keep.sum()  # noqa: E731
    assert_close(risk(params), by_hand(params), 1e-14)
    assert_close(hessian(risk, params).dense(), dense(by_hand, params), 1e-13)


def test_what_does_not_count_may_be_anything():
    """Padding whose outputs overflow."""
    outputs, labels = jnp.array([[1.0, 2.0], [jnp.inf, jnp.nan]]), jnp.array([0, 1])
    weighted = lambda outputs: cross_entropy(outputs, labels, jnp.array([1.0, 0.0]))  # noqa: E731
    assert_close(weighted(outputs), np.log1p(np.e), 1e-14)
    assert_close(
        jax.grad(weighted)(outputs)[0], jax.grad(lambda o: cross_entropy(o, labels[:1]))(outputs[:1])[0], 1e-14
    )
    np.testing.assert_array_equal(jax.grad(weighted)(outputs)[1], 0)


def test_unsigned_labels_hold_no_negative_one():
    labels = jnp.array([0, 1, 255], jnp.uint8)
    outputs = jnp.zeros((3, 2))
    with pytest.raises(ValueError, match=r"1 of 3 labels that are no class, such as 255"):
        cross_entropy.ignoring(-1)(outputs, labels)
    assert_close(cross_entropy.ignoring(255)(outputs, labels), np.log(2), 1e-14)


@pytest.mark.parametrize("name", nightly((*PARTS, *FISHERS), ("empirical_fisher",)))
def test_batches_weigh_by_what_counts(name):
    """Unequal weights, a ragged last batch, ignored labels, and a batch of which nothing counts."""
    params, inputs, labels = problem("cross_entropy")
    weights, loss = (
        np.array([[1.0, 0.5, 2.0], [0.0, 3.0, 1.0], [1.0, 1.0, 1.0], [0.25, 1.0, 3.0]]),
        cross_entropy.ignoring(-1),
    )
    labels = np.where(np.arange(SEQUENCES)[:, None] == 2, -1, np.where(WEIGHTS["mask"], labels, -1))
    whole = objective(predict, loss, inputs, labels, weights=weights)
    cuts = [(0, 2), (2, 3), (3, 4)]
    parts = batched(predict, loss, [(inputs[a:b], labels[a:b], weights[a:b]) for a, b in cuts])
    build = {**PARTS, **FISHERS}[name]
    assert_close(parts(params), whole(params), 1e-13)
    assert_close(build(parts, params).dense(), build(whole, params).dense(), 1e-12)


def test_batches_that_are_mappings_of_trees():
    params, inputs, targets = problem("square")
    model = lambda p, x: predict(p, x["tokens"] * x["scale"])  # noqa: E731
    whole = objective(model, square_loss, {"tokens": inputs, "scale": np.full((SEQUENCES, 1, 1), 2.0)}, targets)
    batches = [
        {"inputs": {"tokens": inputs[a:b], "scale": np.full((b - a, 1, 1), 2.0)}, "targets": targets[a:b]}
        for a, b in ((0, 3), (3, 4))
    ]
    assert_close(ggn(batched(model, square_loss, batches), params).dense(), ggn(whole, params).dense(), 1e-12)


class ReadsDifferently:
    """Batches of which only the last differs when it is read again."""

    def __init__(self, inputs, targets):
        self.inputs, self.targets, self.passes = inputs, targets, 0

    def __iter__(self):
        self.passes += 1
        yield self.inputs[:2], self.targets[:2]
        yield self.inputs[2:] + (self.passes > 1), self.targets[2:]


def masks_by_itself(outputs, labels):
    """A mean over fewer positions than targets, of which the batches know nothing."""
    keep = (labels >= 0).astype(float)
    losses = entry_losses("cross_entropy", outputs, jnp.maximum(labels, 0))
    return jnp.sum(keep * losses) / jnp.sum(keep)


def bad_batches(name):
    params, inputs, labels = problem("cross_entropy")
    masked = np.where(np.arange(SEQUENCES)[:, None] > 2, np.array([0, -1, -1]), labels)
    return {
        "read again": lambda: hessian(batched(predict, cross_entropy, ReadsDifferently(inputs, labels)), params),
        "masks by itself": lambda: hessian(
            batched(predict, masks_by_itself, [(inputs[:2], labels[:2]), (inputs[2:], masked[2:])]), params
        ),
        "labels": lambda: hessian(
            batched(predict, cross_entropy, [(inputs[:2], labels[:2]), (inputs[2:], masked[2:])]), params
        ),
        "four things": lambda: batched(predict, cross_entropy, [(inputs, labels, None, None)]),
        "a dict": lambda: batched(predict, cross_entropy, [{"x": inputs, "y": labels}]),
        "a string": lambda: batched(predict, cross_entropy, ["abc"]),
        "nothing counts": lambda: batched(predict, cross_entropy, [(inputs, labels, np.zeros(SEQUENCES))]),
    }[name]


@pytest.mark.parametrize(
    ("name", "message"),
    {
        "read again": "batch 1 differs when it is read again",
        "masks by itself": "not a mean over batches, seen in batch 1: .* say so by weights",
        "labels": "batch 1: targets hold 2 of 6 labels that are no class, such as -1; expected whole numbers",
        "four things": r"batch 0 holds 4 things; expected a pair \(inputs, targets\), or \(inputs, targets, weights\)",
        "a dict": r"batch 0 is a mapping with the keys \['x', 'y'\]; expected inputs and targets",
        "a string": "batch 0 holds a str; expected a pair",
        "nothing counts": "no position counts",
    }.items(),
)
def test_batches_that_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        bad_batches(name)()


LAYERS = {
    "softmax": AttentionConfig(key_dim=2, value_dim=CLASSES),
    "linear_heads": AttentionConfig(key_dim=2, value_dim=2, heads=2, output_dim=CLASSES, weights="linear"),
}


@pytest.mark.parametrize("weighting", nightly(("positions", "examples"), ("positions",)))
@pytest.mark.parametrize(
    ("layer", "name"),
    [
        ("softmax", "cross_entropy"),
        pytest.param("softmax", "square", marks=pytest.mark.slow),
        ("linear_heads", "square"),
    ],
)
def test_the_closed_form_weighs_as_autodiff_does(layer, name, weighting):
    config = LAYERS[layer]
    _, inputs, targets = problem(name)
    module = SelfAttention(config)
    params = module.init(jax.random.key(1), jnp.asarray(inputs))["params"]
    loss, weights = LOSSES[name], WEIGHTS[weighting]
    if name == "cross_entropy":
        loss, targets = loss.ignoring(-1), np.where(WEIGHTS["mask"], targets, -1)
    risk = objective(from_linen(module), loss, inputs, targets, weights=weights)
    exact = attention_hessian(risk, params)
    assert_close(exact.dense(), dense(risk, params), 1e-12)
    assert_close(exact.dense("ggn"), ggn(risk, params, check=False).dense(), 1e-12)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            np.array([0, 1, -1]),
            r"targets hold 1 of 3 labels that are no class, such as -1; .* cross_entropy\.ignoring\(-1\)",
        ),
        (
            np.array([1, 2, 3]),
            "targets hold 1 of 3 labels that are no class, such as 3; expected whole numbers from 0 to 2",
        ),
        (np.array([0.0, 1.0, 2.0]), r"If they are class labels, cast them from float64 to whole numbers"),
    ],
)
def test_labels_that_are_no_class(labels, message):
    """Refused by the loss, when an operator is built, by the closed form, and before training starts."""
    import optax

    params, inputs, _ = problem("cross_entropy")
    layer = SelfAttention(LAYERS["softmax"])
    weights = layer.init(jax.random.key(1), jnp.asarray(inputs[0]))["params"]
    risk = objective(predict, cross_entropy, inputs[0], labels)
    for refused in (
        lambda: risk(params),
        lambda: hessian(risk, params, check=False),
        lambda: attention_hessian(objective(from_linen(layer), cross_entropy, inputs[0], labels), weights),
        lambda: train(risk, params, optax.sgd(0.1), jax.random.key(0), steps=1),
    ):
        with pytest.raises(ValueError, match=message):
            refused()


def test_under_jit_a_label_that_is_no_class_makes_everything_nan():
    params, inputs, labels = problem("cross_entropy")
    bad = jnp.asarray(np.where(np.arange(LENGTH) == 1, -1, labels))
    loss_and_curvature = jax.jit(
        lambda labels: (
            risk := objective(predict, cross_entropy, inputs, labels),
            (risk(params), jax.grad(risk)(params)["out"], hessian(risk, params).dense()),
        )[1]
    )
    assert all(np.isnan(part).any() for part in loss_and_curvature(bad))
    assert all(np.isfinite(part).all() for part in loss_and_curvature(jnp.asarray(labels)))
    layer = SelfAttention(LAYERS["softmax"])
    weights = layer.init(jax.random.key(1), jnp.asarray(inputs))["params"]
    around = lambda labels: objective(from_linen(layer), cross_entropy, inputs, labels)  # noqa: E731
    closed = jax.jit(lambda labels: attention_hessian(around(labels), weights).dense())
    assert np.isnan(closed(bad)).any()


def test_a_loss_that_is_not_finite_builds_no_operator_and_starts_no_training():
    import optax

    risk = objective(lambda p, x: jnp.log(p) * x, square_loss, np.ones(3), np.ones(3))
    for start in (
        lambda: hessian(risk, jnp.asarray(-1.0), check=False),
        lambda: ggn(risk, jnp.asarray(-1.0), check=False),
        lambda: train(risk, jnp.asarray(-1.0), optax.sgd(0.1), jax.random.key(0), steps=1),
    ):
        with pytest.raises(ValueError, match="the loss is nan at these parameters; expected a finite number"):
            start()


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (np.array([[1.0, -1.0, 1.0]] * SEQUENCES), ValueError, "weights hold -1.0; expected none below zero"),
        (np.full((SEQUENCES, LENGTH), np.nan), ValueError, "weights has 12 non-finite of 12 values"),
        (np.zeros(SEQUENCES), ValueError, "no position counts: of 12, every weight is zero"),
        (np.ones(LENGTH), ValueError, r"weights have shape \(3,\); expected \(4, 3\), one weight a position"),
        (np.ones((SEQUENCES, LENGTH), complex), TypeError, "weights have dtype complex128; expected real numbers"),
    ],
)
def test_weights_that_are_refused(weights, error, message):
    params, inputs, labels = problem("cross_entropy")
    with pytest.raises(error, match=message):
        hessian(objective(predict, cross_entropy, inputs, labels, weights=weights), params)


@pytest.mark.parametrize("label", ["-1", None, True, float("nan"), [1]])
def test_an_ignored_label_is_a_number(label):
    with pytest.raises(TypeError, match="expected the number that marks a target that does not count"):
        cross_entropy.ignoring(label)


def test_a_loss_is_a_function():
    with pytest.raises(TypeError, match=r"loss is 'square'; expected a function .* take attnlab\.losses\.loss_by_name"):
        objective(predict, "square", np.ones(3), np.ones(3))


def test_weights_of_a_loss_of_ones_own():
    """It is given them as a third argument."""
    params, inputs, targets = problem("square")
    weights = WEIGHTS["examples"]
    absolute = lambda o, t, w: jnp.sum(w[:, None, None] * jnp.sqrt(1 + (o - t) ** 2)) / jnp.sum(w)  # noqa: E731
    risk = objective(predict, absolute, inputs, targets, weights=weights)
    parts = batched(predict, absolute, [(inputs[a:b], targets[a:b], weights[a:b]) for a, b in ((0, 1), (1, 4))])
    assert_close(
        hessian(parts, params).dense(), dense(lambda p: absolute(predict(p, inputs), targets, weights), params), 1e-12
    )
    assert_close(empirical_fisher(parts, params).dense(), empirical_fisher(risk, params).dense(), 1e-12)


def test_losses_by_group_are_weighted():
    params, inputs, labels = problem("cross_entropy")
    weights = 1 + WEIGHTS["positions"]
    risk = objective(predict, cross_entropy, inputs, labels, weights=weights)
    probe = group_losses(np.array([0, 1, 1]), 2)
    values = probe.measure(risk, type("State", (), {"params": params}), (), jax.random.key(0))[0]
    losses = np.asarray(entry_losses("cross_entropy", predict(params, inputs), labels))
    held = [weights[labels == 0].sum(), weights[labels > 0].sum()]
    sums = [(weights * losses)[labels == 0].sum(), (weights * losses)[labels > 0].sum()]
    assert_close(values["loss"], np.divide(sums, held), 1e-13)
    assert_close(values["share"], np.divide(held, weights.sum()), 1e-13)
    assert_close(jnp.sum(values["share"] * values["loss"]), risk(params), 1e-13)


def test_minibatches_take_their_weights_with_them():
    params, inputs, labels = problem("cross_entropy")
    weights = np.arange(1.0, 1 + SEQUENCES)
    risk = objective(predict, cross_entropy, inputs, labels, weights=weights)
    batch = minibatches(2)(jax.random.key(0), risk)
    rows = [int(w) - 1 for w in batch.weights]
    expected = objective(predict, cross_entropy, inputs[rows], labels[rows], weights=weights[rows])
    assert_close(batch(params), expected(params), 1e-14)


def test_the_fisher_matrix_of_the_square_loss_is_that_of_its_gaussian():
    """E[s s^T] of the Gaussian with variance C / 2 in each of a position's C outputs, by sampling its labels."""
    params, inputs, targets = problem("square")
    flat, unravel = ravel_pytree(params)
    outputs = predict(params, inputs).reshape(-1, CLASSES)
    jacobian = jax.jacrev(lambda vector: predict(unravel(vector), inputs).reshape(-1, CLASSES))(flat)
    draws = np.random.default_rng(0).standard_normal((4000, *outputs.shape)) * (CLASSES / 2) ** 0.5
    scores = np.einsum("snc,ncp->snp", draws / (CLASSES / 2), np.asarray(jacobian))  # of log N(y; outputs, C / 2)
    second = np.einsum("snp,snq->spq", scores, scores) / len(outputs)
    error = second.std(axis=0) / len(draws) ** 0.5
    found = fisher(objective(predict, square_loss, inputs, targets), params).dense()
    assert np.max(np.abs(second.mean(axis=0) - found) / error) < 5
    assert np.max(np.abs(second.mean(axis=0) - 1.5 * found) / error) > 20
