"""Names and blocks of parameters: no leaf is lost, one layer of a stack is a block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from attnlab.curvature.operators import ggn, hessian
from attnlab.losses import square_loss
from attnlab.models.adapters import from_linen
from attnlab.objectives import objective
from attnlab.trees import block_slices, leaf_names, select
from compare import assert_close

COLLIDING = {"a/b": jnp.ones(2), "a": {"b": jnp.full(3, 2.0)}, "c": jnp.ones(1)}


def test_paths_that_read_alike_have_names_of_their_own():
    assert sorted(leaf_names(COLLIDING)) == ["['a']['b']", "['a/b']", "c"]
    assert sum(s.stop - s.start for s in block_slices(COLLIDING).values()) == 6


def test_no_parameter_of_a_colliding_name_is_lost():
    predict = lambda p, x: x * (jnp.sum(p["a/b"] ** 2) + jnp.sum(p["a"]["b"] ** 3) + jnp.sum(p["c"]))  # noqa: E731
    risk = objective(predict, square_loss, jnp.ones(1), jnp.zeros(1))
    operator = hessian(risk, COLLIDING)
    blocks = operator.blocks()
    assert len(blocks) == 9
    block = hessian(risk, COLLIDING, block="['a']['b']")
    assert_close(block.dense(), blocks["['a']['b']", "['a']['b']"], 1e-12)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + jnp.tanh(nn.Dense(3, param_dtype=jnp.float64)(x)), None


class Stack(nn.Module):
    scanned: bool

    @nn.compact
    def __call__(self, x):
        if self.scanned:
            stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
            return stack(name="layers")(x, None)[0]
        for n in range(4):
            x = Block(name=f"layer_{n}")(x, None)[0]
        return x


def stacked():
    x, y = (jax.random.normal(jax.random.key(n), (5, 3)) for n in (0, 1))
    params = Stack(True).init(jax.random.key(2), x)["params"]
    unrolled = {f"layer_{n}": jax.tree.map(lambda leaf, n=n: leaf[n], params["layers"]) for n in range(4)}
    risks = [objective(from_linen(Stack(scanned)), square_loss, x, y) for scanned in (True, False)]
    return risks, params, unrolled


@pytest.mark.parametrize(
    ("entry", "leaf"),
    [
        pytest.param("layers[1]", "layer_1", marks=pytest.mark.slow),
        ("layers[3]/Dense_0/kernel", "layer_3/Dense_0/kernel"),
    ],
)
def test_one_layer_of_a_stack_is_a_block(entry, leaf):
    (scanned, plain), params, unrolled = stacked()
    for build in (hessian, ggn):
        found = build(scanned, params, block=entry)
        assert_close(found.dense(), build(plain, unrolled, block=leaf).dense(), 1e-12)
    assert list(found.point)[-1] == f"{entry.split('/')[0]}/Dense_0/kernel"
    selection = select(params, entry)
    again = selection.put(params, selection.take(params))
    assert_close(again, params, 0.0)


@pytest.mark.parametrize(
    ("block", "error", "message"),
    [
        ("layers[4]", ValueError, "expected an entry from 0 to 3 of the stack 'layers'"),
        ("layers/1", ValueError, r"One layer of a stack along the first axis is written 'layers\[1\]'"),
        ("lairs[1]", ValueError, "there is no parameter block 'lairs'"),
        (3, TypeError, "block is 3; expected a name such as 'query'"),
        (["query"], TypeError, r"block is \['query'\]; expected a name"),
    ],
)
def test_blocks_that_are_refused(block, error, message):
    (scanned, _), params, _ = stacked()
    with pytest.raises(error, match=message):
        hessian(scanned, params, block=block)


def test_leaves_of_different_lengths_are_no_stack():
    with pytest.raises(ValueError, match=r"first axes \[\(2,\), \(3,\)\]; expected one length, that of a stack"):
        select({"layers": {"a": np.ones((2, 2)), "b": np.ones((3, 2))}}, "layers[0]")
