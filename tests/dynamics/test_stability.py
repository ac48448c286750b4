"""Optimizers that are built with numbers for which their threshold means nothing."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attnlab.dynamics.stability import stable_optimizer


@pytest.mark.parametrize(
    ("name", "rate", "options", "message"),
    [
        ("gd", -0.1, {}, r"learning_rate is -0\.1; expected a finite number above 0"),
        ("gd", 0.0, {}, r"learning_rate is 0\.0"),
        ("rmsprop", jnp.array(np.inf), {}, "learning_rate is inf"),
        ("heavy_ball", 0.1, {"momentum": 1.0}, r"momentum is 1\.0; expected a number of at least 0 and below 1"),
        ("nesterov", 0.1, {"momentum": -0.1}, r"momentum is -0\.1"),
        ("adam", 0.1, {"b1": 1}, "b1 is 1; expected a number of at least 0 and below 1"),
        ("rmsprop", 0.1, {"b2": 1.5}, r"b2 is 1\.5"),
        ("adam", 0.1, {"eps": -1e-8}, "eps is -1e-08; expected a finite number of at least 0"),
        ("adamw", optax.constant_schedule(0.1), {"weight_decay": np.nan}, "weight_decay is nan"),
    ],
)
def test_numbers_out_of_range_are_refused(name, rate, options, message):
    with pytest.raises(ValueError, match=message):
        stable_optimizer(name, rate, **options)
