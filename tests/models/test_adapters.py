"""One model written as a linen module, an nnx module and a plain function is one `predict`."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import oracles
from attnlab.losses import cross_entropy, square_loss
from attnlab.models import heads
from attnlab.models.adapters import at_positions, from_function, from_linen, from_nnx, mean_over_tokens
from attnlab.models.attention import AttentionConfig, SelfAttention
from attnlab.objective import objective
from attnlab.trees import leaf_names
from compare import assert_close

MODULE = SelfAttention(AttentionConfig(key_dim=2, value_dim=2))


class NnxAttention(nnx.Module):
    """The same layer as a user of nnx writes it, with a state that is not a parameter."""

    def __init__(self, params):
        self.query, self.key, self.value = (nnx.Param(params[name]) for name in ("query", "key", "value"))
        self.scale = nnx.Variable(jnp.asarray(2**-0.5))

    def __call__(self, inputs):
        scores = (inputs @ self.query[...]) @ jnp.swapaxes(inputs @ self.key[...], -1, -2)
        return jax.nn.softmax(self.scale[...] * scores) @ (inputs @ self.value[...])


def plain_attention(scale, params, inputs):
    queries, keys, values = (inputs @ params[name] for name in ("query", "key", "value"))
    return heads.attend(heads.softmax_weights(scale * heads.attention_scores(queries, keys, 1.0)), values)


def layer(key):
    tokens = jax.random.normal(key, (2, 3, 3))
    return MODULE.init(key, tokens)["params"], tokens


def all_adapters(params):
    return {
        "linen": (from_linen(MODULE), params),
        "nnx": from_nnx(NnxAttention(params)),
        "function": (from_function(plain_attention, jnp.asarray(2**-0.5)), params),
    }


def test_all_adapters_have_one_output_and_one_hessian(key):
    params, tokens = layer(key)
    expected_outputs = MODULE.apply({"params": params}, tokens)
    hessians = []
    for predict, own_params in all_adapters(params).values():
        assert leaf_names(own_params) == leaf_names(params)
        assert_close(jax.jit(predict)(own_params, tokens), expected_outputs, 1e-13)
        risk = objective(predict, square_loss, tokens, jnp.ones_like(expected_outputs))
        hessians.append(oracles.hessian(risk, own_params))
    assert_close(hessians[1], hessians[0], 1e-12)
    assert_close(hessians[2], hessians[0], 1e-12)


@pytest.mark.parametrize("name", ["linen", "nnx", "function"])
def test_objective_crosses_jit_as_an_argument(name):
    params, tokens = layer(jax.random.key(1))
    predict, own_params = all_adapters(params)[name]
    risk = objective(predict, square_loss, tokens, jnp.ones((2, 3, 2)))
    compiled = jax.jit(lambda risk, params: risk(params))
    assert_close(compiled(risk, own_params), risk(own_params), 1e-13)
    other = objective(predict, square_loss, 2 * tokens, jnp.ones((2, 3, 2)))
    assert_close(compiled(other, own_params), other(own_params), 1e-13)
    assert compiled._cache_size() == 1


def test_equal_linen_modules_share_one_compiled_function():
    params, tokens = layer(jax.random.key(1))
    compiled = jax.jit(lambda predict, params, inputs: predict(params, inputs))
    for _ in range(2):
        compiled(from_linen(SelfAttention(AttentionConfig(key_dim=2, value_dim=2))), params, tokens)
    assert compiled._cache_size() == 1


def test_nnx_model_of_lists(key):
    model = nnx.Sequential(
        nnx.Linear(3, 4, rngs=nnx.Rngs(0), param_dtype=jnp.float64),
        jnp.tanh,
        nnx.Linear(4, 2, rngs=nnx.Rngs(1), param_dtype=jnp.float64),
    )
    inputs = jax.random.normal(key, (5, 3))
    predict, params = from_nnx(model)
    assert_close(predict(params, inputs), model(inputs), 1e-14)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, params)
    assert float(jnp.max(jnp.abs(predict(doubled, inputs) - model(inputs)))) > 1e-3


class Shifted(nn.Module):
    """A linen module with a collection besides its parameters, and a second method."""

    @nn.compact
    def __call__(self, inputs):
        return self.product(inputs) + self.variable("fixed", "shift", lambda: jnp.ones(())).value

    @nn.nowrap
    def product(self, inputs):
        return inputs * self.param("factor", nn.initializers.ones, (), inputs.dtype)


class TwoMethods(nn.Module):
    def setup(self):
        self.factor = self.param("factor", nn.initializers.ones, (), jnp.float64)

    def __call__(self, inputs):
        return self.factor * inputs

    def negative(self, inputs):
        return -self(inputs)


def test_other_collections_are_held_fixed():
    params = {"factor": jnp.asarray(3.0)}
    predict = from_linen(Shifted(), {"fixed": {"shift": jnp.asarray(0.5)}})
    assert_close(predict(params, jnp.asarray(2.0)), jnp.asarray(6.5), 0)


def test_another_method():
    predict = from_linen(TwoMethods(), method="negative")
    assert_close(predict({"factor": jnp.asarray(3.0)}, jnp.asarray(2.0)), jnp.asarray(-6.0), 0)


def test_at_positions_reads_some_tokens(key):
    params, tokens = layer(key)
    predict = from_linen(MODULE)
    read = at_positions(predict, (2, 0))
    assert_close(jax.jit(read)(params, tokens), predict(params, tokens)[:, jnp.array([2, 0])], 1e-13)


def test_risk_at_positions_is_the_masked_average(key):
    params, tokens = layer(key)
    labels = jnp.array([[0, 1], [1, 1]])
    risk = objective(at_positions(from_linen(MODULE), range(1, 3)), cross_entropy, tokens, labels)
    log_probabilities = jax.nn.log_softmax(MODULE.apply({"params": params}, tokens))
    by_hand = [-log_probabilities[n, t + 1, labels[n, t]] for n in range(2) for t in range(2)]
    assert_close(risk(params), sum(by_hand) / 4, 1e-13)


def test_mean_over_tokens(key):
    params, tokens = layer(key)
    pooled = mean_over_tokens(from_linen(MODULE))
    assert_close(pooled(params, tokens), MODULE.apply({"params": params}, tokens).mean(axis=1), 1e-13)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ((), r"positions are \(\); expected at least one"),
        ((-1,), r"positions are \(-1,\); expected at least one whole number, none negative"),
        ((0, 3), "the last of positions is 3; expected 0 <= .* <= 2. There are 3 tokens"),
    ],
)
def test_bad_positions(positions, message):
    params, tokens = layer(jax.random.key(1))
    with pytest.raises(ValueError, match=message):
        at_positions(from_linen(MODULE), positions)(params, tokens)
