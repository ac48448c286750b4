"""The command line, driven as a user would."""

import subprocess
import sys
from pathlib import Path

import pytest

ATTNLAB = Path(sys.executable).with_name("attnlab")


def run(*words, **options):
    return subprocess.run([*map(str, words)], capture_output=True, text=True, **options)


def test_list_names_every_script(pytestconfig):
    done = run(ATTNLAB, "list")
    assert done.returncode == 0
    for script in (pytestconfig.rootpath / "analyses").glob("[!_]*.py"):
        assert script.stem.replace("_", "-") in done.stdout


@pytest.mark.parametrize("words", [("--help",), ("run", "--help"), ("run", "attention-spectrum", "--help")])
def test_help_is_help(words):
    done = run(ATTNLAB, *words)
    assert done.returncode == 0
    assert "usage: attnlab" in done.stdout


def test_an_unknown_analysis_is_named_with_the_known_ones():
    done = run(ATTNLAB, "run", "atention-spectrum")
    assert done.returncode == 2
    assert "invalid choice: 'atention-spectrum'" in done.stderr
    assert "attention-spectrum" in done.stderr


def test_an_unknown_flag_is_named():
    done = run(ATTNLAB, "run", "attention-spectrum", "--step", "3")
    assert done.returncode == 2
    assert "--step" in done.stderr


def test_bad_input_fails_with_one_line_and_leaves_nothing(tmp_path):
    done = run(ATTNLAB, "run", "attention-spectrum", "--images", "5000", "--output", tmp_path)
    assert done.returncode == 1
    assert "error: count is 5000; expected 1 <= count <= 1797" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
