"""The explorer: one page without a network, whose slider moves every panel."""

import html
import json
import re
import subprocess

import numpy as np
import pytest

import attnlab as al
from attnlab.cli import main
from attnlab.explorer import measured, runs_of
from attnlab.training import Records
from test_report_browser import CHROMIUM

STEPS = np.arange(0, 50, 10)
VALUES = {
    "edge": {"ratio": np.linspace(0.5, 1.1, 5), "upper": np.full(5, np.inf)},
    "spectrum": np.arange(100.0).reshape(5, 20),
    "attention": np.arange(5 * 2 * 3 * 3, dtype=float).reshape(5, 2, 3, 3),
}
RECORDS = Records(STEPS, VALUES, np.geomspace(1, 1e-3, 40))


def test_a_page_holds_everything_and_asks_for_nothing(tmp_path):
    page = al.explore(RECORDS, tmp_path / "run.html", title="my run").read_text(encoding="utf-8")
    assert "<title>my run</title>" in page
    for name in ("edge/ratio = 0.5", "spectrum", "attention", "loss = 1"):
        assert f'"{name}"' in page
    assert not re.search(r'<(script|link)[^>]*(src|href)="', page)


def test_a_thousand_measurements_stay_small(tmp_path):
    values = {"ratio": np.linspace(0, 1, 1000), "spectrum": np.zeros((1000, 64)), "map": np.zeros((1000, 8, 8))}
    records = Records(np.arange(1000), values, np.linspace(1, 0.1, 1000))
    assert al.explore(records, tmp_path / "run.html").stat().st_size < 3e6


def test_infinite_bounds_and_keys_are_left_out():
    assert sorted(measured(VALUES)) == ["attention", "edge/ratio", "spectrum"]
    assert measured({"name": np.array(["a", "b"])}) == {}


def test_a_saved_analysis_gives_a_run_for_each_group_with_steps(tmp_path):
    arrays = {"GD/steps": STEPS, "GD/losses": np.ones(50), "GD/ratio": np.ones(5), "GD/odd": np.ones(3), "other": STEPS}
    np.savez(tmp_path / "arrays.npz", **arrays)
    (tmp_path / "manifest.json").write_text("{}")
    runs = runs_of(tmp_path)
    assert list(runs) == ["GD"]
    assert list(runs["GD"].values) == ["ratio"]
    main(["explore", str(tmp_path), "--output", str(tmp_path / "run.html")])
    assert "ratio" in (tmp_path / "run.html").read_text(encoding="utf-8")


def test_what_is_no_run_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        al.explore(tmp_path)
    with pytest.raises(ValueError, match="the run 'run' has no measurement; expected steps at which probes were taken"):
        al.explore(Records(np.zeros(0), {}, np.zeros(3)))
    np.savez(tmp_path / "arrays.npz", values=np.ones(3))
    with pytest.raises(ValueError, match=r"no group of arrays in .* has steps"):
        al.explore(tmp_path)


LOOK = """
<iframe id="frame" style="width: 1000px; height: 900px; border: 0" src="PAGE"></iframe>
<script>
frame.onload = () => setTimeout(() => {
  const document_ = frame.contentWindow.Bokeh.documents[0];
  const state = () => ({
    mark: document_.get_model_by_name("mark edge/ratio").location,
    vector: Array.from(document_.get_model_by_name("data spectrum").data.y).slice(0, 2),
    matrix: Array.from(document_.get_model_by_name("data attention").data.image[0]).slice(0, 2),
    step: document_.get_model_by_name("step").text,
    ratio: document_.get_model_by_name("figure edge/ratio").title.text,
  });
  const before = state();
  document_.get_model_by_name("slider").value = 3;
  setTimeout(() => {
    const result = document.createElement("pre");
    result.id = "result";
    result.textContent = JSON.stringify({before, after: state()});
    document.body.append(result);
  }, 500);
}, 2000);
</script>
"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_moving_the_slider_moves_every_panel(tmp_path):
    look, page = tmp_path / "look.html", al.explore(RECORDS, tmp_path / "run.html")
    look.write_text(LOOK.replace("PAGE", page.as_uri()))
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    flags += " --allow-file-access-from-files --enable-logging=stderr --virtual-time-budget=20000"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", look.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = json.loads(html.unescape(re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)[1]))
    assert found["before"] == {"mark": 0, "vector": [0, 1], "matrix": [0, 1]} | {
        "step": "<b>step 0</b>",
        "ratio": "edge/ratio = 0.5",
    }
    assert found["after"] == {"mark": 30, "vector": [60, 61], "matrix": [54, 55]} | {
        "step": "<b>step 30</b>",
        "ratio": "edge/ratio = 0.95",
    }
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert all("setting log level" in line for line in said), said
