"""Ensembles against their members one by one, minibatches, and what a progress bar shows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console
from rich.progress import Progress, TextColumn

from attnlab.losses import square_loss
from attnlab.objectives import objective
from attnlab.runs.session import Session
from attnlab.training import DivergenceError, Probe, minibatches, probe, show_progress, train
from attnlab.training.probe import summary
from attnlab.trees import ravel
from cases import CASES
from compare import assert_close

RATES = (0.01, 0.05, 0.1)
OPTIMIZERS = {"sgd": optax.sgd, "adam": optax.adam}


def members(key):
    """A risk, three points and three keys."""
    risk, params = CASES["softmax/square"](key)
    keys = jax.random.split(key, 3)
    points = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf, 2 * leaf]), params)
    return risk, points, keys


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_ensemble_is_its_members(name, key):
    risk, points, keys = members(key)
    options = {
        "steps": 6,
        "every": 3,
        "probes": {"norm": probe(lambda risk, params: ravel(params) @ ravel(params))},
        "resample": minibatches(1),
    }
    optimizer = optax.inject_hyperparams(OPTIMIZERS[name])(learning_rate=1.0)
    together = train(risk, points, optimizer, keys, hyperparameters={"learning_rate": jnp.array(RATES)}, **options)
    assert together.records.steps.tolist() == [0, 3, 6]
    assert together.records.losses.shape == (6, 3)
    for i, rate in enumerate(RATES):
        point = jax.tree.map(lambda leaf, i=i: leaf[i], points)
        alone = train(risk, point, OPTIMIZERS[name](rate), keys[i], **options)
        assert_close(together.records.losses[:, i], alone.records.losses, 1e-12)
        assert_close(together.records.values["norm"][:, i], alone.records.values["norm"], 1e-12)
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], together.params), alone.params, 1e-12)


def walk_from(risk, state, key):
    return jax.random.normal(key)


def test_an_ensemble_resumes_with_equal_bits(tmp_path, key):
    risk, points, keys = members(key)
    probes = {"walk": Probe(lambda risk, state, memory, key: (memory, memory + jax.random.normal(key)), walk_from)}
    options = {"steps": 100, "every": 2, "resample": minibatches(1), "probes": probes}
    whole = train(risk, points, optax.adam(1e-2), keys, **options)

    def kill(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(risk, points, optax.adam(1e-2), keys, **options, session=Session(directory=tmp_path, report=kill))
    resumed = train(risk, points, optax.adam(1e-2), keys, **options, session=Session(directory=tmp_path))
    for found, expected in zip(jax.tree.leaves(resumed.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(resumed.records.losses, whole.records.losses)
    np.testing.assert_array_equal(resumed.records.values["walk"], whole.records.values["walk"])


def test_members_with_their_own_data_train_as_alone(key, tmp_path):
    risks = [CASES["softmax/square"](k)[0] for k in jax.random.split(key, 3)]
    _, points, keys = members(key)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *risks)
    options = {"steps": 4, "probes": {"risk": probe(lambda risk, params: risk(params))}}
    polyak = optax.polyak_sgd(max_learning_rate=0.1)  # it needs the loss
    together = train(stacked, points, polyak, keys, own_risks=True, session=Session(directory=tmp_path), **options)
    for i, risk in enumerate(risks):
        point = jax.tree.map(lambda leaf, i=i: leaf[i], points)
        alone = train(risk, point, polyak, keys[i], **options)
        assert_close(together.records.values["risk"][:, i], alone.records.values["risk"], 1e-12)
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], together.params), alone.params, 1e-12)


def test_own_data_need_an_ensemble(key):
    risk, points, keys = members(key)
    with pytest.raises(ValueError, match="own_risks is for ensembles"):
        train(risk, points, optax.sgd(0.1), key, own_risks=True, steps=1)
    with pytest.raises(ValueError, match=r"risk.*expected a first axis of 3. Stack one objective a key"):
        train(risk, points, optax.sgd(0.1), keys, own_risks=True, steps=1)


def quadratic():
    return objective(lambda params, x: params * x, square_loss, jnp.ones(3), jnp.zeros(3))


def sweep(rates, report=None):
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    keys = jax.random.split(jax.random.key(0), len(rates))
    rates = jnp.array(rates)
    options = {"steps": 200, "hyperparameters": {"learning_rate": rates}, "session": Session(report=report)}
    return train(quadratic(), jnp.ones((len(rates), 3)), optimizer, keys, **options)


def test_a_member_that_diverges_leaves_the_others():
    reported = []
    losses = sweep([0.1, 1e4, 1e5], lambda now: reported.append(now.loss)).records.losses
    assert np.isfinite(losses[:, 0]).all()
    assert not np.isfinite(losses[-1, 1:]).any()
    assert_close(losses[:, 0], (1 - 0.2 / 3) ** (2 * np.arange(200)), 1e-12)
    assert np.isinf(losses).any()
    assert reported[-1] == losses[-1, 0]
    assert np.isfinite(reported).all()


def test_all_members_diverging_stops_the_run():
    with pytest.raises(DivergenceError, match=r"is not finite in any of the 2 members; the last finite loss was \d"):
        sweep([1e3, 1e4])


@pytest.mark.parametrize("count", [12, 40])
def test_minibatches_are_different_rows_drawn_evenly(count, key):
    """Also where few of many rows are drawn, which goes without a permutation."""
    size, draws = 5, 3000
    risk = objective(lambda p, x: x, square_loss, jnp.arange(count, dtype=float), jnp.arange(count, dtype=float))
    batches = jax.vmap(lambda key: minibatches(size)(key, risk))(jax.random.split(key, draws))
    rows = np.asarray(batches.inputs)
    np.testing.assert_array_equal(rows, batches.targets)
    assert all(len(set(row)) == size for row in rows)
    frequency = np.bincount(rows.astype(int).ravel(), minlength=count) / draws
    deviation = np.sqrt(size / count * (1 - size / count) / draws)
    assert np.abs(frequency - size / count).max() <= 5 * deviation
    # the pair of the two last rows is as likely as any other
    pair = size * (size - 1) / (count * (count - 1))
    together = np.mean([{count - 2, count - 1} <= set(row) for row in rows])
    assert abs(together - pair) <= 5 * np.sqrt(pair * (1 - pair) / draws)


def test_the_bar_shows_loss_and_probes():
    with Progress(TextColumn("{task.fields[status]}"), console=Console(quiet=True)) as bar:
        train(
            quadratic(),
            jnp.ones(3),
            optax.sgd(0.1),
            jax.random.key(0),
            steps=4,
            every=2,
            probes={"size": probe(lambda risk, params: params @ params)},
            session=Session(report=show_progress(bar, "training")),
        )
        (task,) = bar.tasks
    assert (task.completed, task.total) == (4, 4)
    assert task.fields["status"].startswith("loss 0.")
    assert " size 2." in task.fields["status"]


def test_the_bar_shows_the_highest_eigenvalue():
    """The last entry of a vector; of an ensemble the median over its members, those left out that have diverged."""

    def edge(risk, params):
        return {"values": jnp.sort(jnp.abs(params)), "matrix": jnp.eye(3)}

    alone, together = jax.random.key(0), jax.random.split(jax.random.key(0), 3)
    points = jnp.array([3.0, -1.0, 2.0]), jnp.array([[1.0, 2.0, 7.0], [3.0, 8.0, 1.0], [9.0, 1.0, 1.0]])
    for key, point, shown in ((alone, points[0], "3"), (together, points[1], "8")):
        with Progress(TextColumn("{task.fields[status]}"), console=Console(quiet=True)) as bar:
            report = show_progress(bar, "training")
            train(
                quadratic(),
                point,
                optax.sgd(0.1),
                key,
                steps=1,
                probes={"edge": probe(edge)},
                session=Session(report=report),
            )
            assert bar.tasks[0].fields["status"].endswith(f" edge/values {shown}")
    diverged = {"top": np.array([[1.0, 2.0], [np.inf, np.nan], [3.0, 5.0]]), "loss": np.array([1.0, np.nan, 2.0])}
    assert summary(diverged, 3) == "loss 1.5 top 3.5"


class TestBadInput:
    def test_points_without_the_axis_of_the_members(self, key):
        risk, params = CASES["softmax/square"](key)
        with pytest.raises(ValueError, match=r"expected a first axis of 4\. Stack one point a key"):
            train(risk, params, optax.sgd(0.1), jax.random.split(key, 4), steps=1)

    def test_minibatches_larger_than_the_data(self, key):
        risk, params = CASES["softmax/square"](key)
        with pytest.raises(ValueError, match="size is 3; expected 1 <= size <= 2"):
            train(risk, params, optax.sgd(0.1), key, steps=1, resample=minibatches(3))

    def test_probes_of_the_wrong_shape(self, key):
        risk, params = CASES["softmax/square"](key)
        wrong = {
            "expected the pair": Probe(lambda risk, state, memory, key: jnp.ones(3)),
            "returns no array": Probe(lambda risk, state, memory, key: ((), memory)),
        }
        wrong["'bad' is a function; expected .*by attnlab.training.probe"] = lambda risk, params: risk(params)
        for message, bad in wrong.items():
            with pytest.raises(TypeError, match=message):
                train(risk, params, optax.sgd(0.1), key, steps=1, probes={"bad": bad})
