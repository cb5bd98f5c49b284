"""The path of F.linear to a launch: one Plan per signature, prepared once, which notices what changes and steps back
where the call is intercepted. On the CPU, the GPU's kernels in Triton's interpreter."""

import copy
import gc
import pickle
import sys
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from triton_cases import DEVICE, close, random

import sten
from sten import dispatch, kernels
from sten.backends import cuda

O, I = 24, 64
LAYOUTS = [sten.CSR(), sten.BSR((8, 8)), sten.NM(2, 4), sten.VectorNM(1, 4, 8), sten.GroupedNM(2, 4, 1)]
MOST_FRAMES = 8


@pytest.fixture(params=LAYOUTS, ids=str)
def layout(request):
    return request.param


@pytest.fixture
def prepared(layout, monkeypatch):
    """The variants whose launches were prepared."""
    for key in [key for key in dispatch.KERNELS if key[-1] is type(layout)]:
        monkeypatch.setitem(dispatch.KERNELS, key, dispatch.KERNELS[key])  # what a test registers goes with it
    for name in cuda.PRODUCTS:
        key = (name, DEVICE, type(layout))
        prepare = cuda.prepare_by(name, cuda.TABLE[type(layout)])
        monkeypatch.setitem(dispatch.KERNELS, key, dispatch.Kernel(prepare, True))
    seen, elsewhere = [], cuda.Launches._elsewhere

    def noting(self, tensors):
        seen.append(self.variant)
        return elsewhere(self, tensors)

    monkeypatch.setattr(cuda.Launches, "_elsewhere", noting)
    return seen


def weight(layout, seed=0, dtype=torch.float32):
    dense = random(O, I, seed=seed, dtype=dtype)
    mask = layout.mask(dense.abs().float(), None if layout.rate is not None else 0.5)
    return torch.nn.Parameter(sten.from_dense(dense, layout, mask))


@torch.no_grad()
@pytest.mark.parametrize("tokens", [(0,), (1,), (5,), (70,), (2, 3), ()])
def test_the_same_product(layout, prepared, tokens):
    w, bias = weight(layout), random(O)
    for seed in range(5):
        x = random(*tokens, I, seed=seed)
        close(F.linear(x, w), F.linear(x, w.to_dense()))
        close(F.linear(x, w, bias), F.linear(x, w.to_dense(), bias))
    plans = w.cache.plans
    assert len(prepared) == len(plans) == 2  # with and without a bias
    assert [plan.variant for plan in plans.values()] == prepared
    assert sten.which("linear", x, w).variant == prepared[0]


@pytest.mark.skipif(DEVICE == "cuda", reason="test_cuda.py does so there")
@pytest.mark.parametrize("operator", cuda.PRODUCTS)
def test_check_kernel(layout, prepared, operator):
    """Any strides and dimensions, one column, no token, results in poisoned memory; a first and a second call."""
    sten.testing.check_kernel(operator, layout, device=DEVICE, shapes=[(1, 1), (17, 33)], sparsity=(0.7, 1.0))


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 5, 70])
@pytest.mark.parametrize("biased", [False, True])
def test_frames_of_a_call(layout, prepared, tokens, biased, monkeypatch):
    """From F.linear to the start of a launch, after the first call."""
    from sten.kernels.launch import Launch

    frames, call, here = [], Launch.__call__, sys._getframe()

    def counting(self, *arguments):
        frame, count = sys._getframe(), 0
        while frame is not here:
            frame, count = frame.f_back, count + 1
        frames.append(count)  # this function replaces Launch.__call__
        return call(self, *arguments)

    w, x, bias = weight(layout), random(tokens, I), random(O) if biased else None
    F.linear(x, w, bias)
    monkeypatch.setattr(Launch, "__call__", counting)
    F.linear(x, w, bias)
    assert frames and max(frames) <= MOST_FRAMES


@torch.no_grad()
def test_values_written_in_place(layout, prepared):
    w, x = weight(layout), random(5, I)
    F.linear(x, w)
    w.mul_(2)
    close(F.linear(x, w), x @ w.to_dense().T)
    assert len(prepared) == 1
    other = weight(layout, seed=1)
    if all(part.shape == other.parts[name].shape for name, part in w.parts.items()):
        for name, part in w.parts.items():
            part.copy_(other.parts[name])
        pattern = [part for name, part in w.parts.items() if name != "values"]
        w.cache.invalidate(*pattern)
        kernels.pattern_cache.invalidate(*pattern)  # which the former does on a GPU
        close(F.linear(x, w), x @ other.to_dense().T)


@torch.no_grad()
def test_another_pattern(layout, prepared):
    """By each way that gives a weight other parts."""
    w, x = weight(layout), random(5, I)
    dense = random(O, I, seed=7)
    fewer = sten.from_dense(dense, layout, layout.mask(dense.abs(), None if layout.rate is not None else 0.8))
    for other in (weight(layout, seed=1), fewer):
        F.linear(x, w)
        w.data = other
        close(F.linear(x, w), x @ other.to_dense().T)
    w.parts["values"] = w.parts["values"] * 3  # not documented, but supported
    close(F.linear(x, w), x @ fewer.to_dense().T * 3)
    w.parts["values"].data = w.parts["values"] * 2
    close(F.linear(x, w), x @ fewer.to_dense().T * 6)
    w.parts["values"] = torch._neg_view(w.parts["values"])  # at the same address
    close(F.linear(x, w), x @ fewer.to_dense().T * -6)
    w.parts["values"] = w.parts["values"].resolve_neg()
    F.linear(x, w)
    w.data = w.with_values(w.parts["values"] * 2)
    close(F.linear(x, w), x @ fewer.to_dense().T * -12)
    w.parts["values"] = torch.stack([w.parts["values"], w.parts["values"]], -1)[..., 0]  # of other strides
    close(F.linear(x, w), x @ fewer.to_dense().T * -12)


@torch.no_grad()
def test_a_replaced_part_of_the_pattern(layout, prepared):
    """Tables are cached by the identity of their sources: replaced parts need no `invalidate`."""
    w, x, other = weight(layout), random(5, I), weight(layout, seed=1)
    F.linear(x, w)
    if any(part.shape != other.parts[name].shape for name, part in w.parts.items()):
        pytest.skip("another number of entries is another weight")
    for name in list(w.parts):
        w.parts[name] = other.parts[name]
    close(F.linear(x, w), x @ other.to_dense().T)


@torch.no_grad()
def test_another_kernel_in_the_table(layout, prepared):
    w, x = weight(layout), random(5, I)
    F.linear(x, w)

    @sten.kernel("linear", weight=type(layout), device=DEVICE)
    def mine(x, weight, bias, *, layout, shape):
        return torch.full((*x.shape[:-1], shape[0]), 7.0)

    for _ in range(2):
        assert (F.linear(x, w) == 7).all()


@torch.no_grad()
def test_activations_of_every_kind(layout, prepared):
    """Strides, alignment, lazy negation; a bias of any strides, or of one element."""
    w, bias = weight(layout), random(O)
    dense = w.to_dense()
    F.linear(random(5, I), w, bias)
    for _ in range(2):
        for x in (random(I, 5).T, random(5, 2 * I)[:, ::2], random(5 * I + 1)[1:].view(5, I), random(9, I)[::2]):
            close(F.linear(x, w, bias), F.linear(x, dense, bias))
        x = random(5, I)
        for b in (random(O, 3)[:, 1], random(1), random(1).expand(O), random(O + 1)[1:]):
            close(F.linear(x, w, b), F.linear(x, dense, b))
        close(F.linear(torch._neg_view(-x), w, torch._neg_view(-bias)), F.linear(x, dense, bias))
        close(F.linear(torch.nn.Parameter(x), w), F.linear(x, dense))


@torch.no_grad()
def test_one_tensor_as_activations_and_bias(layout, prepared):
    x, dense = random(I), random(I, I)
    w = torch.nn.Parameter(sten.from_dense(dense, layout, layout.mask(dense.abs(), None if layout.rate else 0.5)))
    for _ in range(3):
        close(F.linear(x, w, x), F.linear(x, w.to_dense(), x))


@torch.no_grad()
def test_invalid_operands_raise(layout, prepared):
    w, x = weight(layout), random(5, I)
    F.linear(x, w)
    for wrong, bias in ((x[:, :-1], None), (x.double(), None), (x, random(O - 1)), (x, random(O).double())):
        for _ in range(2):
            with pytest.raises(RuntimeError):
                F.linear(wrong, w, bias)
    if DEVICE == "cpu" and isinstance(layout, sten.NM):
        return  # its kernel for half precision is not for the interpreter
    half = weight(layout, dtype=torch.float16)
    F.linear(x.half(), half)
    with torch.autocast(DEVICE, torch.float16):
        for any_of_them in (w, half):
            close(F.linear(x, any_of_them), x @ any_of_them.to_dense().float().T, torch.float16)


def test_gradients(layout, prepared):
    w, x = weight(layout), random(5, I).requires_grad_()
    for _ in range(4):
        x.grad = w.grad = None
        F.linear(x, w).square().sum().backward()
        expected = x.detach().requires_grad_()
        dense = w.detach().to_dense().requires_grad_()
        F.linear(expected, dense).square().sum().backward()
        close(x.grad, expected.grad)
        close(w.grad.to_dense(), dense.grad * w.mask())
    assert len(prepared) <= 3  # each operator once
    assert F.linear(x, w).requires_grad
    frozen, bias, x = w.detach(), random(O), random(5, I)
    assert F.linear(x, frozen, bias.requires_grad_()).requires_grad
    bias.requires_grad_(False)
    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(F.linear(forward_ad.make_dual(x, x + 1), frozen, bias))
        close(y.tangent, F.linear(x + 1, frozen.to_dense()))
    assert not F.linear(x, frozen, bias).requires_grad


def test_gradients_that_kernels_compute():
    """With tiles large enough for the kernels of gradients; on the CPU in the interpreter."""
    for layout in (sten.VectorNM(1, 8, 64), sten.BSR((16, 16))):
        w, x, above = weight(layout), random(5, I), random(5, O, seed=1)
        flags = dispatch.Flags(5, w.parts["values"].numel(), x.device)
        for name, operands in (("linear_grad_weight", (above, x, w.parts)), ("linear_grad_input", (above, w.parts))):
            plan = cuda.prepare_by(name, cuda.TABLE[type(layout)])(layout, (O, I), torch.float32, flags)
            expected = dispatch.OPERATORS[name].reference(*operands, layout=layout, shape=(O, I))
            assert plan.variant in ("gather", "sampled", "blocks", "expand")
            for _ in range(2):
                close(plan.run(*operands), expected)


def test_which_names_what_runs_for_gradients(layout, prepared):
    """The reason says when a dense expansion and cuBLAS run."""
    w, known = weight(layout), ("expand", "collect", "blocks", "sampled", "gather")
    for name in ("linear_grad_input", "linear_grad_weight"):
        plan = sten.which(name, (70, O), w)
        assert plan.reason and (plan.kernel == "reference" or plan.variant in known)
        assert plan.variant != "expand" or "cuBLAS" in plan.reason


@pytest.mark.parametrize("of, share, tokens, named", [
    (sten.NM(2, 4), 0.5, 1, "int4"), (sten.NM(16, 32), 0.5, 1, "int4"), (sten.NM(2, 4), 0.5, 16, None),
    (sten.NM(2, 4), 0.5, 1024, "fp8"), (sten.NM(8, 16), 0.5, 4096, "fp8"), (sten.CSR(), 0.5, 1, "int4"),
    (sten.CSR(), 0.25, 1, None), (sten.CSR(), 0.1, 4096, None), (sten.CSR(), 0.6, 4096, "fp8"),
    (sten.VectorNM(1, 4, 128), 0.25, 1, None), (sten.VectorNM(1, 4, 128), 0.25, 4096, None),
    (sten.BSR((128, 128)), 0.2, 1, None), (sten.GroupedNM(2, 4, 1), 0.5, 1, "int4"),
])  # fmt: skip
def test_which_names_a_dense_product_that_is_faster(of, share, tokens, named):
    """At no more bytes; in 16-bit types, and of a known number of tokens."""
    flags = dispatch.Flags(tokens, int(share * 4096 * 4096), torch.device(DEVICE))
    prepare = cuda.prepare_by("linear", cuda.TABLE[type(of)])
    reason = prepare(of, (4096, 4096), torch.bfloat16, flags).reason
    assert [rival for rival in ("int4", "fp8") if f"dense {rival}" in reason] == ([named] if named else [])
    for other, dtype in ((flags, torch.float32), (flags._replace(tokens=None), torch.bfloat16)):
        assert "dense int4" not in prepare(of, (4096, 4096), dtype, other).reason


@torch.no_grad()
def test_intercepted_calls(layout, prepared):
    """A torch.library operator runs, visible to what intercepts; nothing is stored. The profiler sees the Plan."""
    w, x = weight(layout), random(5, I)
    F.linear(x, w)
    before = len(prepared), len(w.cache.plans)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        F.linear(x, w)
    name = f"sten::{sten.which('linear', x, w)}".replace(" on cpu", "").split(": ")
    assert ": ".join(name[:2]) in [event.key for event in profile.key_averages()]
    assert "sten.gpu_" in make_fx(lambda x: F.linear(x, w))(x).code
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: F.linear(x, w) + 1, fullgraph=True, backend="aot_eager")
    close(compiled(x), F.linear(x, w) + 1)
    assert (len(prepared), len(w.cache.plans)) == before
    rows = random(3, 5, I)
    close(torch.func.vmap(lambda x: F.linear(x, w))(rows), rows @ w.to_dense().T)


@torch.no_grad()
def test_a_symbolic_number_of_tokens(layout, prepared):
    w = weight(layout)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: F.linear(x, w), fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (3, 5, 70):
        x = random(tokens, I)
        close(compiled(x), x @ w.to_dense().T)


@torch.no_grad()
def test_plans_are_stored_with_the_weight(layout, prepared, monkeypatch):
    monkeypatch.setattr(dispatch, "MAX_PLANS", 4)
    w, x = weight(layout), random(5, I)
    F.linear(x, w)
    for twin in (copy.deepcopy(w), pickle.loads(pickle.dumps(w))):
        assert not twin.cache.plans
    for tokens in range(1, 10):  # a model meets many lengths: some of them are forgotten
        close(F.linear(random(tokens, I), w), random(tokens, I) @ w.to_dense().T)
        assert 0 < len(w.cache.plans) <= 4
    held = [weakref.ref(part) for part in w.parts.values()]
    w.data = weight(layout, seed=1)
    gc.collect()
    assert all(part() is None for part in held)


@torch.no_grad()
def test_a_dtype_without_kernels(layout, prepared):
    w, x = weight(layout, dtype=torch.float64), random(5, I, dtype=torch.float64)
    for _ in range(2):
        close(F.linear(x, w), x @ w.to_dense().T)
    assert not prepared and sten.which("linear", x, w).kernel == "reference"


@torch.no_grad()
def test_a_capture_stores_no_launch(layout, prepared, monkeypatch):
    """Nothing can be timed in a capture; the next call outside prepares and stores."""
    from sten.kernels.backend import Backend

    w, x = weight(layout), random(5, I)
    sten.which("linear", x, w)  # stores the Plan, whose launches come with the first call
    with monkeypatch.context() as patch:
        patch.setattr(Backend, "capturing", lambda self, x: True)
        for _ in range(2):
            close(F.linear(x, w), x @ w.to_dense().T)
    assert len(prepared) == 2
    for _ in range(2):
        close(F.linear(x, w), x @ w.to_dense().T)
    assert len(prepared) == 3


@torch.no_grad()
def test_many_threads_at_once(layout, prepared):
    """The first thread prepares; all get the same numbers."""
    w, failed, start = weight(layout), [], threading.Barrier(4)
    expected = {tokens: random(tokens, I) @ w.to_dense().T for tokens in (1, 2, 5)}

    def work():
        try:
            start.wait()
            for tokens in (1, 2, 5):
                with torch.no_grad():
                    close(F.linear(random(tokens, I), w), expected[tokens])
        except Exception as problem:
            failed.append(problem)

    if DEVICE == "cpu":  # the interpreter itself is not made for threads: one at a time
        start = threading.Barrier(1)
    threads = [threading.Thread(target=work) for _ in range(4 if DEVICE == "cuda" else 1)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not failed
