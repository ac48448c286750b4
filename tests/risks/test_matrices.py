"""A risk in its matrices alone: the same function, and the same block of the Hessian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.curvature.operators import hessian
from attnlab.risks.digits import digits_transformer
from attnlab.risks.matrices import matrices_alone
from attnlab.trees import leaf_names
from compare import assert_close


@pytest.mark.slow
def test_the_vectors_stand_still(key):
    risk, params = digits_transformer(key, key, 4)
    alone, block = matrices_alone(risk, params)
    moved = jax.tree.map(lambda leaf: 1.1 * leaf, block)
    whole = jax.tree.map(lambda leaf: 1.1 * leaf if leaf.ndim > 1 else leaf, params)
    assert_close(alone(moved), risk(whole), 1e-12)
    assert set(block) == {n for n in leaf_names(params) if not n.endswith(("scale", "bias"))}
    direction = jax.tree.map(lambda leaf: jnp.sin(jnp.arange(leaf.size, dtype=float)).reshape(leaf.shape), block)
    padded = dict.fromkeys(leaf_names(params), jnp.zeros(())) | direction
    shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
    leaves = [jnp.broadcast_to(value, shape) for value, shape in zip(padded.values(), shapes, strict=True)]
    product = hessian(risk, params).mv(jax.tree.unflatten(jax.tree.structure(params), leaves))
    named = dict(zip(leaf_names(params), jax.tree.leaves(product), strict=True))
    assert_close(dict(hessian(alone, block).mv(direction)), {name: named[name] for name in block}, 1e-10)


def test_no_matrix():
    risk, _ = digits_transformer(jax.random.key(0), jax.random.key(0), 4)
    with pytest.raises(ValueError, match="params has the leaves a, none of two axes"):
        matrices_alone(risk, {"a": np.ones(3)})
