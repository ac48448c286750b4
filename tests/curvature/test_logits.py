"""Curvature of a model whose logits stay in two factors, against the same model with its logits multiplied out."""

import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from attnlab import logits as logits_module
from attnlab.curvature.operators import empirical_fisher, functional, ggn, hessian
from attnlab.logits import Logits
from attnlab.losses import cross_entropy, square_loss
from attnlab.models.adapters import from_linen
from attnlab.models.attention import AttentionConfig
from attnlab.models.positions import Rotary
from attnlab.models.transformer import LanguageModel, LanguageModelConfig, TransformerConfig
from attnlab.objectives import objective
from cases import generator, generic_params
from compare import assert_close
from nightly import nightly

FEATURES, DIM, CLASSES, BATCH = 3, 2, 7, 2
PARTS = {"hessian": hessian, "ggn": ggn, "functional": functional}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Three positions at once, so that ten positions are four chunks, filled up, and eight are four whole ones."""
    monkeypatch.setattr(logits_module, "CHUNK_BYTES", 3 * CLASSES * 8)


def in_factors(params, inputs):
    # The table reads the first parameter too, as one that is tied to an embedding does.
    return Logits(jnp.tanh(inputs @ params["first"]), params["table"] + jnp.sum(jnp.sin(params["first"])))


def multiplied_out(params, inputs):
    return in_factors(params, inputs).dense()


def risks(length=5, loss=cross_entropy, **options):
    """The objective with logits in factors, the same one with logits multiplied out, and a point."""
    random = generator(jax.random.key(1))
    inputs = jnp.asarray(random.standard_normal((BATCH, length, FEATURES)))
    targets = jnp.asarray(random.integers(CLASSES, size=(BATCH, length)))
    shapes = {"first": (FEATURES, DIM), "table": (CLASSES, DIM)}
    params = {name: jnp.asarray(random.standard_normal(shape)) for name, shape in shapes.items()}
    made = (objective(model, loss, inputs, targets, **options) for model in (in_factors, multiplied_out))
    return *made, params


WEIGHTS = jnp.array([[1.0, 1.0, 0.5, 0.0, 2.0], [1.0, 3.0, 1.0, 1.0, 0.0]])
DATA = {
    "chunks that divide": {"length": 4},
    "weights, chunks filled up": {"weights": WEIGHTS},
    "ignored label": {"loss": cross_entropy.ignoring(3)},
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("data", nightly(DATA, ("weights, chunks filled up",)))
def test_operators_are_those_of_the_whole_logits(part, data):
    factored, dense, params = risks(**DATA[data])
    found, expected = (PARTS[part](risk, params, check=False) for risk in (factored, dense))
    assert_close(found.dense(), expected.dense(), 1e-12)


def test_loss_and_gradient_are_those_of_the_whole_logits():
    factored, dense, params = risks(weights=WEIGHTS)
    found, expected = (jax.jit(jax.value_and_grad(risk))(params) for risk in (factored, dense))
    assert_close(found, expected, 1e-13)
    assert_close(factored(params), expected[0], 1e-14)


@pytest.mark.slow
def test_self_checks_and_examples_take_factors():
    """Operators with their checks: a part of the batch has its own rows of the hidden state, and the same table."""
    factored, dense, params = risks(weights=WEIGHTS)
    assert_close(empirical_fisher(factored, params).dense(), empirical_fisher(dense, params).dense(), 1e-12)


def test_weights_have_derivatives():
    factored, dense, params = risks(weights=WEIGHTS)
    found, expected = (
        jax.grad(lambda weights, risk=risk: replace(risk, weights=weights)(params))(WEIGHTS)
        for risk in (factored, dense)
    )
    assert_close(found, expected, 1e-12)


def test_one_chunk_where_all_fit(monkeypatch):
    monkeypatch.setattr(logits_module, "CHUNK_BYTES", 2**20)
    factored, dense, params = risks(length=3)
    found, expected = (hessian(risk, params, check=False).dense() for risk in (factored, dense))
    assert_close(found, expected, 1e-12)


def language_model(**options):
    head = AttentionConfig(4, 2, 2, output_dim=4, key_value_heads=1, rotary=Rotary(base=50.0), causal=True)
    scheme = {"normalization": "rms_norm", "final_norm": True, "scan": True, "remat": "elementwise"}
    blocks = TransformerConfig(head, 2, 3, "gated", "silu", **scheme)
    module = LanguageModel(LanguageModelConfig(blocks, CLASSES, 5, 4, positions="none", tied=True, **options))
    tokens = jnp.arange(10).reshape(2, 5) % CLASSES
    return module, generic_params(module, tokens, generator(jax.random.key(1))), tokens


@pytest.mark.slow
def test_product_of_a_language_model_that_recomputes_its_blocks():
    module, params, tokens = language_model(factored=True)
    vector = jax.tree.map(jnp.sin, params)
    risk = objective(from_linen(module), cross_entropy, tokens, tokens[:, ::-1])
    found = hessian(risk, params, check=False).mv(vector)
    dense = LanguageModel(replace(module.config, factored=False))
    plain = objective(from_linen(dense), cross_entropy, tokens, tokens[:, ::-1])
    assert_close(found, jax.jit(lambda: jax.jvp(jax.grad(plain), (params,), (vector,))[1])(), 1e-12)


@pytest.mark.parametrize("part", PARTS)
def test_no_array_of_positions_times_vocabulary(part, monkeypatch):
    """Of the arrays with 1,000 classes in the compiled product none is larger than a chunk of four positions."""
    classes, positions = 1000, 16
    monkeypatch.setattr(logits_module, "CHUNK_BYTES", 4 * classes * 8)
    params = {"first": jnp.ones((FEATURES, DIM)), "table": jnp.ones((classes, DIM))}
    inputs, targets = jnp.ones((positions, FEATURES)), jnp.zeros(positions, int)
    built = PARTS[part](objective(in_factors, cross_entropy, inputs, targets), params, check=False)
    program = jax.jit(lambda linear, vector: linear(vector)).lower(built.linear, params).compile().as_text()
    shapes = {tuple(map(int, found.split(","))) for found in re.findall(r"f64\[([\d,]+)\]", program)}
    sizes = {shape: math.prod(shape) for shape in shapes if classes in shape}
    assert 4 * classes in sizes.values()
    assert max(sizes.values()) <= 4 * classes, sizes


def test_labels_that_are_no_class_are_nan_under_jit_and_errors_outside():
    factored, _, params = risks()
    outputs, bad = factored.outputs(params), factored.targets.at[0, 0].set(CLASSES)
    with pytest.raises(ValueError, match="1 of 10 labels that are no class, such as 7"):
        cross_entropy(outputs, bad)
    value, slopes = jax.jit(jax.value_and_grad(cross_entropy))(outputs, bad)
    assert jnp.isnan(value)
    assert jnp.isnan(slopes.hidden[0, 0]).all()


@pytest.mark.parametrize("part", PARTS)
def test_curvature_of_a_label_that_is_no_class_is_nan_under_jit(part):
    """As that of the whole logits: the curvature itself does not read the label."""
    for risk in risks(weights=WEIGHTS)[:2]:
        params = risks()[2]

        @jax.jit
        def product(targets, risk=risk, params=params):
            return PARTS[part](replace(risk, targets=targets), params).mv(params)

        assert not any(jnp.isnan(leaf).any() for leaf in product(risk.targets).values())
        assert jnp.isnan(product(risk.targets.at[0, 0].set(CLASSES))["table"]).any()
        # Where the position does not count, nor does its label.
        assert not jnp.isnan(product(risk.targets.at[0, 3].set(CLASSES))["table"]).any()


def test_losses_that_take_no_factors():
    factored, _, params = risks()
    outputs = factored.outputs(params)
    with pytest.raises(TypeError, match="outputs are Logits in two factors; the loss square of targets of dtype int64"):
        square_loss(outputs, factored.targets)
    with pytest.raises(TypeError, match="only the cross-entropy of labels takes factors"):
        cross_entropy(outputs, jnp.ones(outputs.shape))
    own = replace(factored, loss=jax.tree_util.Partial(lambda outputs, targets: jnp.mean(outputs.hidden**2)))
    with pytest.raises(TypeError, match="its Gauss-Newton matrix is not known; expected cross_entropy"):
        ggn(own, params)


@pytest.mark.parametrize("dtype", nightly((jnp.bfloat16, jnp.float16), (jnp.float16,)))
def test_sums_over_classes_and_positions_of_low_precision_are_in_single(dtype):
    """Held against the same numbers in double: the loss to rounding of single precision, slopes to one of their own."""
    random = generator(jax.random.key(2))
    low = {"hidden": jnp.asarray(random.standard_normal((40, 30)), dtype)}
    low["table"] = jnp.asarray(random.standard_normal((300, 30)), dtype)
    labels = jnp.asarray(random.integers(300, size=40))

    def at(params):
        risk = objective(lambda params, _: Logits(params["hidden"], params["table"]), cross_entropy, labels, labels)
        vector = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape).astype(dtype), params)
        vector = jax.tree.map(lambda leaf, point: leaf.astype(point.dtype), vector, params)
        slopes = jax.grad(risk)(params)
        return risk(params), (slopes, *(build(risk, params, check=False).mv(vector) for build in PARTS.values()))

    loss, found = at(low)
    exact, expected = at(jax.tree.map(lambda leaf: leaf.astype(float), low))
    assert loss.dtype == jnp.float32
    assert_close(loss.astype(float), exact, 1e-6)
    epsilon = float(jnp.finfo(dtype).eps)
    assert_close(jax.tree.map(lambda leaf: leaf.astype(float), found), expected, 2 * epsilon)


def test_a_dense_loss_of_low_precision_is_in_single():
    outputs = jnp.asarray(generator(jax.random.key(3)).standard_normal((500, 100)), jnp.bfloat16)
    labels = jnp.arange(500) % 100
    wide = outputs.astype(float)
    assert_close(cross_entropy(outputs, labels).astype(float), cross_entropy(wide, labels), 1e-6)
    assert_close(square_loss(outputs, -outputs).astype(float), 4 * jnp.mean(wide**2), 1e-6)


@pytest.mark.parametrize("classes", nightly((7, 30), (30,)))
def test_a_block_without_the_table_in_single_precision(classes, monkeypatch):
    """The change of the table is a constant zero then: products of many vectors at once were garbage on some CPUs."""
    monkeypatch.setattr(logits_module, "CHUNK_BYTES", 2**20)
    random = generator(jax.random.key(4))
    inputs = jnp.asarray(random.standard_normal((1, 6, 8)))
    labels = jnp.asarray(random.integers(classes, size=(1, 6)))
    params = {"deep": random.standard_normal((8, 8)), "wide": random.standard_normal((8, 8))}
    params = jax.tree.map(jnp.asarray, params | {"table": random.standard_normal((classes, 8))})

    def predict(params, inputs):
        hidden = jnp.tanh(inputs @ params["deep"]) @ params["wide"]
        return Logits(hidden / jnp.sqrt(1 + jnp.mean(hidden**2, axis=-1, keepdims=True)), params["table"])

    def dense(dtype, block):
        inputs_of, params_of = jax.tree.map(lambda leaf: leaf.astype(dtype), (inputs, params))
        risk = objective(predict, cross_entropy, inputs_of, labels)
        return ggn(risk, params_of, block=block, check=False).dense()

    for block in ("deep", "wide"):
        found, exact = (dense(dtype, block) for dtype in (jnp.float32, jnp.float64))
        assert_close(found.astype(float), exact, 1e-5)
