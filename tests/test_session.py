"""The driver of long computations by itself, on a sum whose terms are known."""

import json
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.runs import DamagedFileError
from attnlab.runs.session import AT_ONCE, Session, fold


class Killed(BaseException):
    pass


def total(session, count=5, identity="sum", *, parts=False):
    """1 + 2 + ... + count; in parts, also the sums on the way."""
    stepped = []

    def step(state, number):
        stepped.append(number)
        return (state[0] + number, state[1] + 1), (state[0] + number if parts else None)

    def chunks(state):
        return int(state[1]) + 1 if state[1] < count else None

    def watch(state):
        begun = int(state[1])
        return lambda state: session.report((begun, int(state[1])))

    with session.open(lambda: identity) as running:
        part = (lambda state: state[0]) if parts else None
        state = fold(step, lambda: (jnp.array(0.0), jnp.array(0)), chunks, running, part=part, watch=watch)
        running.write_result({"count": count}, total=state[0])
        return float(state[0]), [float(given) for given in running.parts], stepped


def kill_at(step):
    def report(progress):
        if progress[1] == step:
            raise Killed

    return report


@pytest.mark.parametrize("parts", [False, True])
def test_a_killed_fold_goes_on_where_it_was_saved(tmp_path, monkeypatch, parts):
    monkeypatch.setattr("attnlab.runs.session.SAVE_SECONDS", 0.0)
    monkeypatch.setattr("attnlab.runs.session.SAVE_SHARE", float("inf"))
    session, seen = Session(directory=tmp_path / "run"), []
    with pytest.raises(Killed):
        total(replace(session, report=kill_at(2)), parts=parts)
    found, given, stepped = total(replace(session, report=seen.append), parts=parts)
    assert (found, stepped) == (15.0, [3, 4, 5])
    assert given == ([1.0, 3.0, 6.0, 10.0, 15.0] if parts else [])
    assert seen == [(2, 3), (2, 4), (2, 5)]
    assert total(session, parts=parts)[2] == []
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["resumed"] is True
    np.testing.assert_array_equal(np.load(tmp_path / "run" / "result.npz")["total"], 15.0)


def test_a_state_alone_is_saved_when_it_is_time(tmp_path, monkeypatch):
    monkeypatch.setattr("attnlab.runs.session.SAVE_SECONDS", 1e9)
    session = Session(directory=tmp_path)
    with pytest.raises(Killed):
        total(replace(session, report=kill_at(3)))
    assert total(session)[2] == [1, 2, 3, 4, 5]
    assert total(session)[2] == []  # the last one always is


def test_foreign_and_damaged_directories_are_refused(tmp_path):
    session = Session(directory=str(tmp_path))
    total(session)
    with pytest.raises(ValueError, match="holds another run"):
        total(session, identity="product")
    (tmp_path / "state.npz").write_bytes((tmp_path / "state.npz").read_bytes()[:-1])
    with pytest.raises(DamagedFileError, match=r"state\.npz is damaged"):
        total(session)


def test_a_directory_has_one_owner(tmp_path):
    session = Session(directory=tmp_path)
    with session.open(lambda: ""), pytest.raises(BlockingIOError, match="belongs to a run"):
        total(session)


def test_without_directory_and_report_nothing_is_left_or_said():
    assert not AT_ONCE.in_chunks
    assert total(AT_ONCE, parts=True) == (15.0, [1.0, 3.0, 6.0, 10.0, 15.0], [1, 2, 3, 4, 5])


@dataclass(frozen=True)
class Progress:
    part: str | None = None


def test_the_session_of_a_part(tmp_path):
    seen = []
    part = Session(directory=tmp_path, report=seen.append, together=2).part("out/w", "out/w (2 of 2)")
    part.report(Progress())
    assert (part.directory, seen, part.together) == (tmp_path / "out%2Fw", [Progress("out/w (2 of 2)")], 2)
    assert AT_ONCE.part("out/w", "") == AT_ONCE


def test_vectors_that_need_one_another_do_not_run_together():
    AT_ONCE.check_one_by_one("train")
    with pytest.raises(ValueError, match=r"session has together=4 .* expected 1 and None for eigenpairs"):
        Session(together=4).check_one_by_one("eigenpairs")
