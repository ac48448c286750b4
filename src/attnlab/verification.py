"""Claims checked one after another, shown in a live table."""

from collections.abc import Iterable, Sequence

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.table import Column, Table

from attnlab.claims import Claim, Verdict

COLUMNS = ("seed", "predicted", "measured", "error (allowed)", "verdict")


def verify_all(claims: Sequence[Claim], seeds: Iterable[int], console: Console) -> bool:
    """Check every claim on every seed, one row each as it is done; whether all passed."""
    table = Table(Column("claim and source", overflow="fold", ratio=2), *COLUMNS, show_lines=True)
    passed = []
    seeds = list(seeds)
    with Live(table, console=console, vertical_overflow="visible"):
        for claim in claims:
            for seed in seeds:
                verdict = claim.verify(seed)
                passed.append(verdict.passed)
                table.add_row(*cells(verdict))
    console.print(f"\n{sum(passed)} of {len(passed)} passed")
    return all(passed)


def cells(verdict: Verdict) -> tuple[str, ...]:
    """One row of the table."""
    claim = verdict.claim
    sign = {"equal": "", "at most": "\u2264 ", "at least": "\u2265 "}[claim.relation]
    word = "[green]passed[/green]" if verdict.passed else "[red]failed[/red]"
    return (
        f"{claim.name}\n[dim]{claim.source}[/dim]",
        str(verdict.seed),
        sign + shown(verdict.predicted),
        shown(verdict.measured),
        f"{verdict.error:.1e} ({claim.tolerance:.0e})",
        word,
    )


def shown(values: np.ndarray) -> str:
    """A number or a few; of a long array its size and norm."""
    if values.size > 6:
        return f"{values.size} numbers, norm {np.linalg.norm(values):.4g}"
    return ", ".join(f"{value:.4g}" for value in np.ravel(values))
