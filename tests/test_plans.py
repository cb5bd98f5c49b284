"""One Plan per signature: `which` prints it; when it is stored, shared, dropped, and not looked up."""

import copy
import dataclasses
import pickle
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from weights import every_layout, make

import sten
from sten import _torch_private as private
from sten import dispatch, which
from sten.backends import cpp
from sten.layouts import BSR, CSR, NM, GroupedNM
from sten.ops import padding


@pytest.fixture(autouse=True)
def registrations(monkeypatch):
    """Remove what a test registers."""
    before = dict(dispatch.KERNELS)
    yield
    for key in [key for key in dispatch.KERNELS if key not in before]:
        del dispatch.KERNELS[key]
    for key, entry in before.items():
        if dispatch.KERNELS.get(key) is not entry:
            dispatch.KERNELS[key] = entry


def plans(w):
    return list(w.cache.plans.values())


# which


PRODUCTS = [
    ("linear", (2, 3, 5), lambda w: F.linear(torch.randn(2, 3, 5), w), "linear"),
    ("linear", (4, 7), lambda w: F.linear(torch.randn(4, 7), w.t()), "linear_grad_input"),
    ("matmul", (4, 7), lambda w: torch.randn(4, 7) @ w, "linear_grad_input"),
    ("matmul", (5,), lambda w: torch.randn(5) @ w.t(), "linear"),
    ("linear_grad_input", (4, 7), lambda w: torch.randn(4, 7) @ w, "linear_grad_input"),
    ("embedding", (2, 3), lambda w: F.embedding(torch.zeros(2, 3, dtype=torch.int64), w), "embedding"),
]


@every_layout
@pytest.mark.parametrize("name, shape, call, operator", PRODUCTS)
def test_which_prints_what_runs(layout, name, shape, call, operator):
    w = make(layout, (7, 5))[0]
    flipped = w.t() if name in ("linear", "matmul") and (shape[-1] == 5) == (name == "matmul") else w
    plan = which(name, shape, flipped)
    assert plan.operator == operator and plans(w) == [plan] and str(layout) in str(plan)
    call(w)
    assert plans(w) == [plan], "a call made another Plan"
    ran = make(layout, (7, 5))[0]
    call(ran)
    assert which(name, shape, ran.t() if flipped is not w else ran) is plans(ran)[0]


@every_layout
def test_which_prints_what_runs_for_gradients(layout):
    w = nn.Parameter(make(layout, (7, 5))[0])
    x = torch.randn(4, 5, requires_grad=True)
    F.linear(x, w).backward(torch.randn(4, 7))
    made = {plan.operator: plan for plan in plans(w)}
    assert set(made) == {"linear", "linear_grad_input", "linear_grad_weight"}
    for name, shape in (("linear", x), ("linear_grad_input", (4, 7)), ("linear_grad_weight", (4, 7))):
        assert which(name, shape, w) is made[name]
    F.linear(torch.randn(4, 7, requires_grad=True), w.t()).backward(torch.randn(4, 5))
    assert which("linear_grad_weight", (4, 5), w.t()).operator == "linear_grad_weight"
    F.embedding(torch.zeros(3, dtype=torch.int64), w).backward(torch.randn(3, 5))
    made = {plan.operator: plan for plan in plans(w)}
    assert which("embedding_grad_weight", (3, 5), w) is made["embedding_grad_weight"]


@every_layout
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
def test_which_prints_what_runs_for_convolutions(layout, form):
    w = nn.Parameter(make(layout, (6, 4, 1, 1))[0])
    x = torch.randn(2, 4, 5, 6).contiguous(memory_format=form).requires_grad_()
    y = F.conv2d(x, w, padding=1)
    grad = torch.randn(y.shape)
    y.backward(grad)
    made = {plan.operator: plan for plan in plans(w)}
    assert which("conv2d", x, w, padding=1) is made["conv2d"]
    geometry = {"padding": (1, 1), "size": x.shape}
    assert which("conv2d_grad_input", grad, w, **geometry) is made["conv2d_grad_input"]
    if form is torch.contiguous_format:
        assert which("conv2d", (2, 4, 5, 6), w, padding=1) is made["conv2d"]
        assert which("conv2d_grad_weight", grad, w, **geometry) is made["conv2d_grad_weight"]
        assert which("conv2d_grad_weight", grad, w, padding=1) is made["conv2d_grad_weight"]
    else:
        assert which("conv2d", (2, 4, 5, 6), w, padding=1) is not made["conv2d"]


@pytest.mark.parametrize("layout", [BSR((4, 4)), GroupedNM(2, 4, 1)], ids=str)
def test_the_memory_format_decides(layout):
    if not cpp.available():
        pytest.skip("the extension is not built")
    for shape, size in (((8, 12, 1), (9,)), ((8, 12, 1, 1), (5, 4)), ((8, 12, 1, 1, 1), (2, 3, 4))):
        w, dense = make(layout, shape)
        conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(size)]
        x = torch.randn(2, 12, *size)
        last = x.movedim(1, -1).contiguous().movedim(-1, 1)
        plan, volume = which("conv2d", x, w), len(size) == 3  # of a smaller one: the direct convolution
        assert "channels_last" in plan.reason if volume else plan.variant == "float32"
        assert which("conv2d", last, w).variant == "float32"
        assert which("conv2d", last[0], w).variant == "float32"
        for picture in (x, last, last[0]):
            torch.testing.assert_close(conv(picture, w), conv(picture, dense), atol=1e-5, rtol=1e-5)
        assert {plan.variant for plan in plans(w)} == ({None, "float32"} if volume else {"float32"})


def test_which_of_a_bias_and_a_weight_in_trainable_form():
    model = sten.sparsify(nn.Sequential(nn.Linear(8, 6)), CSR(), sparsity=0.5)
    with torch.no_grad():
        model(torch.randn(3, 8))
    w = model[0].weight
    assert which("linear", (3, 8), w, model[0].bias) is plans(w)[0]
    sten.trainable(model)
    model(torch.randn(3, 8)).sum().backward()
    plan = which("linear", (3, 8), model[0].weight, model[0].bias)
    assert plan in plans(model[0].weight) and plan.operator == "linear"
    assert model[0].weight.cache is model[0].weight.cache


# registration


@dataclasses.dataclass(frozen=True)
class Copied(CSR):
    """CSR under another name, as a user's own layout."""


def copied(shape=(7, 5), dtype=torch.float32):
    w, dense = make(CSR(), shape, dtype)
    return sten.SparseTensor(Copied(), dict(w.parts), shape), dense


def test_a_copy_without_kernels_runs_the_reference_and_warns_once():
    w, dense = copied()
    x = torch.randn(3, 5)
    dispatch._warned.clear()
    assert which("linear", x, w).kernel == "reference" and "no kernel is registered" in which("linear", x, w).reason
    with pytest.warns(UserWarning, match="weight=Copied"):
        got = F.linear(x, w)
    torch.testing.assert_close(got, F.linear(x, dense))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.linear(x, w)
    image, kernels = torch.randn(2, 5, 4, 4), copied((7, 5, 1, 1))
    torch.testing.assert_close(F.conv2d(image, kernels[0]), F.conv2d(image, kernels[1]))
    torch.testing.assert_close(F.embedding(torch.tensor([1, 2]), w), dense[1:3])


def test_a_prepared_kernel_of_a_user():
    """Users register kernels as the built-ins are; one that is registered later is used."""
    calls, w = [], copied()[0]
    x, bias = torch.randn(3, 5), torch.randn(7)
    want = F.linear(x, w.to_dense(), bias)
    torch.testing.assert_close(F.linear(x, w, bias), want)

    @sten.kernel("linear", weight=Copied, device="cpu", prepare=True)
    def mine(layout, shape, dtype, flags):
        calls.append((layout, shape, dtype, flags))
        if dtype is not torch.float32:
            return None
        if flags.tokens == 1:
            return sten.extend.Plan.of("reference", "one token is not worth it", None)
        return sten.extend.Plan.of("dense", "all at once", lambda x, weight, bias: F.linear(x, w.to_dense(), bias))

    plan = which("linear", x, w, bias)
    assert (plan.kernel, plan.variant, plan.reason, plan.layouts) == ("mine", "dense", "all at once", ("Copied()",))
    for _ in range(3):
        torch.testing.assert_close(F.linear(x, w, bias), want)
    flags = calls[0][3]
    assert len(calls) == 1 and calls[0][:3] == (Copied(), (7, 5), torch.float32)
    assert (flags.tokens, flags.entries, flags.device.type) == (3, w.parts["values"].numel(), "cpu")
    assert flags.geometry is None and flags.memory_format is torch.contiguous_format
    assert which("linear", (1, 5), w).kernel == which("linear", (3, 5), w.double()).kernel == "reference"
    torch.testing.assert_close(F.linear(x[:1], w, bias), want[:1])
    torch.testing.assert_close(F.linear(x.double(), w.double()), F.linear(x.double(), w.double().to_dense()))
    assert sten.testing.check_kernel("linear", CSR(), shapes=[(3, 4)]).calls


def test_a_kernel_of_matmul():
    """It is preferred to the kernel of linear_grad_input, the same product; and runs for two sparse operands."""
    w, dense = copied()
    x = torch.randn(4, 7)
    assert which("matmul", x, w).operator == "linear_grad_input"

    @sten.kernel("matmul", other=Copied, device="cpu")
    def times(input, other, *, layout, shape):
        """Dense times sparse."""
        assert layout == (None, Copied()) and shape == ((4, 7), (7, 5))
        return input @ layout[1].unpack(other, shape[1])

    @sten.kernel("matmul", input=CSR, other=Copied, device="cpu")
    def both(input, other, *, layout, shape):
        return layout[0].unpack(input, shape[0]) @ layout[1].unpack(other, shape[1])

    torch.testing.assert_close(x @ w, x @ dense)
    plan = which("matmul", x, w)
    assert (plan.operator, plan.kernel, plan.reason) == ("matmul", "times", "Dense times sparse") and plan in plans(w)
    left, its = make(CSR(), (3, 7), seed=1)
    with dispatch.observe() as seen:
        torch.testing.assert_close(left @ w, its @ dense)
    assert [kernel.function for *_, kernel, _ in seen] == [both]


def test_any_device():
    """Expansion and the reference run on any device."""
    w = make(NM(2, 4), (8, 12))[0].to("meta")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert F.linear(torch.empty(3, 12, device="meta"), w).shape == (3, 8)
    assert which("linear", (3, 12), w).kernel == "linear_expand"
    assert dispatch.find("linear", "xpu", NM(2, 4)).function.__name__ == "linear_expand"


# the cache of a pattern


def test_tensors_of_one_pattern_share_a_cache():
    w = make(NM(2, 4), (8, 12))[0]
    other = w.with_values(w.parts["values"] * 2)
    for twin in (w.detach(), w.t(), w.clone(), other, w * 2, w.double(), nn.Parameter(w)):
        assert twin.cache is w.cache
    assert w.view(8, 12).cache is w.cache and torch.zeros_like(w).cache is w.cache
    again = sten.from_dense(w.to_dense(), NM(2, 4))
    for twin in (copy.deepcopy(w), pickle.loads(pickle.dumps(w)), w.to("meta"), again):
        assert twin.cache is not w.cache and not twin.cache.plans
    p = nn.Parameter(w)
    F.linear(torch.randn(3, 12), p).sum().backward()
    assert p.grad.cache is w.cache


def test_invalidate_drops_plans():
    w = make(NM(2, 4), (8, 12))[0]
    x = torch.randn(3, 12)
    F.linear(x, w)
    (plan,) = plans(w)
    w.parts["values"].mul_(2)
    F.linear(x, w)
    assert plans(w) == [plan], "values are read where they lie"
    padding.used_slots(w)
    before = w.cache.generation
    other = make(NM(2, 4), (8, 12), seed=1)[0]
    w.parts["index"].copy_(other.parts["index"])
    w.cache.invalidate(w.parts["index"])
    assert not w.cache.plans and w.cache.generation == before + 1 and w.cache.used_slots is None
    torch.testing.assert_close(F.linear(x, w), F.linear(x, w.to_dense()))


def test_a_weight_with_another_pattern_has_another_cache():
    p = nn.Parameter(make(CSR(), (8, 12))[0])
    x, alias = torch.randn(3, 12), p.detach()
    old = p.cache
    F.linear(x, p)
    other, dense = make(CSR(), (8, 12), seed=1)
    p.data = other
    assert p.cache is other.cache and alias.cache is old
    torch.testing.assert_close(F.linear(x, p), F.linear(x, dense))
    torch.testing.assert_close(F.linear(x, alias), F.linear(x, alias.to_dense()))
    with torch.no_grad():
        p.copy_(make(CSR(), (8, 12), seed=2)[0])
    assert p.cache is not other.cache and not p.cache.plans


def test_no_more_than_64_plans():
    w, dense = make(NM(2, 4), (8, 12))
    for tokens in range(150):
        x = torch.randn(tokens, 12)
        torch.testing.assert_close(F.linear(x, w), F.linear(x, dense))
        assert 0 < len(w.cache.plans) <= 64


def test_operands_are_checked_once_per_signature():
    w = make(CSR(), (7, 5))[0]
    good = torch.randn(3, 5), torch.randn(7)
    F.linear(good[0], w, good[1])
    for x, bias in (
        (torch.randn(3, 6), good[1]),
        (good[0], torch.randn(6)),
        (good[0].double(), good[1]),
        (good[0], good[1].double()),
        (torch.randn(()), None),
    ):
        for _ in range(2):
            with pytest.raises(RuntimeError):
                F.linear(x, w, bias)
    with pytest.raises(RuntimeError, match="Expected an input with"):
        torch.randn(3, 5) @ w
    assert len(w.cache.plans) == 1


# interception


def test_private_names_of_torch():
    for name, path in private.PATHS.items():
        value = torch
        for step in path.split("."):
            value = getattr(value, step)
        assert value is not None, f"torch.{path} ({name}) no longer exists: sten works, more slowly"


@pytest.mark.skipif(not cpp.available(), reason="the extension is not built")
def test_facts_in_c_and_in_python():
    """Both tell the same operands apart, and say None of the same."""
    x, half = torch.zeros(4, 8), torch.zeros(4, 8, dtype=torch.bfloat16)
    with FakeTensorMode():
        fake = torch.zeros(4, 8)
    others = x._neg_view(), torch._efficientzerotensor(4, 8), fake, make(CSR(), (7, 5))[0]
    assert all(facts(x, None, each) is None for each in others for facts in (private.facts, private.facts_in_python))
    operands = [
        *[(x,), (nn.Parameter(x),), (x.clone(),), (half,), (x.double(),), (x.t(),), (x.view(8, 4),)],
        *[
            (x.view(2, 2, 8),),
            (x[:1],),
            (x[:, :4],),
            (x.view(-1)[1:9],),
            (x[0],),
            (x[:0],),
            (x[0].expand(4, 8),),
            (torch.zeros(()),),
        ],
        *[(x.to("meta"),), (x, None), (None, x), (x, {}), (x, x), (x, x[0]), (x[0], x), (x[0], x[0]), (None, None), ()],
    ]
    keys, expected = ([facts(*each) for each in operands] for facts in (private.facts, private.facts_in_python))
    assert [[a == b for b in keys] for a in keys] == [[a == b for b in expected] for a in expected]


@pytest.mark.parametrize("recorded", [False, True])
def test_intercepted_calls_store_nothing(recorded):
    w, dense = make(CSR(), (7, 5))
    w = nn.Parameter(w, requires_grad=recorded)
    x, tokens = torch.randn(3, 5), []

    @sten.kernel("linear", weight=CSR, device="cpu", prepare=True)
    def noting(layout, shape, dtype, flags):
        tokens.append(flags.tokens)
        return None

    with torch.autograd.forward_ad.dual_level():
        for _ in range(2):
            torch.testing.assert_close(F.linear(x, w), F.linear(x, dense))
    assert tokens == [None, None] and not w.cache.plans
    F.linear(x, w)
    assert tokens == [None, None, 3] and len(w.cache.plans) == 1


def profiled(call):
    """The result of a call, and the names in its profile."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = call()
    return result, [event.name for event in profile.events()]


@every_layout
@pytest.mark.parametrize("recorded", [False, True])
def test_the_profiler_sees_what_runs_without_it(layout, recorded):
    w = nn.Parameter(make(layout, (8, 12))[0], requires_grad=recorded)
    x = torch.randn(3, 12, requires_grad=recorded)

    def call():
        y = F.linear(x, w)
        return torch.autograd.grad(y.sum(), (x, w)) if recorded else (y,)

    with dispatch.observe() as seen:
        exact = call()
    exact, plans = [t.to_dense() for t in exact], [plan for *_, plan in seen]
    assert len(plans) == (3 if recorded else 1)
    call()
    stored = dict(w.cache.plans)
    got, names = profiled(call)
    assert w.cache.plans == stored
    for one, other in zip(got, exact, strict=True):
        assert torch.equal(one.to_dense(), other)
    for plan in plans:
        variant = f" [{plan.variant}]" if plan.variant else ""
        assert f"sten::{plan.operator}({layout}): {plan.kernel}{variant}" in names


def test_fake_tensors_and_lazy_negations():
    w, dense = make(CSR(), (7, 5))
    with FakeTensorMode() as mode:
        assert F.linear(mode.from_tensor(torch.randn(3, 5)), mode.from_tensor(dense)).shape == (3, 7)
    x = torch.randn(3, 5, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    torch.testing.assert_close(F.linear(x, w), F.linear(x, dense))
    assert not w.cache.plans


@pytest.mark.parametrize("layout", [CSR(), GroupedNM(2, 4, 1), NM(2, 4)], ids=str)
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_a_symbolic_number_of_tokens(layout, without):
    torch._dynamo.reset()
    layer = nn.Linear(12, 8, bias=False).requires_grad_(False)
    sten.sparsify(layer, layout, sparsity=None if layout.rate else 0.5)
    dense = layer.weight.to_dense()
    run = torch.compile(layer.forward, fullgraph=True, dynamic=True, backend="aot_eager")
    with without():
        for tokens in (1, 16, 17, 64):
            x = torch.randn(tokens, 1, 12)
            torch.testing.assert_close(run(x), F.linear(x, dense), atol=1e-5, rtol=1e-5)
    assert not layer.weight.cache.plans


def test_observing_costs_nothing_outside():
    w = make(CSR(), (7, 5))[0]
    x = torch.randn(3, 5)
    F.linear(x, w)
    before = plans(w)
    with dispatch.observe() as seen:
        F.linear(x, w)
        F.linear(x, w)
    F.linear(x, w)
    assert [(name, layout) for name, layout, *_ in seen] == [("linear", CSR())] * 2
    assert set(before) <= set(plans(w)) and len(plans(w)) == 2


def frames(call) -> list[str]:
    """The Python functions that a call enters, the second time that it is made."""
    seen: list[str] = []
    call()
    sys.setprofile(lambda frame, event, _: seen.append(frame.f_code.co_name) if event == "call" else None)
    try:
        call()
    finally:
        sys.setprofile(None)
    return seen[1:]


@pytest.mark.parametrize("layout", [CSR(), GroupedNM(2, 4, 1)], ids=str)
def test_how_many_python_frames_a_product_takes(layout):
    if not cpp.available():
        pytest.skip("the extension is not built")
    w, x, bias = make(layout, (8, 12))[0], torch.randn(3, 12), torch.randn(8)
    for call in (lambda: F.linear(x, w), lambda: F.linear(x, w, bias)):
        assert len(frames(call)) <= 9, frames(call)
    p = nn.Parameter(w)
    assert len(frames(lambda: F.linear(x, p, bias))) <= 18


# dense gradients


@every_layout
def test_dense_gradient(layout):
    w, dense = make(layout, (8, 12), torch.float64)
    kernels, filters = make(layout, (6, 4, 3, 3), torch.float64)
    x, image = torch.randn(5, 12, dtype=torch.float64), torch.randn(2, 4, 7, 6, dtype=torch.float64)
    index = torch.tensor([[1, 3], [3, 0]])
    for call, weight, twin in (
        (lambda t: F.linear(x, t), w, dense),
        (lambda t: x[:, :8] @ t, w, dense),
        (lambda t: F.linear(x[:, :8], t.t()), w, dense),
        (lambda t: F.embedding(index, t, padding_idx=3), w, dense),
        (lambda t: F.conv2d(image, t, stride=2, padding=1), kernels, filters),
    ):
        got, twin, grads = nn.Parameter(weight), nn.Parameter(twin), []
        got.cache.dense_gradient = grads.append
        above = torch.randn_like(call(twin))
        call(got).backward(above)
        call(twin).backward(above)
        got.cache.dense_gradient = None
        assert len(grads) == 1
        torch.testing.assert_close(grads[0], twin.grad)
        torch.testing.assert_close(got.grad.to_dense(), twin.grad * weight.mask())
