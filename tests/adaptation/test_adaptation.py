"""Reparametrised objectives against autodiff of the composition, LoRA's counts, prompts and federated rounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.adaptation.federated import averaging_bias, central_descent, communication_ratio, drift, federated_round
from attnlab.adaptation.lora import certificate, inertia, initial_hessian, initial_inertia, lora
from attnlab.adaptation.prompts import prompt_tuned
from attnlab.adaptation.pullback import pullback, reparametrise
from attnlab.curvature import hessian
from attnlab.data.contextual import contextual_mixture, pooling_error
from attnlab.losses import square_loss
from attnlab.models.adapters import from_linen, mean_over_tokens
from attnlab.models.attention import AttentionConfig, SelfAttention
from attnlab.objectives import objective
from cases import CASES
from compare import assert_close
from oracles import hessian as naive_hessian


def test_pullback_sums_to_the_hessian_of_a_users_model():
    risk, params = CASES["block_pre/cross_entropy"](jax.random.key(1))
    change, factors = lora(params, "attention", 1, jax.random.key(2))
    factors = jax.tree.map(lambda leaf: leaf + 0.3, factors)
    adapted = reparametrise(risk, change)
    expected = naive_hessian(adapted, factors)
    parts = pullback(risk, change, factors)
    assert_close(parts.total.dense(), expected)
    assert_close(hessian(adapted, factors).dense(), expected)
    assert float(jnp.linalg.norm(parts.connection.dense())) > 0


def test_lora_starts_at_the_model_and_adapts_what_is_named():
    _, params = CASES["multi_head/square"](jax.random.key(1))
    change, factors = lora(params, "query", 2, jax.random.key(2))
    assert_close(change(factors), params, 0.0)
    moved = change(jax.tree.map(lambda leaf: leaf + 1.0, factors))
    changed = {name for name in params if not np.array_equal(moved[name], params[name])}
    assert changed == {"query"}
    assert factors["query"]["B"].shape == (params["query"].shape[0], 2)
    with pytest.raises(ValueError, match="no parameter block 'quary'"):
        lora(params, "quary", 2, jax.random.key(2))
    with pytest.raises(ValueError, match="rank is 0"):
        lora(params, "query", 0, jax.random.key(2))
    with pytest.raises(ValueError, match="LoRA adapts matrices"):
        lora({"bias": jnp.ones(3)}, "bias", 1, jax.random.key(2))


def test_inertia_counts_signs():
    assert inertia(np.array([-2.0, -1e-14, 0.0, 3.0, 1.0])) == (1, 2, 2)
    assert sum(initial_inertia((5, 4), 2, 3)) == 2 * (5 + 4)


def test_certificate_is_one_at_the_nuclear_minimum_and_above_at_a_saddle():
    # min over W of |W - M|^2 / 2 + penalty |W|_* shrinks the singular values of M; W = 0 is a saddle of its factors
    matrix, penalty = jnp.diag(jnp.array([3.0, 0.5, 0.2])), 1.0
    minimum = jnp.diag(jnp.array([2.0, 0.0, 0.0]))
    assert_close(certificate(minimum - matrix, penalty), jnp.array(1.0), 1e-12)
    assert_close(certificate(-matrix, penalty), jnp.array(3.0), 1e-12)


def test_prompts_come_first_and_their_outputs_go():
    module = SelfAttention(AttentionConfig(key_dim=2, value_dim=2, causal=True))
    tokens = jax.random.normal(jax.random.key(1), (2, 3, 4))
    params = module.init(jax.random.key(2), tokens)["params"]
    risk = objective(from_linen(module), square_loss, tokens, jnp.zeros((2, 3, 2)))
    prompt = jax.random.normal(jax.random.key(3), (5, 4))
    outputs = prompt_tuned(risk, params).outputs(prompt)
    whole = jnp.concatenate([prompt, tokens[1]])
    assert_close(outputs[1], module.apply({"params": params}, whole)[5:])


def test_a_model_that_pools_its_tokens_takes_no_prompt():
    module = SelfAttention(AttentionConfig(key_dim=2, value_dim=2))
    tokens = jnp.ones((2, 3, 4))
    params = module.init(jax.random.key(2), tokens)["params"]
    pooled = objective(mean_over_tokens(from_linen(module)), square_loss, tokens, jnp.zeros((2, 2)))
    with pytest.raises(
        ValueError, match=r"outputs have shape \(2, 2\) for tokens of shape \(2, 8, 4\).*one output a token"
    ):
        prompt_tuned(pooled, params)(jnp.ones((5, 4)))


def test_the_initial_hessian_has_the_counted_inertia(key):
    curvature, gradient, right = jnp.eye(12), jnp.ones((3, 4)), jax.random.normal(key, (2, 4))
    found = inertia(np.linalg.eigvalsh(initial_hessian(curvature, gradient, right)))
    assert found == initial_inertia((3, 4), 2, 1)


def stacked(risk, count, key):
    """Clients with the same model and inputs of their own."""
    noise = jax.random.normal(key, (count, *risk.inputs.shape))
    one = [jax.tree.map(lambda leaf: leaf, risk) for _ in range(count)]
    clients = jax.tree.map(lambda *leaves: jnp.stack(leaves), *one)
    return clients.__class__(clients.predict, clients.loss, clients.inputs + noise, clients.targets)


def test_federated_rounds_against_loops():
    risk, params = CASES["linear/square"](jax.random.key(1))
    clients = stacked(risk, 3, jax.random.key(2))
    members = [jax.tree.map(lambda leaf, m=m: leaf[m], clients) for m in range(3)]
    gradient = jax.jit(lambda risk, params: jax.grad(risk)(params))

    def step(params, slopes):
        return jax.tree.map(lambda leaf, slope: leaf - 0.1 * slope, params, slopes)

    ends, central = [], params
    for member in members:
        local = params
        for _ in range(3):
            local = step(local, gradient(member, local))
        ends.append(local)
    for _ in range(3):
        slopes = [gradient(member, central) for member in members]
        central = step(central, jax.tree.map(lambda *leaves: sum(leaves) / 3, *slopes))
    expected = jax.tree.map(lambda *leaves: sum(leaves) / 3, *ends)
    assert_close(jax.jit(federated_round, static_argnums=3)(clients, params, 0.1, 3), expected)
    assert_close(jax.jit(central_descent, static_argnums=3)(clients, params, 0.1, 3), central)


def test_no_drift_after_one_local_step_or_with_equal_clients():
    risk, params = CASES["linear/square"](jax.random.key(1))
    zero = jax.tree.map(jnp.zeros_like, params)
    assert_close(drift(stacked(risk, 2, jax.random.key(2)), params, 0.1, 1), zero, 1e-15, scale=1.0)
    equal = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), risk)
    assert_close(drift(equal, params, 0.1, 5), zero, 1e-14, scale=1.0)
    with pytest.raises(ValueError, match="local_steps is 0"):
        federated_round(equal, params, 0.1, 0)


def test_averaging_bias_and_communication(key):
    left, right = jax.random.normal(key, (4, 5, 2)), jax.random.normal(jax.random.fold_in(key, 1), (4, 2, 3))
    expected = sum(b @ a for b, a in zip(left, right, strict=True)) / 4 - left.mean(0) @ right.mean(0)
    assert_close(averaging_bias({"W": {"B": left, "A": right}})["W"], expected)
    params = {"W": jnp.zeros((6, 4))}
    assert communication_ratio(params, lora(params, "W", 2, key)[1]) == 24 / 20


def test_contextual_mixture_has_its_tokens(key):
    tokens, labels = contextual_mixture(key, 50, 8, 3, 0.25, 2.0)
    assert set(np.unique(labels)) == {-1.0, 1.0}
    assert_close(tokens[:, :2], jnp.stack([jnp.ones(50), labels, jnp.zeros(50)], -1)[:, None] * jnp.ones((50, 2, 1)))
    assert float(tokens[:, 2:, 0].max()) <= 0
    assert float(tokens[:, 2:, 0].min()) >= -2
    assert pooling_error(0.25, 0.3) == 0
    assert pooling_error(0.25, 0.5) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="relevant is 2"):
        contextual_mixture(key, 5, 8, 3, 2, 1.0)
