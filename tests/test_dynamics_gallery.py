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
        if (name, seed) == ("two", 5) and len(measured) == 3:
            measured.append("stopped")
            raise KeyboardInterrupt
        measured.append((name, seed))
        found = {field: np.array(values) for field, values in EXPECTED.items()}
        values = np.array([seed / 4, float(name == "two")])
        return found | {"measured": values, "analysis": np.full(2, name), "seconds": np.ones(1)}

    monkeypatch.setattr(gallery, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        gallery.compute(config, Progress(disable=True))
    arrays = gallery.compute(config, Progress(disable=True))
    assert measured == [("one", 4), ("two", 4), ("one", 5), "stopped", ("two", 5)]
    np.testing.assert_array_equal(arrays["measured"], [[1, 1.25], [0, 0], [1, 1.25], [1, 1]])
    assert arrays["analysis"].tolist() == ["one", "one", "two", "two"]
    assert arrays["seconds"].shape == (2, 2)
    verdicts = [[finding.passed for finding in row] for row in gallery.rows(arrays)]
    assert verdicts == [[True, False], [False, False], [True, False], [True, True]]
    assert [finding.passed for finding in gallery.findings(arrays, config)] == [False, False, False, True]
    (times,) = gallery.tables(arrays, config)
    assert list(times.columns[3].cells) == ["1 of 4", "3 of 4"]


@pytest.mark.parametrize(
    ("finding", "place"),
    [
        (between("a", 0.25, 0.0, 1.0), 0.25),
        (between("a", 7.0, 0.0, 1.0), 1.15),
        (equal("a", 2.0, 2.0, 0.0), 0.5),
        (equal("a", 3.0, 2.0, 0.0), 1.15),
        (at_least("a", 2.0, 2.0), 0.0),
        (at_least("a", 1.0, 2.0), -0.15),
        (at_most("a", 2.0, 2.0), 1.0),
        (at_most("a", 3.0, 2.0), 1.15),
    ],
)
def test_the_place_of_a_measurement_in_its_interval(gallery, finding, place):
    assert gallery.place(finding) == pytest.approx(place)


def test_no_seed_is_an_error(gallery):
    with pytest.raises(ValueError, match="seeds is 0; expected at least 1"):
        gallery.compute(gallery.Config(seeds=0), Progress(disable=True))


@pytest.mark.parametrize("name", ["dynamics-gallery", "edge-of-stability", "warmup"])
def test_an_unknown_member_or_run_is_an_error(name):
    script = load_script(analysis_scripts()[name])
    flag = "members" if name == "dynamics-gallery" else "runs"
    with pytest.raises(ValueError, match=f"there is no {flag[:-1]} 'GD 0.3'; expected one of: "):
        script.compute(script.Config(**{flag: ("GD 0.3",)}), Progress(disable=True))
