"""Results are written whole or not at all, with a manifest."""

import dataclasses
import json
import sys

import numpy as np
import pytest

from attnlab.runs import (
    flat,
    load_arrays,
    manifest,
    parts_record,
    replace_directory,
    replace_file,
    save_result,
    stored_arrays,
)


def test_arrays_come_back_as_they_went(tmp_path):
    arrays = {"a": {"b": np.arange(6.0).reshape(2, 3), "c": {"d": np.ones(2)}}, "flag": np.array(True)}
    save_result(tmp_path / "deep" / "run", arrays, {"seed": 1})
    found = load_arrays(tmp_path / "deep" / "run")
    np.testing.assert_equal(found, arrays)
    assert set(flat(arrays)) == {"a/b", "a/c/d", "flag"}
    assert json.loads((tmp_path / "deep" / "run" / "manifest.json").read_text()) == {"seed": 1}


def test_a_failure_leaves_the_old_result_and_nothing_else(tmp_path):
    save_result(tmp_path / "run", {"x": np.ones(2)}, {})
    with pytest.raises(RuntimeError), replace_directory(tmp_path / "run") as partial:
        (partial / "half").write_text("written")
        raise RuntimeError
    with pytest.raises(RuntimeError), replace_file(tmp_path / "file.txt") as partial:
        partial.write_text("half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    np.testing.assert_array_equal(load_arrays(tmp_path / "run")["x"], np.ones(2))


def test_objects_are_refused(tmp_path):
    with pytest.raises(ValueError, match="pickle"):
        save_result(tmp_path / "run", {"x": np.array([object()])}, {})
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_says_how_to_make_it_again(tmp_path, monkeypatch):
    @dataclasses.dataclass
    class Config:
        seed: int = 3
        output: object = tmp_path

    words = ["/somewhere/attnlab", "run", "a", "--output", str(tmp_path), "--seed", "3", "--figures", "b"]
    monkeypatch.setattr(sys, "argv", words)
    record = manifest(Config(), seconds=1.26)
    assert record["command"] == "attnlab run a --seed 3"
    json.dumps(record)
    assert record["config"] == {"seed": 3}  # no folder of this machine
    assert record["seconds"] == 1.3
    assert record["dtype"] == "float64"
    assert {"python", "attnlab", "jax", "flax", "numpy"} <= set(record["versions"])
    assert {"command", "git_commit", "git_dirty", "device", "device_count"} <= set(record)


def test_stored_arrays_are_made_once(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return {"values": np.arange(3.0)}

    path = tmp_path / "parts" / "one.npz"
    first, second = stored_arrays(path, make), stored_arrays(path, make)
    np.testing.assert_array_equal(first["values"], second["values"])
    assert len(calls) == 1
    np.savez(tmp_path / "foreign.npz", values=np.arange(2.0))
    record = parts_record([path, tmp_path / "missing.npz", tmp_path / "foreign.npz"])
    assert record["parts"] == 1
    assert record["seconds"] >= 0
    assert record["git_commits"] == [manifest({})["git_commit"] or ""]


def test_arrays_whose_making_fails_are_not_stored(tmp_path):
    with pytest.raises(ZeroDivisionError):
        stored_arrays(tmp_path / "one.npz", lambda: {"values": np.array(1 // 0)})
    assert list(tmp_path.iterdir()) == []
