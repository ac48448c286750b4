"""What the closed forms take as independent is checked, and their norms hold at any scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import closed_form_of, problem

from attnlab.attention import attention_hessian, cross_layer_ggn, downstream_derivatives, nearest_kronecker
from attnlab.models.adapters import from_linen
from attnlab.models.attention import AttentionConfig
from attnlab.models.transformer import Transformer, TransformerConfig
from attnlab.objectives import objective
from compare import assert_close
from nightly import nightly


def couples_sequences(outputs):
    return jnp.mean(outputs**2) + jnp.mean(jnp.mean(outputs, axis=0) ** 2)


def couples_tokens(outputs):
    return jnp.mean(outputs**2) + jnp.mean(jnp.mean(outputs, axis=1) ** 2)


def network(layers, loss):
    module = Transformer(
        TransformerConfig(AttentionConfig(key_dim=2, value_dim=2, output_dim=3), layers, mlp_width=4, norm=None)
    )
    risk = objective(from_linen(module), lambda outputs, targets: loss(outputs), TOKENS, TOKENS)
    return risk, module.init(jax.random.key(1), TOKENS)["params"]


TOKENS = jax.random.normal(jax.random.key(0), (2, 3, 3))
ENTRIES = {
    "cross layer": lambda loss: cross_layer_ggn(*network(2, loss), "layer_0/attention", "layer_1/attention"),
    "last layer": lambda loss: attention_hessian(*network(1, loss)),
    "coupled": lambda loss: attention_hessian(*network(2, loss), "layer_0/attention"),
    "downstream coupled": lambda loss: downstream_derivatives(lambda x: x, loss, TOKENS),
    "downstream ggn": lambda loss: downstream_derivatives(lambda x: x, loss, TOKENS, part="ggn"),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_loss_that_couples_sequences_is_refused(entry):
    with pytest.raises(ValueError, match=r"couples different (sequences|tokens) \(by .* of its size\); expected each"):
        ENTRIES[entry](couples_sequences)


def test_tokens_may_be_coupled_where_that_is_said():
    outputs = TOKENS
    gradient, curvature = downstream_derivatives(lambda x: x, couples_tokens, outputs)
    expected = jax.hessian(couples_tokens)(outputs)
    assert_close(gradient, jax.grad(couples_tokens)(outputs), 1e-14)
    assert_close(curvature[0], expected[0, :, :, 0], 1e-14)
    with pytest.raises(ValueError, match="couples different tokens"):
        downstream_derivatives(lambda x: x, couples_tokens, outputs, coupled=False)


@pytest.mark.parametrize("exponent", nightly((-12, -3, 0, 3), (-3,)))
@pytest.mark.parametrize("name", [pytest.param("heads_projection", marks=pytest.mark.slow), "cross_entropy"])
def test_norms_in_single_precision_at_any_scale(name, exponent):
    """Tokens scaled, against the same in 64 bits: where the norm is a number of the dtype, it is right."""
    config, loss, params, inputs, targets, mask = problem(name, jax.random.key(3))
    scaled = inputs * 10.0**exponent
    exact = closed_form_of(config, loss, params, scaled, targets, mask).norms()
    single = lambda tree: jax.tree.map(  # noqa: E731
        lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )
    half = closed_form_of(config, loss, single(params), single(scaled), single(targets), mask)
    compared = 0
    for part, norms in half.norms().items():
        for pair, norm in norms.items():
            expected = float(exact[part][pair])
            # Where softmax is certain its moments are zero; factors below the dtype's range are zero themselves.
            if 1e-34 < expected < 1e30:
                compared += 1
                np.testing.assert_allclose(norm, expected, 2e-3)
                block = half.block(*pair, part)
                np.testing.assert_allclose(block.norm(), norm, 1e-5)
    assert compared >= 2


def test_nearest_kronecker_product_of_a_small_block():
    config, loss, params, inputs, targets, mask = problem("one_head", jax.random.key(3))
    block = closed_form_of(config, loss, params, inputs, targets, mask).block("query", "query")
    tiny = 1e-200 * block
    expected, found = nearest_kronecker(block), nearest_kronecker(tiny)
    assert_close(found.relative_error, expected.relative_error, 1e-12)
    assert_close(jnp.kron(found.left, found.right) * 1e200, jnp.kron(expected.left, expected.right), 1e-10)
    assert_close(tiny.norm() * 1e200, block.norm(), 1e-12)
    assert_close(tiny.inner(1e150 * block) * 1e50, block.inner(block), 1e-12)
    assert np.isfinite(float(tiny.norm()))
