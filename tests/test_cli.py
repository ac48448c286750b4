"""The command line, driven as a user would."""

import errno
import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

import attnlab
from attnlab.claims import REGISTRY, load_claims
from attnlab.cli import main

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
    assert "there is no analysis 'atention-spectrum'" in done.stderr
    assert "Did you mean 'attention-spectrum'?" in done.stderr


def test_an_unknown_flag_is_named():
    done = run(ATTNLAB, "run", "attention-spectrum", "--step", "3")
    assert done.returncode == 2
    assert "--step" in done.stderr


@pytest.mark.slow
def test_bad_input_fails_with_one_line_and_leaves_nothing(tmp_path):
    done = run(ATTNLAB, "run", "attention-spectrum", "--images", "5000", "--output", tmp_path)
    assert done.returncode == 1
    assert "error: count is 5000; expected 1 <= count <= 1797" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


CLAIM = """
from attnlab.claims import claim, equal

@claim(statement="1 = 1", source="arithmetic", tolerance=1e-9, because="an identity")
def own_{name}(key):
    {body}
    return equal("one", 1.0, 1.0)
"""


def of_main(capsys, *words):
    """Status, output and errors of the command in this process."""
    before = dict(REGISTRY)
    try:
        main([str(word) for word in words])
        status = 0
    except SystemExit as end:
        status = end.code or 0
    finally:
        for name in REGISTRY.keys() - (before or load_claims()).keys():
            del REGISTRY[name]
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_version(capsys):
    assert of_main(capsys, "--version") == (0, f"attnlab {attnlab.__version__}\n", "")


def test_the_list_of_claims(capsys):
    status, out, _ = of_main(capsys, "verify", "--list")
    assert status == 0
    assert all(name[:20] in out for name in load_claims())


@pytest.mark.parametrize(
    ("words", "content", "message"),
    [
        (("verify", "own.py"), "x = 1", "own.py holds no claim; expected at least one function"),
        (("verify", "own.py"), "def (", "own.py cannot be loaded: SyntaxError"),
        (("verify", "own.py"), "1 / 0", "own.py cannot be loaded: ZeroDivisionError: division by zero"),
        (("verify", "missing.py"), "", "missing.py"),
        (("verify", "attention-hesian"), "", "there is no claim 'attention-hesian'"),
        (("verify", "own.py", "--json", "own.py/v.json"), "", "own.py/v.json"),
        (("report", "--verdicts", "missing.json"), "", "there are no verdicts in missing.json"),
        (("report", "--verdicts", "own.py"), "{", "own.py is no JSON"),
        (("report", "--verdicts", "own.py"), "[1]", "own.py holds no verdicts"),
        (("report", "--verdicts", "own.py", "--output", "own.py/report.html"), "", "own.py/report.html"),
    ],
)
def test_bad_input_is_said_in_a_line(capsys, tmp_path, monkeypatch, words, content, message):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(content)
    status, _, err = of_main(capsys, *words)
    assert status == 2
    assert message in err
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["own.py"]


def test_a_claim_without_its_package_is_skipped(capsys, tmp_path):
    """And what a message has in brackets is no markup."""
    body = "raise ModuleNotFoundError('run pip install \"attnlab[pretrained]\"')"
    (tmp_path / "own.py").write_text(CLAIM.format(name="lacks", body=body) + CLAIM.format(name="holds", body=""))
    written = [tmp_path / "v.json", tmp_path / "a" / "[" / "b].json"]  # a closing tag to a terminal's markup
    for file in written:
        words = ("verify", tmp_path / "own.py", "--workers", 1, "--json", file, "--junit", tmp_path / "v.xml")
        status, out, _ = of_main(capsys, *words)
        assert status == 0
        assert 'own-lacks seed 1: skipped: run pip install "attnlab[pretrained]"' in out
        assert "own-holds seed 1: passed" in out
        assert "1 of 2 passed, 1 skipped" in out
        rows = json.loads(file.read_text())["verdicts"]
        assert [(row["passed"], row["skipped"]) for row in rows] == [(False, True), (True, False)]
    suite = ElementTree.parse(tmp_path / "v.xml").getroot().find("testsuite")
    assert (suite.get("failures"), suite.get("skipped")) == ("0", "1")
    report = tmp_path / "report.html"
    status, out, _ = of_main(capsys, "report", "--verdicts", written[0], "--figures", tmp_path, "--output", report)
    assert "1 of 2 claims hold" in report.read_text()
    assert "1 could not be tried for want of a package" in report.read_text()


def test_an_interrupted_verification_keeps_what_it_has(capsys, tmp_path):
    text = CLAIM.format(name="first", body="") + CLAIM.format(name="second", body="raise KeyboardInterrupt")
    (tmp_path / "own.py").write_text(text)
    status, out, _ = of_main(capsys, "verify", tmp_path / "own.py", "--workers", 1, "--json", tmp_path / "v.json")
    assert status == 130
    assert out.endswith(f"stopped. 1 verdicts are in {tmp_path / 'v.json'}.\n")
    assert [row["claim"] for row in json.loads((tmp_path / "v.json").read_text())["verdicts"]] == ["own-first"]


def test_a_full_disk_stops_no_verification(capsys, tmp_path, monkeypatch):
    def full(path, *_):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("attnlab.verification.write_verdicts", full)
    (tmp_path / "own.py").write_text(CLAIM.format(name="first", body=""))
    status, out, err = of_main(capsys, "verify", tmp_path / "own.py", "--workers", 1, "--json", tmp_path / "v.json")
    assert status == 2
    assert "own-first seed 1: passed" in out
    assert f"No space left on device: '{tmp_path / 'v.json'}'" in err


def test_figures_left_out_are_named(capsys, tmp_path):
    (tmp_path / "own.py").write_text(CLAIM.format(name="first", body=""))
    of_main(capsys, "verify", tmp_path / "own.py", "--workers", 1, "--json", tmp_path / "v.json")
    figures = tmp_path / "figures"
    figures.mkdir()
    for name, content in (("lone.png", ""), ("broken.png", ""), ("broken.json", "{"), ("list.json", "[]")):
        (figures / name).write_text(content)
    (figures / "list.png").write_text("")
    words = ("report", "--verdicts", tmp_path / "v.json", "--figures", figures, "--output", tmp_path / "report.html")
    status, out, _ = of_main(capsys, *words)
    assert status == 0
    assert f"left out: {figures / 'broken.png'} (its manifest broken.json is no JSON" in out
    assert f"left out: {figures / 'list.png'} (its manifest list.json is not one)" in out
    assert f"left out: {figures / 'lone'} (there is no lone.json)" in out
