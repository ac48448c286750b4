"""What curvature tools get wrong in single precision on a LayerNorm language model, and must not."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from attnlab.curvature import hessian, spectral_density
from attnlab.losses import cross_entropy
from attnlab.models.adapters import from_linen
from attnlab.models.attention import AttentionConfig
from attnlab.models.transformer import LanguageModel, LanguageModelConfig, TransformerConfig
from attnlab.objectives import objective


@cache
def language_model():
    """A pre-LayerNorm language model with biases, away from its initialisation, in float32."""
    attention = AttentionConfig(key_dim=4, value_dim=4, heads=2, causal=True, output_dim=8)
    blocks = TransformerConfig(attention, layers=2, mlp_width=16, bias=True, final_norm=True)
    module = LanguageModel(LanguageModelConfig(blocks, vocabulary=16, length=8, width=8, dtype="float32"))
    random = np.random.default_rng(0)
    tokens = jnp.asarray(random.integers(16, size=(4, 9)))
    shapes = jax.eval_shape(module.init, jax.random.key(0), tokens[:, :-1])["params"]
    params = jax.tree.map(lambda leaf: jnp.asarray(0.6 * random.standard_normal(leaf.shape), leaf.dtype), shapes)
    return objective(from_linen(module), cross_entropy, tokens[:, :-1], tokens[:, 1:]), params


@cache
def density(scale=1.0):
    risk, params = language_model()
    loss = risk.loss if scale == 1.0 else lambda o, t: jnp.float32(scale) * cross_entropy(o, t)
    operator = hessian(objective(risk.predict, loss, risk.inputs, risk.targets), params)
    return operator, spectral_density(operator, jax.random.key(0), samples=4, steps=32)


@pytest.mark.slow
def test_products_are_symmetric(key):
    operator, _ = density()
    u, v = jax.random.normal(key, (2, operator.dimension), jnp.float32)
    unravel = ravel_pytree(operator.point)[1]
    image_u, image_v = (ravel_pytree(operator.mv(unravel(x)))[0] for x in (u, v))
    size = jnp.linalg.norm(u) * jnp.linalg.norm(image_v)
    assert abs(jnp.vdot(u, image_v) - jnp.vdot(v, image_u)) <= 1e-5 * size


@pytest.mark.slow
def test_a_scaled_loss_scales_the_spectrum():
    (_, whole), (_, tiny) = density(), density(1e-6)
    for power in (1, 2, 3):
        expected, found = whole.moment(power).value, tiny.moment(power).value
        assert abs(float(found) * 10.0 ** (6 * power) / float(expected) - 1) <= 1e-5 * power
    for end in (np.min, np.max):
        assert abs(float(end(tiny.nodes)) * 1e6 / float(end(whole.nodes)) - 1) <= 1e-5


def test_weights_are_a_probability():
    _, found = density()
    assert found.weights.dtype == found.nodes.dtype == jnp.float32
    assert np.all(found.weights >= 0)
    assert np.all(np.abs(np.sum(found.weights, axis=1, dtype=np.float64) - 1) <= 2e-6)
