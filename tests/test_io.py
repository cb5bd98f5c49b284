"""sten.save and sten.load: round trips, and files that are not what they should be."""

from __future__ import annotations

import copy
import json
import os
import struct
import zlib
from pathlib import Path

import pytest
import torch
from masked import expect_close, masks, sparse_weights, state
from safetensors.torch import load_file, save_file
from small import batch, every_layout, mlp, rate, train
from torch import nn

import sten
from sten import tensor_file
from sten.backends import cpp
from sten.io import checksum_of_version_1
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


def refused(model: nn.Module, path, match: str, error=sten.FormatError) -> None:
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
    """Change a file's tensors or header, and make its checksums right again: a liar, not an accident."""
    tensors = load_file(path)
    size = struct.unpack("<Q", path.read_bytes()[:8])[0]
    meta = json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]
    header = json.loads(meta["sten"])
    change(tensors, header)
    meta["sten"] = json.dumps(header)
    extra(meta)
    tensor_file.write(path, tensors, meta)


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
    corrupted("Expected 'transposed' in the file's", lambda t, h: about(h).update(transposed=1))
    corrupted("Expected numbers or text in the fields", lambda t, h: about(h).update(fields={"x": {}}))
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


def test_checksums_are_zlibs(tmp_path):
    """The format is documented: anybody can check it."""
    tensors = {"b": torch.tensor([2.0]), "a": torch.tensor([1], dtype=torch.uint8)}
    assert checksum_of_version_1(tensors) == zlib.crc32(bytes([1]) + struct.pack("<f", 2.0))
    tensor_file.write(tmp_path / "m", tensors, {})
    data = (tmp_path / "m").read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    crc32 = json.loads(data[8 : 8 + size])["__metadata__"]["crc32"]
    assert crc32 == f"{zlib.crc32(data[8 + size :]):08x}"


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 127, 128, 192, 1000, 2**20 + 3])
def test_the_compiled_checksum_is_zlibs(size):
    data, before = os.urandom(size + 7), zlib.crc32(b"before")
    for start in (0, 1, 7):
        piece = memoryview(data)[start : start + size]
        assert cpp.crc32()(piece, before) == zlib.crc32(piece, before)
        assert cpp.crc32()(piece, 0) == zlib.crc32(piece)


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_every_version_loads(version):
    """tests/files/model-<version>.safetensors is what each version of the format wrote."""
    path = Path(__file__).parent / "files" / f"model-{version}.safetensors"
    model = sten.load(every_layout_model(), path)
    about = sten.inspect(path)
    assert about["version"] == version and set(about["sparse"]) == {f"{i}.weight" for i in (0, 1, 2, 5, 6, 7)}
    assert {type(w.sparse_layout).__name__ for w in sparse_weights(model).values()} == {
        "CSR", "NM", "FanIn", "BSR", "VectorNM", "GroupedNM",
    }  # fmt: skip
    assert model[3].weight is model[2].weight
    sites = ["input of 6: TopK(k=4), FanIn()", "output of 7: JumpReLU(threshold=0.5, bandwidth=0.1), dense with zeros"]
    assert [str(site) for site in sten.summary(model).sites] == (sites if version == 4 else [])
    dense = every_layout_model()
    for name, w in sparse_weights(model).items():
        assert torch.equal(w.to_dense(), dense.get_parameter(name) * w.mask()), name


def every_layout_model() -> nn.Module:
    torch.manual_seed(0)
    linear = nn.Linear(12, 20), nn.Conv2d(8, 6, 3), nn.Linear(20, 8, bias=False), nn.Embedding(8, 20)
    model = nn.Sequential(*linear, nn.BatchNorm1d(4), nn.Linear(24, 12), nn.Linear(12, 16), nn.Linear(16, 12))
    model[3].weight = model[2].weight
    return model


# without a copy


@pytest.mark.parametrize("mmap", [False, True])
@every_layout
def test_assign_loads_a_model_without_memory(layout, mmap, tmp_path):
    source = nn.Sequential(sten.sparsify(mlp(), layout=layout, sparsity=rate(layout)), nn.BatchNorm1d(8), Tied())
    sten.save(source, tmp_path / "m")
    with torch.device("meta"):
        into = nn.Sequential(mlp(), nn.BatchNorm1d(8), Tied())
    assert sten.load(into, tmp_path / "m", assign=True, mmap=mmap) is into
    same_model(into, source)
    assert into[2].head.weight is into[2].embed.weight
    x = batch(0)
    torch.testing.assert_close(into[:2](x), source[:2](x))
    optimizer = torch.optim.SGD(into[:2].parameters(), 0.1)
    data = (tmp_path / "m").read_bytes()
    train(sten.attach(into[:2], optimizer), optimizer, range(2), None)
    assert (tmp_path / "m").read_bytes() == data  # pages are copied when they are written


def test_buffers_that_no_file_holds_are_not_left_on_meta(tmp_path):
    class Table(nn.Linear):
        def __init__(self):
            super().__init__(8, 4)
            self.register_buffer("table", torch.ones(3), persistent=False)

    sten.save(sten.sparsify(Table(), sten.NM(2, 4)), tmp_path / "m")
    with torch.device("meta"):
        model = Table()
    with pytest.raises(sten.FormatError, match="got table, which is not persistent, on meta"):
        sten.load(model, tmp_path / "m", assign=True)
    assert all(p.is_meta for p in model.parameters())


# inspect


def test_inspect_needs_no_layout(path):
    about = sten.inspect(path)
    assert about["sparse"]["0.weight"]["layout"] == "CSR" and about["sparse"]["0.weight"]["shape"] == [20, 12]
    assert about["sparse"]["0.weight"]["density"] == pytest.approx(0.3)
    assert about["tensors"]["2.bias"] == {"dtype": "float32", "shape": [8], "bytes": 32}
    rewrite(path, lambda t, h: h["sparse"]["0.weight"].update(layout="OfAStranger"))
    assert sten.inspect(path)["sparse"]["0.weight"]["layout"] == "OfAStranger"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(sten.FormatError, match="Expected a complete safetensors file"):
        sten.inspect(path)
    with pytest.raises(FileNotFoundError):
        sten.inspect(path.parent)


def test_the_reader_of_the_docs(path):
    """docs/formats.md has a reader without sten and torch."""
    page = (Path(__file__).parent.parent / "docs" / "formats.md").read_text()
    space: dict = {}
    exec(next(code for code in page.split("```python\n")[1:] if "def read(" in code).split("```")[0], space)
    weights, tensors = space["read"](path)
    assert weights["0.weight"]["layout"] == "CSR" and weights["0.weight"]["shape"] == [20, 12]
    want = load_file(path)
    for name, array in {**tensors, "0.weight.col": weights["0.weight"]["col"]}.items():
        assert torch.equal(torch.from_numpy(array.copy()), want[name])
