"""Numbers for every row of `RULES`, none as preset: a new row needs one here, and all tests of rules take it up."""

from attnlab.dynamics.rules import update_rule

OPTIONS = {
    "gd": {},
    "heavy_ball": {"momentum": 0.7},
    "nesterov": {"momentum": 0.8},
    "rmsprop": {"b2": 0.9},
    "adam": {"b1": 0.6, "b2": 0.99},
    "adamw": {"b1": 0.6, "b2": 0.99, "weight_decay": 0.3},
}


def rule_of(name, rate):
    """The rule of that name, with the numbers above."""
    return update_rule(name, rate, **OPTIONS[name])
