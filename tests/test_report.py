"""The report: complete, one file, the same on every rerun, and honest about what is stale."""

import base64
import html
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fontTools.ttLib import TTFont
from PIL import Image

from attnlab.claims import at_most, load_claims
from attnlab.cli import analysis_scripts
from attnlab.report import staleness, write_report
from attnlab.report.changes import changes
from attnlab.report.mathematics import mathematics
from attnlab.runs import source_digests

VOID = {"meta", "link", "img", "br", "input"}


class Balanced(HTMLParser):
    """Raises where a tag is not closed by its own kind; collects what the page would load."""

    def __init__(self):
        super().__init__()
        self.open, self.addresses = [], []

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def row(**changes):
    usual = {
        "claim": "one-is-one",
        "strand": "arithmetic",
        "statement": r"\alpha < \tfrac{1}{2} \text{ & more}",
        "source": "a <source> & co",
        "instance": "Draws one.",
        "parts": [at_most("one", 1.0, 1.0, 0.1, because="rounding").record()],
        "seed": 1,
        "error": 0.0,
        "passed": True,
        "reason": "",
        "seconds": 0.1,
    }
    return {**usual, **changes}


def verdicts(*rows):
    versions = {"attnlab": "0", "jax": "0", "python": "3"}
    config = {"seeds": [1, 2], "size": 1}
    run = {"config": config, "seconds": 3.0, "device": "cpu", "versions": versions, "git_commit": None}
    return {**run, "verdicts": list(rows)}


def figure(folder: Path, name: str, **record):
    folder.mkdir(exist_ok=True)
    Image.effect_noise((1600, 900), 100).save(folder / f"{name}.png")
    (folder / f"{name}.json").write_text(json.dumps({"analysis": name, "command": f"attnlab run {name}", **record}))


def page(tmp_path, *rows, scripts=None):
    path = tmp_path / "report.html"
    write_report(path, verdicts(*rows), tmp_path / "figures", scripts or {})
    return path.read_text()


def test_the_page_is_whole_and_needs_no_network(tmp_path):
    figure(tmp_path / "figures", "icl-depth", sources={})
    figure(tmp_path / "figures", "icl-depth-smoke")
    text = page(tmp_path, row(), row(seed=2, passed=False, error=None, reason="it <broke>"))
    reader = Balanced()
    reader.feed(text)
    assert reader.open == []
    assert all(address.startswith(("data:", "#", "figures/")) for address in reader.addresses)
    assert "0 of 1 claims hold" in text
    assert "it &lt;broke&gt;" in text
    assert "a &lt;source&gt; &amp; co" in text
    (small,) = re.findall(r'<a href="figures/icl-depth.png"><img [^>]*src="data:image/png;base64,([^"]*)"', text)
    assert Image.open(io.BytesIO(base64.b64decode(small))).size == (720, 405)
    assert "<math" in text
    assert text == page(tmp_path, row(), row(seed=2, passed=False, error=None, reason="it <broke>"))


@pytest.mark.parametrize("name", load_claims())
def test_every_statement_becomes_mathematics(name):
    formula = mathematics(load_claims()[name].statement)
    reader = Balanced()
    reader.feed(formula)
    assert reader.open == []
    assert not re.search(r"\\|\$", formula), "a command that the converter does not know"


def test_lines_may_break_behind_words_relations_and_commas_outside_of_brackets():
    formula = mathematics(r"f(a, b) \sim c,\ d \implies e \text{ for } g' < 1")
    pieces = ["".join(re.findall(">([^<])<", piece)) for piece in formula.split("</math>")]
    assert pieces == ["f(a,b)∼", "c,", "d⟹", "e", "g′", "1", ""]
    assert "</math> for <math>" in formula


def test_the_page_carries_every_glyph_of_its_mathematics(tmp_path):
    text = page(tmp_path, *(row(claim=claim.name, statement=claim.statement) for claim in load_claims().values()))
    (font,) = re.findall(r"data:font/woff;base64,([^)]*)\)", text)
    glyphs = TTFont(io.BytesIO(base64.b64decode(font))).getBestCmap()
    formulas = "".join(re.findall("<math>.*?</math>", text))
    shown = set(map(ord, html.unescape(re.sub("<[^>]*>", "", formulas))))
    single = set(re.findall("<mi>(.)</mi>", formulas))
    assert len(shown) > 100
    assert not [chr(code) for code in shown - glyphs.keys() if not chr(code).isspace()]
    # A browser shows a single Latin letter in italics, which have code points of their own.
    latin = [letter for letter in single if letter.isascii() and letter != "h"]
    assert not [
        x
        for x in latin
        if ord(x) - ord("a" if x.islower() else "A") + (0x1D44E if x.islower() else 0x1D434) not in glyphs
    ]
    assert "MATH" in TTFont(io.BytesIO(base64.b64decode(font)))


@pytest.fixture
def script():
    return analysis_scripts()["icl-depth"]


def test_digests_cover_what_a_script_imports(script):
    names = set(source_digests(script))
    needed = ("icl/depth.py", "icl/tasks.py", "objectives/in_memory.py")
    assert {"analyses/icl_depth.py", *(f"attnlab/{name}" for name in needed)} <= names
    unneeded = {"cli.py", "runs/files.py", "margin/solve.py", "icl/landscape.py"}
    assert not {f"attnlab/{name}" for name in unneeded} & names
    assert "attnlab/__init__.py" not in names  # the front door names every room
    assert "attnlab/runs/session.py" in source_digests(analysis_scripts()["central-flow"])  # it drives a training run


def test_digests_of_a_script_that_comes_by_the_front_door(tmp_path):
    script = tmp_path / "mine.py"
    script.write_text("import attnlab as al")
    assert {"attnlab/__init__.py", "attnlab/margin/solve.py", "attnlab/icl/tasks.py"} <= set(source_digests(script))


def test_a_figure_is_stale_when_its_code_changed(script):
    sources = source_digests(script)
    assert staleness({"sources": sources}, script).changed == ()
    older = {**sources, "attnlab/icl/depth.py": "0", "attnlab/gone.py": "0"}
    assert staleness({"sources": older}, script).changed == ("attnlab/gone.py", "attnlab/icl/depth.py")
    framed = {**sources, "attnlab/training/report.py": "a digest of what draws progress bars"}
    assert staleness({"sources": framed}, script).changed == ()


def test_an_older_manifest_is_compared_by_its_commit(script):
    def git(*words):
        return subprocess.run(["git", "-C", script.parent, *words], capture_output=True, text=True)

    root = git("rev-list", "--max-parents=0", "HEAD").stdout.split()
    if not root:
        pytest.skip("not a git checkout")
    assert "analyses/icl_depth.py" in staleness({"git_commit": root[0]}, script).changed
    assert staleness({"git_commit": "0" * 40}, script).changed is None
    assert staleness({"git_commit": None}, script).changed is None
    assert staleness({}, None).note == "no script makes this figure any more"


def test_the_command_writes_the_report_from_what_is_there(tmp_path):
    figure(tmp_path / "figures", "icl-depth", sources={})
    (tmp_path / "verdicts.json").write_text(json.dumps(verdicts(row())))
    command = [Path(sys.executable).with_name("attnlab"), "report", "--verdicts", "verdicts.json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "wrote report.html" in done.stdout
    text = (tmp_path / "report.html").read_text()
    assert "1 of 1 claims hold" in text
    assert re.search(r">stale</span></summary>[0-9]+ of its files changed", text)


def test_failures_and_disagreements_come_first_and_are_counted(tmp_path):
    rows = (
        row(),
        row(claim="two-is-three", passed=False, error=2.0),
        row(claim="three", disagrees_with="They say four"),
    )
    text = page(tmp_path, *rows)
    assert text.index('id="failed"') < text.index('id="disagreements"') < text.index('id="claims"')
    assert '<a href="#failed">Failed (1)</a>' in text
    assert '<a href="#strand-arithmetic">arithmetic (3)</a>' in text
    assert "They say four." in text
    assert text.count('data-verdict="passed"') == 2
    assert text.count('data-verdict="failed"') == 1


def test_changes_between_two_runs():
    part = at_most("one", 1.0, 1.0, 0.1).record()
    moved = at_most("one", 1.35, 1.0, 0.1).record()
    old = [row(claim="same"), row(claim="gone"), row(claim="moved", parts=[part]), row(claim="broken")]
    new = [row(claim="same"), row(claim="new"), row(claim="moved", parts=[moved]), row(claim="broken", passed=False)]
    assert changes(old, new) == {
        "broken": "passed before, failed now (seed 1)",
        "gone": "is not there any more",
        "moved": "one: 1 before, 1.35 now (seed 1)",
        "new": "is new",
    }
    assert changes(old, old) == {}


def test_the_report_says_what_changed(tmp_path):
    earlier = verdicts(row(passed=False))
    write_report(tmp_path / "report.html", verdicts(row()), tmp_path / "figures", {}, earlier)
    assert "one-is-one: failed before, passed now (seed 1)" in (tmp_path / "report.html").read_text()


def test_comments_and_docstrings_do_not_make_a_figure_stale(tmp_path):
    script = tmp_path / "mine.py"
    script.write_text('"""One."""\n\nX = 1  # one\n"""Of X."""\n\n\ndef f(x):\n    """Two."""\n    return x + X\n')
    before = source_digests(script)
    script.write_text('"""Another."""\nX = 1\n\n\ndef f(x):\n    # more\n    return (x + X)\n')
    assert source_digests(script) == before
    script.write_text("X = 1\n\n\ndef f(x):\n    return x - X\n")
    assert source_digests(script) != before


def test_a_file_that_is_no_image_is_left_out(tmp_path):
    figure(tmp_path / "figures", "icl-depth")
    (tmp_path / "figures" / "icl-depth.png").write_text("no image")
    left_out = write_report(tmp_path / "report.html", verdicts(row()), tmp_path / "figures", {})
    assert len(left_out) == 1
    assert "it is no image" in left_out[0]
