"""Numbers for every row of `RULES`, none as preset: a new row needs one here, and all tests of rules take it up."""

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from attnlab.dynamics.preconditioners import applied
from attnlab.dynamics.rules import RULES, update_rule

OPTIONS = {
    "gd": {},
    "heavy_ball": {"momentum": 0.7},
    "nesterov": {"momentum": 0.8},
    "rmsprop": {"b2": 0.9},
    "adafactor": {"decay_rate": 0.6, "min_dim_size_to_factor": 2},
    "adam": {"b1": 0.6, "b2": 0.99},
    "adamw": {"b1": 0.6, "b2": 0.99, "weight_decay": 0.3},
    "ema": {"momentum": 0.7},
    "shampoo": {"b1": 0.6, "b2": 0.8},
    "soap": {"b1": 0.6, "b2": 0.8, "frequency": 3},
    "sign": {"momentum": 0.6},
    "lion": {"b1": 0.5, "b2": 0.8, "weight_decay": 0.3},
    "muon": {"momentum": 0.6, "exact": True},
    "spectral": {"momentum": 0.6},
    "block_coordinate": {},
}


def rule_of(name, rate):
    """The rule of that name, with the numbers above."""
    return update_rule(name, rate, **OPTIONS[name])


def dense_of(preconditioner, params):
    """P as a matrix; the identity for None."""
    flat, unravel = ravel_pytree(params)
    identity = jnp.eye(flat.size, dtype=flat.dtype)
    if preconditioner is None:
        return identity
    return jax.vmap(lambda row: ravel_pytree(applied(preconditioner, unravel(row)))[0])(identity)


LINEAR = [name for name in RULES if rule_of(name, 1.0).norm is None]
"""Rules whose step is linear in their moments; the others step along the steepest direction in a norm."""
AVERAGED = [name for name in LINEAR if not RULES[name].second_moment or rule_of(name, 1.0).second_decay]
"""Of them those whose second moment, if any, is the average of squared gradients entry by entry."""
GEOMETRIC = [name for name in RULES if name not in LINEAR]
