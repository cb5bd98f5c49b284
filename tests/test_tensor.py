"""SparseTensor as a tensor: attributes, copies, files, state_dicts."""

import copy
import io
import pickle
import re

import pytest
import torch
from torch import nn
from weights import every_layout, make, one_sentence, stored

import sten
from sten.conversion.state_dict_hooks import accept_every_form
from sten.layouts import CSR, NM

SHAPES = [(8, 12), (7, 5), (5, 3, 3, 2)]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@every_layout
@every_shape
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_true_attributes(layout, shape, dtype):
    w, dense = make(layout, shape, dtype)
    assert (w.shape, w.dtype, w.device, w.stride()) == (dense.shape, dtype, dense.device, dense.stride())
    assert torch.equal(w.to_dense(), dense)
    assert torch.equal(w.to_dense() != 0, w.mask() & (dense != 0))
    assert w.density == pytest.approx(float(w.mask().float().mean()))
    assert w.stored_bytes == sum(p.nbytes for p in w.parts.values())
    text = repr(w)
    assert str(layout) in text and str(tuple(shape)) in text and str(dtype)[6:] in text
    assert repr(nn.Parameter(w)).startswith("Parameter(SparseTensor)(")
    assert "\n" not in text


@every_layout
@every_shape
def test_copies(layout, shape):
    w, dense = make(layout, shape)
    for change in (torch.Tensor.double, torch.Tensor.bfloat16, torch.Tensor.half, lambda t: t.to(torch.float64)):
        got = change(w)
        assert isinstance(got, sten.SparseTensor) and got.dtype == change(dense).dtype
        assert torch.equal(got.to_dense(), change(dense))
        stored(got)
    for twin in (w.clone(), copy.deepcopy(w), pickle.loads(pickle.dumps(w)), w.to("cpu", copy=True)):
        assert isinstance(twin, sten.SparseTensor) and twin.sparse_layout == layout and twin.same_pattern(w)
        twin.mul_(2)
        assert torch.equal(w.to_dense(), dense) and torch.equal(twin.to_dense(), 2 * dense)
    alias = w.detach()
    alias.mul_(2)
    assert torch.equal(w.to_dense(), 2 * dense)
    assert w.to(torch.float32) is w and w.int().dtype == torch.int32


@every_layout
def test_twins(layout, poisoned):
    """zeros_like and clone keep the pattern; whatever may hold other numbers than zero off it is dense."""
    w, dense = make(layout)
    zeros = torch.zeros_like(w)
    assert zeros.same_pattern(w) and not zeros.to_dense().any()
    stored(zeros)
    for make_twin in (
        torch.ones_like, lambda t: torch.full_like(t, 3.0), lambda t: t.new_ones(t.shape), lambda t: t.new_zeros(2, 3),
        lambda t: t.new_full((2, 3), 2.0), lambda t: torch.ones_like(t, dtype=torch.float64),
    ):  # fmt: skip
        close = make_twin(w)
        assert type(close) is torch.Tensor and torch.equal(close, make_twin(dense)) and close.is_contiguous()
        assert close.dtype == make_twin(dense).dtype
    for twin in (torch.empty_like(w), torch.randn_like(w), torch.rand_like(w), w.new_empty(w.shape)):
        assert type(twin) is torch.Tensor and twin.shape == w.shape and twin.dtype == w.dtype


@every_layout
@every_shape
@pytest.mark.parametrize("parameter", [False, True])
def test_files(layout, shape, parameter):
    w, dense = make(layout, shape)
    w = nn.Parameter(w) if parameter else w
    buffer = io.BytesIO()
    torch.save({"w": w, "n": 1}, buffer)
    buffer.seek(0)
    got = torch.load(buffer, weights_only=True)["w"]
    assert isinstance(got, nn.Parameter) == parameter and got.requires_grad == parameter
    assert torch.equal(got.to_dense(), dense) and got.sparse_layout == layout and got.same_pattern(w)


def corrupt(w):
    """Each pattern part in turn, with one entry out of range."""
    for name in w.sparse_layout.pattern:
        part = w.parts[name]
        if part.dtype != torch.bool:
            bad = part.clone()
            bad.view(-1)[-1] = torch.iinfo(part.dtype).max
            yield name, sten.SparseTensor(w.sparse_layout, {**w.parts, name: bad}, w.stored_shape)
        yield name, sten.SparseTensor(w.sparse_layout, {**w.parts, name: part[:-1].clone()}, w.stored_shape)


@every_layout
def test_a_corrupted_file_raises(layout):
    w, _ = make(layout, (8, 12))
    for _, bad in corrupt(w):
        buffer = io.BytesIO()
        torch.save(bad, buffer)
        buffer.seek(0)
        with pytest.raises(ValueError) as error:
            torch.load(buffer, weights_only=True)
        assert one_sentence(error)
        with pytest.raises(ValueError):
            pickle.loads(pickle.dumps(bad))


@every_layout
def test_a_corrupted_state_dict_raises(layout):
    w, _ = make(layout, (8, 12))
    model = nn.Linear(12, 8)
    model.weight = nn.Parameter(make(layout, (8, 12), seed=1)[0])
    before = model.weight.to_dense()
    for _, bad in corrupt(w):
        with pytest.raises((ValueError, RuntimeError), match=re.escape(str(layout))):
            model.load_state_dict({"weight": bad, "bias": model.bias})
        assert torch.equal(model.weight.to_dense(), before)


@every_layout
@pytest.mark.parametrize("seed", [0, 1], ids=["same pattern", "other pattern"])
def test_load_state_dict_takes_the_pattern(layout, seed):
    w, dense = make(layout, (8, 12))
    model, source = nn.Linear(12, 8), nn.Linear(12, 8)
    model.weight = nn.Parameter(make(layout, (8, 12), seed=seed)[0])
    source.weight = nn.Parameter(w)
    parameter = model.weight
    model.load_state_dict(source.state_dict())
    assert model.weight is parameter and parameter.requires_grad
    assert torch.equal(parameter.to_dense(), dense) and parameter.same_pattern(w)
    source.weight.data.mul_(2)
    assert torch.equal(parameter.to_dense(), dense)
    x = torch.randn(3, 12)
    assert torch.allclose(model(x), nn.functional.linear(x, dense, model.bias), atol=1e-6)


def test_load_state_dict_between_layouts_keeps_the_layout():
    w, dense = make(NM(2, 4), (8, 12))
    model = nn.Linear(12, 8)
    model.weight = nn.Parameter(make(CSR(), (8, 12), torch.float64, seed=1)[0])
    model.load_state_dict({"weight": w, "bias": model.bias})
    assert model.weight.sparse_layout == CSR() and model.weight.dtype == torch.float64
    assert torch.equal(model.weight.to_dense(), dense.double())
    model.weight = nn.Parameter(make(NM(1, 4), (8, 12), seed=1)[0])
    with pytest.raises(RuntimeError, match="at most 1 of 4"):
        model.load_state_dict({"weight": w, "bias": model.bias})


@every_layout
def test_dense_state_dicts(layout):
    w, dense = make(layout, (8, 12))
    model, plain = nn.Linear(12, 8), nn.Linear(12, 8)
    model.weight = nn.Parameter(w)
    plain.load_state_dict(model.state_dict())
    assert type(plain.weight) is nn.Parameter and torch.equal(plain.weight, dense)
    plain.weight.data.mul_(3)
    model.load_state_dict(plain.state_dict())
    assert isinstance(model.weight, sten.SparseTensor) and torch.equal(model.weight.to_dense(), 3 * dense)
    with pytest.raises(RuntimeError, match="off the pattern"):
        model.load_state_dict(nn.Linear(12, 8).state_dict())
    assert torch.equal(model.weight.to_dense(), 3 * dense)


@every_layout
def test_assign_keeps_a_sparse_weight_sparse(layout):
    w, dense = make(layout, (8, 12))
    model = nn.Sequential(nn.Linear(12, 8))
    model[0].weight = nn.Parameter(w)
    accept_every_form(model[0])
    model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    state = {"0.weight": 2 * dense, "0.bias": torch.zeros(8)}
    model.load_state_dict(state, assign=True)
    assert isinstance(model[0].weight, sten.SparseTensor) and isinstance(model[0].weight, nn.Parameter)
    assert torch.equal(model[0].weight.to_dense(), 2 * dense) and torch.equal(state["0.weight"], 2 * dense)
    other, its = make(layout, (8, 12), seed=1)
    model.load_state_dict({"0.weight": other, "0.bias": torch.zeros(8)}, assign=True)
    assert torch.equal(model[0].weight.to_dense(), its)
    with pytest.raises((RuntimeError, ValueError), match="off the pattern"):
        model.load_state_dict({"0.weight": torch.randn(8, 12), "0.bias": torch.zeros(8)}, assign=True)
    assert torch.equal(model[0].weight.to_dense(), its)


@every_layout
def test_copy_of_another_pattern_into_an_alias_raises(layout):
    w, dense = make(layout, (8, 12))
    other, _ = make(layout, (8, 12), seed=1)
    with pytest.raises(ValueError, match="pattern") as error:
        w.detach().copy_(other)
    assert one_sentence(error) and torch.equal(w.to_dense(), dense)
    w.detach().copy_(w * 2)
    assert torch.equal(w.to_dense(), 2 * dense)
    plain = torch.zeros(8, 12)
    plain.copy_(other)
    assert torch.equal(plain, other.to_dense())


@every_layout
def test_data(layout):
    w = nn.Parameter(make(layout, (8, 12))[0])
    other, its = make(layout, (8, 12), seed=1)
    assert isinstance(w.data, sten.SparseTensor) and not w.data.requires_grad
    w.data = other
    assert torch.equal(w.to_dense(), its) and w.requires_grad
    w.data = 2 * its
    assert isinstance(w, sten.SparseTensor) and torch.equal(w.to_dense(), 2 * its)
    with pytest.raises(ValueError, match="off the pattern"):
        w.data = torch.randn(8, 12)
    for wrong in (other.double(), make(layout, (8, 6))[0], torch.zeros(3)):
        with pytest.raises(TypeError) as error:
            w.data = wrong
        assert one_sentence(error)


@every_layout
def test_storage(layout):
    w, dense = make(layout)
    for ask in ("data_ptr", "numpy", "tolist", "storage"):
        with pytest.raises(TypeError) as error:
            getattr(w, ask)()
        assert one_sentence(error)
    assert not w.is_shared()
    assert w.share_memory_() is w and w.is_shared() and all(p.is_shared() for p in w.parts.values())
    assert torch.equal(w.to_dense(), dense)
    nn.Linear(5, 7).share_memory()
    model = nn.Linear(5, 7)
    model.weight = nn.Parameter(w.clone())
    assert model.share_memory().weight.is_shared()


@every_layout
def test_requires_grad_and_modules(layout):
    model = nn.Linear(12, 8)
    w = make(layout, (8, 12))[0]
    model.weight = nn.Parameter(w)
    assert model.weight.requires_grad and model.weight.is_leaf and not w.requires_grad
    assert [n for n, _ in model.named_parameters()] == ["weight", "bias"]
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        parameter = model.weight
        model.to(dtype)
        assert model.weight is parameter and parameter.dtype == dtype and isinstance(parameter, sten.SparseTensor)
        assert model(torch.randn(2, 12, dtype=dtype)).dtype == dtype
    model.requires_grad_(False)
    assert not model.weight.requires_grad
    meta = copy.deepcopy(model).to("meta")
    assert meta.weight.is_meta and "meta" in repr(meta.weight)
    frozen = copy.deepcopy(model)
    assert frozen.weight.same_pattern(model.weight) and not frozen.weight.requires_grad


def test_deepcopy_keeps_sharing_and_the_gradient():
    w = nn.Parameter(make(CSR())[0])
    w.grad = w.detach() * 2
    pair = copy.deepcopy([w, w])
    assert pair[0] is pair[1] and torch.equal(pair[0].grad.to_dense(), 2 * w.to_dense())
    with pytest.raises(RuntimeError, match="leaf"):
        copy.deepcopy(w * 2)


def test_transposed_copies():
    w, dense = make(NM(2, 4), (8, 12))
    for twin in (w.t().clone(), copy.deepcopy(w.t()), pickle.loads(pickle.dumps(w.t())), w.t().double().float()):
        assert twin.shape == (12, 8) and twin.stride() == dense.t().stride() and torch.equal(twin.to_dense(), dense.t())
    assert "transposed" in repr(w.t()) and torch.equal(w.t().mask(), w.mask().t())


def test_a_leaf_dense_gradient_is_projected():
    w, dense = make(CSR())
    w = nn.Parameter(w)
    (w.exp()).sum().backward()  # torch's own formula: a dense gradient
    assert isinstance(w.grad, sten.SparseTensor) and w.grad.same_pattern(w)
    assert torch.allclose(w.grad.to_dense(), dense.exp() * w.mask())


@pytest.mark.parametrize(
    "call",
    [
        lambda: sten.from_dense([1.0], CSR()),
        lambda: sten.from_dense(torch.ones(2, 2), "CSR"),
        lambda: sten.from_dense(torch.ones(2, 2, dtype=torch.int64), CSR()),
        lambda: sten.from_dense(torch.ones(2, 2), CSR(), torch.ones(2, 2)),
        lambda: sten.from_dense(torch.ones(2, 2), CSR(), torch.ones(2, 3) > 0),
        lambda: sten.from_dense(torch.ones(4), CSR()),
        lambda: sten.from_dense(sten.from_dense(torch.ones(2, 2), CSR()), CSR()),
    ],
)
def test_bad_input(call):
    with pytest.raises((TypeError, ValueError)) as error:
        call()
    assert one_sentence(error)
