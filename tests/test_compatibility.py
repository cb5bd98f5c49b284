"""docs/compatibility.md: the page names every row, and the table says what the tests said."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from compatibility import LAYOUTS, ROWS, Outcome, cells_of, page

import sten

PAGE = Path(__file__).parent.parent / "docs" / "compatibility.md"


def test_the_page_has_every_row_and_no_failure():
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")][1:]
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines] == list(ROWS)
    assert "fails" not in "".join(lines)


def test_the_table_counts_cells():
    outcomes = [Outcome("jvp", "finalized", layout, None, True) for layout in LAYOUTS]
    outcomes += [Outcome("jvp", "trainable", layout, None, layout != "CSR") for layout in ("NM", "CSR", "CSR")]
    outcomes += [Outcome("jvp", "trainable", "NM", None, True), Outcome("jvp", "trainable", "BSR", "no rule", True)]
    outcomes += [Outcome("TP", "finalized", layout, "no rule", layout != "BSR") for layout in LAYOUTS]
    text = page(outcomes)
    assert "\n| jvp | 7/7 | 1/2 (CSR, NM), **fails: CSR**, refused [1](#refused) (BSR) | - |\n" in text
    others = "Masked, CSR, NM, VectorNM, GroupedNM, FanIn"
    assert f"\n| TP | 0/1 (BSR), **fails: BSR**, refused [1](#refused) ({others}) |" in text
    assert "\n15 of 17 cells" in text and "8 of them are refused" in text and "\n1. no rule\n" in text


def marked(params, *marks):
    """What pytest knows of a test with these parameters and marks, the nearest one first."""
    return SimpleNamespace(
        callspec=SimpleNamespace(params=params), iter_markers=lambda name: [m.mark for m in marks], nodeid="a test"
    )


def test_marks_name_cells():
    cell, params = pytest.mark.cell, {"layout": "NM(2, 4)", "form": "trainable"}
    assert cells_of(marked(params, cell("jvp"), cell("TP"))) == [
        ("jvp", "trainable", "NM", None),
        ("TP", "trainable", "NM", None),
    ]
    assert cells_of(marked(params, cell("jvp", refused="x"), cell("jvp"))) == [("jvp", "trainable", "NM", "x")]
    for given in ("form", "layout"):
        some = {"form": ["finalized", "trainable"], "layout": [sten.CSR(), sten.NM(2, 4)]}[given]
        assert len(cells_of(marked(params, cell("DDP", **{given: some})))) == 2
    for wrong in ({"form": "hot"}, {"layout": "CSC"}, {"layout": None}):
        with pytest.raises(pytest.UsageError, match="Expected cell"):
            cells_of(marked(params, cell("jvp", **wrong)))
    with pytest.raises(pytest.UsageError, match="Expected cell"):
        cells_of(marked(params, cell("no such row")))
