"""The directory of a run: one owner at a time, damage that is named, and runs that go on."""

import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attnlab.curvature import spectral_density
from attnlab.curvature.operator import Operator
from attnlab.losses import square_loss
from attnlab.objectives import objective
from attnlab.runs import owned_directory
from attnlab.runs.checkpoint import fingerprint
from attnlab.runs.session import Session
from attnlab.training import DamagedFileError, load_params, load_records, minibatches, probe, train

INPUTS = jnp.linspace(-1.0, 1.0, 24).reshape(8, 3)
RISK = objective(lambda params, inputs: inputs @ params["layer"]["w"], square_loss, INPUTS, INPUTS[:, :1] ** 2)
START = {"layer": {"w": jnp.zeros((3, 1))}}


def run(steps, optimizer=None, key=1, **options):
    options = {"every": 2, "probes": PROBES} | options
    optimizer = OPTIMIZER if optimizer is None else optimizer
    return train(RISK, START, optimizer, jax.random.key(key), steps=steps, resample=BATCHES, **options)


OPTIMIZER, BATCHES = optax.adam(0.05), minibatches(4)
PROBES = {"norm": probe(lambda risk, params: jnp.abs(params["layer"]["w"]).sum())}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return folder, run(8, session=Session(directory=folder))


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "copy")


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif how == "changed":  # a sound archive with another number in it
        with np.load(path) as archive:
            arrays = dict(archive)
        name = next(name for name, array in arrays.items() if array.dtype.kind == "f" and array.size)
        np.savez(path, **(arrays | {name: arrays[name] + 1}))


@pytest.mark.parametrize("how", ["missing", "empty", "truncated", "flipped", "changed"])
@pytest.mark.parametrize(("name", "steps"), [("part_000002.npz", 4), ("part_000000.npz", 0), ("state.npz", 8)])
def test_damage_is_named_and_what_comes_before_it_can_be_read(copy, finished, name, steps, how):
    damage(copy / name, how)
    with pytest.raises(DamagedFileError, match=name) as caught:
        load_records(copy)
    if steps == 0:
        assert caught.value.records is None
    else:
        np.testing.assert_array_equal(caught.value.records.losses, finished[1].records.losses[:steps])
        np.testing.assert_array_equal(caught.value.records.steps, np.arange(0, steps, 2))
    if (name, how) != ("state.npz", "missing"):  # without a state there is nothing to resume
        with pytest.raises(DamagedFileError, match=name):
            run(8, session=Session(directory=copy))


@pytest.mark.parametrize("name", ["part_000001.npz", "state.npz", "end.npz"])
def test_every_byte_counts(copy, name):
    content = (copy / name).read_bytes()
    for place in [*range(0, len(content), 17), *range(-70, 0)]:
        changed = bytearray(content)
        changed[place] ^= 4
        (copy / name).write_bytes(changed)
        with pytest.raises(DamagedFileError, match=name):
            load_records(copy)


def test_parts_of_another_run_are_not_joined(copy, tmp_path):
    run(8, optax.adam(0.1), session=Session(directory=tmp_path / "other"))
    shutil.copy(tmp_path / "other" / "part_000001.npz", copy)
    with pytest.raises(DamagedFileError, match=r"part_000001\.npz belongs to another run") as caught:
        load_records(copy)
    assert len(caught.value.records.losses) == 2


def test_a_second_live_run_is_refused(tmp_path):
    refused = []

    def report(progress):
        with pytest.raises(BlockingIOError, match=str(tmp_path)) as caught:
            run(8, optax.adam(0.1), session=Session(directory=tmp_path))
        refused.append(caught)

    whole = run(8, session=Session(directory=tmp_path, report=report))
    assert len(refused) == 4
    np.testing.assert_array_equal(load_records(tmp_path).losses, whole.records.losses)


def test_the_lock_of_a_killed_process_is_gone(tmp_path):
    code = "import sys, pathlib, os, signal; from attnlab.runs import owned_directory\n"
    code += "with owned_directory(pathlib.Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    assert subprocess.run([sys.executable, "-c", code, tmp_path]).returncode == -9
    with owned_directory(tmp_path):
        pass


def test_a_density_has_its_directory_for_itself(tmp_path):
    matrix = Operator(jax.tree_util.Partial(lambda m, v: m @ v, jnp.diag(jnp.arange(1.0, 9.0))), jnp.zeros(8))
    with owned_directory(tmp_path), pytest.raises(BlockingIOError, match="belongs to a run"):
        spectral_density(matrix, jax.random.key(0), samples=2, steps=4, session=Session(directory=tmp_path))
    spectral_density(matrix, jax.random.key(0), samples=2, steps=4, session=Session(directory=tmp_path))
    damage(tmp_path / "state.npz", "truncated")
    with pytest.raises(DamagedFileError, match=r"state\.npz is damaged"):
        spectral_density(matrix, jax.random.key(0), samples=2, steps=4, session=Session(directory=tmp_path))


def assert_same_run(found, whole):
    for one, other in zip(jax.tree.leaves(found.records), jax.tree.leaves(whole.records), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)
    np.testing.assert_allclose(found.params["layer"]["w"], whole.params["layer"]["w"], rtol=1e-12)
    assert int(found.state.step) == int(whole.state.step)


def test_more_steps_in_a_directory_are_one_longer_run(copy):
    whole = run(14)
    assert_same_run(run(14, session=Session(directory=copy)), whole)
    again = run(14, session=Session(directory=copy))
    assert_same_run(again, whole)
    np.testing.assert_array_equal(load_records(copy).losses, again.records.losses)
    np.testing.assert_array_equal(load_params(copy)["layer"]["w"], again.params["layer"]["w"])
    with pytest.raises(ValueError, match="has gone on to step 14"):
        run(8, session=Session(directory=copy))


def test_a_state_goes_on(finished, tmp_path):
    whole, start = run(14), finished[1].state
    for options in ({}, {"session": Session(directory=tmp_path)}, {"session": Session(directory=tmp_path)}):
        further = run(6, key=5, start=start, **options)  # the state's own key counts
        np.testing.assert_allclose(further.records.losses, whole.records.losses[8:], rtol=1e-12)
        np.testing.assert_array_equal(further.records.steps, [8, 10, 12, 14])
        np.testing.assert_allclose(further.params["layer"]["w"], whole.params["layer"]["w"], rtol=1e-12)
    with pytest.raises(ValueError, match="start holds the state of another optimizer"):
        run(6, optax.sgd(0.1), start=start)
    with pytest.raises(TypeError, match="start is a dict"):
        run(6, start=START)


def test_an_ensemble_goes_on():
    keys = jax.random.split(jax.random.key(0), 3)
    starts = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 1, leaf - 1]), START)
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    rates = {"learning_rate": jnp.array([0.1, 0.2, 0.3])}
    whole = train(RISK, starts, optimizer, keys, steps=6, hyperparameters=rates)
    half = train(RISK, starts, optimizer, keys, steps=3, hyperparameters=rates)
    further = train(RISK, None, optimizer, None, steps=3, start=half.state)
    np.testing.assert_allclose(further.records.losses, whole.records.losses[3:], rtol=1e-12)
    assert further.records.steps.tolist() == [3, 4, 5, 6]


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NotADirectoryError, match="expected a directory"):
            run(8, session=Session(directory=path))


def test_states_of_equal_runs_are_equal(finished, copy):
    assert fingerprint(run(8, session=Session(directory=copy)).state) == fingerprint(finished[1].state)
