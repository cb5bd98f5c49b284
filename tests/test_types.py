"""What a type checker says of the public functions: the model's own type comes back."""

import subprocess
import sys

import pytest

pytest.importorskip("mypy")

CODE = """
import torch
import sten

class Net(torch.nn.Module):
    head = torch.nn.Linear(8, 8)

model = torch.nn.Sequential(torch.nn.Linear(8, 8))
optimizer = torch.optim.SGD(model.parameters(), 0.1)
reveal_type(sten.sparsify(Net()))
reveal_type(sten.attach(model, optimizer))
reveal_type(sten.trainable(model))
reveal_type(sten.finalize(torch.nn.Linear(8, 8)))
reveal_type(sten.densify(Net()))
reveal_type(sten.load(Net(), "model.safetensors"))
reveal_type(sten.which("linear", (4, 8), model[0].weight))
reveal_type(sten.from_dense(torch.ones(2, 2), sten.NM(2, 4)))
"""
TYPES = ["Net", "Sequential", "Sequential", "Linear", "Net", "Net", "Plan", "SparseTensor"]


def test_the_type_that_goes_in_comes_out(tmp_path):
    (tmp_path / "user.py").write_text(CODE)
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--cache-dir", str(tmp_path / "cache"), "user.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    revealed = [line for line in done.stdout.splitlines() if "Revealed type" in line]
    assert [line.split('"')[1].rsplit(".", 1)[-1] for line in revealed] == TYPES, done.stdout + done.stderr
    assert "error" not in done.stdout
