"""summary and plan: their numbers, and how they print."""

from __future__ import annotations

import builtins

import pytest
import torch
from small import mlp
from torch import nn

import sten
from sten.layouts import BSR, CSR, NM


def rows(model: nn.Module) -> dict:
    return {row.name: row for row in sten.summary(model).rows}


def test_numbers_by_hand():
    layer = nn.Linear(4, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[4.0, -3, 2, 1], [0, 1, 0, 1]]))
    (row,) = sten.summary(sten.sparsify(layer, layout=NM(2, 4))).rows
    assert (row.name, row.layout, row.shape, row.density) == ("weight", "NM(n=2, m=4)", (2, 4), 0.5)
    assert (row.dense_bytes, row.stored_bytes) == (32, 2 * 2 * 4 + 2 * 1)
    assert row.energy == pytest.approx(9 / 12) and row.why == row.tied_to == ""


def test_totals_count_ties_once():
    model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    table = sten.summary(sten.sparsify(model, layout=CSR(), sparsity=0.5, weights="*"))
    assert [r.tied_to for r in table.rows] == ["", "0.weight", ""] and table.rows[1].why == "tied to 0.weight"
    *_, total, chosen = table.plain().splitlines()
    total = total.split()
    assert total[:2] == ["total", "0.500"]
    assert chosen == "sparse: 2 of 2 weights, with 128 of 128 parameters (100%)"
    stored = 2 * (32 * 4 + 32 * 4 + 9 * 4)
    assert sum(r.stored_bytes for r in table.rows if not r.tied_to) == stored and "of" in total


@pytest.mark.parametrize("form", ["finalized", "trainable"])
def test_every_weight_is_listed_in_order_in_both_forms(form):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Linear(8, 4), nn.Embedding(3, 4), nn.Linear(4, 4))
    sten.sparsify(model, layout={"3.weight": None, "*": NM(2, 4)})
    if form == "trainable":
        sten.trainable(model)
    found = rows(model)
    assert list(found) == ["0.weight", "1.weight", "2.weight", "3.weight"]
    assert found["1.weight"].energy > 0.5 and found["1.weight"].layout == "NM(n=2, m=4)"
    assert found["0.weight"].why == "Conv2d has no linear weight but a 4-D one: name it in weights= to choose it"
    assert found["2.weight"].why == "Embedding has no linear weight: name it in weights= to choose it"
    assert "is None" in found["3.weight"].why and found["3.weight"].energy is None


def test_reasons_are_found_from_every_level():
    """A part is sparsified by itself: the summary of the whole knows, and so does that of a smaller part."""
    inner = nn.Sequential(nn.Linear(8, 8), nn.Embedding(4, 8))
    model = nn.Sequential(inner, nn.Linear(8, 8))
    sten.sparsify(inner, layout=sten.NM(2, 4))
    found = rows(model)
    assert found["0.0.weight"].energy is not None and "Embedding" in found["0.1.weight"].why
    assert found["1.weight"].why == "" and found["1.weight"].layout == "dense"
    sten.sparsify(model, layout=sten.NM(2, 4), weights="1.weight")
    assert rows(model)["0.1.weight"].why == "not chosen by weights="
    assert list(rows(model[1])) == ["weight"]


def test_a_reason_does_not_outlive_its_form():
    model = sten.sparsify(mlp(), layout=sten.NM(2, 4), weights="0.weight")
    sten.sparsify(model, weights="2.weight", layout=NM(1, 4))
    found = rows(model)
    assert found["2.weight"].why == "" and found["0.weight"].why == "" and found["0.weight"].energy is not None
    sten.densify(model)
    assert {(r.layout, r.energy) for r in rows(model).values()} == {("dense", None)}


def test_energy_of_an_empty_weight():
    layer = nn.Linear(4, 4)
    nn.init.zeros_(layer.weight)
    assert sten.summary(sten.sparsify(layer, layout=sten.NM(2, 4))).rows[0].energy == 1.0


def test_plan_is_the_summary_to_be():
    model = mlp()
    plan = sten.plan(model, layout=BSR((4, 4)), sparsity=0.5, weights="0.weight")
    assert type(plan).__name__ == "SparsifyPlan" and type(sten.summary(model)).__name__ == "Summary"
    sten.sparsify(model, layout=BSR((4, 4)), sparsity=0.5, weights="0.weight")
    assert sorted(plan.rows, key=lambda r: r.name) == sten.summary(model).rows
    transposed = pytest.importorskip("transformers.pytorch_utils").Conv1D(8, 8)
    assert sten.plan(transposed, layout=sten.NM(2, 4)).rows[0].layout == "NM(n=2, m=4) transposed"


def test_plan_with_calibration():
    """Batches for a method that reads none are refused, in a plan as in sparsify."""
    with pytest.raises(ValueError, match="reads no activations"):
        sten.plan(mlp(), layout=sten.NM(2, 4), calibration=[torch.ones(1, 12)])


EXPECTED = """\
weight    layout        shape  density  bytes   energy kept (at sparsify)  note
0.weight  NM(n=2, m=4)  20x12  0.500    520 B   {:.3f}
2.weight  dense         8x20   1.000    640 B                not chosen by weights=
total                          0.700    1.133 KiB            0.72 of dense
sparse: 1 of 2 weights, with 240 of 428 parameters (56%)"""


def test_plain_text():
    model = sten.sparsify(mlp(), layout=sten.NM(2, 4), weights="0.weight")
    table = sten.summary(model)
    got = [line.split() for line in table.plain().splitlines()]
    assert got == [line.split() for line in EXPECTED.format(table.rows[0].energy).splitlines()]
    starts = [
        line.index(word) for line, word in zip(table.plain().splitlines(), ("layout", "NM", "dense"), strict=False)
    ]
    assert len(set(starts)) == 1


def test_rich_text():
    rich = pytest.importorskip("rich.console")
    table = sten.summary(sten.sparsify(mlp(), layout=sten.NM(2, 4), weights="0.weight"))
    for word in (
        "0.weight",
        "NM(n=2, m=4)",
        "20x12",
        "0.500",
        "520 B",
        "not chosen by weights=",
        "total",
        "0.72 of dense",
        "sparse: 1 of 2 weights, with 240 of 428 parameters (56%)",
    ):
        assert word in str(table)
    assert "\x1b" not in str(table) and "…" not in str(table)
    console = rich.Console(record=True, width=200, force_terminal=True)
    with console.capture() as capture:
        console.print(table)
    assert "\x1b[1m" in capture.get()


def test_long_names_are_not_cut():
    model = nn.Module()
    inner = model
    for _ in range(12):
        inner.a_rather_long_name = nn.Module()
        inner = inner.a_rather_long_name
    inner.last = nn.Linear(4, 4)
    name = "a_rather_long_name." * 12 + "last.weight"
    text = str(sten.summary(sten.sparsify(model, layout=sten.NM(2, 4))))
    assert any(line.startswith(name) and "NM(n=2, m=4)" in line for line in text.splitlines())


def test_without_rich(monkeypatch):
    real = builtins.__import__

    def no_rich(name, *args, **kwargs):
        if name.startswith("rich"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_rich)
    table = sten.summary(sten.sparsify(mlp(), layout=sten.NM(2, 4)))
    assert str(table) == table.plain()


def test_empty():
    assert sten.summary(nn.ReLU()).rows == [] and "total" in str(sten.summary(nn.ReLU()))
