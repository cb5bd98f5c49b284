"""The commands of `python -m sten`: what they print and write, and one sentence for what cannot be meant."""

from __future__ import annotations

import json
import subprocess
import sys
from xml.etree import ElementTree

import pytest
import torch

import sten
from sten.__main__ import main
from sten.command import bench, names
from sten.explanation.timing import Spread

SIZE = ["--shapes", "128x96", "--tokens", "1", "8", "--seconds", "0.001", "--device", "cpu"]


def run(capsys, *arguments) -> str:
    main(arguments)
    return capsys.readouterr().out


def refused(capsys, *arguments) -> str:
    """The one sentence, and no traceback."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    said = capsys.readouterr().err.strip() or str(stopped.value)
    assert stopped.value.code not in (0, None) and "\n" not in said and said.endswith(".")
    return said


def test_without_a_command_there_is_help(capsys):
    assert run(capsys).splitlines()[0].startswith("usage: python -m sten") and "explain MODEL" in run(capsys)


def test_info_has_every_layout_and_a_reason_for_each_expansion(capsys):
    out = run(capsys, "info")
    lines = out.splitlines()
    for layout in ("Masked", "CSR", "BSR", "NM", "GroupedNM", "VectorNM", "FanIn"):
        (line,) = [line for line in lines if line.strip().startswith(layout + "(")]
        for number in {cell[0] for cell in line.split("dense (")[1:]}:
            assert any(line.strip().startswith(f"({number}) ") for line in lines)
    w = sten.from_dense(torch.randn(512, 512), sten.NM(2, 4))
    assert sten.which("linear", (1024, 512), w).reason in out and f"torch {torch.__version__}" in out


def test_bench(capsys, tmp_path):
    layouts = ["--layouts", "CSR 0.9", "NM(2, 4)", "BSR(16, 16) 80%", "BSR((1000, 1000)) 0.5"]
    files = [
        "--json",
        str(tmp_path / "b.json"),
        "--picture",
        str(tmp_path / "b.svg"),
        "--dtypes",
        "float32",
        "bfloat16",
    ]
    out = run(capsys, "bench", *SIZE, *layouts, *files)
    assert "CSR() 0.9" in out and "128 -> 96, torch.bfloat16" in out
    last = out.strip().splitlines()[-1]
    assert last.startswith("On this cpu, at 1 ") and last.count(".\n") == 0 and last.endswith(".")
    cells = json.loads((tmp_path / "b.json").read_text())["cells"]
    assert len(cells) == 16 and {cell["tokens"] for cell in cells} == {1, 8}
    plan = sten.which("linear", (8, 128), sten.from_dense(torch.randn(96, 128), sten.NM(2, 4)))
    assert [c["reason"] for c in cells if c["layout"] == "NM(n=2, m=4)"] == [plan.reason] * 4
    assert ElementTree.parse(tmp_path / "b.svg").getroot().tag.endswith("svg")


@pytest.mark.parametrize(
    ("speedups", "sentence"),
    [
        ({"A": (2, 4), "B": (3, 1.5)}, "at 1 token B is the fastest (3.00 times dense); at 8 tokens A is the fastest"),
        ({"A": (0.5, 0.5), "B": (0.4, 0.4)}, "at 1 and 8 tokens nothing is clearly faster than dense."),
    ],
)
def test_the_advice_of_bench(speedups, sentence):
    one = Spread(1.0, 1.0, 1.0)
    cells = [
        bench.Cell((4, 4), "float32", name, tokens, one, one, one * speedup, "k", "r")
        for name, both in speedups.items()
        for tokens, speedup in zip((1, 8), both, strict=True)
    ]
    assert sentence in bench.advice(cells, torch.device("cpu"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("CSR", (sten.CSR(), 0.9)),
        ("CSR() 0.75", (sten.CSR(), 0.75)),
        ("CSR 75%", (sten.CSR(), 0.75)),
        ("NM(2,4)", (sten.NM(2, 4), None)),
        ("BSR((16, 32)) 0.5", (sten.BSR((16, 32)), 0.5)),
        ("BSR(16,32)0.5", (sten.BSR((16, 32)), 0.5)),
        (" GroupedNM(1, 10, 8) ", (sten.GroupedNM(1, 10, 8), None)),
    ],
)
def test_layouts_by_name(text, expected):
    assert names.layout(text) == expected and names.layout(names.title(expected)) == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("frob",), "invalid choice: 'frob'"),
        (("bench", "--layouts", "NMM"), "Expected a layout"),
        (("bench", "--layouts", "NM(3, 2)"), "Expected n from 1 to 2 for NM, got 3"),
        (("bench", "--layouts", "NM(2, 4) 0.5"), "Expected no sparsity with NM"),
        (("bench", "--layouts", "CSR 1.5"), "got 'CSR 1.5'"),
        (("bench", "--layouts", "CSR(__import__('os'))"), "Expected a layout"),
        (("bench", "--shapes", "768"), "Expected a shape such as 768x3072"),
        (("bench", "--tokens", "0"), "Expected a whole number above 0"),
        (("bench", "--dtypes", "int8"), "Expected one of float32"),
        (("bench", "--device", "frob"), "Expected a device that is there"),
        (("bench", "--seconds", "-1"), "Expected seconds above 0"),
        (("bench", *SIZE, "--json", "/no/such/folder/x"), "Expected a file in a folder that is there"),
        (("inspect",), "the following arguments are required: file"),
        (("explain", "./nothing"), "got no such file: ./nothing"),
    ],
)
def test_wrong_arguments_get_one_sentence(capsys, arguments, words):
    assert words in refused(capsys, *arguments)


def test_inspect(capsys, tmp_path):
    sten.save(sten.sparsify(torch.nn.Linear(8, 4), sten.NM(2, 4)), tmp_path / "m")
    out = run(capsys, "inspect", str(tmp_path / "m"))
    assert "weight: NM(n=2, m=4), shape (4, 8), density 0.5" in out and "bias: float32 (4,), 16 bytes" in out
    assert "got no file" in refused(capsys, "inspect", str(tmp_path / "n"))


def test_explain_of_a_file(capsys, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Sequential(torch.nn.Linear(8, 16)))
    sten.save(sten.sparsify(model, {"0": sten.NM(2, 4), "1": sten.CSR()}, sparsity=0.5), tmp_path / "m")
    files = ["--html", str(tmp_path / "m.html"), "--json", str(tmp_path / "m.json"), "--seconds", "0.001"]
    out = run(capsys, "explain", str(tmp_path / "m"), "--tokens", "3", "--device", "cpu", *files)
    assert "its 2 sparse matrices, multiplied with 3 random inputs" in out and "Worth keeping" in out
    rows = json.loads((tmp_path / "m.json").read_text())
    assert [(row["name"], row["layout"], row["input"]) for row in rows] == [
        ("0", "NM(n=2, m=4)", "3x16"),
        ("1.0", "CSR()", "3x8"),
    ]
    assert "<svg" in (tmp_path / "m.html").read_text()
    sten.save(torch.nn.Linear(4, 4), tmp_path / "dense")
    assert "with sparse matrices, got none" in refused(capsys, "explain", str(tmp_path / "dense"))


def test_explain_of_a_folder_of_transformers(capsys, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = transformers.BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=16)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    given = ["--tokens", "4", "--layout", "NM(2, 4)", "--device", "cpu", "--seconds", "0.001"]
    out = run(capsys, "explain", str(tmp_path), *given)
    assert "bert.encoder.layer.0.output.dense" in out and "NM(n=2, m=4)" in out


def test_as_a_program():
    done = subprocess.run([sys.executable, "-m", "sten", "bench", "--tokens", "x"], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "Expected a whole number above 0" in done.stderr
