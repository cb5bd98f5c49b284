"""docs/compatibility.md, written from the outcomes of tests: `python -m pytest --compatibility=docs/compatibility.md`.

A test of a client is marked `cell(row)`. Its parameters `layout` and `form` name the cell; where it has none, the mark
does: `cell(row, form="trainable", layout="CSR")`, or lists of them, if one test stands for all. A cell that is rightly
refused is `cell(row, refused="reason")`, and its test expects that error. Where a test has several marks for one cell,
the one nearest to the test counts. A cell passes if all its tests do.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import itertools
import platform
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import pytest

ROWS = (
    "compile", "dynamic compile", "export", "AOTI", "ONNX", "autocast", "GradScaler", "func.grad", "vmap", "jvp",
    "checkpointing", "hooks", "deepcopy", "pickle", "state_dict", "weights_only", "safetensors", "accelerate",
    "save_pretrained", "Trainer", "Trainer resume", "Lightning", "PEFT", "DDP", "FSDP2 train", "FSDP2 inference", "TP",
    "DCP", "reshard", "flop counter", "EMA", "SWA", "DataParallel", "8-bit optimizers", "timm", "generate",
    "static-cache generate",
)  # fmt: skip
FORMS = ("finalized", "trainable", "dense weight")
LAYOUTS = ("Masked", "CSR", "BSR", "NM", "VectorNM", "GroupedNM", "FanIn")
PACKAGES = ("torch", "transformers", "accelerate", "peft", "lightning", "safetensors", "torchao", "timm", "onnx")
COMMAND = "python -m pytest --compatibility=docs/compatibility.md"


class Outcome(NamedTuple):
    """What one test says of one cell."""

    row: str
    form: str
    layout: str
    refused: str | None
    passed: bool


def cells_of(item: pytest.Item) -> list[tuple[str, str, str, str | None]]:
    """(row, form, layout, reason of a refusal) of a test; UsageError where a mark names no cell."""
    found: dict[tuple, str | None] = {}
    params = item.callspec.params if hasattr(item, "callspec") else {}
    for mark in item.iter_markers("cell"):
        row = mark.args[0] if mark.args else None
        forms = _names(mark.kwargs.get("form", params.get("form")))
        layouts = [name.partition("(")[0] for name in _names(mark.kwargs.get("layout", params.get("layout")))]
        if row not in ROWS or not {*forms} <= {*FORMS} or not {*layouts} <= {*LAYOUTS}:
            raise pytest.UsageError(
                f"Expected cell(row) with a row, a form and a layout of tests/compatibility.py, got {row!r}, {forms}, "
                f"{layouts} for {item.nodeid}."
            )
        for cell in itertools.product([row], forms, layouts):
            found.setdefault(cell, mark.kwargs.get("refused"))
    return [(*cell, refused) for cell, refused in found.items()]


def _names(value: object) -> list[str]:
    return [str(one) for one in value] if isinstance(value, (list, tuple)) else [str(value)]


class Collector:
    """A plugin of pytest: runs the marked tests only, and writes the page. With xdist, the main process writes it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.outcomes: list[Outcome] = []

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        config.hook.pytest_deselected(items=[item for item in items if not item.get_closest_marker("cell")])
        items[:] = [item for item in items if item.get_closest_marker("cell")]
        for item in items:  # these travel with the report from the processes of xdist
            item.user_properties += [("cell", cell) for cell in cells_of(item)]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.failed:
            cells = [cell for key, cell in report.user_properties if key == "cell" and not report.skipped]
            self.outcomes += [Outcome(*cell, passed=report.passed) for cell in cells]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not hasattr(session.config, "workerinput"):
            with open(self.path, "w") as file:
                file.write(page(self.outcomes))


def page(outcomes: Iterable[Outcome]) -> str:
    """The page: one row a feature, one column a form, and below what is refused or fails, by layout."""
    cells: dict[tuple[str, str], dict[str, list[Outcome]]] = defaultdict(lambda: defaultdict(list))
    for one in outcomes:
        cells[one.row, one.form][one.layout].append(one)
    reasons: list[str] = []
    lines = [f"| feature | {' | '.join(FORMS)} |", "|---" * (1 + len(FORMS)) + "|"]
    lines += [f"| {row} | {' | '.join(_cell(cells[row, form], reasons) for form in FORMS)} |" for row in ROWS]
    every = [tests for by_layout in cells.values() for tests in by_layout.values()]
    refused = [tests for tests in every if any(one.refused for one in tests)]
    good = sum(all(one.passed for one in tests) for tests in every)
    return HEAD.format(
        command=COMMAND,
        date=datetime.date.today(),
        versions=", ".join([f"Python {platform.python_version()}", *_versions()]),
        good=good,
        tested=len(every),
        refused=len(refused),
        layouts=", ".join(LAYOUTS),
        table="\n".join(lines),
        notes="\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, 1)) or "None.",
    )


HEAD = """# Compatibility

Which features of PyTorch and its ecosystem work with sparse weights, in each [form of a weight](concepts.md#the-forms-of-a-weight).
Written by `{command}` from the outcomes of the tests; do not edit. {date}, {versions}.

{good} of {tested} cells (feature x form x layout) are as they should be; {refused} of them are refused with one sentence, for the reasons below.

A cell shows how many layouts pass, of how many that were tested; their names, where these are not all of {layouts}. "-" is not tested.

{table}

## Refused

{notes}
"""  # noqa: E501


def _cell(by_layout: dict[str, list[Outcome]], reasons: list[str]) -> str:
    refusals: dict[str, list[str]] = defaultdict(list)
    for layout, tests in by_layout.items():
        reason = next((one.refused for one in tests if one.refused), None)
        if reason and all(one.passed for one in tests):
            refusals[reason].append(layout)
    tested = [name for name in LAYOUTS if name in by_layout and all(name not in own for own in refusals.values())]
    failed = [name for name in tested if not all(one.passed for one in by_layout[name])]
    texts = []
    if tested:
        some = f" ({', '.join(tested)})" if len(by_layout) < len(LAYOUTS) or refusals else ""
        texts.append(f"{len(tested) - len(failed)}/{len(tested)}{some}")
    if failed:
        texts.append(f"**fails: {', '.join(failed)}**")
    for reason, names in refusals.items():
        if reason not in reasons:
            reasons.append(reason)
        some = "" if len(names) == len(LAYOUTS) else f" ({', '.join(name for name in LAYOUTS if name in names)})"
        texts.append(f"refused [{reasons.index(reason) + 1}](#refused){some}")
    return ", ".join(texts) or "-"


def _versions() -> list[str]:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
