"""Weights from and to torch.sparse, SciPy, compressed-tensors and masks in .npz: exact, or one sentence."""

import copy
import random
import zipfile

import fuzzing
import numpy as np
import pytest
import torch
from small import every_layout, mlp, rate
from torch import nn
from weights import make, one_sentence

import sten
from sten.layouts import BSR, CSR, NM

CT = "compressed_tensors.compressors.sparse_compressors"
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
TORCH = {
    "coo": (lambda t: t.to_sparse(), CSR()),
    "csr": (lambda t: t.to_sparse_csr(), CSR()),
    "csc": (lambda t: t.to_sparse_csc(), CSR()),
    "bsr": (lambda t: t.to_sparse_bsr((2, 4)), BSR((2, 4))),
    "bsc": (lambda t: t.to_sparse_bsc((2, 4)), BSR((4, 2))),
}


def pruned(shape=(6, 12), dtype=torch.float32):
    return (torch.randn(shape) * (torch.rand(shape) < 0.4)).to(dtype)


def refused(call, match="Expected", kind=sten.FormatError):
    with pytest.raises(kind, match=match) as error:
        call()
    assert one_sentence(error), str(error.value)


# torch.sparse


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TORCH)
def test_from_torch(name, dtype):
    make_sparse, layout = TORCH[name]
    dense = pruned(dtype=dtype)
    theirs = make_sparse(dense)
    w = sten.from_torch(theirs)
    assert w.sparse_layout == layout and w.transposed == (name in ("csc", "bsc")) and w.dtype == dtype
    assert torch.equal(w.to_dense(), dense) and not w.requires_grad
    x = torch.randn(3, 12, dtype=dtype)
    torch.testing.assert_close(nn.functional.linear(x, w), x @ dense.t(), rtol=5e-2, atol=5e-2)
    values = theirs._values() if name == "coo" else theirs.values()
    values.zero_()  # memory of its own
    assert torch.equal(w.to_dense(), dense)
    with pytest.raises(TypeError, match=r"sten\.from_torch") as error:
        sten.from_dense(theirs, CSR())
    assert one_sentence(error)


def test_from_torch_adds_repeated_entries_and_takes_convolutions():
    index = torch.tensor([[1, 0, 1], [2, 0, 2]])
    w = sten.from_torch(torch.sparse_coo_tensor(index, torch.tensor([1.0, 2.0, 3.0]), (2, 3)))
    assert w.to_dense().tolist() == [[2.0, 0.0, 0.0], [0.0, 0.0, 4.0]]
    dense = pruned((6, 4, 3, 3))
    w = sten.from_torch(dense.to_sparse())
    assert torch.equal(w.to_dense(), dense)
    assert torch.equal(sten.to_torch(w).to_dense(), dense) and sten.to_torch(w).layout == torch.sparse_coo
    refused(lambda: sten.to_torch(w, torch.sparse_csr), kind=ValueError)
    empty = torch.zeros(3, 4)
    assert sten.from_torch(empty.to_sparse()).density == sten.from_torch(empty.to_sparse_csr()).density == 0


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta")
@pytest.mark.parametrize("transposed", [False, True])
@every_layout
def test_to_torch(layout, transposed):
    w, dense = make(layout, (8, 12))
    w, dense = (w.t(), dense.t()) if transposed else (w, dense)
    for target in (None, torch.sparse_coo, torch.sparse_csr):
        with torch.sparse.check_sparse_tensor_invariants():
            theirs = sten.to_torch(w, target)
        assert torch.equal(theirs.to_dense(), dense) and not theirs.requires_grad
        again = sten.from_torch(theirs)
        assert torch.equal(again.to_dense(), dense) and torch.equal(again.mask(), w.mask())
    assert (sten.to_torch(w).layout in (torch.sparse_bsr, torch.sparse_bsc)) == (layout == BSR((4, 4)))
    if layout != BSR((4, 4)):
        refused(lambda: sten.to_torch(w, torch.sparse_bsr), "sparse_csr", ValueError)


def test_to_torch_of_what_torch_has_not():
    ragged = make(BSR((4, 4)), (7, 10))[0]
    refused(lambda: sten.to_torch(ragged), "divide its shape", ValueError)
    assert torch.equal(sten.to_torch(ragged, torch.sparse_csr).to_dense(), ragged.to_dense())
    refused(lambda: sten.to_torch(torch.ones(2, 2)), kind=TypeError)
    free = sten.SparseTensor(CSR(), CSR().with_slots(make(CSR(), (4, 6))[0].parts, 20), (4, 6))
    assert torch.equal(sten.to_torch(free).to_dense(), free.to_dense())


def unchecked(make_sparse, *args):
    return make_sparse(*args, check_invariants=False)


HOSTILE = {
    "col": lambda: unchecked(torch.sparse_csr_tensor, [0, 1, 2], [0, 9], [1.0, 2.0], (2, 3)),
    "col of 2**32": lambda: unchecked(
        torch.sparse_csr_tensor, torch.tensor([0, 1, 2]), torch.tensor([0, 2**32]), torch.ones(2), (2, 3)
    ),
    "negative col": lambda: unchecked(torch.sparse_csr_tensor, [0, 1, 2], [0, -1], [1.0, 2.0], (2, 3)),
    "crow falls": lambda: unchecked(torch.sparse_csr_tensor, [0, 2, 1, 2], [0, 1], [1.0, 2.0], (3, 3)),
    "crow beyond": lambda: unchecked(torch.sparse_csr_tensor, [0, 1, 99], [0, 1], [1.0, 2.0], (2, 3)),
    "order": lambda: unchecked(torch.sparse_csr_tensor, [0, 2, 2], [1, 0], [1.0, 2.0], (2, 3)),
    "coo": lambda: unchecked(torch.sparse_coo_tensor, torch.tensor([[0, 7], [0, 1]]), torch.ones(2), (2, 3)),
    "hybrid": lambda: torch.sparse_coo_tensor(torch.tensor([[0, 1]]), torch.ones(2, 3), (2, 3)),
    "batch": lambda: torch.ones(2, 3, 4).to_sparse_csr(),
    "whole numbers": lambda: torch.ones(2, 3, dtype=torch.int64).to_sparse_csr(),
    "blocks": lambda: unchecked(torch.sparse_bsr_tensor, [0, 1, 2], [0, 5], torch.ones(2, 2, 2), (4, 4)),
}


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta")
@pytest.mark.parametrize("name", HOSTILE)
def test_from_torch_checks(name):
    refused(lambda: sten.from_torch(HOSTILE[name]()))


def test_from_torch_refuses_what_is_not_of_torch_sparse():
    for thing in (torch.ones(2, 2), np.ones((2, 2)), make(CSR(), (4, 6))[0], mlp()):
        refused(lambda thing=thing: sten.from_torch(thing), kind=TypeError)


def test_a_module_of_csr_parameters():
    dense = [pruned((20, 12)), pruned((8, 20))]
    model, twin = mlp(), mlp()
    for i, w in zip((0, 2), dense, strict=True):
        twin[i].weight.data = w
        model[i].weight = nn.Parameter(w.to_sparse_csr(), requires_grad=i == 0)
    refused(lambda: sten.sparsify(model, CSR(), sparsity=0.5), r"sten\.from_torch\(model\)", TypeError)
    assert sten.from_torch(model) is model
    assert [model[i].weight.requires_grad for i in (0, 2)] == [True, False]
    x = torch.randn(3, 12)
    torch.testing.assert_close(model(x), twin(x))
    again = copy.deepcopy(model)
    again.load_state_dict(model.state_dict())
    model(x).sum().backward()
    twin(x).sum().backward()
    torch.testing.assert_close(model[0].weight.grad.to_dense(), twin[0].weight.grad * (dense[0] != 0))


def test_a_module_with_a_hostile_parameter_is_left_alone():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2))
    first = model[0].weight = nn.Parameter(torch.eye(2, 3).to_sparse_csr())
    model[1].weight = nn.Parameter(HOSTILE["col"]())
    refused(lambda: sten.from_torch(model))
    assert model[0].weight is first


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch packs semi-structured tensors on a GPU")
def test_semi_structured():
    dense = torch.randn(64, 64, dtype=torch.float16, device="cuda")
    dense = dense * NM(2, 4).mask(dense.abs())
    theirs = torch.sparse.to_sparse_semi_structured(dense)
    assert torch.equal(sten.from_torch(theirs).to_dense(), dense)
    refused(lambda: sten.from_dense(theirs, NM(2, 4)), r"sten\.from_torch", TypeError)


# SciPy


@pytest.mark.parametrize("form", ["csr", "csc", "bsr", "coo", "lil", "dok", "dia"])
@pytest.mark.parametrize("kind", ["array", "matrix"])
def test_from_scipy(form, kind):
    scipy = pytest.importorskip("scipy.sparse")
    dense = pruned().numpy()
    theirs = getattr(scipy, f"{form}_{kind}")(dense)
    w = sten.from_scipy(theirs)
    assert (type(w.sparse_layout) is BSR) == (form == "bsr") and np.array_equal(w.to_dense().numpy(), dense)
    with pytest.raises(TypeError, match=r"sten\.from_scipy"):
        sten.from_dense(theirs, CSR())


def test_from_scipy_sorts_and_adds():
    scipy = pytest.importorskip("scipy.sparse")
    theirs = scipy.csr_array((np.array([1.0, 2.0, 3.0]), np.array([2, 0, 2]), np.array([0, 3])), shape=(1, 3))
    assert sten.from_scipy(theirs).to_dense().tolist() == [[2.0, 0.0, 4.0]]
    assert theirs.indices.tolist() == [2, 0, 2]  # as it was
    theirs.indices[1] = 99
    refused(lambda: sten.from_scipy(theirs))
    theirs = scipy.coo_array(np.eye(3))
    theirs.row[0] = 77
    refused(lambda: sten.from_scipy(theirs))
    refused(lambda: sten.from_scipy(scipy.csr_array(np.eye(3, dtype=complex))))
    refused(lambda: sten.from_scipy(np.eye(3)), kind=TypeError)


@pytest.mark.parametrize("transposed", [False, True])
@every_layout
def test_to_scipy(layout, transposed):
    pytest.importorskip("scipy.sparse")
    for shape in ((8, 12), (7, 10)):
        w, dense = make(layout, shape)
        w, dense = (w.t(), dense.t()) if transposed else (w, dense)
        theirs = sten.to_scipy(w)
        theirs = theirs.tocsr() if transposed else theirs
        assert np.array_equal(theirs.toarray(), dense.numpy())
        assert torch.equal(sten.from_scipy(theirs).to_dense(), dense)
    refused(lambda: sten.to_scipy(w.to(torch.bfloat16)), kind=ValueError)


# compressed-tensors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(6, 12), (5, 9), (3, 8), (4, 20)])
def test_bitmasks(shape, dtype):
    dense = pruned(shape, dtype)
    state = sten.to_compressed_tensors({"a.weight": sten.from_dense(dense, CSR()), "a.bias": torch.ones(3)})
    assert torch.equal(state["a.shape"], torch.tensor(shape)) and torch.equal(state["a.compressed"], dense[dense != 0])
    bits = np.packbits((dense != 0).numpy(), axis=-1, bitorder="little")
    assert np.array_equal(state["a.bitmask"].numpy(), bits)
    again = sten.from_compressed_tensors(state)
    assert set(again) == {"a.weight", "a.bias"} and torch.equal(again["a.weight"].to_dense(), dense)
    older = {key.replace("a.", "a.weight.") if "bias" not in key else key: t for key, t in state.items()}
    assert torch.equal(sten.from_compressed_tensors(older)["a.weight"].to_dense(), dense)


@every_layout
def test_bitmasks_of_every_layout(layout):
    model = sten.sparsify(mlp(), layout, sparsity=rate(layout))
    again = sten.from_compressed_tensors(sten.to_compressed_tensors(model.state_dict()))
    for name in ("0.weight", "2.weight"):
        want = model.get_parameter(name).detach()
        assert torch.equal(again[name].to_dense(), want.to_dense()) and torch.equal(again[name].mask(), want.mask())


def test_bitmasks_against_the_package():
    unstructured = pytest.importorskip(f"{CT}.sparse_bitmask").BitmaskTensor
    two_four = pytest.importorskip(f"{CT}.sparse_24_bitmask").Sparse24BitMaskTensor
    for dtype in (torch.float32, torch.bfloat16):
        dense = torch.randn(6, 12).to(dtype)
        for theirs, layout, format in (
            (unstructured, CSR(), "sparse-bitmask"),
            (two_four, NM(2, 4), "sparse-24-bitmask"),
        ):
            want = dense * layout.mask(dense.abs(), 0.6 if layout.rate is None else None)
            state = theirs.from_dense(want).dict("fc")
            w = sten.from_compressed_tensors(state)["fc.weight"]
            assert w.sparse_layout == layout and torch.equal(w.to_dense(), want)
            ours = sten.to_compressed_tensors({"fc.weight": w}, format)
            assert ours.keys() == state.keys()
            assert all(torch.equal(ours[key], state[key]) and ours[key].dtype == state[key].dtype for key in state)


CHANGES = {
    "no bitmask": lambda s: s.pop("fc.bitmask"),
    "bits": lambda s: s["fc.bitmask"].fill_(255),
    "spare bits": lambda s: s["fc.bitmask"][0].fill_(128 + 64 + 32 + 16),
    "size": lambda s: s["fc.shape"].fill_(2**40),
    "negative": lambda s: s["fc.shape"].fill_(-1),
    "floats": lambda s: s.update({"fc.shape": torch.tensor([6.0, 12.0])}),
    "fewer": lambda s: s.update({"fc.compressed": s["fc.compressed"][:-1]}),
    "whole numbers": lambda s: s.update({"fc.compressed": s["fc.compressed"].int()}),
    "dtype": lambda s: s.update({"fc.bitmask": s["fc.bitmask"].int()}),
    "both": lambda s: s.update({"fc.weight": torch.ones(6, 12)}),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("layout", [CSR(), NM(2, 4)], ids=str)
def test_bitmasks_are_checked(name, layout):
    w = make(layout, (6, 12))[0]
    state = sten.to_compressed_tensors({"fc.weight": w}, "sparse-24-bitmask" if layout.rate else "sparse-bitmask")
    CHANGES[name](state)
    refused(lambda: sten.from_compressed_tensors(state))


def test_what_bitmasks_cannot_hold():
    w = make(CSR(), (6, 12))[0]
    offsets = sten.to_compressed_tensors({"fc.weight": w})
    offsets["fc.row_offsets"][1] += 1
    refused(lambda: sten.from_compressed_tensors(offsets), "row_offsets")
    refused(lambda: sten.to_compressed_tensors({"fc.weight": w}, "sparse-24-bitmask"), "use sparse-bitmask", ValueError)
    refused(lambda: sten.to_compressed_tensors({"fc.weight": w}, "dense"), kind=ValueError)
    conv = make(CSR(), (4, 3, 3, 3))[0]
    refused(lambda: sten.to_compressed_tensors({"conv.weight": conv}), "a matrix", ValueError)


# masks


@pytest.mark.parametrize("form", ["finalized", "trainable"])
@every_layout
def test_masks(layout, form, tmp_path):
    model = sten.sparsify(mlp(), layout, sparsity=rate(layout))
    want = {f"{i}.weight": model[i].weight.mask() for i in (0, 2)}
    sten.save_masks(sten.trainable(model) if form == "trainable" else model, tmp_path / "masks.npz")
    masks = sten.load_masks(mlp(), tmp_path / "masks.npz")
    assert masks.keys() == want.keys() and all(torch.equal(masks[name], want[name]) for name in want)
    other = mlp()
    with torch.no_grad():
        for name, mask in masks.items():
            other.get_parameter(name).mul_(mask)
    sten.sparsify(other, layout, sparsifier=None)
    assert torch.equal(other[0].weight.mask(), want["0.weight"])


def test_masks_of_others(tmp_path):
    """Boolean, 0 and 1, packed; named with and without .mask."""
    mask, path = np.random.default_rng(0).random((20, 12)) < 0.5, tmp_path / "m.npz"
    for array in (mask, mask.astype(np.uint8), mask.astype(np.float32), np.packbits(mask)):
        for name in ("0.weight", "0.weight.mask"):
            np.savez(path, **{name: array})
            assert np.array_equal(sten.load_masks(mlp(), path)["0.weight"].numpy(), mask)


def test_masks_are_checked(tmp_path):
    mask, path = np.ones((20, 12), bool), tmp_path / "m.npz"
    for arrays in (
        {"9.weight": mask},
        {"0.weight": mask[:3]},
        {"0.weight": 2 * mask.astype(int)},
        {"0.weight": mask, "0.weight.mask": mask},
        {"0.weight": np.array([None], dtype=object)},
        {"0.weight": np.zeros(2**22)},
    ):
        np.savez_compressed(path, **arrays)
        refused(lambda: sten.load_masks(mlp(), path))
    path.write_bytes(b"no zip")
    refused(lambda: sten.load_masks(mlp(), path))
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("0.weight.npy", b"\x93NUMPY\x01\x00\xff\xff{'descr'")
    refused(lambda: sten.load_masks(mlp(), path))
    with pytest.raises(FileNotFoundError):
        sten.load_masks(mlp(), tmp_path / "none")


# fuzzing


def mutated_bitmasks(r):
    layout = r.choice([CSR(), NM(2, 4)])
    state = sten.to_compressed_tensors(
        {"fc.weight": make(layout, (6, 12), seed=r.randrange(9))[0], "fc.bias": torch.ones(3)},
        "sparse-24-bitmask" if layout.rate and r.random() < 0.7 else "sparse-bitmask",
    )
    for _ in range(r.randrange(1, 3)):
        state = fuzzing.mutated(r, state)
    return lambda: sten.from_compressed_tensors(state).values()


def mutated_torch(r):
    dense = torch.randn(6, 12) * (torch.rand(6, 12) < 0.4)
    if r.random() < 0.3:
        t = dense.to_sparse()
        args, make_sparse = [t._indices(), t._values(), [6, 12]], torch.sparse_coo_tensor
    elif r.random() < 0.5:
        t, make_sparse = dense.to_sparse_csr(), torch.sparse_csr_tensor
        args = [t.crow_indices(), t.col_indices(), t.values(), [6, 12]]
    else:
        t, make_sparse = dense.to_sparse_bsr((2, 4)), torch.sparse_bsr_tensor
        args = [t.crow_indices(), t.col_indices(), t.values(), [6, 12]]
    for _ in range(r.randrange(1, 3)):
        args = fuzzing.mutated(r, args)
    try:
        tensor = make_sparse(*args, check_invariants=False)
        read = ["_indices", "_values"] if tensor.is_sparse else ["crow_indices", "col_indices", "values"]
        assert all(getattr(tensor, name)().layout == torch.strided for name in read)
        assert tensor.numel() < 10**6  # a row costs an offset, whatever it holds
    except (RuntimeError, TypeError, IndexError, ValueError, AssertionError):
        return list  # torch makes no such tensor, or cannot read it
    return lambda: [sten.from_torch(tensor)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mutate", [mutated_bitmasks, mutated_torch])
def test_mutations(mutate, one_thread):
    refusals = works = 0
    for number in range(600):
        r = random.Random(number)
        torch.manual_seed(number)
        convert = mutate(r)
        try:
            weights = [w for w in convert() if isinstance(w, sten.SparseTensor)]
        except sten.FormatError:
            refusals += 1
            continue
        for w in weights:
            w.sparse_layout.validate(w.parts, w.stored_shape)
            if w.dim() == 2 and w.numel() < 10**6:
                nn.functional.linear(torch.ones(3, w.shape[1], dtype=w.dtype), w)
            works += 1
    assert refusals > 200 and works > 20
