"""`import attnlab as al`: the names are there, lazily, as a type checker and a completion see them."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import attnlab as al


@pytest.mark.parametrize("name", [name for name in al.__all__ if name not in ("TOPICS", "__version__")])
def test_a_name_is_that_of_its_module(name):
    (home,) = {m for modules in al.TOPICS.values() for m, names in modules.items() if name in names}
    assert getattr(al, name) is getattr(importlib.import_module(home), name)
    assert getattr(al, name).__doc__


def test_a_type_checker_sees_the_same_names():
    tree = ast.parse(Path(al.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    typed = {(alias.asname, node.module) for node in block.body for alias in node.names}
    listed = {(n, module) for modules in al.TOPICS.values() for module, names in modules.items() for n in names}
    assert typed == listed | {("plot", "attnlab")}


def test_completion_and_star_import():
    assert set(al.__all__) <= set(dir(al))
    space = {}
    exec("from attnlab import *", space)
    assert space["hessian"] is al.hessian


def test_no_name_is_hidden_by_a_module_of_the_package():
    """Importing a submodule binds its name in the package, over a name of the front door."""
    modules = {path.stem for path in Path(al.__file__).parent.iterdir()}
    assert not modules & set(al.__all__)


def test_unknown_names_are_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'attnlab' has no attribute 'hesian'; expected one of: objective"):
        al.hesian  # noqa: B018


def test_the_import_costs_no_jax():
    program = "import attnlab as al, sys; dir(al); print('jax' in sys.modules); al.hessian; print('jax' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "True"]
