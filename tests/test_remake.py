"""Figures are made again when their code has changed, and only then."""

import json
import shutil

import pytest

from attnlab.report.remake import jobs, jobs_table, remake, to_make

SCRIPT = """
import sys
from pathlib import Path

from attnlab.runs import manifest, write_json

COUNT = 0
script = Path(__file__)
write_json(Path(sys.argv[2]) / f"{script.stem}.json", manifest({}, 2.0, script) | {"git_dirty": False})
"""


@pytest.fixture
def scripts(tmp_path):
    (tmp_path / "analyses").mkdir()
    (tmp_path / "figures").mkdir()
    found = {name: tmp_path / "analyses" / f"{name}.py" for name in ("one", "two")}
    for path in found.values():
        path.write_text(SCRIPT)
    return found


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


def test_seconds_of_a_resumed_run_are_those_of_all_its_parts(scripts, tmp_path):
    folder = tmp_path / "figures"
    remake(jobs(folder, scripts), folder, lambda line: None)
    record = json.loads((folder / "two.json").read_text())
    (folder / "two.json").write_text(json.dumps(record | {"parts": {"seconds": 7200.0}, "git_dirty": True}))
    job = jobs(folder, scripts, ["two"])[0]
    assert (job.seconds, job.reason) == (7200.0, "made from code that was not committed")


def test_bad_input_is_named(scripts, tmp_path):
    with pytest.raises(ValueError, match="'three'"):
        jobs(tmp_path / "figures", scripts, ["three"])
    (tmp_path / "figures" / "one.json").write_text("{")
    with pytest.raises(ValueError, match=r"one\.json is no manifest of a figure"):
        jobs(tmp_path / "figures", scripts)
    shutil.rmtree(tmp_path / "figures")
    assert len(to_make(jobs(tmp_path / "figures", scripts))) == 2
