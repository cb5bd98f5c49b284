"""`python -m sten info` and `bench` say what they promise."""

import sys

import pytest

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


def test_a_command_is_needed(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, capsys)
