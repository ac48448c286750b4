"""The examples in the docstrings run, and print what they say."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import attnlab


def examples():
    """Every object of the package that has an example, by its full name."""
    found = {}
    for info in pkgutil.walk_packages(attnlab.__path__, "attnlab."):
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            own = getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")
            if own and callable(value) and ">>>" in (inspect.getdoc(value) or ""):
                found[f"{module.__name__}.{name}"] = value
    return found


EXAMPLES = examples()


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_prints_what_it_says(name):
    (test,) = doctest.DocTestFinder(recurse=False).find(EXAMPLES[name], name, globs={})
    assert test.examples
    report = []
    doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=report.append)
    assert not report, "".join(report)


def test_there_are_examples_where_a_user_starts():
    assert len(EXAMPLES) >= 40
