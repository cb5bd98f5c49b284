"""sten.save and sten.load: round trips, and files that are not what they should be."""

from __future__ import annotations

import copy
import json
import os
import struct
import subprocess
import sys
import zlib

import pytest
import torch
from masked import expect_close, masks, sparse_weights, state
from safetensors.torch import load_file, save_file
from small import batch, every_layout, mlp, rate, train
from torch import nn

import sten
from sten.io import _checksum
from sten.layouts import CSR, NM, GroupedNM


def same_model(a: nn.Module, b: nn.Module) -> None:
    """The same forms, patterns, numbers and dtypes."""
    expect_close(state(a), state(b), 0, 0)
    assert {n: w.sparse_layout for n, w in sparse_weights(a).items()} == {
        n: w.sparse_layout for n, w in sparse_weights(b).items()
    }
    assert all(torch.equal(mask, masks(b)[n]) for n, mask in masks(a).items())
    for (n, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert type(p) is type(q) and p.dtype == q.dtype, n


# round trips


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@every_layout
def test_round_trip(layout, dtype, tmp_path):
    model = sten.sparsify(mlp().to(dtype), layout=layout, sparsity=rate(layout))
    sten.save(model, tmp_path / "model.safetensors")
    into = mlp().to(dtype)
    params = list(into.parameters())
    assert sten.load(into, str(tmp_path / "model.safetensors")) is into
    same_model(into, model)
    assert all(a is b for a, b in zip(params, into.parameters(), strict=True))
    torch.testing.assert_close(into(batch(0).to(dtype)), model(batch(0).to(dtype)))


@every_layout
def test_convolutions_and_buffers(layout, tmp_path):
    def build():
        return nn.Sequential(nn.Conv2d(8, 12, 3, bias=False), nn.BatchNorm2d(12), nn.Conv2d(12, 8, 1, groups=2))

    model = sten.sparsify(build(), layout=layout, sparsity=rate(layout), weights="*")
    model(torch.randn(2, 8, 6, 6))
    sten.save(model, tmp_path / "m")
    into = sten.load(build(), tmp_path / "m")
    same_model(into, model)
    x = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(into.eval()(x), model.eval()(x))
    assert into[1].num_batches_tracked == 1


def test_conv1d(tmp_path):
    from transformers.pytorch_utils import Conv1D

    model = sten.sparsify(Conv1D(8, 12), layout=GroupedNM(1, 4, 2))
    sten.save(model, tmp_path / "m")
    into = sten.load(Conv1D(8, 12), tmp_path / "m")
    assert into.weight.transposed
    same_model(into, model)


class Tied(nn.Module):
    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
        if tie:
            self.head.weight = self.embed.weight


@pytest.mark.parametrize("sparse", [False, True])
def test_ties(sparse, tmp_path):
    model = sten.sparsify(Tied(), layout=sten.NM(2, 4), weights="*") if sparse else Tied()
    sten.save(model, tmp_path / "m")
    assert set(load_file(tmp_path / "m")) == (
        {"embed.weight.values", "embed.weight.index"} if sparse else {"embed.weight"}
    )
    into = sten.load(Tied(), tmp_path / "m")
    assert into.head.weight is into.embed.weight
    same_model(into, model)
    untied = sten.load(Tied(tie=False), tmp_path / "m")
    assert untied.head.weight is not untied.embed.weight
    with torch.no_grad():
        untied.head.weight.zero_()
    expect_close({"embed.weight": state(untied)["embed.weight"]}, state(model), 0, 0)


def test_a_tie_that_the_file_breaks(tmp_path):
    sten.save(Tied(tie=False), tmp_path / "m")
    refused(Tied(), tmp_path / "m", r"equal numbers for embed\.weight and head\.weight, which are tied")


@pytest.mark.parametrize("form", ["dense", "finalized", "trainable"])
@pytest.mark.parametrize("into", ["dense", "finalized", "trainable"])
def test_every_form_into_every_form(form, into, tmp_path):
    """The loaded model has the file's forms: sparse weights as SparseTensor Parameters, dense ones dense."""
    change = {"dense": sten.densify, "finalized": sten.finalize, "trainable": sten.trainable}
    model = change[form](sten.sparsify(mlp(), layout=CSR(), sparsity=0.7))
    sten.save(model, tmp_path / "m")
    target = change[into](sten.sparsify(mlp(), layout=NM(2, 4), sparsifier=sten.Random()))
    sten.load(target, tmp_path / "m")
    same_model(target, sten.finalize(model))


def test_optimizers_follow(tmp_path):
    """Loading into a model in training: attach again and go on."""
    model = mlp()
    opt = torch.optim.AdamW(model.parameters())
    sten.sparsify(model, layout=sten.NM(2, 4), optimizer=opt)
    train(model, opt, range(2))
    sten.save(sten.sparsify(mlp(), layout=CSR(), sparsity=0.7), tmp_path / "m")
    sten.load(model, tmp_path / "m")
    sten.attach(model, opt)
    train(model, opt, range(2))
    assert all(s.shape in ((), p.shape) for p, own in opt.state.items() for s in own.values())


@pytest.mark.parametrize("method", [sten.SET(8, every=2), sten.RigL(8, every=2), sten.SRSTE()], ids=str)
def test_loading_ends_training_with_a_method(method, tmp_path):
    sten.save(sten.sparsify(mlp(), sten.CSR(), sparsity=0.5), tmp_path / "m")
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    sten.sparsify(model, sten.CSR(), method, sparsity=0.5, optimizer=optimizer)
    train(model, optimizer, range(3))
    sten.load(model, tmp_path / "m")
    want = masks(model)
    assert all(param.grad is None or param.grad.shape == param.shape for param in model.parameters())
    train(sten.attach(model, optimizer), optimizer, range(6))  # as a static pattern
    assert all(torch.equal(mask, want[name]) for name, mask in masks(model).items())


def test_the_file_is_smaller_and_plain(tmp_path):
    model = sten.sparsify(nn.Linear(256, 256), layout=CSR(), sparsity=0.9)
    sten.save(model, tmp_path / "sparse")
    sten.save(nn.Linear(256, 256), tmp_path / "dense")
    assert os.path.getsize(tmp_path / "sparse") < 0.25 * os.path.getsize(tmp_path / "dense")
    assert set(load_file(tmp_path / "sparse")) == {"bias", "weight.values", "weight.crow", "weight.col"}


# writers that die


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    """The process dies in the middle of writing: the old file is whole, and nothing else bears its name."""
    path = tmp_path / "m"
    model = sten.sparsify(mlp(), layout=sten.NM(2, 4))
    sten.save(model, path)
    code = f"""
import os, warnings
warnings.simplefilter("ignore")
import torch, safetensors.torch, sten
def die(tensors, name, metadata):
    open(name, "wb").write(b"half a file")
    os._exit(9)
safetensors.torch.save_file = die
sten.save(torch.nn.Linear(4, 4), {str(path)!r})
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=os.getcwd(), check=False).returncode == 9
    same_model(sten.load(mlp(), path), model)
    assert [f.name for f in tmp_path.iterdir() if f.suffix != ".part"] == ["m"]


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        sten.save(mlp(), tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_save_refuses_what_is_no_tensor(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            pass

    with pytest.raises(ValueError, match=r"got a dict for .*_extra_state"):
        sten.save(Extra(2, 2), tmp_path / "m")
    with pytest.raises(FileNotFoundError, match="Expected an existing folder"):
        sten.save(mlp(), tmp_path / "nowhere" / "m")


# files that lie


@pytest.fixture
def path(tmp_path):
    sten.save(sten.sparsify(mlp(), layout=CSR(), sparsity=0.7), tmp_path / "m")
    return tmp_path / "m"


def refused(model: nn.Module, path, match: str, error=ValueError) -> None:
    """One sentence, and the model is as it was."""
    before, types = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    params = [(n, id(p), type(p)) for n, p in model.named_parameters()]
    with pytest.raises(error, match=match) as caught:
        sten.load(model, path)
    text = str(caught.value)
    assert "\n" not in text and text.rstrip(")")[-1] == "."
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(before[k], after[k]) for k in before)
    assert types == [type(m) for m in model.modules()]
    assert params == [(n, id(p), type(p)) for n, p in model.named_parameters()]


def rewrite(path, change=lambda tensors, header: None, extra=lambda meta: None) -> None:
    """Change a file's tensors or header, and make its checksum right again: a liar, not an accident."""
    tensors = load_file(path)
    size = struct.unpack("<Q", path.read_bytes()[:8])[0]
    meta = json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]
    header = json.loads(meta["sten"])
    change(tensors, header)
    header["crc32"] = _checksum(tensors)
    meta["sten"] = json.dumps(header)
    extra(meta)
    save_file(tensors, path, metadata=meta)


def test_no_file(tmp_path):
    refused(mlp(), tmp_path / "m", "no file", FileNotFoundError)
    refused(mlp(), tmp_path, "no file", FileNotFoundError)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_truncated(path, keep):
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    refused(mlp(), path, "Expected a complete safetensors file")


def test_every_flipped_byte_is_noticed(path):
    data = path.read_bytes()
    for place in range(0, len(data), 37):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        model = mlp()
        want = state(model)
        with pytest.raises(ValueError):
            sten.load(model, path)
        expect_close(state(model), want, 0, 0)


def test_damaged_numbers(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))
    refused(mlp(), path, "checksum")


def test_foreign_file(tmp_path):
    save_file(mlp().state_dict(), tmp_path / "m")
    refused(mlp(), tmp_path / "m", "without 'sten' in its header")
    torch.save(mlp().state_dict(), tmp_path / "m")
    refused(mlp(), tmp_path / "m", "Expected a complete safetensors file")


@pytest.mark.parametrize("index", [-1, 12, 2**31 - 1])
def test_index_out_of_range(path, index):
    def change(tensors, header):
        tensors["0.weight.col"][3] = index

    rewrite(path, change)
    refused(mlp(), path, r"0\.weight: Expected numbers from 0 to 11 in part 'col' of CSR\(\)")


def test_corrupted_headers_and_tensors(path):
    good = path.read_bytes()

    def corrupted(match, change=lambda t, h: None, extra=lambda meta: None):
        path.write_bytes(good)
        rewrite(path, change, extra)
        refused(mlp(), path, match)

    about = lambda h: h["sparse"]["0.weight"]  # noqa: E731
    corrupted("got 'Evil'", lambda t, h: about(h).update(layout="Evil"))
    corrupted("Expected the fields", lambda t, h: about(h).update(fields={"x": 1}))
    corrupted("got 99", lambda t, h: h.update(version=99))
    corrupted("damaged", lambda t, h: h.pop("sparse"))
    corrupted("damaged", extra=lambda meta: meta.update(sten="{"))
    corrupted("damaged", extra=lambda meta: meta.update(sten="[]"))
    corrupted("Expected 'layout' in the file's description", lambda t, h: about(h).pop("layout"))
    corrupted("Expected shape", lambda t, h: about(h).update(shape=[21, 12]))
    corrupted(r"0\.weight", lambda t, h: about(h).update(shape="x"))
    corrupted(r"0\.weight", lambda t, h: about(h).update(shape=[-20, 12]))
    corrupted(r"0\.weight", lambda t, h: about(h).update(shape=[2**60, 2**60]))
    corrupted("Expected the parts", lambda t, h: t.pop("0.weight.crow"))
    corrupted("Expected the parts", lambda t, h: t.update({"0.weight.more": torch.ones(1)}))
    corrupted("int32", lambda t, h: t.update({"0.weight.col": t["0.weight.col"].long()}))
    corrupted("to start at 0", lambda t, h: t["0.weight.crow"].__setitem__(0, 5))
    corrupted("got none for", lambda t, h: t.pop("2.bias"))
    corrupted("too many", lambda t, h: t.update({"3.bias": torch.ones(1)}))
    corrupted(r"Expected shape \(8,\) for 2\.bias, got \(3,\)", lambda t, h: t.update({"2.bias": torch.ones(3)}))
    corrupted("got torch.int64", lambda t, h: t.update({"2.bias": torch.ones(8, dtype=torch.int64)}))
    corrupted("ties", lambda t, h: h.update(ties={"a": "b"}))


def test_another_architecture(path):
    refused(nn.Linear(3, 3), path, "Expected the model's names")
    refused(nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 9)), path, r"Expected shape .* for 2\.\w+")
    with torch.device("meta"):
        model = mlp()
    with pytest.raises(ValueError, match="on meta"):
        sten.load(model, path)


def test_checksum_is_zlib():
    """The format is documented: anybody can check it."""
    assert _checksum({"b": torch.tensor([2.0]), "a": torch.tensor([1], dtype=torch.uint8)}) == zlib.crc32(
        bytes([1]) + struct.pack("<f", 2.0)
    )
