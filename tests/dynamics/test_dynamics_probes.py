"""Each probe against its definition, written out densely; one row a probe."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

import oracles
from attnlab.dynamics.frequency import frequency_groups, group_losses, group_prediction
from attnlab.dynamics.gradients import batch_sharpness, gradient_noise, gradient_norms
from attnlab.dynamics.kernel import empirical_ntk, ntk
from attnlab.dynamics.tokens import (
    attention_calls,
    attention_entropy,
    effective_rank,
    entropy,
    least_entropy,
    mean_cosine,
    rank_residual,
    representations,
    token_geometry,
)
from attnlab.losses import cross_entropy, square_loss
from attnlab.models.adapters import from_linen
from attnlab.models.attention import AttentionConfig, SelfAttention
from attnlab.objectives import objective
from attnlab.training import TrainingState, minibatches, train
from attnlab.trees import block_slices, ravel
from cases import CASES
from compare import assert_close


def measured(probe, case, key):
    """What a probe records at the start of a run, and the objective and point it saw."""
    risk, params = CASES[case](key)
    values = train(risk, params, optax.sgd(0.0), key, steps=1, probes={"it": probe}).records.values["it"]
    return jax.tree.map(lambda leaf: leaf[0], values), risk, params


def per_example(risk, params):
    """The gradient of each example's own loss, (n, parameters)."""
    examples = [
        objective(risk.predict, risk.loss, risk.inputs[i : i + 1], risk.targets[i : i + 1])
        for i in range(risk.inputs.shape[0])
    ]
    return np.stack([ravel(jax.grad(example)(params)) for example in examples])


def norms_by_hand(risk, params):
    gradient = ravel(jax.grad(risk)(params))
    return {name: jnp.linalg.norm(gradient[rows]) for name, rows in block_slices(params).items()}


def noise_by_hand(risk, params):
    gradients = per_example(risk, params)
    trace = np.trace(np.cov(gradients, rowvar=False, bias=True))
    return {"trace": trace, "noise_scale": trace / np.sum(gradients.mean(axis=0) ** 2)}


def kernel_by_hand(risk, params):
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    jacobian = jax.jit(jax.jacfwd(lambda vector: risk.outputs(unravel(vector)).ravel()))(flat)
    kernel, targets = jacobian @ jacobian.T, risk.targets.ravel()
    alignment = jnp.vdot(kernel, jnp.outer(targets, targets)) / (jnp.linalg.norm(kernel) * targets @ targets)
    return {"alignment": alignment, "distance": 0.0, "highest": np.linalg.eigvalsh(kernel)[-1]}


def groups_by_hand(risk, params):
    losses = [-jax.nn.log_softmax(row)[label] for row, label in zip(outputs(risk, params), labels(risk), strict=True)]
    group = np.array([GROUPS[label] for label in labels(risk)])
    share = np.array([np.mean(group == g) for g in range(3)])
    means = [np.mean([loss for loss, g in zip(losses, group, strict=True) if g == i] or [0.0]) for i in range(3)]
    return {"loss": np.array(means), "share": share}


def outputs(risk, params):
    found = risk.outputs(params)
    return found.reshape(-1, found.shape[-1])


def labels(risk):
    return np.asarray(risk.targets).ravel().tolist()


GROUPS = (0, 1, 1, 2, 2)

PROBES = {
    "gradient_norms": (gradient_norms(), "block_pre/square", norms_by_hand),
    "gradient_noise": (gradient_noise(), "softmax/cross_entropy", noise_by_hand),
    "ntk": (ntk(), "softmax/square", kernel_by_hand),
    "group_losses": (group_losses(jnp.array(GROUPS), 3), "language_model/cross_entropy", groups_by_hand),
}


@pytest.mark.parametrize("name", PROBES)
def test_probe_is_its_definition(name, key):
    probe, case, by_hand = PROBES[name]
    found, risk, params = measured(probe, case, key)
    expected = by_hand(risk, params)
    assert set(found) == set(expected)
    for part, value in found.items():
        scale = None if np.any(expected[part]) else 1.0
        assert_close(value, jnp.asarray(expected[part]), 1e-10, scale)


def test_shares_weigh_the_group_losses_to_the_whole(key):
    found, risk, params = measured(group_losses(jnp.array(GROUPS), 3), "language_model/cross_entropy", key)
    assert_close(found["share"] @ found["loss"], risk(params), 1e-12)


def test_an_ignored_label_is_in_no_group(key):
    """As the loss takes it."""
    risk, params = CASES["language_model/cross_entropy"](key)
    risk = objective(risk.predict, cross_entropy.ignoring(-1), risk.inputs, risk.targets.at[0, 0].set(-1))
    found, _ = group_losses(jnp.array(GROUPS), 3).measure(risk, TrainingState(0, params, (), key, {}), (), key)
    assert_close(found["share"] @ found["loss"], risk(params), 1e-12)


def test_batch_sharpness_is_the_mean_over_batches(key):
    """With batches of one of two examples, the expectation is the mean of the two."""
    found, risk, params = measured(batch_sharpness(minibatches(1), 200), "softmax/square", key)
    terms = []
    for i in range(2):
        example = objective(risk.predict, risk.loss, risk.inputs[i : i + 1], risk.targets[i : i + 1])
        gradient = ravel(jax.grad(example)(params))
        terms.append(gradient @ oracles.hessian(example, params) @ gradient / (gradient @ gradient))
    assert abs(found["mean"] - np.mean(terms)) <= 4 * found["error"]
    assert_close(found["error"], np.std(terms) / 200**0.5, 0.1)


def test_ntk_and_ggn_share_their_highest_eigenvalue(key):
    risk, params = CASES["block_pre/square"](key)
    kernel = jax.jit(empirical_ntk)(risk, params)
    highest = np.linalg.eigvalsh(oracles.ggn(risk, params))[-1]
    assert_close(2 / kernel.shape[0] * np.linalg.eigvalsh(kernel)[-1], highest, 1e-10)


def test_ntk_moves_away_from_its_start(key):
    risk, params = CASES["softmax/square"](key)
    values = train(risk, params, optax.sgd(0.3), key, steps=20, every=10, probes={"ntk": ntk()}).records.values["ntk"]
    assert abs(values["distance"][0]) <= 1e-12
    assert values["distance"][2] > 1e-6


# entropy


def test_least_entropy_is_the_minimum_over_the_ball(key):
    """A general optimiser finds no lower entropy, and comes to the bound; the stated scores attain it."""
    tokens, norm = 4, 1.7
    bound = float(least_entropy(jnp.array(norm), tokens))
    special = np.full(tokens, -norm / (tokens * (tokens - 1)) ** 0.5)
    special[0] = norm * ((tokens - 1) / tokens) ** 0.5
    assert np.linalg.norm(special) == pytest.approx(norm)
    assert float(entropy(jax.nn.softmax(jnp.asarray(special)))) == pytest.approx(bound, rel=1e-12)

    def on_the_ball(direction):
        scores = norm * direction / np.linalg.norm(direction)
        weights = np.exp(scores) / np.exp(scores).sum()
        return -(weights * np.log(weights)).sum()

    starts = np.asarray(jax.random.normal(key, (5, tokens)))
    found = min(scipy.optimize.minimize(on_the_ball, start).fun for start in starts)
    assert bound - 1e-12 <= found <= bound + 1e-6


def test_least_entropy_at_its_ends():
    assert float(least_entropy(jnp.array(0.0), 5)) == pytest.approx(np.log(5))
    assert float(least_entropy(jnp.array(50.0), 5)) == pytest.approx(0, abs=1e-12)
    assert float(least_entropy(jnp.array(3.0), 1)) == 0


@pytest.mark.parametrize("model", ["softmax", "temperature", "merged", "causal", "multi_head", "two_layers"])
def test_entropy_of_a_layer_is_above_its_bound(model, key):
    values, risk, params = measured(attention_entropy(), f"{model}/square", key)
    assert set(values) == set(attention_calls(risk.predict, params, risk.inputs))
    for layer in values.values():
        assert layer["slack"] >= 0
        assert np.all(layer["entropy"] >= layer["bound"])
    if model == "multi_head":
        assert next(iter(values.values()))["entropy"].shape == (2,)


def around(predict, params, inputs):
    return jnp.sum(predict(params, jnp.tanh(inputs)), axis=-2)


@pytest.mark.parametrize("probe", [attention_entropy, token_geometry])
def test_what_stands_around_the_layers_may_be_anything(probe, key):
    """The layers are looked at where the objective's model calls them, on what it gives them."""
    risk, params = CASES["block_no_norm/square"](key)
    state = TrainingState(0, params, (), key, {})
    inside = dataclasses.replace(risk, inputs=jnp.tanh(risk.inputs))
    outside = objective(jax.tree_util.Partial(around, risk.predict), risk.loss, risk.inputs, jnp.ones((2, 3)))
    found, expected = (probe().measure(each, state, (), key)[0] for each in (outside, inside))
    assert_close(found, expected, 1e-14)


@pytest.mark.parametrize("probe", [attention_entropy, token_geometry])
def test_a_model_without_attention_is_refused(probe, key):
    risk, params = CASES["mlp/square"](key)
    with pytest.raises(ValueError, match=r"the objective's model calls no .* of attnlab.models; expected at least one"):
        jax.eval_shape(probe().measure, risk, TrainingState(0, params, (), key, {}), (), key)


# representations


def test_geometry_of_known_tokens():
    equal, orthonormal = jnp.ones((2, 5, 3)), jnp.eye(4)[None]
    assert float(rank_residual(equal)) == 0
    assert float(mean_cosine(equal)) == pytest.approx(1)
    assert float(effective_rank(equal)) == pytest.approx(1)
    assert float(rank_residual(orthonormal)) == pytest.approx((3 / 4) ** 0.5)
    assert float(mean_cosine(orthonormal)) == pytest.approx(0)
    assert float(effective_rank(orthonormal)) == pytest.approx(4)


def test_cosine_is_the_mean_over_pairs(key):
    tokens = np.asarray(jax.random.normal(key, (2, 4, 3)))
    pairs = [
        (a @ b) / (np.linalg.norm(a) * np.linalg.norm(b))
        for sequence in tokens
        for i, a in enumerate(sequence)
        for j, b in enumerate(sequence)
        if i != j
    ]
    assert_close(mean_cosine(jnp.asarray(tokens)), np.mean(pairs), 1e-12)


def test_representations_leave_the_blocks_in_order(key):
    values, risk, params = measured(token_geometry(), "two_layers/square", key)
    found = representations(risk.predict, params, risk.inputs)
    assert list(found) == ["layer_0", "layer_1"]
    assert_close(found["layer_1"], risk.outputs(params), 1e-12)
    assert_close(values["layer_0"]["cosine"], mean_cosine(found["layer_0"]), 1e-12)


# frequency


def test_groups_hold_equal_shares_from_frequent_to_rare():
    counts = np.array([5, 40, 10, 20, 25, 0])
    tokens = np.repeat(np.arange(6), counts)
    groups = np.asarray(frequency_groups(tokens, 6, 2))
    assert groups.tolist() == [1, 0, 1, 1, 1, 1]
    zipf = np.repeat(np.arange(200), (2000 / np.arange(1, 201)).astype(int))
    groups = np.asarray(frequency_groups(zipf, 200, 5))
    assert np.all(np.diff(groups) >= 0)
    share = np.bincount(groups[zipf], minlength=5) / zipf.size
    assert np.abs(share - 0.2).max() <= 0.09


def test_groups_as_targets_are_classes_of_the_first_outputs(key):
    risk, params = CASES["language_model/cross_entropy"](key)
    scores = jax.nn.log_softmax(outputs(risk, params)[:, :3])
    by_hand = [-row[GROUPS[label]] for row, label in zip(scores, labels(risk), strict=True)]
    assert_close(group_prediction(risk, jnp.array(GROUPS), 3)(params), np.mean(by_hand), 1e-12)


class TestBadInput:
    def test_entropy_of_linear_attention(self, key):
        with pytest.raises(ValueError, match="weights='linear'"):
            measured(attention_entropy(), "linear/square", key)

    def test_group_losses_without_labels(self, key):
        with pytest.raises(TypeError, match="losses by group expect labels"):
            measured(group_losses(jnp.array(GROUPS), 3), "softmax/square", key)

    @pytest.mark.parametrize(
        ("groups", "message"),
        [
            ([0, 1, 3], "groups holds 0 to 3 and count is 3; expected groups 0 to 2"),
            ([0, -1], "groups holds -1 to 0"),
            ([0.0, 1.0], "expected a whole number a class"),
        ],
    )
    def test_groups_that_no_group_would_hold(self, groups, message):
        with pytest.raises(ValueError, match=message):
            group_losses(jnp.array(groups), 3)

    @pytest.mark.parametrize("table", [GROUPS[:-1], (*GROUPS, 0)])
    def test_a_table_of_groups_for_another_vocabulary(self, table, key):
        with pytest.raises(ValueError, match=f"groups has {len(table)} entries and the outputs have 5 classes"):
            measured(group_losses(jnp.array(table), 3), "language_model/cross_entropy", key)

    def test_cosine_of_one_token(self):
        with pytest.raises(ValueError, match=r"tokens has shape \(2, 1, 3\); .* sequences of at least two"):
            mean_cosine(jnp.ones((2, 1, 3)))

    def test_one_batch_bounds_no_error(self):
        with pytest.raises(ValueError, match="batches is 1; expected at least 2"):
            batch_sharpness(minibatches(1), 1)


@pytest.mark.slow
def test_probes_run_inside_an_ensemble(key):
    module = SelfAttention(AttentionConfig(key_dim=2, value_dim=2))
    inputs = jax.random.normal(key, (2, 3, 3))
    risk = objective(from_linen(module), square_loss, inputs, jnp.ones((2, 3, 2)))
    keys = jax.random.split(key, 2)
    points = jax.vmap(lambda key: module.init(key, inputs)["params"])(keys)
    probes = {"entropy": attention_entropy(), "noise": gradient_noise(), "ntk": ntk()}
    values = train(risk, points, optax.sgd(0.1), keys, steps=2, every=1, probes=probes).records.values
    assert values["entropy"][""]["entropy"].shape == (3, 2, 1)
    assert values["ntk"]["distance"].shape == values["noise"]["trace"].shape == (3, 2)
