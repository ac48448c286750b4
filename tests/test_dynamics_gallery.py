"""The gallery's table over seeds, with members that take no time."""

import numpy as np
import pytest
from rich.progress import Progress

from attnlab.cli import analysis_scripts, load_script
from attnlab.expectation import at_least, at_most, between, equal

EXPECTED = {
    "what": ["a", "b"],
    "relation": ["equal", "at least"],
    "reference": [0.5, 1.0],
    "unit": ["absolute", "absolute"],
    "tolerance": [0.5, 0.0],
    "because": ["", ""],
    "source": ["s", "s"],
}


@pytest.fixture
def gallery():
    return load_script(analysis_scripts()["dynamics-gallery"])


def test_a_stopped_run_resumes_and_every_seed_has_its_column(gallery, tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "MEMBERS", ("one", "two"))
    config = gallery.Config(output=tmp_path, seed=4, seeds=2, members=("one", "two"))
    measured = []

    def measure(config, name, seed, progress):
        if (name, seed) == ("two", 14) and len(measured) == 3:
            measured.append("stopped")
            raise KeyboardInterrupt
        measured.append((name, seed))
        found = {field: np.array(values) for field, values in EXPECTED.items()}
        values = np.array([1 + (seed - 4) / 40, float(name == "two")])
        return found | {"measured": values, "analysis": np.full(2, name), "seconds": np.ones(1)}

    monkeypatch.setattr(gallery, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        gallery.compute(config, Progress(disable=True))
    arrays = gallery.compute(config, Progress(disable=True))
    assert measured == [("one", 4), ("two", 4), ("one", 14), "stopped", ("two", 14)]
    np.testing.assert_array_equal(arrays["measured"], [[1, 1.25], [0, 0], [1, 1.25], [1, 1]])
    assert arrays["analysis"].tolist() == ["one", "one", "two", "two"]
    assert arrays["seconds"].shape == (2, 2)
    verdicts = [[finding.passed for finding in row] for row in gallery.rows(arrays)]
    assert verdicts == [[True, False], [False, False], [True, False], [True, True]]
    assert [finding.passed for finding in gallery.findings(arrays, config)] == [False, False, False, True]
    (times,) = gallery.tables(arrays, config)
    assert list(times.columns[3].cells) == ["1 of 4", "3 of 4"]


@pytest.mark.parametrize(
    ("finding", "interval"),
    [
        (between("a", 0.25, 0.0, 1.0), "0 to 1"),
        (equal("a", 3.0, 2.0, 0.0), "2"),
        (at_least("a", 1.0, 2.0, 0.5), "≥ 1.5"),
        (at_most("a", 2.0, 2.0, 0.5), "≤ 2.5"),
    ],
)
def test_the_interval_is_that_which_passes(gallery, finding, interval):
    assert gallery.interval(finding) == interval


def test_both_tables_hold_every_number_with_its_verdict_source_and_reason(gallery, tmp_path):
    found = {field: np.array(values) for field, values in EXPECTED.items()}
    arrays = found | {
        "analysis": np.array(["warmup", "rod-flow"]),
        "measured": np.array([[0.25, 0.75], [1.5, 0.5]]),
        "what": np.array(["a < b | c", "b"]),
        "because": np.array(["rounding", ""]),
    }
    config = gallery.Config(seeds=2, members=("warmup", "rod-flow"), figures=tmp_path)
    texts = gallery.documents(arrays, config)
    assert set(texts) == {".md", ".html"}
    for text in texts.values():
        assert "3 of 4 expectations are reproduced, from seeds 1, 11." in text
        assert all(word in text for word in ("warmup: 2 of 2", "rod-flow: 1 of 2", "0 to 1", "rounding"))
        assert "rod-flow.png" in text
    assert "| a < b \\| c | 0 to 1 | 0.25 | 0.75 | pass | s | rounding |" in texts[".md"]
    assert "| b | ≥ 1 | 1.5 | **0.5** | **miss** | s |  |" in texts[".md"]
    assert "a &lt; b | c" in texts[".html"]
    assert '<td class="number miss">0.5</td>' in texts[".html"]
    elsewhere = gallery.documents(arrays, gallery.Config(seeds=2, members=("warmup", "rod-flow")))
    assert "(../rod-flow/rod-flow.png)" in elsewhere[".md"]


def test_no_seed_is_an_error(gallery):
    with pytest.raises(ValueError, match="seeds is 0; expected at least 1"):
        gallery.compute(gallery.Config(seeds=0), Progress(disable=True))


@pytest.mark.parametrize("name", ["dynamics-gallery", "edge-of-stability", "warmup"])
def test_an_unknown_member_or_run_is_an_error(name):
    script = load_script(analysis_scripts()[name])
    flag = "members" if name == "dynamics-gallery" else "runs"
    with pytest.raises(ValueError, match=f"there is no {flag[:-1]} 'GD 0.3'; expected one of: "):
        script.compute(script.Config(**{flag: ("GD 0.3",)}), Progress(disable=True))
