"""Wrong types and ranges: each error names the argument and what it was, and speaks of nothing inside."""

from collections import namedtuple
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attnlab.adaptation.lora import lora
from attnlab.checks import check_finite, check_floating, check_positive, check_range, unknown_name
from attnlab.dynamics.rules import update_rule
from attnlab.icl.identification import fit_family
from attnlab.icl.tasks import isotropic, sample_prompts
from attnlab.losses import square_loss
from attnlab.models.attention import AttentionConfig
from attnlab.objectives import objective
from attnlab.training import probe, train

KEY = jax.random.key(0)
INPUTS = jnp.linspace(-1.0, 1.0, 24).reshape(8, 3)
RISK = objective(lambda params, inputs: inputs @ params["w"], square_loss, INPUTS, INPUTS[:, :1])
PARAMS = {"w": jnp.zeros((3, 1))}
run = partial(train, RISK, PARAMS, optax.sgd(0.1), KEY, steps=2)
PROMPTS = sample_prompts(KEY, isotropic(3), 6, 16)
ONE_PROMPT = jax.tree.map(lambda leaf: leaf[:1], PROMPTS)
fit = partial(fit_family, lambda prompt: prompt.query.sum(), key=KEY)
Layer = namedtuple("Layer", ["weight", "act"])


def probing(function):
    return {"mine": probe(function)}


CASES = {
    "a function as a leaf": (lambda: check_floating("params", Layer(1.0, jnp.tanh)), "params: act is .*, a function"),
    "a string as a leaf": (lambda: check_floating("params", {"w": 1.0, "name": "net"}), "params: name is 'net', a str"),
    "a string": (lambda: check_finite("inputs", "abc"), "inputs is 'abc', a str; expected an array"),
    "an object": (lambda: check_finite("inputs", {"x": object()}), "inputs: x is .*, a object; expected an array"),
    "a string in a range": (lambda: check_range("count", "3", 1, 5, ""), "count is '3', a str; expected 1 <= count"),
    "not a number": (lambda: check_positive(samples=float("nan")), "samples is nan; expected a positive whole number"),
    "infinitely many": (lambda: check_positive(samples=float("inf")), "samples is inf; expected a positive whole"),
    "a number as a string": (lambda: check_positive(samples="2"), "samples is '2'; expected a positive whole number"),
    "parameters with a function": (lambda: train(RISK, {"w": jnp.tanh}, optax.sgd(0.1), KEY, steps=2), "params: w is"),
    "a risk that is none": (lambda: train(PARAMS, PARAMS, optax.sgd(0.1), KEY, steps=2), "risk is a dict; expected"),
    "a probe that raises": (lambda: run(probes=probing(lambda r, p: p["no"])), "probe 'mine': KeyError: 'no'"),
    "a probe's ValueError": (lambda: run(probes=probing(lambda r, p: p["w"].reshape(7))), "probe 'mine': "),
    "a probe of a string": (
        lambda: run(probes=probing(lambda r, p: "x")),
        "probe 'mine' returned a value, which is 'x'",
    ),
    "a resample of one argument": (
        lambda: run(resample=lambda key: RISK),
        r"expected a function resample\(key, risk\)",
    ),
    "a list of rates": (lambda: run(hyperparameters=[0.1]), "hyperparameters is a list; expected a dict"),
    "a rate as a string": (lambda: run(hyperparameters={"learning_rate": "0.1"}), "'learning_rate' is '0.1', a str"),
    "an integer for a key": (lambda: train(RISK, PARAMS, optax.sgd(0.1), 0, steps=2), "key is 0; expected a typed key"),
    "a key of the old kind": (
        lambda: train(RISK, PARAMS, optax.sgd(0.1), jax.random.PRNGKey(0), steps=2),
        "expected a typed key",
    ),
    "an option of optax": (
        lambda: update_rule("adam", 0.1, beta1=0.9),
        "no option of adam 'beta1'; expected one of: b1, b2, eps",
    ),
    "a string for a rate": (lambda: update_rule("gd", "0.1"), "learning_rate is '0.1', a str"),
    "a negative dimension": (lambda: isotropic(-1), "dimension is -1; expected a positive whole number"),
    "half a dimension": (lambda: isotropic(2.5), "dimension is 2.5; expected a positive whole number"),
    "a length as a string": (lambda: sample_prompts(KEY, isotropic(2), "6", 4), "length is '6', a str"),
    "an unknown family": (lambda: fit(PROMPTS, "ridg", 1), "no family 'ridg'.*Did you mean 'ridge'"),
    "no layers": (lambda: fit(PROMPTS, "ridge", 0), "layers is 0; expected a positive whole number"),
    "one prompt": (lambda: fit(ONE_PROMPT, "ridge", 1), "the number of prompts is 1; expected 2 <="),
    "a model of zero": (
        lambda: fit_family(lambda p: p.target * 0, PROMPTS, "ridge", 1, KEY),
        "the model predicts 0 on",
    ),
    "a scale that is NaN": (lambda: AttentionConfig(4, 4, scale=float("nan")), "scale is nan"),
    "a scale as a string": (lambda: AttentionConfig(4, 4, scale="1"), "scale is '1', a str; expected a real number"),
    "a gain that is infinite": (lambda: AttentionConfig(4, 4, gain=float("inf")), "gain is inf"),
    "a rank above the matrix's": (
        lambda: lora({"w": jnp.ones((4, 3))}, "w", 4, KEY),
        "rank is 4; expected 1 <= rank <= 3",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_argument_is_named(name):
    call, message = CASES[name]
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        call()


def test_what_is_no_mistake_passes():
    check_floating("params", {"a": 1.5, "b": np.float32(2), "c": None})
    check_positive(steps=1e4, count=np.int64(3))
    assert AttentionConfig(4, 4, scale=0.0).score_scale == 0
    assert lora({"w": jnp.ones((4, 3))}, "w", 3, KEY)[1]["w"]["A"].shape == (3, 3)
    assert np.isfinite(fit(PROMPTS, "ridge", 1).held_out_error.value)


def test_the_error_for_a_name_lists_a_short_table_and_the_nearest_of_a_long_one():
    assert str(unknown_name("option", "bet", ["beta", "gamma"])) == (
        "there is no option 'bet'; expected one of: beta, gamma. Did you mean 'beta'?"
    )
    said = str(unknown_name("claim", "claim-17x", [f"claim-{number}" for number in range(190)]))
    assert "claim-58, claim-59 and 130 more. Did you mean 'claim-17' or " in said
