"""The README keeps its word: its Python runs, its files and commands exist."""

import re
import subprocess
import sys

import pytest


@pytest.fixture
def readme(pytestconfig):
    return (pytestconfig.rootpath / "README.md").read_text()


def test_the_python_examples_run_and_print_finite_numbers(readme):
    examples = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(examples) >= 2
    for example in examples:
        done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
        assert "nan" not in done.stdout


def test_its_files_and_make_targets_exist(readme, pytestconfig):
    root = pytestconfig.rootpath
    for path in re.findall(r"\]\(([\w/.-]+)\)", readme):
        assert (root / path).exists(), path
    makefile = (root / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make (\w+)", readme, re.MULTILINE):
        assert f"\n{target}:" in makefile, target


def test_its_table_has_every_analysis(readme, pytestconfig):
    for script in (pytestconfig.rootpath / "analyses").glob("[!_]*.py"):
        assert f"| `attnlab run {script.stem.replace('_', '-')}` |" in readme
