"""The terms of a layer that turns its keys, by what they are made of."""

import jax
import pytest
from attention_cases import closed_form_of, problem

from attnlab.attention import describe
from compare import assert_close


@pytest.fixture(scope="module")
def described():
    config, loss, params, inputs, targets, mask = problem("turned_sink", jax.random.key(1))
    closed_form = closed_form_of(config, loss, params, inputs, targets, mask)
    return closed_form, {(d.row, d.column, d.part, d.formula): d for d in describe(closed_form)}


def test_a_query_keeps_its_kronecker_form_and_a_key_does_not(described):
    _, found = described
    formulas = {key[:3]: key[3] for key in found}
    assert formulas["query", "query", "functional"] == "sum_i τ x_i (τ x_i)ᵀ ⊗ κ̂κ_i"
    assert "sum_j s_ij (x_j ρ_ijᵀ)" in formulas["key", "key", "ggn"]
    assert formulas["key", "key", "functional"] == "sum_ij b_ij (x_j ρ_ijᵀ) ⊗ (x_j ρ_ijᵀ)"


def test_roles_name_the_turn(described):
    _, found = described
    roles = {key: set(each.roles) for key, each in found.items()}
    assert roles["query", "query", "functional", "sum_i τ x_i (τ x_i)ᵀ ⊗ κ̂κ_i"] == {"data", "third moment"}
    crossed = next(r for key, r in roles.items() if {*key[:2]} == {"query", "key"} and "R_i" in key[3])
    assert {"position", "data", "second moment"} <= crossed


@pytest.mark.slow
def test_norms_are_those_of_the_blocks(described):
    closed_form, found = described
    (only,) = [each for key, each in found.items() if key[:3] == ("query", "query", "functional")]
    assert_close(only.norm, closed_form.norms()["functional"]["query", "query"], 1e-12)
