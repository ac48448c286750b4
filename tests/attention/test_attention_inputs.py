"""Bad input to the closed form, and the description of what a Hessian is made of."""

import io
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import layer_config, problem
from rich.console import Console

from attnlab.attention import attention_hessian, attention_moments, describe, describe_table
from attnlab.models.attention import SelfAttention
from compare import assert_close


def good():
    config, _, params, inputs, targets, _ = problem("batch", jax.random.key(1))
    return {"config": config, "params": params, "inputs": inputs, "targets": targets}


def empty_row(inputs):
    return jnp.ones((inputs.shape[-2],) * 2, bool).at[3].set(False)


BAD = {
    "bias": (lambda a: a | {"config": layer_config(bias=True)}, ValueError, "bias is True; the closed form covers"),
    "missing weight": (lambda a: a | {"params": {"query": a["params"]["query"]}}, ValueError, "this config has"),
    "whole model": (lambda a: a | {"params": {"params": a["params"]}}, ValueError, "attention layer alone"),
    "not a dict": (lambda a: a | {"params": jnp.ones(3)}, ValueError, "params hold"),
    "token dimension": (lambda a: a | {"inputs": a["inputs"][..., 1:]}, ValueError, r"expected \(3, 3\) for tokens"),
    "one token": (lambda a: a | {"inputs": a["inputs"][0, 0]}, ValueError, "Add the missing axes"),
    "empty": (lambda a: a | {"inputs": a["inputs"][:0]}, ValueError, "inputs has shape"),
    "nan": (lambda a: a | {"inputs": a["inputs"].at[0, 0].set(jnp.nan)}, ValueError, "inputs has 4 non-finite"),
    "nan in the weights": (
        lambda a: a | {"params": a["params"] | {"query": a["params"]["query"].at[0].set(jnp.nan)}},
        ValueError,
        "params: query has 3 non-finite of 12 values",
    ),
    "infinite": (lambda a: a | {"targets": a["targets"].at[0, 0].set(jnp.inf)}, ValueError, "targets has 2 non-finite"),
    "integers": (lambda a: a | {"inputs": jnp.ones((3, 5, 4), int)}, TypeError, "expected real floating-point"),
    "targets": (lambda a: a | {"targets": a["targets"][..., 1:]}, ValueError, "the square loss expects"),
    "too few targets": (lambda a: a | {"targets": a["targets"][:, 1:]}, ValueError, "one target per token"),
    "loss": (lambda a: a | {"loss": "squared"}, ValueError, "Did you mean 'square'"),
    "mask dtype": (lambda a: a | {"mask": jnp.ones((5, 5))}, TypeError, "mask has dtype float64"),
    "mask shape": (lambda a: a | {"mask": jnp.ones((4, 4), bool)}, ValueError, r"mask has shape \(4, 4\)"),
    "mask sequences": (lambda a: a | {"mask": jnp.ones((3, 5, 5), bool)}, ValueError, "does not broadcast"),
    "empty row": (
        lambda a: a | {"mask": empty_row(a["inputs"])},
        ValueError,
        "lets 3 queries look nowhere, .* token 3",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    spoil, error, message = BAD[name]
    with pytest.raises(error, match=message):
        attention_hessian(**spoil(good()))


def test_names_of_blocks_and_parts():
    hessian = attention_hessian(**good())
    with pytest.raises(ValueError, match=r"there is no parameter block 'qurey'.* Did you mean 'query'"):
        hessian.block("qurey", "key")
    with pytest.raises(ValueError, match="there is no part of the Hessian 'ggn'"):
        hessian.dense("ggn")
    with pytest.raises(ValueError, match="expected that of the parameters"):
        hessian.mv({"query": jnp.ones((4, 3))})


def test_linear_attention_may_look_nowhere():
    """Without a softmax an empty row of the mask is an output of zero."""
    arguments = good() | {"config": layer_config(weights="linear")}
    mask = empty_row(arguments["inputs"])
    moments = attention_moments(arguments["config"], arguments["params"], arguments["inputs"], mask)
    assert not np.any(moments.first[:, :, 3])
    norms = attention_hessian(**arguments, mask=mask).norms()
    assert all(np.isfinite(norm) for norm in jax.tree.leaves(norms))


def test_under_jit_as_without(key):
    config, loss, params, inputs, targets, mask = problem("mask_per_sequence", key)
    build = partial(attention_hessian, config, loss=loss, mask=mask)
    assert_close(jax.jit(build)(params, inputs, targets), build(params, inputs, targets), 1e-13)


def test_the_factors_make_the_block(key):
    """The described arrays of the query block, put together as its formula says, are the block."""
    config = layer_config()
    inputs = jax.random.normal(key, (6, 4))
    params = SelfAttention(config).init(key, inputs)["params"]
    hessian = attention_hessian(config, params, inputs, jax.random.normal(key, (6, 2)))
    rows = {(row.row, row.column, row.part): row for row in describe(hessian)}
    row = rows["query", "query", "outer"]
    assert row.formula == "sum_i τ x_i (τ x_i)ᵀ ⊗ W_Kᵀ Σ_i W_V Λ_i W_Vᵀ Σ_i W_K"
    assert set(row.roles) == {"data", "second moment", "weight", "loss curvature"}
    arrays = {factor.symbol: np.asarray(factor.array) for factor in row.factors}
    expected = 0
    for x, second in zip(config.score_scale * arrays["x_i"][0], arrays["Σ_i"][0, 0], strict=True):
        root = arrays["W_V"][0].T @ second @ arrays["W_K"][0]
        expected = expected + np.kron(np.outer(x, x), arrays["Λ_i"] * root.T @ root)
    assert_close(hessian.block("query", "query", "outer").dense(), expected, 1e-12)
    assert_close(row.norm, np.linalg.norm(expected), 1e-12)
    assert "third moment" in rows["key", "key", "functional"].roles
    assert rows["query", "value", "functional"].roles == ("data", "second moment", "weight", "loss gradient")


def test_every_term_is_described(key):
    for name in ("heads_projection", "linear_merged"):
        config, loss, params, inputs, targets, mask = problem(name, key)
        hessian = attention_hessian(config, params, inputs, targets, loss, mask=mask)
        rows = describe(hessian)
        terms = sum(len(block.terms) for blocks in (hessian.outer, hessian.functional) for block in blocks.values())
        assert len(rows) == terms
        assert all(row.factors for row in rows)
        console = Console(width=400, file=io.StringIO())
        console.print(describe_table(hessian))
        assert all(row.formula in console.file.getvalue() for row in rows)
        assert all(f"│ {row.row} x {row.column} " in str(describe_table(hessian)) for row in rows)
