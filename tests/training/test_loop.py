"""The training loop against a hand-written one, its probes, and what it leaves behind when it is killed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import oracles
from attnlab.dynamics.sharpness import Tracking, top_eigenvalues
from attnlab.losses import square_loss
from attnlab.objectives import objective
from attnlab.runs import files
from attnlab.runs.session import Session
from attnlab.training import Probe, probe, train
from attnlab.training.loop import _first_state, _identity, _Plan
from attnlab.trees import ravel
from cases import CASES
from compare import assert_close
from nightly import nightly


def by_hand(risk, params, optimizer, steps):
    """A plain Python loop."""
    state = optimizer.init(params)
    losses = []
    for _ in range(steps):
        loss, gradient = jax.value_and_grad(risk)(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(loss)
    return params, jnp.array(losses)


OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.05, momentum=0.9, nesterov=True),
    "adam": optax.adam(1e-2),
    "schedule": optax.adamw(optax.linear_schedule(1e-3, 1e-2, 5)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_a_plain_loop(name, key):
    risk, params = CASES["softmax/square"](key)
    trajectory = train(risk, params, OPTIMIZERS[name], key, steps=12, every=3)
    expected_params, expected_losses = by_hand(risk, params, OPTIMIZERS[name], 12)
    assert_close(trajectory.params, expected_params, 1e-12)
    assert_close(trajectory.records.losses, expected_losses, 1e-12)


def test_an_optimizer_may_search_along_a_line():
    """L-BFGS evaluates the risk and its gradient where it likes: on a quadratic it soon stands in the minimum."""
    scales = jnp.array([1.0, 3.0, 10.0])
    risk = objective(lambda params, x: params * x, square_loss, scales, jnp.ones(3))
    trajectory = train(risk, jnp.ones(3), optax.lbfgs(), jax.random.key(0), steps=10, every=5)
    assert_close(trajectory.params, 1 / scales, 1e-8)


def test_probes_see_every_mth_step(key):
    risk, params = CASES["softmax/square"](key)
    probes = {
        "loss": probe(lambda risk, params: risk(params)),
        "norm": probe(lambda risk, params: ravel(params) @ ravel(params)),
    }
    records = train(risk, params, optax.sgd(0.1), key, steps=12, every=4, probes=probes).records
    assert records.steps.tolist() == [0, 4, 8, 12]
    for i, step in enumerate((0, 4, 8, 12)):
        at_step, _ = by_hand(risk, params, optax.sgd(0.1), step)
        assert_close(records.values["loss"][i], risk(at_step), 1e-12)
        assert_close(records.values["norm"][i], ravel(at_step) @ ravel(at_step), 1e-12)


def test_a_probe_may_be_a_whole_hessian(key):
    risk, params = CASES["linear/square"](key)
    records = train(
        risk, params, optax.sgd(0.01), key, steps=2, every=1, probes={"hessian": probe(oracles.hessian)}
    ).records
    assert_close(records.values["hessian"][0], oracles.hessian(risk, params), 1e-12)


def counting():
    """A probe that counts its own measurements and draws a number."""
    return Probe(
        lambda risk, state, memory, key: ((memory, jax.random.normal(key)), memory + 1),
        start=lambda risk, state, key: jnp.array(0),
    )


def test_probes_keep_a_memory_and_get_fresh_keys(key):
    risk, params = CASES["softmax/square"](key)
    records = train(risk, params, optax.sgd(0.1), key, steps=9, every=3, probes={"count": counting()}).records
    counts, draws = records.values["count"]
    assert counts.tolist() == [0, 1, 2, 3]
    assert len(set(draws.tolist())) == 4


PROBES = {"count": counting(), "top": top_eigenvalues(Tracking(accuracy=1.0))}  # its values hang on their course


def minibatch(key, risk):
    """Half of the examples, drawn by the key."""
    rows = jax.random.permutation(key, risk.inputs.shape[0])[: risk.inputs.shape[0] // 2]
    return objective(risk.predict, risk.loss, risk.inputs[rows], risk.targets[rows])


class Killed(BaseException):
    """What a kill looks like from inside."""


@pytest.mark.parametrize("killed_after", nightly((1, 3), (3,)))
def test_a_killed_run_resumes_with_equal_bits(tmp_path, key, killed_after):
    """Killed between two parts; the probes draw numbers, count, and start from the last eigenvectors."""
    risk, params = CASES["softmax/square"](key)
    options = {"steps": 120, "every": 2, "probes": PROBES, "resample": minibatch}
    whole = train(risk, params, OPTIMIZERS["adam"], key, **options)
    reports = []

    def kill(progress):
        reports.append(progress)
        if len(reports) == killed_after:
            raise Killed

    with pytest.raises(Killed):
        train(
            risk, params, OPTIMIZERS["adam"], key, **options, session=Session(directory=tmp_path / "run", report=kill)
        )
    (tmp_path / "run" / "part_000777.npz").write_bytes(b"left over")
    resumed_at = []
    resumed = train(
        risk,
        params,
        OPTIMIZERS["adam"],
        key,
        **options,
        session=Session(directory=tmp_path / "run", report=lambda progress: resumed_at.append(progress.step)),
    )
    assert resumed_at[0] == reports[-1].step + reports[0].step
    assert_equal_bits(resumed, whole)


def assert_equal_bits(found, expected):
    """Records and parameters of two runs."""
    leaves = [jax.tree.leaves((run.records, run.params)) for run in (found, expected)]
    for one, other in zip(*leaves, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_run_killed_between_its_records_and_its_state_repeats_a_part(tmp_path, key, monkeypatch):
    risk, params = CASES["softmax/square"](key)
    options = {"steps": 120, "every": 2, "probes": PROBES, "resample": minibatch}
    whole = train(risk, params, OPTIMIZERS["adam"], key, **options)
    written, replace_file = [], files.replace_file

    def killing(path):
        written.append(path.name)
        if written.count("state.npz") == 3:
            raise Killed
        return replace_file(path)

    monkeypatch.setattr(files, "replace_file", killing)
    with pytest.raises(Killed):
        train(risk, params, OPTIMIZERS["adam"], key, **options, session=Session(directory=tmp_path))
    assert (tmp_path / "part_000002.npz").exists()
    monkeypatch.undo()
    assert_equal_bits(
        train(risk, params, OPTIMIZERS["adam"], key, **options, session=Session(directory=tmp_path)), whole
    )


def test_progress_reports_loss_and_probes(key):
    risk, params = CASES["softmax/square"](key)
    seen = []
    train(
        risk,
        params,
        optax.sgd(0.1),
        key,
        steps=4,
        every=2,
        probes={"loss": probe(lambda r, p: r(p))},
        session=Session(report=seen.append),
    )
    assert [progress.step for progress in seen] == [2, 4]
    assert seen[0].values["loss"] == pytest.approx(float(risk(params)))


class TestBadInput:
    def test_steps_that_every_does_not_divide(self, key):
        with pytest.raises(ValueError, match="steps is 10; expected a multiple of every, which is 4"):
            train(*CASES["softmax/square"](key), optax.sgd(0.1), key, steps=10, every=4)

    def test_interval_of_zero(self, key):
        with pytest.raises(ValueError, match="every is 0"):
            train(*CASES["softmax/square"](key), optax.sgd(0.1), key, steps=10, every=0)

    def test_memory_that_changes_shape(self, key):
        growing = Probe(
            lambda risk, state, memory, key: ((), jnp.concatenate([memory, memory])),
            start=lambda risk, state, key: jnp.ones(1),
        )
        with pytest.raises(TypeError, match="probe 'growing' starts with a memory of"):
            train(*CASES["softmax/square"](key), optax.sgd(0.1), key, steps=2, probes={"growing": growing})

    def test_a_directory_of_another_run(self, tmp_path):
        """Also where all arrays are equal, and the first step and the probes' names."""
        key = jax.random.key(1)
        risk, params = CASES["softmax/square"](key)
        rates = optax.cosine_decay_schedule(0.1, 20), optax.cosine_decay_schedule(0.1, 40)
        weigh = lambda value: {"top": probe(lambda risk, params: jnp.full(3, value) @ np.full(3, value))}  # noqa: E731
        run = {"optimizer": optax.sgd(rates[0]), "steps": 4, "every": 2, "probes": weigh(1.0)}
        tracked = [{"top": top_eigenvalues(Tracking(accuracy=accuracy))} for accuracy in (1.0, 1e-4)]
        changes = {
            "schedule": {"optimizer": optax.sgd(rates[1])},
            "resample": {"resample": minibatch},
            "constants of a probe": {"probes": weigh(2.0)},
            "name of a probe": {"probes": {"highest": weigh(1.0)["top"]}},
        }
        train(risk, params, key=key, **run, session=Session(directory=tmp_path))
        for change in changes.values():
            with pytest.raises(ValueError, match="holds another run"):
                train(risk, params, key=key, **(run | change), session=Session(directory=tmp_path))
        identities = {
            _identity(risk, _first_state(risk, params, key, plan, {}, None), plan)
            for plan in (_Plan(run["optimizer"], tuple(probes.items()), 2, None, None, False) for probes in tracked)
        }
        assert len(identities) == 2
