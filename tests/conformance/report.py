"""The counts of a run by suite, and its faults by operator, as text and as JSON."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict

from .classify import ADVICE, FAULTS, OUTCOMES

COLUMNS = ("suite", "operator", "kind", "case", "form", "outcome", "detail", "sample")


def counts(rows: list[list]) -> dict[str, Counter]:
    """Outcomes by suite."""
    table: dict[str, Counter] = defaultdict(Counter)
    for row in rows:
        table[row[0]][row[5]] += 1
    return table


def faults(rows: list[list]) -> dict[tuple[str, str, str], list[list]]:
    """The rows that are wrong, lost or crash, by (suite, operator, kind)."""
    table: dict[tuple[str, str, str], list[list]] = defaultdict(list)
    for row in rows:
        if row[5] in FAULTS:
            table[tuple(row[:3])].append(row)
    return table


def text(rows: list[list], every: bool = False) -> str:
    """What the command prints: one line for each operator with faults, or one for each kind of them."""
    lines = [f"{'suite':12}" + "".join(f"{outcome:>12}" for outcome in ("rows", *OUTCOMES))]
    for suite, counted in counts(rows).items():
        numbers = [sum(counted.values()), *(counted[outcome] for outcome in OUTCOMES)]
        lines.append(f"{suite:12}" + "".join(f"{number:>12,}" for number in numbers))
    by_operator: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (suite, operator, kind), group in sorted(faults(rows).items()):
        number = Counter(row[5] for row in group)
        said = ", ".join(f"{number[outcome]} {outcome}" for outcome in FAULTS if number[outcome])
        example = f" [{group[0][3]}, {group[0][4]}: {group[0][6]}]" if every else ""
        by_operator[suite, operator].append(f"{kind}: {said}{example}")
    lines.append("")
    for (suite, operator), kinds in by_operator.items():
        separator = f"\n{suite}/{operator}  " if every else "; "
        lines.append(f"{suite}/{operator}  " + separator.join(kinds))
    refusals = {row[6] for row in rows if row[5] == "refused" and not ADVICE.search(row[6])}
    terse = {re.sub(r"\(.*?\)|\d+", "#", refusal) for refusal in refusals}
    lines += ["", f"{len(terse)} sentences that refuse and do not say what would work", *sorted(terse)]
    return "\n".join(lines)


def as_json(rows: list[list]) -> str:
    """Counts, and every row that is not simply right."""
    return json.dumps(
        {
            "counts": {suite: dict(counted) for suite, counted in counts(rows).items()},
            "columns": COLUMNS,
            "rows": [row for row in rows if row[5] != "right"],
        }
    )
