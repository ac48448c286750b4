"""Bad input to the closed form, and the description of what a Hessian is made of."""

import io
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import closed_form_of, layer_config, problem
from rich.console import Console

from attnlab.attention import attention_moments, describe, describe_table
from attnlab.models.attention import SelfAttention
from compare import assert_close
from nightly import nightly


def good():
    config, loss, params, inputs, targets, _ = problem("batch", jax.random.key(1))
    return {"config": config, "loss": loss, "params": params, "inputs": inputs, "targets": targets}


def empty_row(inputs):
    return jnp.ones((inputs.shape[-2],) * 2, bool).at[3].set(False)


def with_biases(arguments):
    biases = {f"{name}_bias": jnp.zeros(leaf.shape[1]) for name, leaf in arguments["params"].items()}
    return arguments | {"config": layer_config(bias=True), "params": arguments["params"] | biases}


BAD = {
    "bias": (with_biases, ValueError, "bias is True; the closed form covers"),
    "missing weight": (
        lambda a: a | {"params": {"query": a["params"]["query"]}},
        ValueError,
        "fit the module: Could not find",
    ),
    "whole model": (
        lambda a: a | {"params": {"params": a["params"]}},
        ValueError,
        "fit the module: .* extra params layer",
    ),
    "not a dict": (lambda a: a | {"params": jnp.ones(3)}, ValueError, "do not fit the module"),
    "token dimension": (
        lambda a: a | {"inputs": a["inputs"][..., 1:]},
        ValueError,
        r"fit the module: .*shape \(3, 3\)",
    ),
    "one token": (lambda a: a | {"inputs": a["inputs"][0, 0]}, ValueError, "expected .*tokens"),
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
    "too few targets": (
        lambda a: a | {"targets": a["targets"][:, 1:]},
        ValueError,
        r"have shape \(3, 4, 2\); the square loss",
    ),
    "mask dtype": (lambda a: a | {"mask": jnp.ones((5, 5))}, TypeError, "mask has dtype float64"),
    "mask shape": (lambda a: a | {"mask": jnp.ones((4, 4), bool)}, ValueError, r"mask has shape \(4, 4\)"),
    "mask sequences": (lambda a: a | {"mask": jnp.ones((3, 5, 5), bool)}, ValueError, "does not broadcast"),
    "empty row": (
        lambda a: a | {"mask": empty_row(a["inputs"])},
        ValueError,
        "a row of mask is all false; softmax expects at least one token that each query may see",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    spoil, error, message = BAD[name]
    with pytest.raises(error, match=message):
        closed_form_of(**spoil(good()))


def test_names_of_blocks_and_parts():
    hessian = closed_form_of(**good())
    with pytest.raises(ValueError, match=r"there is no parameter block 'qurey'.* Did you mean 'query'"):
        hessian.block("qurey", "key")
    for take in (hessian.dense, hessian.operator):
        with pytest.raises(ValueError, match="there is no part of the Hessian 'outer'"):
            take("outer")
    with pytest.raises(ValueError, match="expected that of the parameters"):
        hessian.operator().mv({"query": jnp.ones((4, 3))})


def test_linear_attention_may_look_nowhere():
    """Without a softmax an empty row of the mask is an output of zero."""
    arguments = good() | {"config": layer_config(weights="linear")}
    mask = empty_row(arguments["inputs"])
    moments = attention_moments(arguments["config"], arguments["params"], arguments["inputs"], mask)
    assert not np.any(moments.first[:, :, 3])
    norms = closed_form_of(**arguments, mask=mask).norms()
    assert all(np.isfinite(norm) for norm in jax.tree.leaves(norms))


def test_under_jit_as_without(key):
    config, loss, params, inputs, targets, mask = problem("mask_per_sequence", key)
    build = partial(closed_form_of, config, loss, mask=mask)
    assert_close(jax.jit(build)(params, inputs, targets), build(params, inputs, targets), 1e-13)


def test_the_factors_make_the_block(key):
    """The described arrays of the query block, put together as its formula says, are the block."""
    config = layer_config()
    inputs = jax.random.normal(key, (6, 4))
    params = SelfAttention(config).init(key, inputs)["params"]
    hessian = closed_form_of(config, "square", params, inputs, jax.random.normal(key, (6, 2)))
    rows = {(row.row, row.column, row.part): row for row in describe(hessian)}
    row = rows["query", "query", "ggn"]
    assert row.formula == "sum_i τ x_i (τ x_i)ᵀ ⊗ W_Kᵀ Σ_i W_V Λ_i W_Vᵀ Σ_i W_K"
    assert set(row.roles) == {"data", "second moment", "weight", "loss curvature"}
    arrays = {factor.symbol: np.asarray(factor.array) for factor in row.factors}
    expected = 0
    for x, second in zip(config.score_scale * arrays["x_i"][0], arrays["Σ_i"][0, 0], strict=True):
        root = arrays["W_V"][0].T @ second @ arrays["W_K"][0]
        expected = expected + np.kron(np.outer(x, x), arrays["Λ_i"] * root.T @ root)
    assert_close(hessian.block("query", "query", "ggn").dense(), expected, 1e-12)
    assert_close(row.norm, np.linalg.norm(expected), 1e-12)
    assert "third moment" in rows["key", "key", "functional"].roles
    assert rows["query", "value", "functional"].roles == ("data", "second moment", "weight", "loss gradient")


@pytest.mark.parametrize("name", nightly(("heads_projection", "linear_merged"), ("linear_merged",)))
def test_every_term_is_described(name, key):
    config, loss, params, inputs, targets, mask = problem(name, key)
    hessian = closed_form_of(config, loss, params, inputs, targets, mask)
    rows = describe(hessian)
    terms = sum(len(block.terms) for blocks in (hessian.ggn, hessian.functional) for block in blocks.values())
    assert len(rows) == terms
    assert all(row.factors for row in rows)
    console = Console(width=400, file=io.StringIO())
    console.print(describe_table(hessian))
    assert all(row.formula in console.file.getvalue() for row in rows)
    assert all(f"│ {row.row} x {row.column} " in str(describe_table(hessian)) for row in rows)
