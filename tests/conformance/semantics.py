"""A page of what each act does to a sparse weight, from the rows of a run."""

from __future__ import annotations

from collections import Counter, defaultdict

from .classify import FAULTS

HEAD = """# What an act does to a sparse weight

Made by `python -m tests.conformance --semantics docs/semantics.md` from the rows of a run; the right value of each
row is that of the dense twin. *right*: as dense. *refused*: one sentence that says what would work; nothing changes.
*documented*: acts on the stored entries alone. *fault*: wrong, lost or a crash in some layout, see
`tests/conformance/known.json`. Where several stand, it depends on the numbers or the layout.
"""

MEANING = {"function": "call", "method": "call", "inplace": "in place", "out": "`out=`", "view": "write to a view"}


def page(rows: list[list]) -> str:
    """The whole page in Markdown."""
    return "\n".join([HEAD, user_acts(rows), operator_kinds(rows), models(rows)])


def cell(outcomes: Counter) -> str:
    """Outcomes in words, the most frequent first; faults as one."""
    merged: Counter = Counter()
    for outcome, number in outcomes.items():
        if outcome != "skipped":
            merged["fault" if outcome in FAULTS else outcome] += number
    return ", ".join(f"**{name}**" if name == "fault" else name for name, _ in merged.most_common()) or "-"


def user_acts(rows: list[list]) -> str:
    """Acts on `m.weight`: finalized and trainable."""
    table: dict[str, dict[str, Counter]] = defaultdict(lambda: defaultdict(Counter))
    for suite, operator, _, case, _, outcome, *_ in rows:
        if suite == "acts":
            table[operator][case][outcome] += 1
    lines = ["## On `m.weight`\n", "| act | finalized | trainable |", "|---|---|---|"]
    for act, forms in table.items():
        escaped = act.replace("|", "\\|")
        lines.append(f"| `{escaped}` | {cell(forms['finalized'])} | {cell(forms['trainable'])} |")
    return "\n".join(lines) + "\n"


def operator_kinds(rows: list[list]) -> str:
    """Operators: by how they are called."""
    kinds = ("function", "method", "inplace", "out", "alias", "view", "backward")
    table: dict[str, dict[str, Counter]] = defaultdict(lambda: defaultdict(Counter))
    for suite, operator, kind, _, _, outcome, *_ in rows:
        if suite in ("operators", "foreach"):
            table[operator][kind][outcome] += 1
    lines = ["## Operators\n", "| operator | " + " | ".join(MEANING.get(k, k) for k in kinds) + " |"]
    lines.append("|---" * (len(kinds) + 1) + "|")
    for operator, by_kind in sorted(table.items()):
        lines.append(f"| `{operator}` | " + " | ".join(cell(by_kind[kind]) for kind in kinds) + " |")
    return "\n".join(lines) + "\n"


def models(rows: list[list]) -> str:
    """Modules and optimizers: by form."""
    table: dict[str, dict[str, Counter]] = defaultdict(lambda: defaultdict(Counter))
    for suite, operator, kind, case, _, outcome, *_ in rows:
        if suite in ("modules", "optimizers"):
            table[f"{operator}: {kind}"][case.split("/")[-1]][outcome] += 1
    lines = ["## Modules and optimizers\n", "| act | finalized | trainable |", "|---|---|---|"]
    lines += [f"| {a} | {cell(f['finalized'])} | {cell(f['trainable'])} |" for a, f in sorted(table.items())]
    return "\n".join(lines) + "\n"
