"""Compiled programs are kept between processes, in a folder that stays small."""

import os

import jax
import pytest

from attnlab.compiled import drop_oldest, keep_compiled_programs


@pytest.mark.parametrize(("limit", "left"), [(30, "abc"), (29, "bc"), (10, "c"), (9, "")])
def test_the_oldest_programs_go_first(tmp_path, limit, left):
    for age, name in enumerate("cba"):
        (tmp_path / name).write_bytes(bytes(10))
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    drop_oldest(tmp_path, limit)
    assert "".join(sorted(path.name for path in tmp_path.iterdir())) == left


def test_a_missing_folder_is_an_empty_one(tmp_path):
    drop_oldest(tmp_path / "none", 0)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("named", [False, True])
def test_a_folder_that_is_named_already_stays(tmp_path, monkeypatch, named):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    if named:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    try:
        keep_compiled_programs()
        expected = before if named else str(tmp_path / "attnlab" / "compiled")
        assert jax.config.jax_compilation_cache_dir == expected
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
