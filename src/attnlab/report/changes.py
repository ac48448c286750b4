"""What changed between two runs of the claims."""

from collections.abc import Mapping, Sequence
from typing import Any

Rows = Sequence[Mapping[str, Any]]


def changes(earlier: Rows, now: Rows) -> dict[str, str]:
    """By claim what is different, in words: new and missing ones, other verdicts, other measurements.

    A measurement is another one where it differs by more than its tolerance, whatever the verdict; seeds that only one
    of both runs has are not compared.

    >>> from attnlab.report.changes import changes
    >>> changes([{"claim": "a", "seed": 1, "passed": True, "parts": []}], [])
    {'a': 'is not there any more'}
    """
    old, new = ({(row["claim"], row["seed"]): row for row in rows} for rows in (earlier, now))
    before, after = ({claim for claim, _ in rows} for rows in (old, new))
    found = dict.fromkeys(before - after, "is not there any more") | dict.fromkeys(after - before, "is new")
    for claim, seed in sorted(old.keys() & new.keys()):
        words = _difference(old[claim, seed], new[claim, seed])
        if words:
            found[claim] = "; ".join(filter(None, (found.get(claim), f"{words} (seed {seed})")))
    return dict(sorted(found.items()))


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    if old["passed"] != new["passed"]:
        return f"{_word(old)} before, {_word(new)} now"
    measured = {part["what"]: part for part in old["parts"]}
    moved = [
        f"{part['what']}: {measured[part['what']]['measured']} before, {part['measured']} now"
        for part in new["parts"]
        if part["what"] in measured and _apart(measured[part["what"]], part)
    ]
    return "; ".join(moved)


def _word(row: Mapping[str, Any]) -> str:
    return "passed" if row["passed"] else "failed"


def _apart(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether the errors, in units of the tolerance, differ by more than one of them."""
    errors = (old["error"], new["error"])
    return None not in errors and abs(errors[0] - errors[1]) > 1
