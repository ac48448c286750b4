"""The exact probe of an attention layer's blocks against dense autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import oracles
from attnlab.dynamics.closed_form import attention_blocks
from attnlab.losses import cross_entropy, square_loss
from attnlab.models.adapters import from_linen
from attnlab.models.attention import AttentionConfig, SelfAttention
from attnlab.objective import objective
from attnlab.training import train
from attnlab.trees import block_slices
from compare import assert_close

LAYER = AttentionConfig(key_dim=2, value_dim=3, causal=True)


def problem(key, loss):
    module, tokens = SelfAttention(LAYER), jax.random.normal(key, (2, 4, 3))
    targets = jax.random.normal(key, (2, 4, 3)) if loss is square_loss else jnp.arange(8).reshape(2, 4) % 3
    return objective(from_linen(module), loss, tokens, targets), module.init(key, tokens)["params"]


@pytest.mark.parametrize("loss", [square_loss, cross_entropy])
def test_blocks_are_those_of_autodiff_along_training(loss, key):
    risk, params = problem(key, loss)
    run = train(risk, params, optax.sgd(0.5), key, steps=2, every=2, probes={"blocks": attention_blocks(LAYER)})
    values = jax.tree.map(lambda leaf: leaf[-1], run.records.values["blocks"])
    whole, outer = oracles.hessian(risk, run.params), oracles.ggn(risk, run.params)
    rows = block_slices(run.params)
    for part, matrix in {"full": whole, "outer": outer, "functional": whole - outer}.items():
        scale = np.linalg.norm(matrix)
        for pair, norm in values[part].items():
            first, second = pair.split("/")
            assert_close(norm, np.linalg.norm(matrix[rows[first], rows[second]]), 1e-10, scale)
    assert values["moments"]["second"] > 0


def test_other_losses_are_refused(key):
    risk, params = problem(key, square_loss)
    other = objective(
        risk.predict, lambda outputs, targets: square_loss(outputs, targets) / 2, risk.inputs, risk.targets
    )
    with pytest.raises(ValueError, match="the closed form knows those of"):
        train(other, params, optax.sgd(0.5), key, steps=1, probes={"blocks": attention_blocks(LAYER)})
