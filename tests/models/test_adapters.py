"""One model written as a linen module, an nnx module and a plain function is one `predict`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import oracles
from attnlab.curvature import CurvatureWarning, hessian
from attnlab.losses import cross_entropy, square_loss
from attnlab.models import heads
from attnlab.models.adapters import at_positions, from_equinox, from_function, from_linen, from_nnx, mean_over_tokens
from attnlab.models.attention import AttentionConfig, SelfAttention
from attnlab.objectives import objective
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


class Training(nnx.Module):
    """Dropout and batch norm: two kinds of state that a call in training mode changes."""

    def __init__(self):
        self.linear = nnx.Linear(3, 2, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
        self.drop, self.norm = nnx.Dropout(0.5, rngs=nnx.Rngs(1)), nnx.BatchNorm(2, rngs=nnx.Rngs(2), dtype=jnp.float64)

    def __call__(self, inputs):
        return self.norm(self.drop(self.linear(inputs)))


@pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types")
def test_an_nnx_model_in_training_mode_is_one_function_and_stays_as_it_is():
    with jax.numpy_dtype_promotion("standard"):
        model, inputs = Training(), jax.random.normal(jax.random.key(0), (6, 3))
        model.train()
        before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))
        predict, params = from_nnx(model)
        first, again, traced = predict(params, inputs), predict(params, inputs), jax.jit(predict)(params, inputs)
        assert_close(again, first, 0)
        assert_close(traced, first, 1e-12)
        assert_close(nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)), before, 0)
        # The caller's own call draws the dropout that the adapter held: its counter had not moved.
        assert_close(model(inputs), first, 1e-12)
        risk = objective(predict, square_loss, inputs, jnp.zeros((6, 2)))
        with pytest.warns(CurvatureWarning, match="outputs depend on the"):
            hessian(risk, params)


class Stack(nnx.Module):
    """Twelve layers that do not commute: in the order of strings, 10 and 11 come before 2."""

    def __init__(self):
        self.layers = nnx.List([nnx.Linear(3, 3, rngs=nnx.Rngs(n), param_dtype=jnp.float64) for n in range(12)])

    def __call__(self, inputs):
        for layer in self.layers:
            inputs = jnp.tanh(layer(inputs))
        return inputs


def as_strings(tree):
    """As a checkpoint restores it: keys are strings, in another order."""
    return {str(k): as_strings(v) for k, v in reversed(list(tree.items()))} if isinstance(tree, dict) else tree


def test_nnx_parameters_are_matched_by_their_paths():
    model, inputs = Stack(), jax.random.normal(jax.random.key(0), (2, 3))
    predict, params = from_nnx(model)
    restored = as_strings(params)
    assert_close(predict(restored, inputs), model(inputs), 1e-14)
    # Where a jitted function has sorted the strings, too.
    assert_close(jax.jit(predict)(restored, inputs), model(inputs), 1e-14)
    del restored["layers"]["3"]
    with pytest.raises(
        ValueError, match=r"params lack \['layers/3/bias', 'layers/3/kernel'\] of the model's parameters"
    ):
        predict(restored, inputs)
    with pytest.raises(ValueError, match=r"hold \['layers/12'\] that the model has not"):
        predict({"layers": {**params["layers"], 12: jnp.ones(3)}}, inputs)


class Modes(nn.Module):
    """A linen module with keywords, dropout and batch statistics."""

    @nn.compact
    def __call__(self, inputs, mask=None, train=True):
        hidden = nn.Dense(4, param_dtype=jnp.float64)(inputs)
        with jax.numpy_dtype_promotion("standard"):  # its statistics are in single precision
            hidden = nn.BatchNorm(use_running_average=not train, param_dtype=jnp.float64, dtype=jnp.float64)(hidden)
        hidden = nn.Dropout(0.5, deterministic=not train)(hidden)
        return hidden if mask is None else hidden * mask


def test_linen_keywords_rngs_and_collections():
    inputs, mask = jax.random.normal(jax.random.key(0), (5, 3)), jnp.arange(4.0)[None]
    module = Modes()
    # Flax starts the statistics in single precision, whose square roots differ between programs.
    variables = jax.tree.map(lambda leaf: leaf.astype(float), module.init(jax.random.key(1), inputs, train=False))
    predict = from_linen(module, variables, train=False, mask=mask)
    expected = module.apply(variables, inputs, mask=mask, train=False)
    assert_close(jax.jit(predict)(variables["params"], inputs), expected, 1e-14)
    doubled = {**variables, "params": jax.tree.map(lambda leaf: 2 * leaf, variables["params"])}
    expected = module.apply(doubled, inputs, mask=mask, train=False)
    assert_close(predict(doubled["params"], inputs), expected, 1e-14)
    # Keys are arguments of a program, and held fixed.
    dropped = from_linen(nn.Dropout(0.5, deterministic=False), rngs={"dropout": jax.random.key(2)})
    found = dropped({}, inputs)
    assert_close(dropped({}, inputs), found, 0)
    assert_close(found, nn.Dropout(0.5, deterministic=False).apply({}, inputs, rngs={"dropout": jax.random.key(2)}), 0)


def test_a_linen_module_that_changes_its_statistics_is_refused():
    inputs = jnp.ones((5, 3))
    variables = Modes().init(jax.random.key(1), inputs, train=False)
    predict = from_linen(Modes(), variables, rngs={"dropout": jax.random.key(2)})
    with pytest.raises(ValueError, match=r"changes other variables than its parameters: .* train=False"):
        predict(variables["params"], inputs)


def test_an_equinox_module():
    equinox = pytest.importorskip("equinox")

    class Layer(equinox.Module):
        linear: equinox.nn.Linear
        drop: equinox.nn.Dropout
        table: jax.Array
        activation: object

        def __call__(self, example):
            return self.drop(self.activation(self.linear(example[self.table])))

    layer = Layer(
        equinox.nn.Linear(3, 2, key=jax.random.key(0)), equinox.nn.Dropout(0.5), jnp.array([2, 0, 1]), jnp.tanh
    )
    layer = equinox.nn.inference_mode(layer)
    predict, params = from_equinox(layer)
    inputs, targets = jax.random.normal(jax.random.key(1), (5, 3)), jnp.zeros((5, 2))
    assert leaf_names(params) == ("linear/weight", "linear/bias")
    assert_close(predict(params, inputs), jax.vmap(layer)(inputs), 1e-14)
    risk = objective(predict, square_loss, inputs, targets)
    plain = lambda p, x: jnp.tanh(x[:, jnp.array([2, 0, 1])] @ p["w"].T + p["b"][None])  # noqa: E731
    point = {"w": params.linear.weight, "b": params.linear.bias}
    expected = oracles.hessian(objective(plain, square_loss, inputs, targets), point)
    order = np.array([6, 7, 0, 1, 2, 3, 4, 5])  # a dict is flattened in sorted order, a module in that of its fields
    found = hessian(risk, params)
    assert_close(found.dense()[np.ix_(order, order)], expected, 1e-12)
    assert_close(hessian(risk, params, block="linear/bias").dense(), expected[:2, :2], 1e-12)
    whole, _ = from_equinox(equinox.nn.Linear(3, 2, key=jax.random.key(0)), vmap=False)
    assert whole(equinox.filter(layer.linear, equinox.is_inexact_array), inputs[0]).shape == (2,)


@pytest.mark.parametrize("adapter", [from_linen, from_nnx, from_equinox])
def test_an_adapter_of_another_kind_of_model(adapter):
    with pytest.raises(TypeError, match=r"is a function; expected an? .*Module\. Take from_"):
        adapter(lambda params, inputs: inputs)


def test_a_static_keyword_is_hashable():
    with pytest.raises(TypeError, match=r"axes is \[0\], which cannot be hashed; expected arrays, or a static value"):
        from_linen(MODULE, axes=[0])
