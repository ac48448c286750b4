"""Every analysis at smoke size: what it computes is finite and what it writes is complete and repeatable."""

import dataclasses
import errno
import json
import re
import string

import jax
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from rich.console import Console
from rich.table import Table

from attnlab.analysis import Analysis, AnalysisConfig
from attnlab.cli import analysis_scripts, first_sentence, load_script
from attnlab.expectation import at_most
from attnlab.plotting.style import save_figure, style
from attnlab.runs import load_arrays

mpl.use("agg")


@pytest.fixture(autouse=True)
def double_precision_again():
    """An analysis sets the precision that it wants, and the tests that follow want 64 bits."""
    yield
    jax.config.update("jax_enable_x64", True)


ANALYSES = {name: load_script(script).ANALYSIS for name, script in analysis_scripts().items()}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * each.slow) for name, each in ANALYSES.items()]
)
def test_smoke_run_writes_a_whole_result(name, tmp_path):
    script = analysis_scripts()[name]
    analysis = load_script(script).ANALYSIS
    assert isinstance(analysis, Analysis)
    assert analysis.name == name
    assert len(first_sentence(script)) > 20
    config = analysis.config(smoke=True, output=tmp_path, figures=tmp_path / "figures")
    arrays = analysis.run(config, Console(quiet=True))
    assert arrays
    saved = load_arrays(tmp_path / "results" / f"{name}-smoke")
    jax.tree.map(np.testing.assert_array_equal, saved, arrays)
    figures = tmp_path / "figures"
    members = {name, *arrays.get("analysis", np.array([])).tolist()}  # a gallery writes the figures of its members
    expected = {f"{member}-smoke.{kind}" for member in members for kind in ("png", "pdf", "json")}
    if analysis.details is not None:
        expected |= {f"{name}-smoke-details.{kind}" for kind in ("png", "pdf")}
    if analysis.documents is not None:
        expected |= {f"{name}-smoke{ending}" for ending in analysis.documents(arrays, config)}
    assert {path.name for path in figures.iterdir()} == expected
    record = json.loads((figures / f"{name}-smoke.json").read_text())
    assert record["analysis"] == name
    assert record["config"]["smoke"] is True
    assert record["config"]["seed"] == config.seed
    assert all(finding["what"] and finding["source"] for finding in record["findings"])
    assert record["findings"]
    assert record["message"]
    check_axes(analysis, arrays, dataclasses.replace(config, **config.SMOKE), tmp_path)


def check_axes(analysis, arrays, config, folder):
    """The figures show something on labelled axes, and are the same files when they are drawn again."""
    with style():
        for ending, figure in analysis.draw(arrays, config).items():
            again, _ = save_figure(figure, folder / "again")
            assert isinstance(figure, Figure)
            assert all(axes.has_data() for axes in figure.axes)
            assert any(axes.get_xlabel() for axes in figure.axes)
            assert again.read_bytes() == (folder / "figures" / f"{analysis.name}-smoke{ending}.png").read_bytes()
            check_look(figure, main=not ending)
    plt.close("all")


def check_look(figure, main):
    """One message with a number, lettered panels (four at most in the first figure), and text that can be read where
    the figure is seven inches wide, that stays inside and does not meet other text."""
    panels = [axes for axes in figure.axes if not hasattr(axes, "_colorbar")]
    titles = [axes.get_title(loc="left") for axes in panels]
    named = [title for title in titles if title]
    assert sorted(title[:3] for title in named) == [f"({letter})" for letter in string.ascii_lowercase[: len(named)]]
    assert len(panels) <= 4 or not main
    assert re.search(r"\d", figure.get_suptitle()) or not main
    assert figure.get_suptitle()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    sizes = {text.get_text(): text.get_fontsize() * 7 / figure.get_figwidth() for text in texts}
    assert all(size >= 7 for size in sizes.values()), {text: size for text, size in sizes.items() if size < 7}
    figure.canvas.draw()
    headings = [figure._suptitle, *(axes._left_title for axes in panels if axes.get_title(loc="left"))]
    boxes = [heading.get_window_extent() for heading in headings]
    for heading, box in zip(headings, boxes, strict=True):
        assert box.x0 >= 0, heading
        assert box.x1 <= figure.bbox.x1, heading
        assert sum(box.overlaps(other) for other in boxes) == 1, heading


def test_the_manifest_says_whether_a_run_was_resumed(tmp_path):
    config = AnalysisConfig(output=tmp_path)

    def compute(config, progress):
        if not config.scratch().exists():
            config.scratch().mkdir(parents=True)
            raise KeyboardInterrupt
        return {"x": np.arange(2.0)}

    def plot(arrays, config):
        figure, axes = plt.subplots()
        axes.plot(arrays["x"])
        return figure

    def resumed(compute):
        none = lambda arrays, config: []  # noqa: E731
        analysis = Analysis("toy", AnalysisConfig, compute, plot, none, none, "A toy.")
        analysis.run(config, Console(quiet=True))
        return json.loads((tmp_path / "results" / "toy" / "toy.json").read_text())["resumed"]

    with pytest.raises(KeyboardInterrupt):
        resumed(compute)
    assert resumed(compute) is True
    assert resumed(lambda config, progress: {"x": np.arange(2.0)}) is False


def test_block_growth_resumes_from_parts_of_its_seeds(tmp_path):
    script = load_script(analysis_scripts()["block-growth"])
    config = script.Config(seed=3, seeds=2, output=tmp_path)
    assert not config.resumes()
    script.parts_folder(config).mkdir(parents=True)
    for seed, resumes in ((13, False), (4, True)):
        (script.parts_folder(config) / f"softmax-5-{seed}.npz").touch()
        assert config.resumes() is resumes


@dataclasses.dataclass(frozen=True)
class TinyConfig(AnalysisConfig):
    """No option of its own."""


def tiny(compute=lambda config, progress: {"x": np.arange(3.0)}, plot=lambda arrays, config: Figure()):
    tables = lambda arrays, config: [Table("[/b] and [red]")]  # noqa: E731
    findings = lambda arrays, config: [at_most("[/b] and [red]", arrays["x"].max(), 1.0)]  # noqa: E731
    return Analysis("tiny", TinyConfig, compute, plot, tables, findings, "Of no use.")


def test_paths_and_messages_are_no_markup(tmp_path, capsys):
    tiny().main(["--output", str(tmp_path / "a" / "[" / "b]")])
    assert "wrote" in capsys.readouterr().out
    assert (tmp_path / "a" / "[" / "b]" / "results" / "tiny" / "arrays.npz").exists()

    def fails(config, progress):
        raise ModuleNotFoundError('run pip install "attnlab[pretrained]" [/b]')

    with pytest.raises(SystemExit) as end:
        tiny(fails).main(["--output", str(tmp_path)])
    assert end.value.code == 1
    assert capsys.readouterr().err == 'error: run pip install "attnlab[pretrained]" [/b]\n'


def test_the_findings_are_shown_and_kept_and_the_figure_is_where_it_was_asked_for(tmp_path, capsys):
    tiny().main(["--output", str(tmp_path)])
    shown = " ".join(capsys.readouterr().out.split())
    assert "≤ 1" in shown
    assert {path.name for path in (tmp_path / "results" / "tiny").iterdir()} == {
        "arrays.npz", "manifest.json", "tiny.json", "tiny.pdf", "tiny.png"
    }  # fmt: skip
    (finding,) = json.loads((tmp_path / "results" / "tiny" / "manifest.json").read_text())["findings"]
    assert (finding["measured"], finding["passed"]) == ("2", False)
    tiny().main(["--output", str(tmp_path / "b"), "--figures", str(tmp_path / "figures")])
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"tiny.json", "tiny.pdf", "tiny.png"}
    assert {path.name for path in (tmp_path / "b" / "results" / "tiny").iterdir()} == {"arrays.npz", "manifest.json"}


def test_arrays_are_dicts_within_dicts(tmp_path):
    tiny(lambda config, progress: {"x": [1.0], "a": {"b": {"c": 2.0}}}).main(["--output", str(tmp_path)])
    assert load_arrays(tmp_path / "results" / "tiny")["a"]["b"]["c"] == 2.0
    with pytest.raises(SystemExit):
        tiny(lambda config, progress: {"x": [1.0], "a/b": 2.0}).main(["--output", str(tmp_path / "c")])


def test_arrays_outlive_a_picture_that_fails(tmp_path):
    def plot(arrays, config):
        raise ValueError("no picture")

    with pytest.raises(SystemExit):
        tiny(plot=plot).main(["--output", str(tmp_path)])
    np.testing.assert_array_equal(load_arrays(tmp_path / "results" / "tiny")["x"], np.arange(3.0))


def test_a_place_that_cannot_be_written_is_said_before_anything_is_computed(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    computed = []
    with pytest.raises(SystemExit):
        tiny(lambda config, progress: computed.append(1)).main(["--output", str(tmp_path / "file")])
    assert computed == []
    assert "file/results/tiny" in "".join(capsys.readouterr().err.split())


def test_a_full_disk_is_named_and_leaves_the_former_result(tmp_path, monkeypatch):
    tiny().main(["--output", str(tmp_path)])

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match=str(tmp_path / "results" / "tiny")):
        tiny().run(TinyConfig(output=tmp_path), Console(quiet=True))
    np.testing.assert_array_equal(load_arrays(tmp_path / "results" / "tiny")["x"], np.arange(3.0))
