"""The one table of rules."""

from dataclasses import fields

from attnlab.checks import check_names, unknown_name
from attnlab.dynamics.rules.adaptive import Adafactor, Adam, AdamW, RMSProp
from attnlab.dynamics.rules.base import LearningRate, UpdateRule
from attnlab.dynamics.rules.geometric import BlockCoordinate, Lion, Muon, SignDescent, SpectralDescent
from attnlab.dynamics.rules.linear import Averaged, GradientDescent, HeavyBall, Nesterov
from attnlab.dynamics.rules.rotated import Shampoo, Soap

_LINEAR = (GradientDescent, HeavyBall, Nesterov, Averaged)
_ADAPTIVE = (RMSProp, Adafactor, Adam, AdamW)
_ROTATED = (Shampoo, Soap)
_GEOMETRIC = (SignDescent, Lion, Muon, SpectralDescent, BlockCoordinate)

RULES: dict[str, type[UpdateRule]] = {row.name: row for row in (*_LINEAR, *_ADAPTIVE, *_ROTATED, *_GEOMETRIC)}
"""Optimizers whose threshold is known; a new one is a row here, and the table drives its tests."""


def update_rule(name: str, learning_rate: LearningRate, **options: float) -> UpdateRule:
    """The optimizer called `name`: `update_rule("adam", 1e-3, b1=0.8)` is `Adam(1e-3, b1=0.8)`.

    `learning_rate` is a number or an optax schedule. Options, with optax's defaults: `momentum` (0.9) of `heavy_ball`,
    `nesterov` and `ema`; `b2` (0.99), `eps`, `eps_in_sqrt` (False) of `rmsprop`; `b1`, `b2`, `eps`, `eps_root` of
    `adam`; these and `weight_decay` of `adamw`; `decay_rate`, `min_dim_size_to_factor`, `eps` of `adafactor`; `b1`,
    `b2` (0.99), `eps` of `shampoo`; of `soap` those of `adam` (`b1` and `b2` 0.95), and `frequency` (10) of its bases,
    in steps. Thresholds: 2/eta for gd, rmsprop and adafactor, (2 + 2 beta)/eta, (2 + 2 beta)/((1 + 2 beta) eta),
    (2 + 2 beta)/((1 - beta) eta) of the averaged gradient, of adam, shampoo and soap, and
    (2 - eta weight_decay)(1 + b1)/((1 - b1) eta) for adamw.

    Rules whose step is the steepest in a norm have theirs for the sharpness in that norm (`generalized_sharpness`), at
    the effective rate of a step (`edge_of_step`): `sign` and `spectral` with `momentum` (0), `lion` with `b1`, `b2` and
    `weight_decay`, `muon` with `momentum` (0.95), `nesterov` (True) and `exact` (False), `block_coordinate`; see
    `rules.geometric` for the law. Raises `ValueError` for an optimizer whose threshold is not known, an option that it
    does not have, or a number out of its range (`UpdateRule`).
    """
    if name not in RULES:
        raise unknown_name("optimizer with a known stability threshold", name, RULES)
    check_names(f"option of {name}", options, [field.name for field in fields(RULES[name])][1:])
    return RULES[name](learning_rate, **options)
