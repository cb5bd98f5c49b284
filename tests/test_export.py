"""torch.export, AOTInductor and ONNX of every form: the programs compute what the model does, for other batch sizes.

A sample of the layouts, and no AOTInductor, unless STEN_ALL=1.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from cases import SMALL
from forms import FORMS, every_form
from small import mlp, rate
from torch import nn

import sten

ALL = bool(os.environ.get("STEN_ALL"))
some_layouts = pytest.mark.parametrize("layout", SMALL if ALL else [SMALL[n] for n in (1, 5)], ids=str)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def sparse(layout, form, model=None):
    torch.manual_seed(0)
    model = mlp() if model is None else model
    if form == "dense weight":
        method = sten.Gradual(1, 2) if layout.rate is None else sten.SRSTE()
        return sten.sparsify(model, layout, method, rate(layout), weights="*")
    model = sten.sparsify(model, layout, sparsity=rate(layout), weights="*")
    return sten.trainable(model) if form == "trainable" else model


def batch(size, dtype=torch.float32):
    return torch.randn(size, 12, generator=torch.Generator().manual_seed(size)).to(dtype)


def exported(model, example, strict=False):
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    return torch.export.export(model, (example,), dynamic_shapes=shapes, strict=strict)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.cell("export")
@some_layouts
@every_form
@pytest.mark.parametrize("strict", [False, True])
def test_export(layout, form, strict):
    """The model requires gradients, and still does afterwards."""
    for dtype in (torch.float32, torch.float64) if strict else (torch.float32,):  # double runs no C++ kernel
        model = sparse(layout, form).to(dtype)
        params = list(model.parameters())
        program = exported(model, batch(6, dtype), strict)
        for each in (program, program.run_decompositions()):
            close(each.module()(batch(9, dtype)), model(batch(9, dtype)))
        assert all(map(lambda p, before: p is before and p.requires_grad, model.parameters(), params))


class Images(nn.Module):
    """A convolution, an embedding and a projection of it."""

    def __init__(self):
        super().__init__()
        self.conv, self.table, self.out = nn.Conv2d(4, 8, 3), nn.Embedding(16, 8), nn.Linear(8, 12)

    def forward(self, image, words):
        return self.out(self.conv(image).mean((2, 3)) + self.table(words).sum(1))


@some_layouts
@pytest.mark.parametrize("form", FORMS[:2])
def test_export_of_other_layers(layout, form):
    model = sparse(layout, form, Images())
    inputs = torch.randn(3, 4, 6, 6), torch.randint(16, (3, 5))
    program = torch.export.export(model, inputs).run_decompositions()
    close(program.module()(*inputs), model(*inputs))


def test_an_exported_program_is_saved_and_loaded(tmp_path):
    model = sparse(sten.CSR(), "trainable")
    torch.export.save(exported(model, batch(6)).run_decompositions(), tmp_path / "program.pt2")
    close(torch.export.load(tmp_path / "program.pt2").module()(batch(9)), model(batch(9)))


FRESH = """
import sys, torch
{}
model = torch._inductor.aoti_load_package(sys.argv[1])
x, want = torch.load(sys.argv[2])
torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
"""
# the C++ compiler takes ten seconds for each
PACKAGES = [(layout, form) for layout in SMALL for form in FORMS] if ALL else []


@pytest.mark.cell("AOTI")
@pytest.mark.parametrize(("layout", "form"), PACKAGES, ids=str)
def test_package_in_a_fresh_process(layout, form, tmp_path):
    model = sparse(layout, form)
    path = torch._inductor.aoti_compile_and_package(exported(model, batch(6)), package_path=f"{tmp_path}/m.pt2")
    torch.save((batch(9), model(batch(9)).detach()), tmp_path / "data.pt")
    command = [sys.executable, "-W", "ignore", "-c", FRESH.format("import sten"), path, str(tmp_path / "data.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    if (layout, form) == (sten.CSR(), "trainable"):
        command[4] = FRESH.format("")
        done = subprocess.run(command, capture_output=True, text=True)
        assert "Could not find schema for sten::csr_linear" in done.stderr  # it names the package to import


def in_onnxruntime(model, path):
    """(what the file computes, its initializers and operators)."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    torch.onnx.export(model, (batch(6),), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    session, graph = runtime.InferenceSession(path), onnx.load(path).graph
    assert {node.domain for node in graph.node} == {""}  # standard operators
    y = session.run(None, {session.get_inputs()[0].name: batch(9).numpy()})[0]
    return torch.from_numpy(y), graph


@pytest.mark.cell("ONNX")
@some_layouts
@pytest.mark.parametrize("form", FORMS[:2])
def test_onnx(layout, form, tmp_path):
    """The file has the stored parts; of a dense copy, dense weights."""
    model = sparse(layout, form)
    close(in_onnxruntime(model, f"{tmp_path}/model.onnx")[0], model(batch(9)))


@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11's type promotion fails on a product with a mask")
@pytest.mark.cell("ONNX", form="dense weight")
@pytest.mark.parametrize(
    "layout", [layout for layout in SMALL if type(layout) is not sten.GroupedNM][:: 1 if ALL else 5]
)
def test_onnx_under_a_method(layout, tmp_path):
    model = sparse(layout, "dense weight")
    close(in_onnxruntime(model, f"{tmp_path}/model.onnx")[0], model(batch(9)))


@pytest.mark.cell("ONNX", form="dense weight", layout="GroupedNM", refused="call sten.finalize first")
def test_onnx_under_a_method_without_standard_operators(tmp_path):
    model = sparse(SMALL[5], "dense weight")
    with pytest.raises(Exception) as error:
        in_onnxruntime(model, f"{tmp_path}/model.onnx")
    cause = error.value
    while cause.__cause__ is not None:
        cause = cause.__cause__
    assert "Expected a finalized model for ONNX, got GroupedNM under a method; call sten.finalize" in str(cause)


def test_onnx_dense_or_gathered(tmp_path):
    """The user's choice: the stored entries, or a dense weight."""
    model = sten.sparsify(nn.Linear(12, 200), sten.CSR(), sparsity=0.9)
    for each, dense in ((model, False), (sten.densify(copy.deepcopy(model)), True)):
        y, graph = in_onnxruntime(each, f"{tmp_path}/model.onnx")
        close(y, model(batch(9)))
        assert any(sorted(i.dims) == [12, 200] for i in graph.initializer) == dense
