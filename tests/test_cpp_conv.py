"""The direct convolution of the CPU against float64 convolutions with the unpacked weight."""

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sten
from sten.backends import cpp
from sten.backends.cpu_conv import DIRECT

if not cpp.available():
    pytest.skip("the extension sten._C is not built", allow_module_level=True)

LAYOUTS = [
    *(sten.CSR(), sten.FanIn(), sten.VectorNM(1, 4, 4), sten.VectorNM(2, 5, 3), sten.VectorNM(1, 2, 8)),
    *(sten.BSR((4, 4)), sten.BSR((1, 8)), sten.BSR((3, 2)), sten.BSR((2, 1)), sten.BSR((6, 16))),
    *(sten.GroupedNM(2, 4, 2), sten.GroupedNM(1, 10, 2), sten.GroupedNM(3, 5, 1), sten.GroupedNM(5, 6, 3)),
]


def random_weight(layout, shape, sparsity=0.8, empty=False):
    """A sparse weight; with `empty`, its second output has no entries."""
    score = torch.randn(shape)
    mask = layout.mask(score) if layout.rate is not None else layout.mask(score, sparsity)
    if empty:
        mask[1] = False
    return sten.from_dense(score * mask, layout, mask)


def assert_conv(x, weight, bias=None, **geometry):
    """Check F.conv2d against float64, within float32 rounding of the sum of magnitudes; return the result."""
    got, double = F.conv2d(x, weight, bias, **geometry), None if bias is None else bias.double()
    dense = weight.to_dense().double()
    exact = F.conv2d(x.double(), dense, double, **geometry)
    scale = F.conv2d(x.double().abs(), dense.abs(), None if bias is None else double.abs(), **geometry)
    assert got.shape == exact.shape and got.dtype == torch.float32
    assert ((got - exact).abs() <= 2e-6 * scale + 1e-30).all(), (weight, x.shape, geometry)
    return got


def is_direct(x, weight, **geometry):
    """Whether the Plan of the call is a kernel's, not expansion to dense."""
    return sten.which("conv2d", x, weight, **geometry).kernel.endswith("_conv")


def expands_for_speed(weight):
    """Whether so many entries are stored that a dense convolution of many pixels is faster."""
    return weight.parts["values"].numel() > DIRECT[type(weight.sparse_layout)][1] * weight.numel()


@pytest.mark.parametrize("width", [1, 3, 4, 7, 8, 14, 16, 17, 28, 33, 56])
def test_widths(instruction_set, poisoned, width):
    """Images narrower than a vector, and rows whose last vectors overlap."""
    torch.manual_seed(width)
    for layout in LAYOUTS:
        weight = random_weight(layout, (9, 20, 3, 3))
        for height, stride in ((width, 1), (5, 2)):
            x = torch.randn(2, 20, height, width)
            assert is_direct(x, weight, padding=1, stride=stride) or expands_for_speed(weight)
            assert_conv(x, weight, torch.randn(9), padding=1, stride=stride)


@pytest.mark.parametrize("seed", range(4))
def test_fuzz(instruction_set, poisoned, seed):
    """Random shapes, kernels, strides, paddings, dilations, groups and threads."""
    torch.manual_seed(seed)
    choice, threads = random.Random(seed).choice, torch.get_num_threads()
    for _ in range(60):
        groups, channels, kernel = (
            choice([1, 1, 1, 2, 3]),
            choice([2, 3, 8, 40]),
            [choice([1, 2, 3, 3, 5]) for _ in "hw"],
        )
        sides = {"stride": [1, 1, 2, 3], "dilation": [1, 1, 2, 3], "padding": [0, 1, 1, 2, 4]}
        sides = {name: [choice(values) for _ in "hw"] for name, values in sides.items()}
        size = [choice([1, 2, 4, 5, 8, 9, 15, 16, 31, 32, 40, 64]) for _ in "hw"]
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, sides["dilation"], strict=True)]
        if any(n + 2 * p < r for n, p, r in zip(size, sides["padding"], reach, strict=True)):
            continue
        outputs = groups * choice([1, 2, 8, 9, 20])
        weight = random_weight(choice(LAYOUTS), (outputs, channels, *kernel), choice([0.5, 0.9]))
        x = torch.randn(choice([0, 1, 1, 3]), channels * groups, *size)
        torch.set_num_threads(choice([1, 2]))
        assert_conv(x, weight, choice([None, torch.randn(outputs)]), groups=groups, **sides)
    torch.set_num_threads(threads)


def test_many_channels(instruction_set, poisoned):
    """Several blocks of channels, whose sums are kept in the output or beside it."""
    torch.manual_seed(0)
    for size in ((3, 3), (9, 40), (2, 120), (10, 16)):
        weight = random_weight(sten.CSR(), (17, 200, 3, 3), 0.7)
        assert_conv(torch.randn(3, 200, *size), weight, torch.randn(17), padding=1)
        weight = random_weight(sten.CSR(), (17, 200, 1, 1), 0.5)
        assert_conv(torch.randn(3, 200, *size), weight)


def test_empty_rows_and_memory_formats(instruction_set):
    torch.manual_seed(0)
    for layout in (sten.FanIn(), sten.CSR()):
        weight, x = random_weight(layout, (6, 10, 3, 3), empty=True), torch.randn(2, 10, 9, 18)
        for bias in (None, torch.randn(6)):
            assert_conv(x, weight, bias, padding=1)
            last = assert_conv(x.to(memory_format=torch.channels_last), weight, bias, padding=1)
            assert last.is_contiguous(memory_format=torch.channels_last) and not last.is_contiguous()
            assert_conv(x[..., ::2], weight, bias, stride=(2,))
            assert_conv(x[:, :, :, 1:17], weight, bias, padding="same")
        assert F.conv2d(x[0], weight).shape == (6, 7, 16)


@pytest.mark.parametrize("layout", [sten.VectorNM(2, 4, 4), sten.BSR((3, 4)), sten.GroupedNM(2, 4, 2)], ids=str)
def test_infinity_stays_in_its_channel(instruction_set, layout):
    """Columns of padding never multiply a pixel, and pixels beside an image are zeros."""
    torch.manual_seed(0)
    weight = random_weight(layout, (8, 5, 3, 3))
    x = torch.full((1, 5, 6, 6), torch.inf)
    dense = F.conv2d(x, weight.to_dense().abs(), padding=1)
    got = F.conv2d(x, sten.from_dense(weight.to_dense().abs(), layout, weight.to_dense() != 0), padding=1)
    assert torch.equal(got.isnan(), torch.zeros_like(got, dtype=torch.bool))
    assert torch.isfinite(got).sum() >= torch.isfinite(dense).sum()
    hot = torch.randn(1, 5, 6, 6)
    hot[:, 2] = torch.inf
    clean = (weight.to_dense()[:, 2] == 0).flatten(1).all(1)
    want = F.conv2d(hot[:, [0, 1, 3, 4]], weight.to_dense()[:, [0, 1, 3, 4]], padding=1)
    torch.testing.assert_close(F.conv2d(hot, weight, padding=1)[:, clean], want[:, clean], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", [*LAYOUTS[:3], *LAYOUTS[5:7], *LAYOUTS[10:12]], ids=str)
def test_gradients_dtypes_and_conv1d(layout):
    torch.manual_seed(0)
    weight = random_weight(layout, (8, 6, 3, 3))
    dense, x = weight.to_dense().requires_grad_(), torch.randn(2, 6, 9, 9, requires_grad=True)
    weight, y = weight.requires_grad_(), torch.randn(2, 6, 9, 9)
    y.copy_(x.detach()).requires_grad_()
    F.conv2d(x, weight, stride=2, padding=1).square().sum().backward()
    F.conv2d(y, dense, stride=2, padding=1).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)
    kept = weight.detach().to_dense() != 0
    torch.testing.assert_close(weight.grad.to_dense()[kept], dense.grad[kept], rtol=1e-4, atol=1e-4)
    for dtype in (torch.bfloat16, torch.float16):
        low, image = weight.detach().to(dtype), torch.randn(2, 6, 9, 9).to(dtype)
        exact = F.conv2d(image.float(), low.to_dense().float()).to(dtype)
        torch.testing.assert_close(F.conv2d(image, low), exact, rtol=1e-2, atol=1e-2)
    line, signal = random_weight(layout, (8, 6, 5)), torch.randn(3, 6, 40)
    assert is_direct(signal, line, padding=2)
    for geometry in ({}, {"padding": 2, "stride": 2}, {"dilation": 3}):
        torch.testing.assert_close(
            F.conv1d(signal, line, torch.ones(8), **geometry),
            F.conv1d(signal, line.to_dense(), torch.ones(8), **geometry),
        )


def test_compiled_and_checked():
    torch.manual_seed(0)
    torch.compiler.reset()
    weight, x = random_weight(sten.CSR(), (6, 4, 3, 3)), torch.randn(2, 4, 8, 8)
    module = nn.Conv2d(4, 6, 3, stride=2, padding=1)
    module.weight = nn.Parameter(weight, requires_grad=False)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), F.conv2d(x, weight.to_dense(), module.bias, 2, 1))
    crow, col, values = (weight.parts[name] for name in ("crow", "col", "values"))
    geometry = (36, False, [3, 3, 2, 2, 1, 1, 1, 1, 1], 6)
    torch.library.opcheck(torch.ops.sten.band_conv2d.default, (x, values, crow, col, None, 1, *geometry))
    parts = random_weight(sten.GroupedNM(2, 4, 3), (6, 4, 3, 3)).parts
    operands = (x, parts["values"], parts["index"], None, 2, 4, 3, *geometry[2:])
    torch.library.opcheck(torch.ops.sten.grouped_nm_conv2d.default, operands)


def test_what_expands():
    """Which says why: depthwise, three dimensions, other layouts, too many entries."""
    image, csr = (1, 8, 40, 40), sten.CSR()
    cases = [
        (csr, (8, 1, 3, 3), (1, 8, 40, 40), "depthwise"),
        (csr, (8, 8, 3, 3, 3), (1, 8, 9, 9, 9), "three dimensions"),
        (sten.NM(2, 4), (8, 8, 3, 3), image, "for NM only"),
        (sten.GroupedNM(2, 3, 2), (9, 8, 3, 3), image, "a dense convolution is faster"),
        (sten.FanIn(), (8, 4, 3, 3), image, "groups=1"),
        (sten.VectorNM(9, 10, 4), (8, 8, 3, 3), image, "a dense convolution is faster"),
    ]
    for layout, shape, size, reason in cases:
        weight = random_weight(layout, shape) if layout.rate is None else sten.from_dense(torch.ones(shape), layout)
        plan = sten.which("conv2d", size, weight)
        assert plan.kernel == "reference" and reason in plan.reason, plan
    few = random_weight(csr, (8, 8, 3, 3), 0.2)
    assert is_direct((1, 8, 9, 9), few) and not is_direct(image, few)


def wrong_calls():
    """Each way to call the operator wrongly, and a part of its message."""
    weight, x = random_weight(sten.CSR(), (6, 4, 3, 3)), torch.randn(2, 4, 8, 8)
    crow, col, values = (weight.parts[name] for name in ("crow", "col", "values"))
    usual = {"kernel_size": [3, 3], "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1]}

    def call(x=x, crow=crow, col=col, bias=None, columns=36, groups=1, last=False, **sides):
        geometry = [*itertools.chain(*{**usual, **sides}.values()), groups]
        torch.ops.sten.band_conv2d(x, values, crow, col, bias, 1, columns, last, geometry, 6)

    return call, [
        ({"x": x.double()}, "dtype"),
        ({"x": x[0]}, "Expected x (images"),
        ({"columns": 35}, "Expected the columns of 4 channels by 9"),
        ({"columns": 27, "last": True}, "Expected the columns of 4 channels by 9"),
        ({"groups": 4, "columns": 9}, "in 4 groups"),
        ({"bias": torch.ones(5)}, "bias of 6"),
        ({"stride": [0, 1]}, "stride"),
        ({"padding": [-1, 1]}, "padding of at least 0"),
        ({"padding": [1, 1, 1]}, "Expected a geometry of nine numbers"),
        ({"dilation": [9, 1]}, "at least 19 pixels"),
        ({"padding": [1, 500000000]}, "Expected an image of fewer"),
        ({"col": col + 36}, "columns below 36"),
        ({"crow": crow * 5}, "never falls"),
    ]


@pytest.mark.parametrize("case", range(13))
def test_wrong_calls_raise(case):
    call, cases = wrong_calls()
    arguments, message = cases[case]
    with pytest.raises((RuntimeError, ValueError)) as caught:
        call(**arguments)
    assert message in str(caught.value)
