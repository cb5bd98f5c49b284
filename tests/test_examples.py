"""The examples run as a user would run them, and the outside package builds, installs and works."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sten

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def run(*command, cwd, **environment):
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def test_quickstart(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    out = run(
        sys.executable,
        str(EXAMPLES / "quickstart.py"),
        "--tiny",
        "--out",
        str(tmp_path),
        cwd=tmp_path,
        PYTHONPATH=str(ROOT),
    )
    assert "test accuracy" in out and "latency, 1024 samples" in out
    assert (tmp_path / "quickstart.png").stat().st_size > 10_000
    assert (tmp_path / "quickstart_model.safetensors").stat().st_size > 1_000


@pytest.mark.parametrize(("script", "saved"), [("prune_decoder.py", "a.safetensors"), ("prune_encoder.py", "folder")])
def test_prune(script, saved, tmp_path, monkeypatch, capsys):
    """The whole example on a small random model."""
    pytest.importorskip("transformers")
    path = tmp_path / saved
    monkeypatch.setattr(sys, "argv", [script, "--tiny", "--out", str(path)])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    out = capsys.readouterr().out
    assert "of distillation" in out and "sparse: " in out
    assert (path / "config.json" if path.is_dir() else path).stat().st_size > 500


def test_new_layout(registry):
    path = EXAMPLES / "new_layout.py"
    assert len(path.read_text().splitlines()) < 40
    columns = runpy.run_path(str(path))["Columns"]()
    sten.testing.check_layout(columns)
    sten.testing.check_kernel("linear", columns)
    model = sten.sparsify(torch.nn.Linear(64, 32), layout=columns, sparsity=0.75)
    assert sten.which("linear", torch.ones(1, 64), model.weight).kernel == "columns_linear"
    model(torch.randn(3, 64)).sum().backward()
    assert model.weight.grad.sparse_layout == columns


@pytest.mark.parametrize("method", ["topk", "batchtopk", "jumprelu"])
def test_sparse_autoencoder(method, monkeypatch, capsys, one_thread):
    monkeypatch.setattr(sys, "argv", ["sparse_autoencoder.py", method, "--tiny"])
    runpy.run_path(str(EXAMPLES / "sparse_autoencoder.py"), run_name="__main__")
    numbers = re.findall(r"[\d.]+", capsys.readouterr().out)
    assert float(numbers[0]) < 0.5, "it reconstructs"
    assert 2.5 < float(numbers[1]) <= (4.0 if method == "topk" else 6.0), "about k latents are active"


def test_teal(capsys, one_thread):
    """Greedy fractions move the outputs less than one fraction for all, for the same number of zeros."""
    pytest.importorskip("transformers")
    script = runpy.run_path(str(EXAMPLES / "teal.py"))
    script["main"]()
    out = capsys.readouterr().out
    first, second = map(float, re.findall(r"error ([\d.]+)", out))
    assert second < 0.9 * first < 0.3
    zero = [float(part) for part in re.findall(r"proj': ([\d.]+)", out)]
    assert len(zero) == 12 and 0.48 < sum(zero[6:]) / 6 < 0.53


def test_teal_drops_what_costs_nothing(one_thread):
    """An input that is almost zero is dropped first, whole; what is left of the sparsity goes to the others."""
    greedy = runpy.run_path(str(EXAMPLES / "teal.py"))["greedy"]
    torch.manual_seed(0)
    block = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))
    with torch.no_grad():
        block[0].weight.mul_(1e-6), block[0].bias.fill_(1.0)
    x = torch.randn(50, 16)
    edges = greedy(block, ("0", "1"), [((x,), {})], 0.5, step=0.05)
    assert edges["0"] >= float(x.abs().max()) and edges["1"] == 0.0
    edges = greedy(block, ("0", "1"), [((x,), {})], 0.6, step=0.05)
    assert float((block[0](x).abs() <= edges["1"]).float().mean()) == pytest.approx(0.2, abs=0.01)


def test_top_k_gradients(tmp_path):
    out = run(sys.executable, str(EXAMPLES / "topk_gradients.py"), "--tiny", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert "with 1 % of the gradients" in out  # it checks itself that the ranks agree and learn


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_extension(tmp_path):
    """Its own wheel, installed outside the checkout, used by a process that knows sten and the package alone."""
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(EXAMPLES / "extension", source)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-build-isolation",
        "--no-deps",
        "--target",
        str(site),
    ]
    run(*pip, ".", cwd=source)
    program = """
import torch, sten, sten_bitmask
layout = sten_bitmask.Bitmask()
sten.testing.check_layout(layout, shapes=[(5, 3), (13, 17), (4, 3, 3, 3)])
sten.testing.check_kernel("linear", layout)
model = sten.sparsify(torch.nn.Linear(64, 32), layout=layout, sparsity=0.9)
print(sten.which("linear", torch.ones(1, 64), model.weight))
sten.save(model, "model.safetensors")
again = sten.load(torch.nn.Linear(64, 32), "model.safetensors")
x = torch.randn(3, 64)
assert torch.equal(again(x), model(x))
torch.testing.assert_close(model(x), sten.densify(again)(x))
"""
    out = run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=os.pathsep.join([str(site), str(ROOT)]))
    assert "bitmask_linear [cpp]" in out
