"""The direction of imports, and what importing the package must not do."""

import subprocess
import sys

import pytest
from importlinter.cli import lint_imports

HEAVY = ("jax", "matplotlib.pyplot", "scipy", "sklearn")


def test_modules_import_only_from_below(pytestconfig):
    assert lint_imports(config_filename=str(pytestconfig.rootpath / "pyproject.toml"), cache_dir=None) == 0


@pytest.mark.parametrize("module", ["attnlab", "attnlab.cli", "attnlab.analysis"])
def test_commands_answer_before_anything_heavy_is_imported(module):
    program = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.slow
def test_importing_everything_leaves_the_precision_alone():
    program = (
        "import pkgutil, importlib, attnlab, jax\n"
        "for m in pkgutil.walk_packages(attnlab.__path__, 'attnlab.'): importlib.import_module(m.name)\n"
        "print(jax.config.jax_enable_x64)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_no_attention_takes_its_softmax_in_32_bits(pytestconfig):
    """The library's own attention does, of 64-bit inputs too; it stands in the claim that measures this alone."""
    files = (pytestconfig.rootpath / "src").rglob("*.py")
    users = [file.name for file in files if "dot_product_attention" in file.read_text()]
    assert users == ["approximation.py"]
