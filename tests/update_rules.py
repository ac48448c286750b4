"""Numbers for every row of `RULES`, none as preset: a new row needs one here, and all tests of rules take it up."""

from attnlab.dynamics.rules import RULES, update_rule

OPTIONS = {
    "gd": {},
    "heavy_ball": {"momentum": 0.7},
    "nesterov": {"momentum": 0.8},
    "rmsprop": {"b2": 0.9},
    "adam": {"b1": 0.6, "b2": 0.99},
    "adamw": {"b1": 0.6, "b2": 0.99, "weight_decay": 0.3},
    "ema": {"momentum": 0.7},
    "sign": {"momentum": 0.6},
    "lion": {"b1": 0.5, "b2": 0.8, "weight_decay": 0.3},
    "muon": {"momentum": 0.6, "exact": True},
    "spectral": {"momentum": 0.6},
    "block_coordinate": {},
}


def rule_of(name, rate):
    """The rule of that name, with the numbers above."""
    return update_rule(name, rate, **OPTIONS[name])


LINEAR = [name for name in RULES if rule_of(name, 1.0).norm is None]
"""Rules whose step is linear in their moments; the others step along the steepest direction in a norm."""
GEOMETRIC = [name for name in RULES if name not in LINEAR]
