"""The pruning benchmarks run on small random models, resume, and say what they measured."""

import json
import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sten

FOLDER = Path(__file__).parent.parent / "benchmarks" / "pruning"


@pytest.fixture
def bench(monkeypatch):
    """Imports of that folder, and its scripts; forgotten afterwards, since their names are short."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    before = set(sys.modules)

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(FOLDER / script), run_name="__main__")

    yield run
    for name in set(sys.modules) - before:
        if str(FOLDER.parent) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_quantized_rows_are_read(bench):
    from models import unpacked

    generator = np.random.default_rng(0)
    scale, least = np.float16(0.125), np.float16(-1)
    codes = generator.integers(0, 16, (3, 64)).astype(np.uint8)
    blocks = codes.reshape(3, 2, 2, 16)  # a block's first 16 numbers are the low halves of its bytes
    head = np.frombuffer(scale.tobytes() + least.tobytes(), np.uint8)
    rows = [np.concatenate([head, b[0] | b[1] << 4]) for row in blocks for b in row]
    expected = torch.from_numpy(codes).float() * 0.125 - 1
    assert torch.equal(unpacked(np.stack(rows).reshape(3, 40), "q4_1"), expected)
    codes = generator.integers(-127, 128, (2, 32)).astype(np.int8)
    rows = [np.concatenate([np.frombuffer(scale.tobytes(), np.uint8), row.view(np.uint8)]) for row in codes]
    assert torch.equal(unpacked(np.stack(rows), "q8_0"), torch.from_numpy(codes).float() * 0.125)


def test_texts_share_no_words(bench):
    from texts import halves, passages, python_topics, runs_of_words

    split = halves("", python_topics())
    assert len(split.calibration) > 10 and len(split.evaluation) > 10
    seen = set().union(*map(runs_of_words, split.calibration))
    assert all(seen.isdisjoint(runs_of_words(text)) for text in split.evaluation)
    assert len(list(passages(split.evaluation))) > 50


def test_references_compute_what_their_codes_say(bench):
    from references import Int4, Int8

    torch.manual_seed(0)
    linear, x = torch.nn.Linear(128, 32), torch.randn(2, 5, 128)
    for kind, tolerance in ((Int8, 0.02), (Int4, 0.15)):
        error = (kind(linear)(x) - linear(x)).norm() / linear(x).norm()
        assert 0 < error < tolerance


def test_every_cell_is_spelled_with_names_of_sten(bench):
    from cells import SENSITIVITY, cells, evaluated

    found = list(cells(3))
    assert len({cell.name for cell in found}) == len(found)
    for cell in found:
        assert isinstance(evaluated(cell.layout), sten.Layout) and isinstance(evaluated(cell.method), sten.Sparsifier)
        if isinstance(cell.sparsity, str) and not cell.sparsity.startswith(SENSITIVITY):
            evaluated(cell.sparsity)


def test_cells_that_differ_in_distillation_are_pruned_once(bench):
    from cells import RATES, Cell, rates

    assert len({cell.name for cell in rates()}) == 2 * len(RATES)
    assert len({cell.before_distillation for cell in rates()}) == 2
    usual = Cell("", "minilm", "NM(2, 4)", "Wanda()", steps=100, seed=1, domain="both")  # older results have this name
    assert usual.name == "minilm | NM(2, 4) | Wanda() | distill 100 | both | seed 1"


def test_grid_speed_and_report(bench, tmp_path, capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    out, threads = tmp_path / "one_shot.json", torch.get_num_threads()
    wanted = [
        "smollm2 | NM(2, 4) | Wanda() | seed 0",
        "smollm2 | VectorNM(2, 4, 32) | *ADMM()) | permuted | distill 40 *",
    ]
    wanted += ["minilm | CSR() sensitivity(0.5) | Wanda() | seed 0"]
    arguments = "--tiny", "--device", "cpu", "--sequences", 4, "--passages", 32, "--seeds", 1, "--out", out
    arguments += "--cells", *wanted
    bench("one_shot.py", *arguments)
    content = json.loads(out.read_text())
    assert len(content["cells"]) == 3
    for row in content["cells"].values():
        assert "error" not in row, row
        numbers = [v for name, v in row.items() if name.startswith(("perplexity", "cosine", "rank"))]
        assert len(numbers) in (2, 4) and all(math.isfinite(v) for v in numbers)
        assert row["bytes"] > 0 and row["seconds"]["prune"] >= 0
    capsys.readouterr()
    bench("one_shot.py", *arguments)
    assert capsys.readouterr().out == ""  # all of it was there
    try:
        speed = tmp_path / "one_shot_speed_cpu.json"
        short = "--tiny", "--device", "cpu", "--rounds", 1, "--models", "smollm2", "--batches", 1
        bench("speed.py", *short, "--out", speed, "--patterns", "NM(2, 4)", "int8")
    finally:
        torch.set_num_threads(threads)
    rows = json.loads(speed.read_text())["rows"]
    assert set(rows) == {"smollm2 | NM(2, 4)", "smollm2 | int8"}
    assert all(row["decode 1"]["us"] > 0 and "error" not in row for row in rows.values())
    bench("picture.py", "--results", out, "--speeds", tmp_path, "--out", tmp_path / "picture")
    assert (tmp_path / "picture.png").stat().st_size > 10_000 and (tmp_path / "picture.svg").exists()
    capsys.readouterr()
    bench("report.py", "--results", out)
    printed = capsys.readouterr().out
    assert "| `NM(2, 4)` | 56% |" in printed


def test_what_pruning_costs_is_measured_on_any_machine(bench, tmp_path):
    pytest.importorskip("transformers")
    for part in ("layer", "blocks", "models"):
        bench("cost.py", part, "--tiny", "--device", "cpu", "--rounds", 1, "--json", tmp_path / "cost.json")
        content = json.loads((tmp_path / "cost.json").read_text())
        assert set(content) == {"about", part} and content[part]


def test_the_page_has_a_place_for_every_table(bench):
    from report import Results, filled, tables

    root = FOLDER.parent.parent
    page = "".join((root / name).read_text() for name in ("README.md", "docs/pruning.md", "docs/training.md"))
    found = tables(Results(Path("/nowhere.json")))
    marked = filled(page, {name: f"[{name}]" for name in found})
    assert all(f"\n[{name}]\n<!-- end -->" in marked for name in found)
