"""Deep linear attention with two matrices a layer, written out; fresh prompts at every step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attnlab.icl.training import FreshPrompts, merged_stack_predict, stack_training
from attnlab.training import train
from compare import assert_close


def by_hand(params, prompts):
    """Prompt by prompt and layer by layer, Z + (1/N) (Z Q Z_c^T) Z_c P."""
    found = []
    for i in range(len(prompts.target)):
        context = np.column_stack([prompts.inputs[i], prompts.labels[i]])
        tokens = np.vstack([context, np.append(prompts.query[i], 0.0)])
        for query_key, value in zip(params["query_key"], params["value"], strict=True):
            known = tokens[:-1]
            tokens = tokens + (tokens @ query_key @ known.T) @ known @ value / len(known)
        found.append(-tokens[-1, -1])
    return np.array(found)


def test_stack_is_its_equation(key):
    risk, params = stack_training(key, layers=3, dimension=2, length=4, prompts=5, scale=0.5)
    expected = by_hand(jax.tree.map(np.asarray, params), risk.inputs)
    assert_close(merged_stack_predict(params, risk.inputs), jnp.asarray(expected), 1e-12)
    assert_close(risk(params), np.mean((expected - risk.targets) ** 2), 1e-12)


def test_every_step_sees_prompts_of_its_own(key):
    risk, params = stack_training(key, layers=1, dimension=2, length=4, prompts=5)
    losses = train(risk, params, optax.sgd(0.0), key, steps=4, resample=FreshPrompts(2, 4, 3)).records.losses
    assert len(set(np.asarray(losses).tolist())) == 4


def test_sizes_are_positive(key):
    with pytest.raises(ValueError, match="layers is 0; expected a positive whole number"):
        stack_training(key, layers=0, dimension=2, length=4, prompts=5)
