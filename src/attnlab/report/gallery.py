"""The gallery of the figures in Markdown: what each says, how much of it was as expected, and the command."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnlab.report.staleness import seconds_taken

GROUPS = {
    "Curvature": (
        "attention-spectrum", "attention-blocks", "block-growth", "curvature-along-training", "pretrained-blocks",
        "language-model-curvature", "language-model-layer", "low-precision", "curvature-cost", "approximation-errors",
        "depth-and-scale", "token-identities", "learning-coefficient", "block-diagonality", "kronecker-quality",
    ),
    "Max-margin attention": ("margin-path", "margin-phase-diagram", "margin-digits"),
    "In-context learning": (
        "icl-gradient-descent", "icl-depth", "icl-landscape", "icl-preconditioner", "icl-correlated",
        "icl-task-diversity", "icl-training-time", "icl-task-crossover", "icl-chain-of-thought", "icl-sine",
    ),
    "Training dynamics": (
        "dynamics-gallery", "edge-of-stability", "edge-in-every-norm", "sharpness-measures", "warmup", "central-flow",
        "rod-flow", "block-heterogeneity", "adam-on-linear-attention", "class-imbalance",
    ),
    "Tokens, adaptation and memory": ("token-clustering", "adaptation-landscape", "attention-as-memory"),
}  # fmt: skip
"""Names of the analyses by strand, in the order in which they are shown; an analysis of none is shown last."""


def strand_of(name: str) -> tuple[int, str]:
    """Place of an analysis in this order, and its strand."""
    strands = {other: strand for strand, names in GROUPS.items() for other in names}
    return (list(strands).index(name), strands[name]) if name in strands else (len(strands), "Others")


INTRODUCTION = """# Figures

Every figure says one thing, which stands above it and here, with its number. It is made by one command, beside a
manifest: config, seed, versions, commit, seconds, and what was measured beside what was expected of it.
`attnlab figures` makes again those whose code has changed, and this page.
"""

HEAD = "| figure | what it says | expectations met | seeds | command and seconds |\n|---|---|---|---|---|\n"


def gallery(folder: Path, summaries: Mapping[str, str]) -> str:
    """The page: a table for each strand, with a row for every analysis, drawn yet or not; `summaries` by its name."""
    named = {name for names in GROUPS.values() for name in names}
    groups = {strand: [name for name in names if name in summaries] for strand, names in GROUPS.items()}
    groups["Others"] = [name for name in summaries if name not in named]
    tables = [
        f"\n## {strand}\n\n{HEAD}" + "".join(_row(folder, name, summaries[name]) for name in names)
        for strand, names in groups.items()
        if names
    ]
    return INTRODUCTION + "".join(tables)


def _row(folder: Path, name: str, summary: str) -> str:
    manifest, command = folder / f"{name}.json", f"`attnlab run {name}`"
    if not manifest.exists():
        return f"| not drawn yet | {summary} | | | {command} |\n"
    record = json.loads(manifest.read_text())
    found = record.get("findings", [])
    met = f"{sum(bool(each['passed']) for each in found)} of {len(found)}" if found else ""
    seconds = seconds_taken(record)
    told = command if seconds is None else f"{command} {seconds:.0f} s"
    cells = (_image(folder, name), _words(record, summary), met, seeds(record["config"]), told)
    return f"| {' | '.join(cells)} |\n"


def seeds(config: Mapping[str, Any]) -> str:
    """How many random draws a figure shows, by its options."""
    counts = (config.get(name) for name in ("seeds", "texts", "starts"))  # `starts` may be sizes and no count
    return str(next((count for count in counts if isinstance(count, int)), 1))


def _words(record: Mapping[str, Any], summary: str) -> str:
    # A bar would end the cell, and a norm's, escaped already, has another name.
    message = " ".join(record.get("message", "").split()).replace(r"\|", r"\Vert ")
    return (f"**{message}.** {summary}" if message else summary).replace("|", r"\|")


def _image(folder: Path, name: str) -> str:
    small = f'<a href="{name}.png"><img src="{name}.png" width="220" alt="{name}"></a>'
    details = f'<br><a href="{name}-details.png">more of it</a>'
    return small + (details if (folder / f"{name}-details.png").exists() else "")
