"""Claims in worker processes: the verdicts, their order, their files, and what a broken claim does to the others."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from attnlab.claims import REGISTRY, at_most, claim, equal
from attnlab.runs.session import Session
from attnlab.verification import Check, default_workers, record, verify_all, write_junit, write_verdicts

ATTNLAB = Path(sys.executable).with_name("attnlab")
OPTIONS = {"source": "arithmetic", "tolerance": 1e-9, "because": "an identity"}

OWN = '''
import os

from attnlab.claims import claim, equal

OPTIONS = {"source": "arithmetic", "tolerance": 1e-9, "because": "an identity"}


@claim(statement="1 = 1", **OPTIONS)
def size_is_one(key, size=1):
    """Holds at the default size alone."""
    return equal("the size", size, 1.0)


@claim(statement="1 = 1", **OPTIONS)
def this_one_raises(key):
    """Never gets so far."""
    raise ArithmeticError("no [red] number")


@claim(statement="1 = 1", **OPTIONS)
def this_one_dies(key):
    """Takes its process down."""
    os._exit(3)
'''


@pytest.fixture
def some_claims():
    """Three claims that the registry forgets again."""
    before = dict(REGISTRY)

    @claim(statement="a", **OPTIONS)
    def a_claim_with_sizes(key, size=1):
        return equal("the size", size, 1.0)

    @claim(statement="b", **OPTIONS)
    def a_claim_without_sizes(key):
        return [at_most("ones", np.ones(9), np.ones(9)), at_most("two", 1.0, 2.0)]

    @claim(statement="c < d & e", **OPTIONS)
    def a_claim_that_raises(key):
        raise ValueError("the reason")

    yield ["a-claim-with-sizes", "a-claim-without-sizes", "a-claim-that-raises"]
    REGISTRY.clear()
    REGISTRY.update(before)


def verdicts_on(names, **options):
    check = Check(names, **{"seeds": [1, 2], **options})
    return check, verify_all(check, Console(quiet=True), 1, lambda: None)


def test_verdicts_come_in_the_order_asked_for(some_claims):
    _, verdicts = verdicts_on(some_claims)
    assert [(v.claim.name, v.seed) for v in verdicts] == [(name, seed) for name in some_claims for seed in (1, 2)]
    assert [v.passed for v in verdicts] == [True, True, True, True, False, False]
    assert verdicts[-1].reason == "ValueError: the reason"


def test_size_reaches_the_claims_that_have_sizes(some_claims):
    _, verdicts = verdicts_on(some_claims[:2], size=2)
    assert [v.passed for v in verdicts] == [False, False, True, True]


def test_json_and_junit_hold_every_verdict(some_claims, tmp_path):
    check, verdicts = verdicts_on(some_claims)
    write_verdicts(tmp_path / "v.json", verdicts, check, 1.5)
    content = json.loads((tmp_path / "v.json").read_text())
    assert content["seconds"] == 1.5
    assert content["config"] == {"seeds": [1, 2], "size": 1}
    assert [row["passed"] for row in content["verdicts"]] == [v.passed for v in verdicts]
    ones, _ = content["verdicts"][2]["parts"]
    assert (ones["what"], ones["expected"], ones["passed"]) == ("ones", "≤ 9 numbers, norm 3", True)
    assert content["verdicts"][2]["worst"] == "ones"
    assert content["verdicts"][-1]["error"] is None

    write_junit(tmp_path / "v.xml", verdicts, 1.5)
    suite = ElementTree.parse(tmp_path / "v.xml").getroot().find("testsuite")
    assert (suite.get("tests"), suite.get("failures")) == ("6", "2")
    failures = [case.find("failure") for case in suite.findall("testcase")]
    assert [failure is None for failure in failures] == [v.passed for v in verdicts]
    assert failures[-1].get("message") == "ValueError: the reason"
    assert "c < d & e" in failures[-1].text


def test_a_verification_that_was_stopped_goes_on_with_the_same_verdicts(some_claims, tmp_path):
    calls = []

    @claim(statement="d", **OPTIONS)
    def a_claim_that_is_stopped_once(key):
        calls.append("stopped")
        if len(calls) == 1:
            raise KeyboardInterrupt
        return at_most("few", np.array([np.nan, -0.0, 1 / 3]), 1.0, 0.5)

    names = [*some_claims, "a-claim-that-is-stopped-once"]
    check, session = Check(names, [1, 2]), Session(tmp_path / "run")
    kept = []
    with pytest.raises(KeyboardInterrupt):
        verify_all(check, Console(quiet=True), 1, lambda: None, session=session)
    # Verified again, it would fail.
    REGISTRY[names[0]] = replace(REGISTRY[names[1]], name=names[0], measure=lambda key: at_most("anew", 2.0, 1.0))
    resumed = verify_all(check, Console(quiet=True), 1, lambda: None, kept.append, session)
    again = verify_all(check, Console(quiet=True), 1, lambda: None, kept.append, session)
    assert len(calls) == 3
    plain = verify_all(replace(check, names=names[1:]), Console(quiet=True), 1, lambda: None)

    def numbers(verdicts):
        return [record(replace(verdict, seconds=0.0)) for verdict in verdicts]

    assert numbers(resumed)[2:] == numbers(plain)
    assert [verdict.passed for verdict in resumed[:2]] == [True, True]
    assert numbers(again) == numbers(resumed) == numbers(kept[-1])
    np.testing.assert_array_equal(resumed[-1].parts[0].measured, [np.nan, -0.0, 1 / 3])

    with pytest.raises(ValueError, match="another"):
        verify_all(Check(names, [1, 3]), Console(quiet=True), 1, lambda: None, session=session)


def test_workers_default_to_the_processors_of_this_process():
    assert 1 <= default_workers() <= (os.cpu_count() or 1)


@pytest.mark.slow
def test_processes_of_their_own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    run = partial(subprocess.run, capture_output=True, text=True, cwd=tmp_path)
    done = run([ATTNLAB, "verify", "own.py", "--strict", "--workers", "2", "--json", "v.json", "--junit", "v.xml"])
    assert done.returncode == 1, done.stderr
    assert "0 of 3 passed" in done.stdout
    rows = {row["claim"]: row for row in json.loads((tmp_path / "v.json").read_text())["verdicts"]}
    assert list(rows) == ["size-is-one", "this-one-raises", "this-one-dies"]
    assert rows["this-one-dies"]["reason"] == "its worker process ended before it was done"
    assert len(ElementTree.parse(tmp_path / "v.xml").getroot().findall("testsuite/testcase")) == 3
