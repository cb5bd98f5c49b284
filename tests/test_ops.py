"""Operators on a SparseTensor against the same operators on the masked dense tensor."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from weights import LAYOUTS, every_layout, make, one_sentence, stored

import sten
from sten import dispatch, which
from sten.backends import cpp
from sten.layouts import BSR, CSR, NM, GroupedNM, Masked
from sten.ops import padding

CONV = [
    ((6, 4, 3, 3), {"stride": 1, "padding": 1}),
    ((6, 4, 3, 2), {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)}),
    ((6, 2, 3, 3), {"padding": "same", "groups": 2, "dilation": 2}),
    ((6, 4, 2, 2), {"padding": "same"}),
    ((8, 1, 3, 3), {"padding": "valid", "groups": 8}),
    ((6, 5, 1, 1), {}),
    ((6, 5, 1, 1), {"stride": 2, "padding": 1}),
]


def close(got, want, atol=1e-5):
    assert not isinstance(got, sten.SparseTensor)
    assert got.shape == want.shape and got.dtype == want.dtype
    torch.testing.assert_close(got, want, atol=atol, rtol=1e-5)


# products


@every_layout
@pytest.mark.parametrize("shape", [(8, 12), (7, 5), (16, 16), (1, 9)], ids=str)
@pytest.mark.parametrize("x_shape", [(3,), (), (0,), (2, 4), (33,), (2, 0)], ids=str)
def test_linear(layout, shape, x_shape, strictly, poisoned):
    w, dense = make(layout, shape)
    for bias in (
        None,
        torch.randn(shape[0]),
        torch.randn(shape[0], 3)[:, 1],
        torch.randn(1).expand(shape[0]),
        torch.randn(1),
        torch.randn(()),
    ):
        x = torch.randn(*x_shape, shape[1])
        close(F.linear(x, w, bias), F.linear(x, dense, bias))
        close(F.linear(x, nn.Parameter(w), bias).detach(), F.linear(x, dense, bias))
        apart = torch.randn(*x_shape, 2 * shape[1])[..., ::2]
        close(F.linear(apart, w, bias), F.linear(apart, dense, bias))


@every_layout
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_linear_in_other_dtypes(layout, dtype, strictly):
    w, dense = make(layout, (7, 5), dtype)
    x = torch.randn(3, 5, dtype=dtype)
    torch.testing.assert_close(F.linear(x, w), F.linear(x, dense))


@every_layout
@pytest.mark.parametrize("flip", [False, True])
def test_matmul(layout, flip, strictly):
    w, dense = make(layout, (7, 5))
    if flip:
        w, dense = w.t(), dense.t()
    rows, columns = dense.shape
    for x in (
        torch.randn(rows),
        torch.randn(3, rows),
        torch.randn(2, 3, rows),
        torch.randn(rows, 3).t(),
        torch.randn(0, rows),
    ):
        for product in (torch.matmul, lambda a, b: a @ b, torch.Tensor.matmul):
            close(product(x, w), product(x, dense))
    for x in (torch.randn(columns), torch.randn(columns, 3), torch.randn(2, columns, 3), torch.randn(columns, 0)):
        for product in (torch.matmul, lambda a, b: a @ b, torch.Tensor.matmul):
            close(product(w, x), product(dense, x))
    x, b = torch.randn(3, rows), torch.randn(columns)
    close(torch.mm(x, w), x @ dense)
    close(x.mm(w), x @ dense)
    close(torch.addmm(b, x, w), torch.addmm(b, x, dense))
    full = torch.randn(3, columns)
    close(torch.addmm(full, x, w, beta=0.5, alpha=2), torch.addmm(full, x, dense, beta=0.5, alpha=2))
    close(torch.addmm(torch.zeros(2), w, torch.ones(columns, 2)), dense @ torch.ones(columns, 2))


def test_sparse_times_sparse_warns_and_runs_dense():
    a, da = make(CSR(), (7, 5))
    b, db = make(CSR(), (5, 7), seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        close(a @ b, da @ db)
        close(F.linear(a, make(CSR(), (7, 5))[0]), da @ da.t())
    with sten.strict(), pytest.raises(sten.DensifyError):
        a @ b


def test_wrong_operands():
    w = make(CSR(), (7, 5))[0]
    for call in (
        lambda: F.linear(torch.ones(2, 7), w),
        lambda: F.linear(torch.ones(2, 5, dtype=torch.float64), w),
        lambda: torch.ones(2, 5) @ w,
        lambda: F.conv2d(torch.ones(1, 3, 5, 5), make(CSR(), (6, 4, 3, 3))[0]),
        lambda: F.conv2d(torch.ones(1, 4, 5, 5).double(), make(CSR(), (6, 4, 3, 3))[0]),
        lambda: F.linear(torch.ones(2, 5), w, torch.ones(3)),
        lambda: F.conv2d(torch.ones(1, 4, 5, 5), make(CSR(), (6, 4, 3, 3))[0], torch.ones(1)),
        lambda: F.embedding(torch.tensor([7]), w),
        lambda: F.embedding(torch.tensor([-1]), w),
        lambda: F.embedding(torch.tensor([0]), w, max_norm=1.0),
    ):
        with pytest.raises((RuntimeError, IndexError)) as error:
            call()
        assert one_sentence(error)


# convolutions


@every_layout
@pytest.mark.parametrize("shape, geometry", CONV, ids=str)
def test_conv2d(layout, shape, geometry, strictly, poisoned):
    w, dense = make(layout, shape)
    x, bias = torch.randn(2, shape[1] * geometry.get("groups", 1), 7, 6), torch.randn(shape[0])
    close(F.conv2d(x, w, bias, **geometry), F.conv2d(x, dense, bias, **geometry))
    close(F.conv2d(x[0], w, **geometry), F.conv2d(x[0], dense, **geometry))
    last = x.to(memory_format=torch.channels_last)
    close(F.conv2d(last, w, bias, **geometry), F.conv2d(x, dense, bias, **geometry))
    close(F.conv2d(x[:0], w, bias, **geometry), F.conv2d(x[:0], dense, bias, **geometry))


@every_layout
def test_conv1d_and_conv3d(layout, strictly):
    w, dense = make(layout, (6, 4, 3))
    x = torch.randn(2, 4, 9)
    close(F.conv1d(x, w, stride=2, padding=1), F.conv1d(x, dense, stride=2, padding=1))
    w, dense = make(layout, (6, 4, 2, 1, 2))
    x = torch.randn(2, 4, 3, 4, 3)
    close(F.conv3d(x, w, padding="same"), F.conv3d(x, dense, padding="same"))


def test_padding_modes_of_a_module():
    conv = nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")
    w, dense = make(NM(2, 4), (6, 4, 3, 3))
    x = torch.randn(1, 4, 5, 5)
    conv.weight = nn.Parameter(dense)
    want = conv(x)
    conv.weight = nn.Parameter(w)
    close(conv(x), want)


# embedding


@every_layout
def test_embedding(layout, strictly):
    w, dense = make(layout, (9, 7))
    for index in (torch.tensor([3, 3, 8]), torch.tensor([[0, 1], [8, 2]]), torch.tensor(4), torch.zeros(0, 2).long()):
        close(F.embedding(index, w), F.embedding(index, dense))
        close(F.embedding(index.int(), w, padding_idx=3), F.embedding(index, dense, padding_idx=3))


# shape


@every_layout
def test_transposes(layout, strictly):
    w, dense = make(layout, (7, 5))
    for flip in (
        lambda t: t.t(), lambda t: t.T, lambda t: t.mT, lambda t: t.transpose(0, 1), lambda t: t.transpose(-1, -2),
        lambda t: t.permute(1, 0), torch.t, lambda t: t.t().t(), lambda t: t.transpose(0, 0),
        lambda t: t.permute(0, 1),
    ):  # fmt: skip
        got = flip(w)
        assert isinstance(got, sten.SparseTensor) and got.stride() == flip(dense).stride()
        assert torch.equal(got.to_dense(), flip(dense))
        assert got.parts["values"].data_ptr() == w.parts["values"].data_ptr()
    conv = make(layout, (6, 4, 3, 3))[0]
    with pytest.raises(RuntimeError):
        conv.t()
    with pytest.raises(sten.DensifyError):
        conv.permute(1, 0, 2, 3)
    assert w.view(7, 5).same_pattern(w) and w.reshape(-1, 5).same_pattern(w) and w.view_as(dense).same_pattern(w)


def test_other_operators_warn_and_run_dense():
    w, dense = make(Masked(), (7, 5))
    for call in (
        lambda t: t[1:3],
        lambda t: t.flatten(),
        lambda t: t.cumsum(0),
        lambda t: torch.cat([t, t]),
        lambda t: t.view(-1),
    ):
        with sten.strict(), pytest.raises(sten.DensifyError):
            call(w)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            close(call(w), call(dense))
    with pytest.raises(ValueError, match=r"off the pattern.*cumsum_"):
        w.cumsum_(0)


def test_one_warning_for_an_operator_and_a_layout():
    w = make(BSR((2, 2)), (7, 5))[0]
    dispatch._warned.clear()
    with pytest.warns(UserWarning, match="cumprod.*BSR"):
        w.cumprod(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        w.cumprod(0)


# reductions


@every_layout
def test_reductions(layout, strictly):
    w, dense = make(layout, (7, 5), torch.float64)
    for reduce in (
        torch.sum, torch.mean, torch.norm, torch.linalg.vector_norm, lambda t: t.norm(1),
        lambda t: t.norm(float("inf")),
        lambda t: t.norm(2, dim=1), lambda t: t.norm(p=0), lambda t: t.norm(dim=(0, 1), keepdim=True),
        lambda t: t.sum(1),
        lambda t: t.sum((0, 1)), lambda t: t.mean(0, keepdim=True), lambda t: t.max(), lambda t: t.min(),
        lambda t: t.amax(1),
        lambda t: t.count_nonzero(), lambda t: t.count_nonzero(0), lambda t: t.sum(dtype=torch.float32),
        lambda t: torch.linalg.norm(t), lambda t: t.isnan().any(), lambda t: (t != 0).all(),
        lambda t: torch.linalg.vector_norm(t, float("-inf")),
    ):  # fmt: skip
        close(reduce(w), reduce(dense))


def test_norm_of_nothing():
    w = sten.from_dense(torch.zeros(3, 4), CSR())
    assert w.norm() == 0 and w.norm(float("inf")) == 0 and w.sum() == 0
    close(F.linear(torch.ones(2, 4), w), torch.zeros(2, 3))


# pointwise


@every_layout
def test_out_of_place(layout, strictly):
    w, dense = make(layout, (7, 5), torch.float64)
    mask, other = w.mask(), w.detach() * 2 + w
    twin = other.to_dense()
    factor = torch.randn(7, 5, dtype=torch.float64)
    for name in KEEP_ZERO:
        f = getattr(torch, name)
        got = f(w)
        assert isinstance(got, sten.SparseTensor) and got.same_pattern(w), name
        torch.testing.assert_close(got.to_dense(), f(dense), equal_nan=True)
        stored(f(w.abs()))
    for f in (
        lambda t, o, _: t * 3, lambda t, o, _: 3 * t, lambda t, o, _: t / 4, lambda t, o, _: t + o,
        lambda t, o, _: t - o,
        lambda t, o, _: t * o, lambda t, o, _: -t, lambda t, o, _: t**2, lambda t, o, _: t.add(o, alpha=0.5),
        lambda t, o, d: t * d, lambda t, o, d: d * t, lambda t, o, d: t / d, lambda t, o, d: t * d[:1],
        lambda t, o, d: t * d[0],
        lambda t, o, _: torch.maximum(t, o), lambda t, o, _: torch.lerp(t, o, 0.3),
        lambda t, o, _: torch.addcmul(t, t, o),
        lambda t, o, d: t * (d > 0), lambda t, o, _: t * torch.tensor(2.0), lambda t, o, d: F.gelu(t),
    ):  # fmt: skip
        got, want = f(w, other, factor), f(dense, twin, factor)
        assert isinstance(got, sten.SparseTensor), want
        torch.testing.assert_close(got.to_dense(), want)
        stored(got)
    stored(w / other)
    torch.testing.assert_close((w / other).to_dense(), torch.where(mask, dense / twin, 0))
    stored(torch.addcdiv(w, w, other))


@every_layout
def test_dense_results(layout, strictly):
    w, dense = make(layout, (7, 5), torch.float64)
    other, twin = make(layout, (7, 5), torch.float64, seed=6)
    assert not w.same_pattern(other)
    plain = torch.randn(7, 5, dtype=torch.float64)
    for f in (
        lambda t, o, d: t.exp(), lambda t, o, d: t + 1, lambda t, o, d: 1 - t, lambda t, o, d: t.cos(),
        lambda t, o, d: t + d,
        lambda t, o, d: d - t, lambda t, o, d: t + o, lambda t, o, d: t == 0, lambda t, o, d: t > o,
        lambda t, o, d: t.sigmoid(),
        lambda t, o, d: d / (t + 1), lambda t, o, d: d / t, lambda t, o, d: 1 / t, lambda t, o, d: t**0,
        lambda t, o, d: 2**t,
        lambda t, o, d: t * d[None], lambda t, o, d: t.clamp(0.1), lambda t, o, d: F.softmax(t, -1),
        lambda t, o, d: t**d.abs(),
        lambda t, o, d: torch.where(d > 0, t, o), lambda t, o, d: torch.addcmul(d, t, o),
        lambda t, o, d: torch.lerp(t, d, 0.5),
    ):  # fmt: skip
        got = f(w, other, plain)
        assert not isinstance(got, sten.SparseTensor)
        torch.testing.assert_close(got, f(dense, twin, plain), equal_nan=True)
    torch.testing.assert_close((w * other).to_dense(), dense * twin)


KEEP_ZERO = ["neg", "abs", "sign", "sqrt", "square", "relu", "tanh", "sin", "atan", "expm1", "log1p", "floor", "erf"]
IN_PLACE = [
    lambda t, o: t.add_(1), lambda t, o: t.sub_(0.5), lambda t, o: t.mul_(3), lambda t, o: t.div_(3),
    lambda t, o: t.exp_(),
    lambda t, o: t.fill_(2), lambda t, o: t.sqrt_(), lambda t, o: t.pow_(2), lambda t, o: t.reciprocal_(),
    lambda t, o: t.clamp_(0.1, 0.2), lambda t, o: t.add_(o), lambda t, o: t.add_(o, alpha=2), lambda t, o: t.mul_(o),
    lambda t, o: t.div_(o), lambda t, o: t.lerp_(o, 0.25), lambda t, o: t.addcmul_(o, o, value=0.5),
    lambda t, o: t.zero_(),
    lambda t, o: t.addcdiv_(o, o.abs().add_(1e-3), value=2.0), lambda t, o: t.neg_(), lambda t, o: t.copy_(o),
    lambda t, o: t.abs_().rsqrt_(), lambda t, o: t.erfinv_().nan_to_num_(),
]  # fmt: skip


@every_layout
@pytest.mark.parametrize("change", IN_PLACE)
def test_in_place(layout, change, strictly):
    """Only on the stored entries, as on a dense tensor of those entries; padding stays zero."""
    for flip in (False, True):
        w, dense = make(layout, (7, 5), torch.float64)
        other = w * 3
        if flip:
            w, dense, other = w.t(), dense.t(), other.t()
        want = change(dense.clone(), 3 * dense)
        assert change(w, other) is w
        torch.testing.assert_close(w.to_dense(), torch.where(w.mask(), want, 0), equal_nan=True)
        if not want[w.mask()].isnan().any():
            stored(w)
            slots = torch.where(padding._compute_used_slots(w), 0, w.parts["values"])
            assert not slots.any()


@every_layout
def test_random_fills(layout):
    w = make(layout, (7, 5))[0]
    for fill in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_, nn.init.xavier_normal_, nn.init.ones_):
        fill(w)
        stored(w)
        assert bool((w.to_dense() != 0).eq(w.mask()).all())
    w = nn.Parameter(w)
    nn.init.constant_(w, 2.0)
    assert torch.equal(w.detach().to_dense(), 2 * w.mask().float())


@every_layout
def test_dense_operands_in_place(layout, strictly):
    w, dense = make(layout, (7, 5))
    plain = torch.randn(7, 5)
    for change in (
        lambda t, o: t.add_(o),
        lambda t, o: t.copy_(o),
        lambda t, o: t.sub_(o),
        lambda t, o: t.lerp_(o, 0.5),
    ):
        twin = w.clone()
        with pytest.raises(ValueError, match="off the pattern") as error:
            change(twin, plain)
        assert one_sentence(error) and torch.equal(twin.to_dense(), dense)
        torch.testing.assert_close(change(twin, plain * w.mask()).to_dense(), change(dense.clone(), plain * w.mask()))
        stored(twin)
    for change in (lambda t: t.mul_(plain), lambda t: t.div_(plain), lambda t: t.mul_(plain[:1])):
        torch.testing.assert_close(change(w.clone()).to_dense(), change(dense.clone()))
    hit = plain > 0
    stored(w.clone().masked_fill_(hit, 0.0))
    torch.testing.assert_close(w.clone().masked_fill_(hit, 0).to_dense(), dense.masked_fill(hit, 0))
    here = hit & w.mask()
    torch.testing.assert_close(w.clone().masked_fill_(here, 2.0).to_dense(), dense.masked_fill(here, 2.0))
    with pytest.raises(ValueError, match="off the pattern"):
        w.clone().masked_fill_(~w.mask(), 2.0)
    plain.add_(w).mul_(w)
    assert not isinstance(plain, sten.SparseTensor)


def test_used_slots_are_cached_until_a_part_changes():
    w = make(NM(2, 4), (7, 5))[0]
    used = padding.used_slots(w)
    assert used is padding.used_slots(w * 2) and not used.all()
    w.parts["index"].add_(0)
    assert padding.used_slots(w) is not used
    assert padding.used_slots(make(NM(2, 4), (8, 12))[0]) is None


# fused layers


def test_recurrent_layers_warn_and_run_dense():
    for kind in (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell):
        layer = kind(6, 8)
        twin = kind(6, 8)
        twin.load_state_dict(layer.state_dict())
        name = "weight_ih" if kind is nn.LSTMCell else "weight_ih_l0"
        dense = getattr(layer, name).detach()
        w = sten.from_dense(dense, NM(2, 4))
        setattr(layer, name, nn.Parameter(w))
        getattr(twin, name).data.mul_(w.mask())
        x = torch.randn(3, 6) if kind is nn.LSTMCell else torch.randn(4, 3, 6)
        dispatch._warned.clear()
        with pytest.warns(UserWarning, match="has no rule"):
            out = layer(x)[0]
        torch.testing.assert_close(out, twin(x)[0])
        out.sum().backward()
        twin(x)[0].sum().backward()
        torch.testing.assert_close(getattr(layer, name).grad.to_dense(), getattr(twin, name).grad * w.mask())
        with sten.strict(), pytest.raises(sten.DensifyError):
            layer(x)


# which


@every_layout
def test_which_plans(layout):
    w = make(layout, (7, 5))[0]
    chosen = [
        which("linear", torch.ones(2, 5), w),
        which("linear", (2, 7), w.t()),
        which("matmul", (2, 7), w),
        which("matmul", (5,), w.t()),
    ]
    assert [a.operator for a in chosen] == ["linear", "linear_grad_input", "linear_grad_input", "linear"]
    for plan in chosen + [which("embedding", (3,), w), which("linear_grad_weight", (2, 7), w)]:
        assert plan.kernel != "reference" and len(plan.reason) > 20 and str(layout) in str(plan)
    with dispatch.observe() as seen:
        F.linear(torch.ones(2, 5), w)
        torch.ones(2, 7) @ w
    assert [(name, spec) for name, spec, *_ in seen] == [("linear", layout), ("linear_grad_input", layout)]


def test_which_on_bad_input():
    w = make(CSR(), (7, 5))[0]
    for call in (
        lambda: which("lineal", (2, 5), w),
        lambda: which("linear", (2, 6), w),
        lambda: which("linear", (), w),
        lambda: which("linear", "x", w),
        lambda: which("linear", (2, 5), torch.ones(7, 5)),
        lambda: which("conv2d", (2, 4, 5, 5), w),
    ):
        with pytest.raises((ValueError, TypeError)) as error:
            call()
        assert one_sentence(error)


def test_no_warning_for_any_built_in(recwarn):
    for layout in LAYOUTS:
        w = nn.Parameter(make(layout, (8, 12))[0])
        F.linear(torch.randn(2, 12, requires_grad=True), w).sum().backward()
        F.embedding(torch.tensor([1]), w).sum().backward()
        (torch.ones(2, 8) @ w).sum().backward()
    assert not [w for w in recwarn if "sten" in str(w.message)]


@pytest.mark.parametrize("layout", [CSR(), GroupedNM(2, 4, 1)], ids=str)
def test_float32_on_the_cpu_runs_compiled(layout):
    if not cpp.available():
        pytest.skip("the extension is not built")
    w = make(layout, (7, 5))[0]
    assert which("linear", (20, 5), w).variant == "float32"
    assert which("linear", (2, 5), w.double()).kernel == "reference"


@pytest.mark.parametrize("layout", [BSR((4, 3)), GroupedNM(2, 4, 1)], ids=str)
def test_kernel_size_one_is_a_product(layout):
    if not cpp.available():
        pytest.skip("the extension is not built")
    w, dense = make(layout, (8, 12, 1, 1))
    x, bias = torch.randn(2, 12, 5, 4), torch.randn(8)
    last = x.to(memory_format=torch.channels_last)
    assert which("conv2d", last, w).variant == "float32"
    for operand, weight in ((x, w), ((2, 12, 5, 4), w), (last, make(layout, (8, 12, 3, 3))[0])):
        assert which("conv2d", operand, weight).kernel in ("band_conv", "grouped_nm_conv")
    assert which("conv2d", last, w.double()).kernel == "reference"
    for picture in (x, x.to(memory_format=torch.channels_last), x[:, :, ::2], x[:0]):
        for geometry in ({}, {"stride": (2, 1), "padding": (1, 0)}):
            got, want = F.conv2d(picture, w, bias, **geometry), F.conv2d(picture, dense, bias, **geometry)
            close(got, want)
            assert got.stride() == want.stride() or 0 in got.shape or not picture.is_contiguous()
    w, dense = make(layout, (8, 3, 1))
    x = torch.randn(2, 6, 5)
    close(F.conv1d(x, w, groups=2), F.conv1d(x, dense, groups=2))
    close(F.conv1d(x[:, :3], w), F.conv1d(x[:, :3], dense))
