"""The faults of today, by suite, operator and kind: `known.json`. It can only shrink.

An entry has the outcomes that occur, and `sample`: whether one of the rows that `make test` runs shows it.
"""

from __future__ import annotations

import json
from pathlib import Path

from .report import faults

FILE = Path(__file__).with_name("known.json")

Known = dict[tuple[str, str, str], dict]


def read() -> Known:
    """The entries by (suite, operator, kind)."""
    tree = json.loads(FILE.read_text()) if FILE.exists() else {}
    return {(s, o, k): e for s, operators in tree.items() for o, kinds in operators.items() for k, e in kinds.items()}


def shown_by(rows: list[list]) -> Known:
    """The entries that the rows of a run show."""
    return {
        key: {"outcomes": sorted({row[5] for row in group}), "sample": any(row[7] for row in group)}
        for key, group in faults(rows).items()
    }


def new_faults(rows: list[list]) -> list[tuple[str, str, str]]:
    """What the rows show and the list does not have."""
    entries = read()
    return sorted(key for key in shown_by(rows) if key not in entries)


def mended(rows: list[list]) -> list[tuple[str, str, str]]:
    """Entries that the sample used to show and no longer does: they are to be taken off the list."""
    shown = shown_by(rows)
    played = {tuple(row[:3]) for row in rows if row[7]}
    return sorted(key for key, entry in read().items() if entry["sample"] and key in played and key not in shown)


def write(rows: list[list], grow: bool = False) -> None:
    """The list anew from a full run; without `grow` it takes no fault that it does not have."""
    old, now = read(), shown_by(rows)
    suites = {row[0] for row in rows}
    units = {tuple(row[:2]) for row in rows}
    entries = {key: entry for key, entry in now.items() if grow or key in old}
    entries |= {key: entry for key, entry in old.items() if key[0] not in suites or key[:2] not in units}
    tree: dict = {}
    for (suite, operator, kind), entry in sorted(entries.items()):
        tree.setdefault(suite, {}).setdefault(operator, {})[kind] = entry
    FILE.write_text(in_lines(tree))


def in_lines(tree: dict) -> str:
    """JSON with one operator a line, so that a difference can be read."""
    suites = []
    for suite, operators in tree.items():
        lines = [f"  {json.dumps(name)}: {json.dumps(kinds)}" for name, kinds in operators.items()]
        suites.append(f" {json.dumps(suite)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(suites) + "\n}\n"
