"""A product bound to its weight answers as the kernel would, notices what changes, and steps back where it must."""

import copy
import inspect
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from triton_cases import DEVICE, close, random

import sten
from sten import dispatch
from sten.native import cuda

O, I = 24, 64
LAYOUTS = [sten.CSR(), sten.BSR((8, 8)), sten.NM(2, 4), sten.VectorNM(1, 4, 8), sten.GroupedNM(2, 4, 1)]


@pytest.fixture(params=LAYOUTS, ids=str)
def layout(request):
    return request.param


@pytest.fixture
def asked(layout, monkeypatch):
    """The activations that the kernel itself was called with; on the CPU, the GPU's kernel in Triton's interpreter."""
    key, seen = ("linear", DEVICE, type(layout)), []
    choose, function, *_ = cuda.TABLE[type(layout)]

    def noting(x, *args, **kwargs):
        seen.append(tuple(x.shape))
        return function(x, *args, **kwargs)

    for name in [k for k in dispatch.KERNELS if k[0] == "linear"]:
        monkeypatch.setitem(dispatch.KERNELS, name, dispatch.KERNELS[name])  # what a test registers goes with it
    choose = cuda.in_known_dtypes(choose)
    sten.kernel("linear", weight=type(layout), device=DEVICE, choose=choose, bind=cuda.binding(noting))(noting)
    assert dispatch.KERNELS[key].function is noting
    return seen


def weight(layout, seed=0, dtype=torch.float32):
    dense = random(O, I, seed=seed, dtype=dtype)
    mask = layout.mask(dense.abs().float(), None if layout.rate is not None else 0.5)
    return torch.nn.Parameter(sten.from_dense(dense, layout, mask))


def warm(w, x, bias=None):
    """The weight has met such activations so often that its kernel is not asked again."""
    for _ in range(3):
        F.linear(x, w, bias)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [(0,), (1,), (5,), (70,), (2, 3), ()])
def test_the_same_product(layout, asked, tokens):
    w, bias = weight(layout), random(O)
    for seed in range(5):
        x = random(*tokens, I, seed=seed)
        close(F.linear(x, w), F.linear(x, w.to_dense()))
        close(F.linear(x, w, bias), F.linear(x, w.to_dense(), bias))
    assert len(asked) == 4  # twice before it was bound, and once for each kind of call


@pytest.mark.skipif(DEVICE == "cuda", reason="test_cuda.py does so there")
def test_it_keeps_the_law_of_kernels(layout, asked):
    """Any strides and dimensions, one column, no token, results in poisoned memory."""
    sten.testing.check_kernel("linear", layout, device=DEVICE, shapes=[(1, 1), (17, 33)], sparsity=(0.7, 1.0))


@torch.no_grad()
def test_what_is_written_in_place_is_seen(layout, asked):
    w, x = weight(layout), random(5, I)
    warm(w, x)
    before = len(asked)
    w.mul_(2)
    close(F.linear(x, w), x @ w.to_dense().T)
    other = weight(layout, seed=1)
    if all(part.shape == other.parts[name].shape for name, part in w.parts.items()):
        for name, part in w.parts.items():
            part.copy_(other.parts[name])
        close(F.linear(x, w), x @ other.to_dense().T)
    assert len(asked) == before


@torch.no_grad()
def test_another_pattern_is_seen(layout, asked):
    """By each of the ways that give a weight other parts."""
    w, x = weight(layout), random(5, I)
    dense = random(O, I, seed=7)
    fewer = sten.from_dense(dense, layout, layout.mask(dense.abs(), None if layout.rate is not None else 0.8))
    for other in (weight(layout, seed=1), fewer):
        warm(w, x)
        w.data = other
        close(F.linear(x, w), x @ other.to_dense().T)
    warm(w, x)
    w.parts["values"] = w.parts["values"] * 3  # nobody should; it is right all the same
    close(F.linear(x, w), x @ fewer.to_dense().T * 3)
    warm(w, x)
    w.parts["values"].data = w.parts["values"] * 2
    close(F.linear(x, w), x @ fewer.to_dense().T * 6)
    warm(w, x)
    w.parts["values"] = torch._neg_view(w.parts["values"])  # at the same address
    close(F.linear(x, w), x @ fewer.to_dense().T * -6)
    w.parts["values"] = w.parts["values"].resolve_neg()
    warm(w, x)
    w.parts = {**w.parts, "values": w.parts["values"] * 2}
    close(F.linear(x, w), x @ fewer.to_dense().T * -12)


@torch.no_grad()
def test_another_kernel_in_the_table(layout, asked):
    w, x = weight(layout), random(5, I)
    warm(w, x)

    @sten.kernel("linear", weight=type(layout), device=DEVICE)
    def mine(x, weight, bias, *, spec, shape):
        return torch.full((*x.shape[:-1], shape[0]), 7.0)

    for _ in range(4):
        assert (F.linear(x, w) == 7).all()
    assert w.bound is dispatch.UNSERVED


@torch.no_grad()
def test_activations_of_every_kind(layout, asked):
    w, bias = weight(layout), random(O)
    dense = w.to_dense()
    warm(w, random(5, I), bias)
    for _ in range(3):
        for x in (random(I, 5).T, random(5, 2 * I)[:, ::2], random(5 * I + 1)[1:].view(5, I), random(9, I)[::2]):
            close(F.linear(x, w, bias), F.linear(x, dense, bias))
        x = random(5, I)
        for b in (random(O, 3)[:, 1], random(1), random(1).expand(O)):
            close(F.linear(x, w, b), F.linear(x, dense, b))
        close(F.linear(torch._neg_view(-x), w, torch._neg_view(-bias)), F.linear(x, dense, bias))
        close(F.linear(torch.nn.Parameter(x), w), F.linear(x, dense))


@torch.no_grad()
def test_one_tensor_as_activations_and_bias(layout, asked):
    x, dense = random(I), random(I, I)
    w = torch.nn.Parameter(sten.from_dense(dense, layout, layout.mask(dense.abs(), None if layout.rate else 0.5)))
    for _ in range(5):
        close(F.linear(x, w, x), F.linear(x, w.to_dense(), x))
    if isinstance(layout, sten.CSR) and len(w.parts["values"]) >= I:
        w = torch.nn.Parameter(sten.from_dense(dense, layout, torch.eye(I, device=DEVICE) > 0))
        for _ in range(5):
            close(F.linear(x, w, w.parts["values"]), F.linear(x, w.to_dense(), w.parts["values"]))


@torch.no_grad()
def test_what_does_not_fit_is_refused_as_before(layout, asked):
    w, x = weight(layout), random(5, I)
    warm(w, x)
    for wrong, bias in ((x[:, :-1], None), (x.double(), None), (x, random(O - 1)), (x, random(O).double())):
        for _ in range(2):
            with pytest.raises(RuntimeError):
                F.linear(wrong, w, bias)
    if DEVICE == "cpu" and isinstance(layout, sten.NM):
        return  # its kernel for half precision is not for the interpreter
    half = weight(layout, dtype=torch.float16)
    warm(half, x.half())
    with torch.autocast(DEVICE, torch.float16):
        for any_of_them in (w, half):
            close(F.linear(x, any_of_them), x @ any_of_them.to_dense().float().T, torch.float16)


def test_gradients(layout, asked):
    w, x = weight(layout), random(5, I).requires_grad_()
    for _ in range(4):
        x.grad = w.grad = None
        F.linear(x, w).square().sum().backward()
        expected = x.detach().requires_grad_()
        dense = w.detach().to_dense().requires_grad_()
        F.linear(expected, dense).square().sum().backward()
        close(x.grad, expected.grad)
        close(w.grad.to_dense(), dense.grad * w.mask())
    assert len(asked) <= 3
    assert F.linear(x, w).requires_grad
    frozen, bias, x = w.detach(), random(O), random(5, I)
    warm(frozen, x, bias)
    assert F.linear(x, frozen, bias.requires_grad_()).requires_grad
    bias.requires_grad_(False)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        F.linear(forward_ad.make_dual(x, x), frozen, bias)
    assert not F.linear(x, frozen, bias).requires_grad
    frozen.parts["values"].requires_grad_()  # nobody should
    known = len(asked)
    F.linear(x, frozen, bias)
    assert len(asked) == known + 1


@torch.no_grad()
def test_who_watches(layout, asked):
    w, x = weight(layout), random(5, I)
    warm(w, x)
    before = len(asked)
    with sten.dispatch.observe() as seen:
        F.linear(x, w)
    assert [name for name, *_ in seen] == ["linear"] and len(asked) == before + 1
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        F.linear(x, w)
    assert any(event.key.startswith("sten::gpu_") for event in profile.key_averages())
    assert "sten.gpu_" in make_fx(lambda x: F.linear(x, w))(x).code
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: F.linear(x, w) + 1, fullgraph=True, backend="aot_eager")
    close(compiled(x), F.linear(x, w) + 1)
    rows = random(3, 5, I)
    close(torch.func.vmap(lambda x: F.linear(x, w))(rows), rows @ w.to_dense().T)


@torch.no_grad()
def test_what_is_kept_stays_with_the_weight(layout, asked, monkeypatch):
    monkeypatch.setattr(sten.kernels.bound, "KEPT", 4)
    w, x = weight(layout), random(5, I)
    warm(w, x)
    for twin in (copy.deepcopy(w), pickle.loads(pickle.dumps(w)), w.detach()):
        assert twin.bound is None
    assert w.bound is not None
    for tokens in range(1, 10):  # a model meets many lengths: some of them are forgotten
        close(F.linear(random(tokens, I), w), random(tokens, I) @ w.to_dense().T)
        assert 0 < len(inspect.getclosurevars(w.bound.answer).nonlocals["decisions"]) <= 4
    held = weakref.ref(w.parts["values"])
    w.data = weight(layout, seed=1)
    assert held() is None


@torch.no_grad()
def test_a_product_that_fails_or_plans_nothing(layout, asked):
    """Is asked again, and the next plan of the thread is run."""
    from sten.kernels import bound, library

    def fails(x, bias):
        raise ArithmeticError

    parts, x = weight(layout).parts, random(5, I)
    with pytest.raises(ArithmeticError):
        bound.bind(fails, parts)(x, None, True)
    assert bound.bind(lambda x, bias: x * 2, parts)(x, None, True) is None
    assert not library._asked.now


@torch.no_grad()
def test_a_dtype_without_kernels(layout, asked):
    w, x = weight(layout, dtype=torch.float64), random(5, I, dtype=torch.float64)
    for _ in range(3):
        close(F.linear(x, w), x @ w.to_dense().T)
    assert w.bound is dispatch.UNSERVED


@torch.no_grad()
def test_a_graph_is_the_first_to_bring_these_activations(layout, asked, monkeypatch):
    from sten.kernels import bound

    w, x = weight(layout), random(5, I)
    warm(w, x)
    monkeypatch.setattr(bound, "capturing", lambda x: True)
    before = len(asked)
    close(F.linear(x, w), x @ w.to_dense().T)
    assert len(asked) == before  # decided long ago
    x = random(6, I)
    for _ in range(2):
        close(F.linear(x, w), x @ w.to_dense().T)
    assert len(asked) == before + 2


def test_only_linear_asks():
    with pytest.raises(ValueError, match="bind"):
        sten.kernel("embedding", weight=sten.CSR, device=DEVICE, bind=cuda.binding(print))
