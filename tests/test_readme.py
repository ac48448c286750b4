"""The README keeps its word: its Python runs, its files and commands exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

CACHED = {
    **os.environ,
    "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
"""Examples keep what they compile, as the tests do."""


@pytest.fixture
def readme(pytestconfig):
    return (pytestconfig.rootpath / "README.md").read_text()


EXAMPLES = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)
QUICK = (0, 3)  # a process of its own each, which compiles everything again: the others run nightly


@pytest.mark.parametrize(
    "number", [i if i in QUICK else pytest.param(i, marks=pytest.mark.slow) for i in range(len(EXAMPLES))]
)
def test_the_python_examples_run_and_print_finite_numbers(number):
    done = subprocess.run([sys.executable, "-c", EXAMPLES[number]], capture_output=True, text=True, env=CACHED)
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


def test_the_table_of_figures_has_every_analysis(pytestconfig):
    table = (pytestconfig.rootpath / "figures" / "README.md").read_text()
    for script in (pytestconfig.rootpath / "analyses").glob("[!_]*.py"):
        assert f"| `attnlab run {script.stem.replace('_', '-')}` " in table
    for image in re.findall(r'src="([^"]+)"', table):
        assert (pytestconfig.rootpath / "figures" / image).exists(), image
