"""The benchmarks of the CPU run, check their results and write what they measured."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from sten.backends import cpp

FOLDER = Path(__file__).parent.parent / "benchmarks"
pytestmark = pytest.mark.skipif(not cpp.available(), reason="the extension is not built")


@pytest.mark.parametrize(
    "arguments",
    [
        ["cpu_linear.py", "--layouts", "nm16:32", "--dtype", "bfloat16", "--tokens", "2", "--seconds", "0.01"],
        ["cpu_model.py", "--models", "conv-512x7", "--plans", "csr95", "--batches", "1", "--rounds", "3"],
        ["cpu_packing.py", "--layouts", "csr90", "nm2:4", "1:4:16", "--shape", "70", "130", "--repeats", "1"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_runs(arguments, monkeypatch, tmp_path, one_thread):
    monkeypatch.syspath_prepend(str(FOLDER))
    script, *options = arguments
    monkeypatch.setattr(sys, "argv", [script, *options, "--threads", "1", "--json", str(tmp_path / "out.json")])
    with torch.no_grad():
        runpy.run_path(str(FOLDER / script), run_name="__main__")
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["setting"]["threads"] == 1 and content["results"]


def test_q_sparse(monkeypatch, tmp_path, one_thread, capsys):
    """A step or two of each model, which decodes what the whole model computes, and a table."""
    monkeypatch.syspath_prepend(str(FOLDER / "training"))
    options = ["--device", "cpu", "--size", "tiny", "--steps", "2", "--batch", "2", "--batches", "1", "--cpu-time"]
    options += ["--decode-seconds", "0.01", "--out", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", ["q_sparse.py", *options])
    runpy.run_path(str(FOLDER / "training" / "q_sparse.py"), run_name="__main__")
    rows = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [row["sparsity"] for row in rows] == [0.0, 0.5, 0.7]
    assert all(4 < row["loss"] < 6 and row["decode_eager"] > 0 for row in rows)  # log(256) is 5.5
    assert len({row["loss"] for row in rows}) == 3, "the inputs are sparse in training"
    assert "| 70% |" in capsys.readouterr().out
