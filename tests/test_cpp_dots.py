"""NM on the CPU, few tokens of VectorNM, BSR, FanIn and CSR, and bfloat16 of all."""

import pytest
import torch
import torch.nn.functional as F

import sten
from sten.backends import cpp

if not cpp.available():
    pytest.skip("the extension sten._C is not built", allow_module_level=True)

TOKENS = (0, 1, 2, 3, 7, 49, 130)
SHAPES = [(3, 17), (100, 63), (70, 520)]
NMS = [sten.NM(16, 32), sten.NM(5, 16), sten.NM(2, 8), sten.NM(2, 4), sten.NM(1, 4), sten.NM(3, 7), sten.NM(9, 64)]
BANDS = [
    sten.VectorNM(2, 4, 128),
    sten.VectorNM(1, 8, 16),
    sten.VectorNM(1, 16, 40),
    sten.VectorNM(1, 4, 5),
    sten.BSR((16, 16)),
    sten.BSR((4, 3)),
    sten.BSR((9, 40)),
    sten.FanIn(),
    sten.CSR(),
    sten.GroupedNM(1, 4, 5),
    sten.GroupedNM(2, 4, 8),
    sten.GroupedNM(3, 4, 3),
    sten.GroupedNM(4, 6, 1),
    sten.GroupedNM(5, 6, 2),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of a result rounded once


def random_weight(layout, shape, dtype=torch.float32):
    score = torch.randn(shape)
    mask = layout.mask(score, None if layout.rate else 0.7)
    return sten.from_dense((score * mask).to(dtype), layout, mask)


def assert_product(got, left, right, bias=None):
    """Check `got` against left @ right.T (+ bias) in float64: float32 sums, rounded once to the dtype."""
    left, right, bias = left.double(), right.double(), 0 if bias is None else bias.double()
    want, scale = left @ right.t() + bias, left.abs() @ right.abs().t() + abs(bias)
    error = (got.double() - want).abs()
    allowed = 2e-6 * scale + EPS[got.dtype] * want.abs() + 1e-7
    assert got.shape == want.shape and (error <= allowed).all(), float((error - allowed).max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", NMS + BANDS, ids=str)
def test_linear(instruction_set, poisoned, layout, dtype):
    torch.manual_seed(0)
    for shape in SHAPES:
        weight = random_weight(layout, shape, dtype)
        dense = weight.to_dense()
        for tokens in TOKENS:
            x, bias = torch.randn(tokens, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype) if tokens % 2 else None
            y = F.linear(x, weight, bias)
            assert y.dtype == dtype
            assert_product(y, x, dense, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", NMS, ids=str)
def test_expand_and_collect(instruction_set, poisoned, layout, dtype):
    """They move numbers: bit for bit, as the layout does."""
    torch.manual_seed(0)
    for shape in [(1, 1), *SHAPES]:
        weight, other = random_weight(layout, shape, dtype), torch.randn(shape).to(dtype)
        values, index = weight.parts["values"], weight.parts["index"]
        dense = torch.ops.sten.nm_expand(values, index, layout.n, layout.m, shape[1])
        assert torch.equal(dense, weight.to_dense())
        collected = torch.ops.sten.nm_collect(other, index, layout.n, layout.m)
        assert torch.equal(collected, layout.pack_like(other, weight.parts))


@pytest.mark.parametrize("layout", NMS, ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 60])
def test_gradients_and_matmul(layout, tokens):
    torch.manual_seed(0)
    weight = random_weight(layout, (18, 70)).requires_grad_()
    dense = weight.detach().to_dense()
    x, grad = torch.randn(tokens, 70, requires_grad=True), torch.randn(tokens, 18)
    F.linear(x, weight).backward(grad)
    assert_product(x.grad, grad, dense.t())
    stored = dense != 0
    torch.testing.assert_close(weight.grad.to_dense()[stored], (grad.t() @ x.detach())[stored])
    layout.validate(weight.grad.parts, (18, 70))
    assert_product(grad @ weight.detach(), grad, dense.t())


def test_which():
    plans = {
        (sten.NM(16, 32), torch.float32, 5): "bitmap",
        (sten.NM(16, 32), torch.float32, 500): "expand",
        (sten.NM(16, 32), torch.float16, 5): "converted",
        (sten.FanIn(), torch.float16, 60): "converted",
        (sten.GroupedNM(5, 6, 1), torch.bfloat16, 60): "converted",
    }
    if cpp.features()["bfloat16"]:
        plans[sten.NM(2, 4), torch.bfloat16, 1] = "bitmap"
        for layout in (sten.VectorNM(1, 4, 64), sten.FanIn(), sten.CSR(), sten.GroupedNM(2, 4, 8)):
            plans |= {(layout, torch.bfloat16, tokens): "bfloat16" for tokens in (1, 60, 500)}
        plans |= {(layout, torch.bfloat16, 1): "bitmap" for layout in (sten.FanIn(), sten.CSR())}
        plans[sten.GroupedNM(2, 4, 8), torch.bfloat16, 1] = "converted"
    for (layout, dtype, tokens), variant in plans.items():
        weight = random_weight(layout, (64, 64), dtype)
        assert sten.which("linear", (tokens, 64), weight).variant == variant, (layout, dtype, tokens)
    weight = random_weight(sten.NM(2, 4), (64, 64))
    assert sten.which("linear_grad_weight", (5, 64), weight).kernel == "nm_grad_weight"
    assert sten.which("linear", (5, 64), weight.to(torch.float64)).kernel == "reference"


def test_another_instruction_set_is_right():
    """A Plan was made while bfloat16 could be multiplied."""
    torch.manual_seed(0)
    x = torch.randn(3, 70).bfloat16()
    for layout in (sten.NM(2, 4), sten.VectorNM(1, 4, 16), sten.BSR((16, 16))):
        weight = random_weight(layout, (20, 70), torch.bfloat16)
        F.linear(x, weight)
        cpp.set_instruction_set("portable")
        try:
            assert_product(F.linear(x, weight), x, weight.to_dense())
        finally:
            cpp.set_instruction_set("auto")


@pytest.mark.parametrize("layout", BANDS, ids=str)
def test_infinite_activations_touch_only_their_entries(layout):
    """Bfloat16 is multiplied by pairs: what fills up a pair must not make NaN of an infinite activation."""
    torch.manual_seed(0)
    weight = random_weight(layout, (9, 75), torch.bfloat16)
    stored = weight.to_dense() != 0
    for tokens in (1, 5, 20, 130):
        x = torch.randn(tokens, 75).bfloat16()
        x[:, 40] = torch.inf
        finite = F.linear(x, weight).isfinite().all(0)
        assert torch.equal(finite, ~stored[:, 40]) or isinstance(layout, sten.BSR)  # which stores zeros as well


THREADED = [sten.NM(16, 32), sten.NM(2, 4), sten.VectorNM(1, 8, 16), sten.CSR(), sten.FanIn(), sten.GroupedNM(1, 4, 8)]


@pytest.mark.parametrize("layout", THREADED, ids=str)
def test_two_threads(layout):
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for dtype in DTYPES[:2]:
            weight = random_weight(layout, (700, 320), dtype)
            for tokens in (1, 6, 24) if isinstance(layout, sten.NM) else (1, 6, 24, 75):
                x, bias = torch.randn(2, tokens, 640).to(dtype)[..., ::2], torch.randn(700).to(dtype)
                y = F.linear(x, weight, bias)
                assert_product(y.flatten(0, 1), x.flatten(0, 1), weight.to_dense(), bias)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("layout", NMS[:5], ids=str)
def test_wrong_bits_read_nothing_beyond(layout):
    """A bitmap or positions that were damaged in memory: numbers, but no access out of bounds."""
    weight = random_weight(layout, (9, 70))
    parts = {**weight.parts, "index": torch.randint(0, 256, weight.parts["index"].shape, dtype=torch.uint8)}
    for tokens in (1, 5, 60):
        y = torch.ops.sten.nm_linear(torch.ones(tokens, 70), *parts.values(), None, layout.n, layout.m, 48, 9)
        assert y.isfinite().all()


def test_compile_opcheck_and_convolution():
    torch.manual_seed(0)
    layout, x = sten.NM(2, 4), torch.randn(5, 20)
    weight = random_weight(layout, (12, 20))
    compiled = torch.compile(lambda x, w: F.linear(x, w) + 1, backend="aot_eager", fullgraph=True)
    assert_product(compiled(x, weight) - 1, x, weight.to_dense())
    values, index = weight.parts["values"], weight.parts["index"]
    ops = torch.ops.sten
    torch.library.opcheck(ops.nm_linear.default, (x, values, index, torch.randn(12), 2, 4, 48, 12))
    torch.library.opcheck(ops.nm_expand.default, (values, index, 2, 4, 20))
    torch.library.opcheck(ops.nm_collect.default, (torch.randn(12, 20), index, 2, 4))
    conv = random_weight(layout, (18, 13)).to_dense().view(18, 13, 1, 1)
    conv = sten.from_dense(conv, layout, conv != 0)
    image = torch.randn(2, 13, 7, 6).to(memory_format=torch.channels_last)
    assert sten.which("conv2d", image, conv).kernel.endswith("_conv")
    torch.testing.assert_close(F.conv2d(image, conv, stride=2), F.conv2d(image, conv.to_dense(), stride=2))


def wrong_calls():
    """Each way to call nm_linear wrongly, and a part of its message."""
    values, index = random_weight(sten.NM(2, 4), (4, 16)).parts.values()
    x = torch.randn(2, 16)
    return [
        ((x.double(), values, index, None, 2, 4, 48, 4), "Expected x of dtype"),
        ((x, values.double(), index, None, 2, 4, 48, 4), "Expected values of dtype"),
        ((x, values, index.int(), None, 2, 4, 48, 4), "Expected index of dtype"),
        ((x, values, index[:, :1], None, 2, 4, 48, 4), "contiguous"),
        ((x, values, index, None, 1, 4, 48, 4), "Expected index"),
        ((x, values, index, None, 5, 4, 48, 4), "n <= m"),
        ((x, values[:, :4].contiguous(), index, None, 2, 4, 48, 4), "Expected values"),
        ((x, values, index, None, 2, 4, 48, 5), "5 rows"),
        ((x[:, :9], values, index, None, 2, 4, 48, 4), "Expected values"),
        ((x, values, index, torch.randn(3), 2, 4, 48, 4), "bias"),
    ]


@pytest.mark.parametrize("case", range(10))
def test_wrong_calls_raise(case):
    arguments, message = wrong_calls()[case]
    with pytest.raises(RuntimeError) as caught:
        torch.ops.sten.nm_linear(*arguments)
    assert message in str(caught.value)
