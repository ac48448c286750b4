"""Figures are made again when their code has changed, and only then."""

import json
import shutil

import pytest

from attnlab.cli import analysis_scripts
from attnlab.report.gallery import GROUPS, gallery
from attnlab.report.mathematics import with_formulas
from attnlab.report.remake import jobs, jobs_table, remake, to_make

SCRIPT = """
import sys
from pathlib import Path

from attnlab.runs import manifest, write_json

COUNT = 0
script = Path(__file__)
record = manifest({}, 2.0, script) | {"git_dirty": False, "resumed": False}
write_json(Path(sys.argv[2]) / f"{script.stem}.json", record)
"""


@pytest.fixture
def scripts(tmp_path):
    (tmp_path / "analyses").mkdir()
    (tmp_path / "figures").mkdir()
    found = {name: tmp_path / "analyses" / f"{name}.py" for name in ("one", "two")}
    for path in found.values():
        path.write_text(SCRIPT)
    return found


@pytest.mark.slow
def test_what_is_up_to_date_is_left_alone(scripts, tmp_path):
    folder, said = tmp_path / "figures", []
    found = jobs(folder, scripts)
    assert [(job.name, job.reason, job.seconds) for job in found] == [
        ("one", "not made yet", None),
        ("two", "not made yet", None),
    ]
    assert remake(found, folder, said.append) == []
    assert said[0] == "2 to make, about 0 minutes and 2 of unknown time"
    assert said[-1].startswith("two took")
    assert [job.reason for job in jobs(folder, scripts)] == ["", ""]
    assert [job.seconds for job in jobs(folder, scripts)] == [2.0, 2.0]

    scripts["one"].write_text(SCRIPT.replace("COUNT = 0", "# a comment changes no number\nCOUNT = 0"))
    assert to_make(jobs(folder, scripts)) == []
    scripts["one"].write_text(SCRIPT.replace("COUNT = 0", "COUNT = 1"))
    (job,) = to_make(jobs(folder, scripts))
    assert (job.name, job.reason) == ("one", "1 files changed: analyses/one.py ...")
    assert jobs_table(jobs(folder, scripts)).caption == "1 to make, about 0 minutes"


def test_a_failed_figure_does_not_stop_the_others(scripts, tmp_path):
    folder, said = tmp_path / "figures", []
    scripts["one"].write_text("raise SystemExit(3)")
    assert remake(jobs(folder, scripts), folder, said.append) == ["one"]
    assert "one failed with status 3; 1 to make, about 0 minutes and 1 of unknown time" in said
    assert (folder / "two.json").exists()


@pytest.mark.slow
def test_seconds_of_a_resumed_run_are_those_of_all_its_parts(scripts, tmp_path):
    folder = tmp_path / "figures"
    remake(jobs(folder, scripts), folder, lambda line: None)
    record = json.loads((folder / "two.json").read_text())
    (folder / "two.json").write_text(json.dumps(record | {"parts": {"seconds": 7200.0}, "git_dirty": True}))
    job = jobs(folder, scripts, ["two"])[0]
    assert (job.seconds, job.reason) == (7200.0, "made from code that was not committed")
    (folder / "two.json").write_text(json.dumps(record | {"resumed": True}))  # of what its parts cost it says nothing
    assert jobs(folder, scripts, ["two"])[0].seconds is None


def test_bad_input_is_named(scripts, tmp_path):
    with pytest.raises(ValueError, match="'three'"):
        jobs(tmp_path / "figures", scripts, ["three"])
    (tmp_path / "figures" / "one.json").write_text("{")
    with pytest.raises(ValueError, match=r"one\.json is no manifest of a figure"):
        jobs(tmp_path / "figures", scripts)
    shutil.rmtree(tmp_path / "figures")
    assert len(to_make(jobs(tmp_path / "figures", scripts))) == 2


def test_the_gallery_has_what_each_figure_says_and_how_much_was_expected(tmp_path):
    found = [{"passed": True}, {"passed": False}]
    record = {
        "message": "$|a|$ is 2\nand $\\|b\\|$ 3",
        "findings": found,
        "config": {"seeds": 4},
        "seconds": 7.2,
        "resumed": False,
    }
    (tmp_path / "warmup.json").write_text(json.dumps(record))
    (tmp_path / "warmup-details.png").touch()
    page = gallery(tmp_path, {"warmup": "Why.", "rod-flow": "A flow.", "own": "Mine."})
    (row,) = [line for line in page.splitlines() if "attnlab run warmup" in line]
    assert row == (
        '| <a href="warmup.png"><img src="warmup.png" width="220" alt="warmup"></a>'
        '<br><a href="warmup-details.png">more of it</a> '
        r"| **$\|a\|$ is 2 and $\Vert b\Vert $ 3.** Why. | 1 of 2 | 4 | `attnlab run warmup` 7 s |"
    )
    assert "| not drawn yet | A flow. | | | `attnlab run rod-flow` |" in page
    assert page.index("## Training dynamics") < page.index("## Others") < page.index("Mine.")
    assert "Max-margin" not in page


def test_every_analysis_has_its_strand():
    named = [name for names in GROUPS.values() for name in names]
    assert sorted(named) == sorted(analysis_scripts())


def test_a_message_with_formulas_is_text_and_mathml():
    assert with_formulas("1 < 2") == "1 &lt; 2"
    shown = with_formulas(r"of $\sigma$ & more")
    assert shown.startswith("of <math")
    assert shown.endswith("</math> &amp; more")
