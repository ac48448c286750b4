"""Verdicts and figures as one HTML file: mathematics as MathML, images inside, the same bytes on every rerun."""

import html
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from attnlab.report.changes import changes
from attnlab.report.fonts import FAMILY, embedded_font
from attnlab.report.gallery import strand_of
from attnlab.report.mathematics import mathematics, with_formulas
from attnlab.report.staleness import staleness
from attnlab.report.thumbnails import thumbnail
from attnlab.runs import replace_file

DETAILS = "-details"
"""Ending of a figure that shows more of another one, whose manifest is its own."""

FONT_PLACE = "{embedded font}"
"""Stands in the page for the font until all of its characters are known."""


def read_verdicts(path: Path) -> dict[str, Any]:
    """What `attnlab verify --json` wrote. Raises `FileNotFoundError`, or `ValueError` for a file of anything else."""
    if not path.exists():
        raise FileNotFoundError(f"there are no verdicts in {path}. Make them with attnlab verify --json {path}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}; expected what attnlab verify --json writes.") from error
    rows = content["verdicts"] if isinstance(content, dict) and content.keys() >= RUN else None
    if not (isinstance(rows, list) and all(isinstance(row, dict) and row.keys() >= ROW for row in rows)):
        raise ValueError(f"{path} holds no verdicts; expected what attnlab verify --json writes.")
    return content


RUN = {"verdicts", "config", "versions", "device", "seconds"}
ROW = {"claim", "strand", "statement", "source", "parts", "error", "passed", "seconds"}


def write_report(
    path: Path,
    verdicts: Mapping[str, Any],
    figures: Path,
    scripts: Mapping[str, Path],
    earlier: Mapping[str, Any] | None = None,
) -> list[str]:
    """Write the report to `path`; returns which figures were left out of it, and why.

    It holds small images of the figures, which link to the files themselves.

    Args:
        path: of the HTML file.
        verdicts: what `attnlab verify --json` wrote.
        figures: folder of NAME.png beside NAME.json; figures of smoke runs are left out.
        scripts: the script of every analysis by name.
        earlier: verdicts of another run, to say what changed since.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("attnlab.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"math": mathematics, "unbroken": unbroken}
    shown_figures, left_out = _figures(figures, scripts, path.parent)
    strands = _strands(verdicts["verdicts"])
    page = environment.get_template("page.html").render(
        run=verdicts,
        strands=strands,
        claims=[claim for claims in strands.values() for claim in claims],
        changes=None if earlier is None else changes(earlier["verdicts"], verdicts["verdicts"]),
        figures=shown_figures,
        family=FAMILY,
    )
    shown = set(html.unescape(page))
    page = page.replace(FONT_PLACE, embedded_font(shown), 1)
    with replace_file(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return left_out


def unbroken(text: str) -> Markup:
    """Text whose numbers are not broken at the sign of their exponent."""
    return Markup(re.sub(r"[\d.]+e-\d+", r'<span class="whole">\g<0></span>', str(escape(text))))


def _strands(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The claims of each strand in order, each with its rows, one a seed."""
    claims: dict[str, dict[str, Any]] = {}
    for row in rows:
        claim = claims.setdefault(row["claim"], {**row, "rows": []})
        claim["rows"].append(row)
    strands: dict[str, list[dict[str, Any]]] = {}
    for claim in claims.values():
        claim["passed"] = all(row["passed"] for row in claim["rows"])
        tried = [row for row in claim["rows"] if not row.get("skipped")]
        claim["skipped"] = len(tried) < len(claim["rows"]) and all(row["passed"] for row in tried)
        claim["seconds"] = sum(row["seconds"] for row in claim["rows"])
        strands.setdefault(claim["strand"], []).append(claim)
    return strands


def _figures(folder: Path, scripts: Mapping[str, Path], beside: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The figures, in the order of the gallery, and why others of the folder are none."""
    found, left_out = [], []
    stems = {file.stem for pattern in ("*.json", "*.png") for file in folder.glob(pattern)}
    for name in sorted(stem for stem in stems if stem.removesuffix(DETAILS) not in stems - {stem}):
        manifest, image = folder / f"{name}.json", folder / f"{name}.png"
        try:
            record, small = _manifest(manifest, image), thumbnail(image)
        except ValueError as error:
            left_out.append(str(error))
            continue
        shown = record.get("analysis", name)
        found.append(
            {
                "name": shown,
                "strand": strand_of(shown)[1],
                "record": record,
                "message": with_formulas(record.get("message", "")),
                "manifest": json.dumps(record, indent=2),
                "image": small,
                "file": Path(os.path.relpath(image, beside)).as_posix(),
                "details": f"{name}{DETAILS}" in stems,
                "stale": staleness(record, scripts.get(shown)),
            }
        )
    return sorted(found, key=lambda figure: strand_of(figure["name"])), left_out


def _manifest(path: Path, image: Path) -> dict[str, Any]:
    """The manifest of a figure; raises `ValueError` for what is no figure of the report."""
    if path.stem.endswith("-smoke"):
        raise ValueError(f"{image} (of a smoke run)")
    for file in (path, image):
        if not file.exists():
            raise ValueError(f"{path.with_suffix('')} (there is no {file.name})")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{image} (its manifest {path.name} is no JSON: {error})") from error
    if not (isinstance(record, dict) and isinstance(record.get("sources", {}), dict)):
        raise ValueError(f"{image} (its manifest {path.name} is not one)")
    return record
