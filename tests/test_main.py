"""`python -m sten info` and `bench` say what they promise."""

import sys

import pytest
import torch

import sten
from sten.__main__ import main


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["sten", *arguments])
    main()
    return capsys.readouterr().out


def test_info(monkeypatch, capsys):
    out = run(monkeypatch, capsys, "info")
    assert "torch" in out and "C++ kernels" in out and "expand to dense" in out


def test_bench(monkeypatch, capsys):
    size = ["--out", "128", "--in", "128", "--tokens", "1", "8", "--repeats", "1", "--device", "cpu"]
    out = run(monkeypatch, capsys, "bench", *size)
    assert out.count("x  ") >= 8 and "GroupedNM(1, 10, 8)" in out


def test_inspect(monkeypatch, capsys, tmp_path):
    sten.save(sten.sparsify(torch.nn.Linear(8, 4), sten.NM(2, 4)), tmp_path / "m")
    out = run(monkeypatch, capsys, "inspect", str(tmp_path / "m"))
    assert "weight: NM(n=2, m=4), shape (4, 8), density 0.5" in out and "bias: float32 (4,), 16 bytes" in out
    with pytest.raises(SystemExit, match="got no file"):
        run(monkeypatch, capsys, "inspect", str(tmp_path / "n"))


def test_a_command_is_needed(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, capsys)
