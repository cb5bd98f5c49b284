"""Readers of raw storage: refused in one sentence, or given the numbers; never a crash, and no garbage in a file.

What reads in C++ could end the process, so these acts run in processes of their own.
"""

from __future__ import annotations

import copy
import ctypes
import io
import multiprocessing.reduction
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small import mlp, rate
from torch import nn
from weights import every_layout, make, one_sentence

import sten

FORMS = ("finalized", "trainable")
every_form = pytest.mark.parametrize("form", FORMS)

# refused; each with a part of the sentence
READERS = {
    "torch.from_dlpack(w)": "DLPack",
    "numpy.from_dlpack(w)": "DLPack",
    "w.__dlpack__()": "DLPack",
    "torch.utils.dlpack.to_dlpack(w)": "data pointer",  # torch's own words: no Python function is called
    "bytes(w.untyped_storage())": "storage",
    "w.untyped_storage().tolist()": "storage",
    "w.untyped_storage().data_ptr()": "storage",
    "torch.zeros(0).set_(w.untyped_storage())": "storage",
    "w.storage().tolist()": "storage",
    "w._typed_storage()": "storage",
    "w.data_ptr()": "storage",
    "w.numpy()": "to_dense",
    "numpy.asarray(w)": "to_dense",
    "w.tolist()": "to_dense",
    "safetensors.torch.save({'w': w})": "sten.save",
    "safetensors.torch.save_file({'w': w}, path)": "sten.save",
}

PROGRAM = """
import io, sys, warnings
import numpy, torch, sten
warnings.simplefilter("ignore")
try:
    import safetensors.torch
except ImportError:
    safetensors = None
form, folder, *acts = sys.argv[1:]
path = folder + "/file"
for layout in (sten.CSR(), sten.GroupedNM(1, 4, 2), sten.Masked()):
    torch.manual_seed(0)
    sparsity = 0.5 if layout.rate is None else None
    model = sten.sparsify(torch.nn.Linear(16, 8), layout, sparsity=sparsity)
    if form == "trainable":
        sten.trainable(model)
    if form == "dense weight":
        method = sten.SRSTE() if layout.rate else sten.Gradual(1, 2)
        model = sten.sparsify(sten.densify(model), layout, method, sparsity)
    x = torch.randn(3, 16)
    for act in acts:
        w = model.weight.detach()
        try:
            if "safetensors" not in act or safetensors is not None:
                print(act, "RETURNED", eval(act), sep="\\t", flush=True)
        except Exception as error:
            print(act, str(error).replace("\\n", " "), sep="\\t", flush=True)
"""


def played(form: str, acts, folder: Path) -> list[tuple[str, str]]:
    """(act, what it raised) of acts in another process; a crash fails the test."""
    command = [sys.executable, "-c", PROGRAM, form, str(folder), *acts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.returncode, done.stdout[-500:], done.stderr[-2000:])
    return [tuple(line.split("\t", 1)) for line in done.stdout.splitlines()]


@every_form
def test_readers_are_refused(form, tmp_path):
    rows = played(form, READERS, tmp_path)
    assert len(rows) >= 3 * (len(READERS) - 2)
    for act, error in rows:
        assert "RETURNED" not in error and READERS[act] in error, (act, error)
    assert not (tmp_path / "file").exists()


SCRIPTED = [
    "torch.jit.trace(model, x)",
    "torch.jit.trace(model.requires_grad_(False), x).save(path)",
    "torch.jit.save(torch.jit.trace(model, x, check_trace=False), io.BytesIO())",
    "torch.jit.script(model)",
    "torch.jit.script(model).save(path)",
    "torch.jit.freeze(torch.jit.script(model.eval()))",
    "torch.jit.script(torch.nn.Sequential(model))",
    "torch.onnx.export(model, (x,), path, dynamo=False)",
]


@pytest.mark.parametrize("form", [*FORMS, "dense weight"])
def test_torchscript_is_refused(form, tmp_path):
    for act, error in played(form, SCRIPTED, tmp_path):
        assert error.startswith("Expected") and "torch.export" in error and "sten.densify" in error, (act, error)
    assert not (tmp_path / "file").exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@every_form
@pytest.mark.parametrize("how", ["trace", "script"])
def test_what_the_refusal_of_torchscript_names_works(form, how):
    model = sten.sparsify(mlp(), sten.CSR(), sparsity=0.5)
    model = sten.trainable(model) if form == "trainable" else model
    x = torch.randn(4, 12)
    dense = sten.densify(copy.deepcopy(model))
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(dense, x) if how == "trace" else torch.jit.script(dense), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), model(x))
    exported = torch.export.export(sten.finalize(model).requires_grad_(False), (x,))
    torch.testing.assert_close(exported.module()(x), model(x))


@every_layout
def test_copies_for_other_processes_and_files(layout):
    w, dense = make(layout)
    sent = pickle.loads(multiprocessing.reduction.ForkingPickler.dumps(w))
    assert torch.equal(sent.to_dense(), dense) and sent.sparse_layout == layout
    file = io.BytesIO()
    torch.save(w, file)
    file.seek(0)
    assert torch.equal(torch.load(file).to_dense(), dense)
    assert torch.asarray(w) is w and torch.as_tensor(w) is w
    assert torch.equal(torch.asarray(w, dtype=torch.float64).to_dense(), dense.double())
    assert torch.equal(torch.tensor(w).to_dense(), dense)
    assert torch.equal(w.as_subclass(torch.Tensor).to_dense(), dense)
    assert torch.equal(torch.zeros(0).set_(w), dense) or torch.zeros(0).set_(w).numel() == 0
    assert w.__dlpack_device__()[0] == 1 and not w.is_pinned()


@pytest.mark.filterwarnings("ignore:sten. operator")
@every_layout
def test_reinterpretations_see_the_dense_numbers(layout):
    w, dense = make(layout)
    assert torch.equal(w.as_strided((2, 2), (1, 2)), dense.as_strided((2, 2), (1, 2)))
    assert torch.equal(w.view(torch.int32), dense.view(torch.int32))


def test_other_interfaces_of_memory_do_not_exist():
    w, _ = make(sten.CSR())
    for ask in (memoryview, ctypes.c_float.from_buffer, lambda w: torch.frombuffer(w, dtype=torch.float32)):
        with pytest.raises((TypeError, ValueError)):
            ask(w)
    assert not hasattr(w, "__array_interface__") and not isinstance(w, np.ndarray)


@pytest.mark.parametrize(
    "write", [lambda w: w.set_(torch.zeros(7, 5)), lambda w: w.resize_(3, 3)], ids=["set_", "resize_"]
)
def test_another_storage_is_refused(write):
    w, dense = make(sten.CSR())
    with pytest.raises((NotImplementedError, ValueError)) as error:
        write(w)
    assert one_sentence(error) and torch.equal(w.to_dense(), dense)


def test_torch_compile_may_ask_for_the_storage():
    """It compares the storages of all tensors; the one of a sparse tensor has an identity and no memory."""
    model = sten.sparsify(nn.Linear(12, 8), sten.NM(2, 4))
    x = torch.randn(3, 12)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), model(x))
    with pytest.raises(TypeError, match="storage"):
        model.weight.untyped_storage()


@every_form
def test_accelerate_refuses_or_saves(form, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = sten.sparsify(mlp(), sten.CSR(), sparsity=rate(sten.CSR()))
    model = sten.trainable(model) if form == "trainable" else model
    accelerator = accelerate.Accelerator(cpu=True)
    if form == "finalized":
        with pytest.raises(TypeError, match=r"sten\.save"):
            accelerator.save_model(model, str(tmp_path))
        with pytest.raises(TypeError, match=r"use sten\.from_dense"):
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerator.save_model(model, str(tmp_path))
        assert (tmp_path / "model.safetensors").exists()
