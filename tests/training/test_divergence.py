"""A run that diverges: it stops at once, says where, and keeps what was measured."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attnlab.losses import square_loss
from attnlab.objectives import objective
from attnlab.runs.session import Session
from attnlab.training import DivergenceError, load_records, probe, train

KEY = jax.random.key(0)


def linear():
    return objective(lambda params, x: params * x, square_loss, jnp.ones(3), jnp.zeros(3))


def test_the_error_names_the_step_and_what_was_saved(tmp_path):
    probes = {"sizes": probe(lambda risk, params: jnp.sort(jnp.abs(params)))}
    options = {"steps": 100, "every": 2, "probes": probes, "session": Session(directory=tmp_path)}
    said = r"step 55 is inf; the last finite loss was .*; the last finite probes, at step 54: sizes \d.*Lower"
    with pytest.raises(DivergenceError, match=said) as error:
        train(linear(), jnp.ones(3), optax.sgd(1e3), KEY, **options)
    assert str(error.value).endswith(f"; attnlab.training.load_records('{tmp_path}') reads those that were saved.")
    records, saved = error.value.records, load_records(tmp_path)
    assert np.argmin(np.isfinite(records.losses)) == 55
    np.testing.assert_array_equal(saved.steps, range(0, 54, 2))
    np.testing.assert_array_equal(saved.values["sizes"], records.values["sizes"][:-1])


def test_where_nothing_was_saved_nothing_is_promised(tmp_path):
    with pytest.raises(DivergenceError, match=r"in this error's records\.$"):
        train(
            linear(),
            jnp.ones(3),
            optax.sgd(1e300),
            KEY,
            steps=1000,
            every=1000,
            session=Session(directory=tmp_path / "run"),
        )
    with pytest.raises(FileNotFoundError, match="run holds no saved run; expected the directory that was given"):
        load_records(tmp_path / "run")


def test_a_loss_that_is_nan_from_the_start():
    risk = objective(lambda params, x: params * x, lambda outputs, _: jnp.sum(jnp.sqrt(outputs)), *jnp.ones((2, 1)))
    with pytest.raises(ValueError, match="the loss is nan at these parameters"):
        train(risk, -jnp.ones(1), optax.sgd(10.0), KEY, steps=4)
    keys = jax.random.split(KEY, 2)
    with pytest.raises(DivergenceError, match=r"at step 0 .* in any of the 2 members\. Look at the objective where"):
        train(risk, -jnp.ones((2, 1)), optax.sgd(10.0), keys, steps=4)


def behind_where():
    """The square root's derivative at zero is infinite, and jnp.where makes it NaN, while the loss stays finite."""
    root = lambda params, x: jnp.where(params > 0, jnp.sqrt(params), 0.0) * x  # noqa: E731
    return objective(root, square_loss, jnp.ones(2), jnp.zeros(2))


GOOD, BAD = jnp.array([1.0, 4.0]), jnp.array([0.0, 4.0])


@pytest.mark.parametrize("steps", [1, 20])
def test_parameters_that_are_nan_under_a_finite_loss_stop_the_run(steps):
    what = "a parameter" if steps == 1 else "the loss or a parameter"
    with pytest.raises(DivergenceError, match=rf"^{what} at step 1 is not finite; .*jnp\.where") as error:
        train(behind_where(), BAD, optax.sgd(0.1), KEY, steps=steps, every=steps)
    assert np.isnan(error.value.records.losses[1:]).all()


@pytest.mark.parametrize("steps", [1, 20])
def test_an_ensemble_goes_on_while_a_member_is_finite(steps):
    keys, options = jax.random.split(KEY, 2), {"steps": steps, "every": steps}
    losses = train(behind_where(), jnp.stack([BAD, GOOD]), optax.sgd(0.1), keys, **options).records.losses
    assert np.isfinite(losses[:, 1]).all()
    np.testing.assert_array_equal(np.isfinite(losses[:, 0]), np.arange(steps) == 0)
    with pytest.raises(DivergenceError, match="a parameter at step 1 is not finite in any of the 2 members"):
        train(behind_where(), jnp.stack([BAD, BAD]), optax.sgd(0.1), keys, **options)
