"""In a notebook: tutorials run from top to bottom in a kernel, results show themselves, progress bars move."""

import json
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

TUTORIALS = Path(__file__).parents[1] / "docs" / "tutorials"
PROGRESS = (
    "import jax\n"
    "jax.config.update('jax_enable_x64', True)\n"
    "import optax\n"
    "from rich.progress import Progress\n"
    "import attnlab as al\n"
    "from attnlab.risks.digits import easy_regression\n"
    "from attnlab.training import show_progress\n"
    "risk, params = easy_regression(jax.random.key(0), count=16, length=4, width=2)",
    "al.hessian(risk, params)",
    "al.eigenpairs(al.hessian(risk, params), jax.random.key(0), 3)",
    "with Progress() as bar:\n"
    "    session = al.Session(report=show_progress(bar, 'training'))\n"
    "    run = al.train(risk, params, optax.adam(0.01), jax.random.key(1), steps=60, every=20, session=session)",
    "run",
)


def executed(notebook, folder: Path) -> list[list]:
    """The outputs of every cell of code; an exception in one is raised."""
    nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    return [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]


def kinds(outputs: list[list]) -> set[str]:
    """The types of data that all cells show."""
    return {kind for cell in outputs for output in cell for kind in output.get("data", {})}


def as_notebook(script: Path):
    """A tutorial as the site offers it for download."""
    from sphinx_gallery.gen_gallery import DEFAULT_GALLERY_CONF
    from sphinx_gallery.notebook import jupyter_notebook
    from sphinx_gallery.py_source_parser import split_code_and_text_blocks

    _, blocks = split_code_and_text_blocks(str(script))
    return nbformat.reads(json.dumps(jupyter_notebook(blocks, DEFAULT_GALLERY_CONF, str(script.parent))), as_version=4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("01_curvature_of_your_network", "image/png"),
        ("05_attention_becomes_an_svm", "image/png"),
        ("07_write_a_claim", "text/html"),  # verdicts, as tables
    ],
)
def test_a_tutorial_runs_as_a_notebook_and_shows_its_results(name, shown, tmp_path):
    outputs = executed(as_notebook(TUTORIALS / f"{name}.py"), tmp_path)
    assert {shown, "text/plain"} <= kinds(outputs)
    assert not [output for cell in outputs for output in cell if output.get("name") == "stderr"]


@pytest.mark.slow
def test_results_are_short_and_a_progress_bar_moves(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in PROGRESS])
    _, operator, pairs, bar, run = executed(notebook, tmp_path)
    assert operator[0].data["text/plain"] == "Operator(dimension=12, dtype=float64, blocks=[key, query, value])"
    assert pairs[0].data["text/html"].count("<tr>") == 4
    assert "application/vnd.jupyter.widget-view+json" in kinds([bar])
    widgets = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"].state.values()
    (shown,) = [widget.state.outputs for widget in widgets if widget.model_name == "OutputModel"]
    assert re.search("training.*100%", str(shown))
    assert len(run[0].data["text/plain"]) < 200
