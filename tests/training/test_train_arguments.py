"""What `train` refuses before it starts: each error says what was given, what was expected, and what to do."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
import pytest

from attnlab.dynamics.rules import update_rule
from attnlab.losses import square_loss
from attnlab.objectives import objective
from attnlab.training import probe, train


@dataclass
class Measure:
    """A probe's function that is a plain dataclass, which Python cannot hash."""

    scale: float

    def __call__(self, risk, params):
        return self.scale * risk(params)


KEYS = jax.random.split(jax.random.key(0), 2)
PLAIN = optax.sgd(0.1)
SGD = optax.inject_hyperparams(optax.sgd)


def start(optimizer=PLAIN, key=KEYS[0], risk=None, **options):
    risk = risk or objective(lambda params, x: params * x, square_loss, jnp.ones(3), jnp.zeros(3))
    return train(risk, jnp.ones((*getattr(key, "shape", ()), 3)), optimizer, key, **({"steps": 1} | options))


REFUSED_HYPERPARAMETERS = {
    "not injected": (PLAIN, {"learning_rate": 0.2}, r"no hyperparameter 'learning_rate'.*inject_hyperparams"),
    "another field of the state": (optax.adam(0.1), {"count": 100}, "no hyperparameter 'count'"),
    "an integer": (SGD(learning_rate=1), {"learning_rate": 0.5}, r"holds it as int64.*learning_rate=1\.0, not"),
    "a schedule": (SGD(optax.linear_schedule(0.0, 0.1, 5)), {"learning_rate": 0.5}, "'learning_rate' follows a sched"),
    "one by coordinate": (SGD(0.1), {"learning_rate": jnp.ones(3)}, r"has shape \(3,\); expected a scalar, or keys"),
}


@pytest.mark.parametrize("name", REFUSED_HYPERPARAMETERS)
def test_hyperparameters(name):
    optimizer, values, message = REFUSED_HYPERPARAMETERS[name]
    with pytest.raises(ValueError, match=message):
        start(optimizer, hyperparameters=values)


def test_hyperparameters_of_another_number_of_members():
    with pytest.raises(ValueError, match=r"'learning_rate' has shape \(3,\); expected \(\) or \(2,\)"):
        start(SGD(0.1), KEYS, hyperparameters={"learning_rate": jnp.ones(3)})


REFUSED_TYPES = {
    "untyped key": ({"key": jax.random.PRNGKey(0)}, r"key is an array of uint32, shape \(2,\); expected a typed key"),
    "seed": ({"key": 0}, r"key is 0; expected a typed key, jax\.random\.key"),
    "constructor": ({"optimizer": optax.adam}, "optimizer is a function; expected an optax gradient transformation"),
    "update rule": ({"optimizer": update_rule("gd", 0.1)}, r"is a GradientDescent.*attribute transformation"),
    "function as objective": ({"risk": lambda params: params @ params}, r"risk is a function.*objective\(predict"),
    "list of probes": ({"probes": [probe(Measure(1.0))]}, "probes is a list; expected a dict of probes by name"),
    "unhashable probe": ({"probes": {"risk": probe(Measure(1.0))}}, "'risk' cannot be hashed: .*a frozen dataclass"),
    "data alone": ({"resample": lambda key, risk: (risk.inputs, risk.targets)}, "resample returned a tuple; expected"),
}


@pytest.mark.parametrize("name", REFUSED_TYPES)
def test_types(name):
    options, message = REFUSED_TYPES[name]
    with pytest.raises(TypeError, match=message):
        start(**options)


def test_keys_of_two_axes():
    with pytest.raises(ValueError, match=r"key has shape \(1, 2\); expected \(\), or \(m,\)"):
        start(key=KEYS[None])


def test_whole_numbers_may_be_floats_and_measurements_python_numbers():
    run = start(probes={"one": probe(lambda risk, params: 1.0)}, steps=2e0)
    assert run.records.values["one"].tolist() == [1.0] * 3
