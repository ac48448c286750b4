"""All phenomena of training dynamics in one go: every figure, and one table of what was measured beside expected.

Runs the analyses of training dynamics one after another, each as `attnlab run NAME` would, writes their figures, and
puts every measured number beside the interval that was expected of it, with where that comes from and why it is as wide
as it is: as a page and as Markdown, by member. The figure counts what was reproduced. `--seeds 3` does so from three
seeds, ten apart, since members have seeds of their own: the table has a column for each, the members' figures are those
of the first. A seed takes a quarter of an hour, twice that on a busy machine; a run that was stopped resumes.
"""

import time
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from rich.progress import Progress
from rich.table import Table

from attnlab.analysis import Analysis, AnalysisConfig, Arrays, configure_jax
from attnlab.cli import analysis_scripts, first_sentence, load_script
from attnlab.expectation import Expectation

MEMBERS = (
    "token-identities",
    "block-heterogeneity",
    "edge-of-stability",
    "warmup",
    "central-flow",
    "rod-flow",
    "adam-on-linear-attention",
    "class-imbalance",
)
"""The analyses of the gallery, in the order in which they run."""
APART = 10
"""Between the seeds of two columns: a member's own seeds follow its first."""


@dataclass(frozen=True)
class Config(AnalysisConfig):
    """Options of the analysis. Every member runs in its own precision."""

    SMOKE: ClassVar = {"members": ("rod-flow",), "seeds": 2}

    members: tuple[str, ...] = MEMBERS
    """Which analyses."""
    seeds: int = 1
    """How many seeds; the first has the number `--seed`."""

    def all_seeds(self) -> range:
        """The seeds by number."""
        return range(self.seed, self.seed + APART * self.seeds, APART)


def compute(config: Config, progress: Progress) -> Arrays:
    """Every member at every seed: its findings column by column, `measured` (findings, seeds) and the others
    (findings,), the `analysis` of each, and the `seconds` that members took, (members, seeds)."""
    from attnlab.checks import check_names
    from attnlab.runs import stored_arrays

    check_names("member", config.members, MEMBERS)
    if config.seeds < 1:
        raise ValueError(f"seeds is {config.seeds}; expected at least 1.")
    task = progress.add_task("gallery", total=config.seeds * len(config.members), status="")
    columns = []
    for seed in config.all_seeds():
        parts = []
        for name in config.members:
            progress.update(task, status=f"seed {seed}: {name}")
            path = config.scratch() / f"{name}-{seed}.npz"
            parts.append(stored_arrays(path, lambda n=name, s=seed: measure(config, n, s, progress)))
            for bar in set(progress.task_ids) - {task}:  # those of the member
                progress.remove_task(bar)
            progress.advance(task)
        columns.append({field: np.concatenate([part[field] for part in parts]) for field in parts[0]})
    configure_jax(config.dtype)
    return columns[0] | {
        field: np.stack([column[field] for column in columns], axis=1) for field in ("measured", "seconds")
    }


def measure(config: Config, name: str, seed: int, progress: Progress) -> Arrays:
    """Run one member at one seed; its figure is written beside the gallery's for the first seed only."""
    started = time.perf_counter()
    script = load_script(analysis_scripts()[name])
    first = seed == config.seed
    output = config.output if first else config.scratch() / f"seed-{seed}"
    figures = config.figures if first else None
    member = script.ANALYSIS.config(seed=seed, output=output, figures=figures, smoke=config.smoke)
    member, arrays, _ = script.ANALYSIS.produce(member, progress)
    found = script.ANALYSIS.findings(arrays, member)
    columns = {field: np.array([getattr(each, field) for each in found]) for field in FIELDS}
    return columns | {"analysis": np.full(len(found), name), "seconds": np.array([time.perf_counter() - started])}


FIELDS = ("what", "measured", "relation", "reference", "unit", "tolerance", "because", "source")
"""Of a finding of the members: each measures one number, and its unit is absolute."""


def rows(arrays: Arrays) -> list[list[Expectation]]:
    """Every finding again, at each seed."""
    what, measured, *others = (arrays[field].tolist() for field in FIELDS)
    return [
        [Expectation(name, value, *rest) for value in values]
        for name, values, *rest in zip(what, measured, *others, strict=True)
    ]


def by_member(arrays: Arrays) -> dict[str, list[list[Expectation]]]:
    """The rows of each member."""
    found: dict[str, list[list[Expectation]]] = {}
    for owner, row in zip(arrays["analysis"].tolist(), rows(arrays), strict=True):
        found.setdefault(owner, []).append(row)
    return found


def reproduced(found: list[list[Expectation]]) -> tuple[int, int]:
    """How many of the findings, over all seeds, and of how many."""
    verdicts = [finding.passed for row in found for finding in row]
    return sum(verdicts), len(verdicts)


def findings(arrays: Arrays, config: Config) -> list[Expectation]:
    """Every finding of the members, at all seeds in one."""
    what, measured, *others = (arrays[field].tolist() for field in FIELDS)
    owners = arrays["analysis"].tolist()
    return [
        Expectation(f"{owner}: {name}", values, *rest)
        for owner, name, values, *rest in zip(owners, what, measured, *others, strict=True)
    ]


def interval(finding: Expectation) -> str:
    """What was expected, with both ends where there are two."""
    low, high = (float(finding.reference) + sign * finding.allowed for sign in (-1, 1))
    if finding.relation == "equal":
        return f"{low:.4g} to {high:.4g}" if finding.allowed else f"{low:.4g}"
    return f"≤ {high:.4g}" if finding.relation == "at most" else f"≥ {low:.4g}"


def plot(arrays: Arrays, config: Config):
    """A mark for each expectation of each member, at each seed: reproduced or missed."""
    from attnlab.plotting.panels import panels

    members = by_member(arrays)
    counts = {name: reproduced(found) for name, found in members.items()}
    kept = sum(count[0] for count in counts.values())
    seeds = "one seed" if config.seeds == 1 else f"{config.seeds} seeds"
    message = f"{len(members)} analyses of training dynamics reproduce {kept} of what they expect"
    note = f"one mark an expectation and seed ({seeds}); the table beside this figure has the numbers"
    height = 0.9 + 0.27 * len(members)
    figure, (axes,) = panels(message, ["filled: reproduced, cross: missed"], note=note, columns=1, height=height)
    for row, (name, found) in enumerate(members.items()):
        verdicts = np.array([finding.passed for each in found for finding in each])
        places = np.arange(1, len(verdicts) + 1)
        axes.plot(places[verdicts], np.full(verdicts.sum(), row), "s", color="C0", ms=7)
        axes.plot(places[~verdicts], np.full((~verdicts).sum(), row), "x", color="C1", ms=7, mew=2)
        axes.text(len(verdicts) + 0.8, row, "{} of {}".format(*counts[name]), va="center", fontsize=8)
    longest = max(count[1] for count in counts.values())
    axes.set(
        xlim=(0, longest + 3), ylim=(len(members) - 0.4, -0.6), xlabel="expectations of the analysis, in its order"
    )
    axes.set_yticks(range(len(members)), list(members))
    return figure


def tables(arrays: Arrays, config: Config) -> list[Table]:
    """The time that each member took, and how many of its findings are reproduced, over all seeds."""
    table = Table("analysis", *(f"seed {seed} [s]" for seed in config.all_seeds()), "reproduced")
    found = by_member(arrays)
    for name, seconds in zip(config.members, arrays["seconds"], strict=True):
        kept, total = reproduced(found[name])
        table.add_row(name, *(f"{second:.0f}" for second in seconds), f"{kept} of {total}")
    return [table]


def sections(arrays: Arrays, config: Config) -> list[dict[str, Any]]:
    """For each member its sentence, its figure's file and its rows, in words."""
    ending = "-smoke" if config.smoke else ""
    found = []
    for name, each in by_member(arrays).items():
        folder = "" if config.figures else f"../{name}{ending}/"  # without a folder of figures each has its own
        kept, total = reproduced(each)
        found.append({
            "name": name,
            "sentence": first_sentence(analysis_scripts()[name]),
            "image": f"{folder}{name}{ending}.png",
            "kept": kept,
            "total": total,
            "rows": [
                {
                    "what": row[0].what,
                    "expected": interval(row[0]),
                    "measured": [(f"{finding.measured:.4g}", finding.passed) for finding in row],
                    "passed": all(finding.passed for finding in row),
                    "because": row[0].because,
                    "source": row[0].source,
                }
                for row in each
            ],
        })  # fmt: skip
    return found


TITLE = "Training dynamics: measured beside expected"


def documents(arrays: Arrays, config: Config) -> dict[str, str]:
    """The table as Markdown and as a page."""
    members = sections(arrays, config)
    kept, total = (sum(member[key] for member in members) for key in ("kept", "total"))
    summary = f"{kept} of {total} expectations are reproduced, from seed{'s'[: config.seeds - 1]} "
    summary += ", ".join(map(str, config.all_seeds())) + "."
    return {".md": markdown(summary, members, config), ".html": page(summary, members, config)}


def markdown(summary: str, members: list[dict[str, Any]], config: Config) -> str:
    """A section with a table for each member."""
    lines = [f"# {TITLE}", "", summary, ""]
    columns = ["what", "expected", *(f"seed {seed}" for seed in config.all_seeds()), "verdict", "source", "reason"]
    for member in members:
        lines += [f"## {member['name']}: {member['kept']} of {member['total']}", "", member["sentence"], ""]
        lines += [f"[![{member['name']}]({member['image']})]({member['image']})", ""]
        lines += [cells(columns), cells(["---"] * len(columns))]
        for row in member["rows"]:
            numbers = [number if passed else f"**{number}**" for number, passed in row["measured"]]
            verdict = "pass" if row["passed"] else "**miss**"
            lines.append(cells([row["what"], row["expected"], *numbers, verdict, row["source"], row["because"]]))
        lines.append("")
    return "\n".join(lines)


def cells(words: list[str]) -> str:
    """One row of a table; a bar within a cell would end it."""
    return "| " + " | ".join(word.replace("|", "\\|") for word in words) + " |"


def page(summary: str, members: list[dict[str, Any]], config: Config) -> str:
    """The table in HTML, beside the figures that it shows."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(PAGE)
    return template.render(title=TITLE, summary=summary, members=members, seeds=config.all_seeds())


PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --good: #17803d; --bad: #c0271d; }
@media (prefers-color-scheme: dark) { :root { --good: #5fd38d; --bad: #ff8a80; } }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 76rem; padding: 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { border-top: 1px solid #8885; padding: .25rem .5rem; text-align: left; vertical-align: top; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
img { background: white; height: auto; max-width: 100%; width: 20rem; }
.pass { color: var(--good); } .miss { color: var(--bad); font-weight: 600; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ summary }}</p>
{% for member in members %}
<h2 id="{{ member.name }}">{{ member.name }}: {{ member.kept }} of {{ member.total }}</h2>
<p>{{ member.sentence }} <code>attnlab run {{ member.name }}</code></p>
<p><a href="{{ member.image }}"><img src="{{ member.image }}" alt="figure of {{ member.name }}"></a></p>
<table>
<thead><tr><th>what</th><th>expected</th>{% for seed in seeds %}<th>seed {{ seed }}</th>{% endfor %}<th>verdict</th>
<th>source</th><th>reason</th></tr></thead>
{% for row in member.rows %}
<tr><td>{{ row.what }}</td><td class="number">{{ row.expected }}</td>
{% for number, passed in row.measured %}
<td class="number {{ "pass" if passed else "miss" }}">{{ number }}</td>
{% endfor %}
<td class="{{ "pass" if row.passed else "miss" }}">{{ "pass" if row.passed else "miss" }}</td>
<td>{{ row.source }}</td><td>{{ row.because }}</td></tr>
{% endfor %}
</table>
{% endfor %}
</body>
</html>
"""


ANALYSIS = Analysis(
    "dynamics-gallery", Config, compute, plot, tables, findings, __doc__, slow=True, documents=documents
)

if __name__ == "__main__":
    ANALYSIS.main()
