"""The CPU kernels of rows that share columns (VectorNM, BSR, FanIn; gradients of CSR), and gradients of GroupedNM."""

import pytest
import torch
import torch.nn.functional as F

import sten
from sten.backends import cpp

if not cpp.available():
    pytest.skip("the extension sten._C is not built", allow_module_level=True)

TOKENS = (0, 1, 2, 15, 17, 64, 65, 130)
SHAPES = [(1, 1), (3, 17), (17, 3), (100, 63), (70, 520)]
LAYOUTS = [
    sten.VectorNM(2, 4, 8),
    sten.VectorNM(1, 4, 5),
    sten.VectorNM(3, 7, 1),
    sten.VectorNM(2, 4, 1000),
    sten.BSR((16, 16)),
    sten.BSR((4, 3)),
    sten.BSR((9, 40)),
    sten.FanIn(),
    sten.CSR(),
    sten.GroupedNM(1, 10, 8),
    sten.GroupedNM(2, 4, 2),
    sten.GroupedNM(5, 6, 2),
]


def random_weight(layout, shape):
    """A sparse weight; the second output is empty where the layout may leave out outputs."""
    score = torch.randn(shape)
    mask = layout.mask(score, None if layout.rate else 0.7)
    if layout == sten.FanIn() and shape[0] > 1:
        mask[1] = False
    return sten.from_dense(score * mask, layout, mask)


def assert_product(got, left, right, bias=None, where=slice(None)):
    """Check `got` against left @ right (+ bias) in float64, within float32 rounding of the sum of magnitudes."""
    left, right, bias = left.double(), right.double(), 0 if bias is None else bias.double()
    error, scale = (got.double() - (left @ right + bias)).abs(), left.abs() @ right.abs() + abs(bias)
    assert got.dtype == torch.float32 and (error <= 2e-6 * scale + 1e-30)[where].all(), float(error[where].max())


def check_products(weight, tokens, bias=None):
    """y and the two gradients."""
    dense = weight.to_dense()
    x, grad = torch.randn(tokens, dense.shape[1], requires_grad=True), torch.randn(tokens, dense.shape[0])
    weight = weight.detach().clone().requires_grad_()
    y = F.linear(x, weight, bias)
    y.backward(grad)
    assert_product(y.detach(), x.detach(), dense.t(), bias)
    assert_product(x.grad, grad, dense)
    assert_product(weight.grad.to_dense(), grad.t(), x.detach(), where=dense != 0)
    weight.sparse_layout.validate(weight.grad.parts, tuple(dense.shape))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_products(instruction_set, poisoned, layout):
    torch.manual_seed(0)
    for shape in SHAPES:
        weight = random_weight(layout, shape)
        for tokens in TOKENS:
            check_products(weight, tokens, torch.randn(shape[0]) if tokens % 2 else None)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_which_names_the_kernel(layout):
    weight = random_weight(layout, (32, 64))
    for operator, features in (("linear", 64), ("matmul", 32), ("linear_grad_weight", 32)):
        plan = sten.which(operator, (20, features), weight)
        assert plan.kernel.startswith(("band_", "csr_", "grouped_nm_")) and plan.variant == "float32", plan
    assert sten.which("linear", (20, 64), weight.to(torch.float16)).variant == "converted"
    assert sten.which("linear", (20, 64), weight.to(torch.float64)).kernel == "reference"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_other_dtypes_are_rounded_once(layout, dtype):
    torch.manual_seed(0)
    weight = random_weight(layout, (50, 70)).to(dtype).requires_grad_()
    x, bias = torch.randn(9, 70).to(dtype).requires_grad_(), torch.randn(50).to(dtype)
    grad, dense = torch.randn(9, 50).to(dtype), weight.detach().to_dense().double()
    y = F.linear(x, weight, bias)
    y.backward(grad)
    exact = {"y": F.linear(x.detach().double(), dense, bias.double()), "x": grad.double() @ dense}
    exact["weight"] = torch.where(dense != 0, grad.double().t() @ x.detach().double(), 0)
    got = {"y": y.detach(), "x": x.grad, "weight": torch.where(dense != 0, weight.grad.to_dense(), 0)}
    for name, want in exact.items():
        assert got[name].dtype == dtype
        torch.testing.assert_close(got[name].double(), want, rtol=torch.finfo(dtype).eps, atol=2e-5, msg=name)


THREADED = [sten.VectorNM(2, 4, 8), sten.BSR((8, 8)), sten.FanIn(), sten.CSR(), sten.GroupedNM(1, 4, 16)]


@pytest.mark.parametrize("layout", [*THREADED, sten.GroupedNM(2, 4, 8)], ids=str)
def test_on_two_threads(layout, poisoned):
    """Several blocks of columns, several pieces of rows, a last panel that is not full."""
    torch.manual_seed(0)
    weight, before = random_weight(layout, (600, 2500)), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for tokens in (1, 16, 300):
            check_products(weight, tokens)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("lead", [(), (2, 3)], ids=str)
def test_leading_dimensions_and_strides(lead):
    torch.manual_seed(0)
    base = torch.randn(*lead, 66)
    for layout in LAYOUTS:
        weight = random_weight(layout, (20, 33))
        for x in (
            base[..., ::2],
            base[..., :33],
            base.flip(-1)[..., 3:36].transpose(0, -1).contiguous().transpose(0, -1),
        ):
            assert_product(F.linear(x, weight), x, weight.to_dense().t())


@pytest.mark.parametrize("tokens", [1, 16, 200])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_infinity_stays_where_it_is_multiplied(layout, tokens):
    """Rows without an entry in an infinite column are exact, and the gradient of padding is zero."""
    torch.manual_seed(0)
    weight = random_weight(layout, (50, 150))
    x, grad = torch.randn(tokens, 150), torch.randn(tokens, 50)
    x[:, 149] = torch.inf
    stored = layout.unpack({**weight.parts, "values": torch.ones_like(weight.parts["values"])}, (50, 150))
    clean = stored[:, 149] == 0
    y = F.linear(x, weight)
    assert torch.isfinite(y[:, clean]).all() and not torch.isfinite(y[:, ~clean]).any()
    weight.requires_grad_()
    grad[:, 49] = torch.inf
    F.linear(torch.randn(tokens, 150), weight).backward(grad)
    layout.validate(weight.grad.parts, (50, 150))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_second_derivatives_and_compile(layout):
    torch.manual_seed(0)
    torch.compiler.reset()  # each layout compiles the same code object
    weight = random_weight(layout, (12, 20))
    x = torch.randn(5, 20)
    compiled = torch.compile(lambda x, w: F.linear(x, w) + 1, backend="aot_eager", fullgraph=True)
    assert_product(compiled(x, weight) - 1, x, weight.to_dense().t())
    x, weight = x.requires_grad_(), weight.requires_grad_()
    (first,) = torch.autograd.grad(F.linear(x, weight).square().sum(), x, create_graph=True)
    (got,) = torch.autograd.grad(first.square().sum(), weight)
    dense, inputs = weight.detach().to_dense().requires_grad_(), x.detach().requires_grad_()
    (first,) = torch.autograd.grad(F.linear(inputs, dense).square().sum(), inputs, create_graph=True)
    (want,) = torch.autograd.grad(first.square().sum(), dense)
    pattern = weight.detach().to_dense() != 0
    torch.testing.assert_close(got.to_dense()[pattern], want[pattern], rtol=1e-4, atol=1e-3)


def test_opcheck():
    torch.manual_seed(0)
    x, grad = torch.randn(5, 20), torch.randn(5, 12)
    for layout, height, columns in ((sten.VectorNM(1, 4, 5), 5, 20), (sten.BSR((4, 3)), 4, 21)):
        parts = random_weight(layout, (12, 20)).parts
        crow, col = parts.get("crow"), parts.get("col", parts.get("index"))
        width = 3 if crow is not None else 1
        ops, values = torch.ops.sten, parts["values"]
        torch.library.opcheck(ops.band_linear.default, (x, values, crow, col, torch.randn(12), height, columns, 12))
        torch.library.opcheck(ops.band_grad_input.default, (grad, values, crow, col, height, columns, 20))
        torch.library.opcheck(ops.band_grad_values.default, (grad, x, crow, col, height, width, columns))


def test_opcheck_of_grouped_nm():
    torch.manual_seed(0)
    x, grad, ops = torch.randn(5, 20), torch.randn(5, 12), torch.ops.sten
    values, index = random_weight(sten.GroupedNM(2, 4, 2), (12, 20)).parts.values()
    torch.library.opcheck(ops.grouped_nm_grad_input.default, (grad, values, index, 2, 4, 2, 20))
    torch.library.opcheck(ops.grouped_nm_grad_values.default, (grad, x, index, 2, 4, 2))
    for wrong, message in (((grad[:, :7], x), "Expected index"), ((grad, x[:2]), "leading dimensions")):
        with pytest.raises(RuntimeError, match=message):
            ops.grouped_nm_grad_values(*wrong, index, 2, 4, 2)
    with pytest.raises(ValueError, match="Expected index from 0"):
        ops.grouped_nm_grad_input(grad, values, index + 12, 2, 4, 2, 20)


def wrong_calls():
    """Each way to call band_linear wrongly, and a part of its message."""
    torch.manual_seed(0)
    x = torch.randn(2, 8)
    w = random_weight(sten.VectorNM(1, 4, 2), (4, 8)).parts
    b = random_weight(sten.BSR((2, 2)), (4, 8)).parts
    values, index = w["values"], w["index"]
    blocks = (b["values"], b["crow"], b["col"])
    return [
        ((x.double(), values, None, index, None, 2, 8, 4), "dtype"),
        ((x, values, None, index.long(), None, 2, 8, 4), "col"),
        ((x, values, None, index, None, 0, 8, 4), "height"),
        ((x, values, None, index, None, 3, 8, 7), "col of 3 rows"),
        ((x, values[:3], None, index, None, 2, 8, 4), "Expected values"),
        ((x, values, None, index, None, 2, 7, 4), "at most 7 input features"),
        ((x, values, None, index, torch.randn(3), 2, 8, 4), "bias"),
        ((x, values.t().contiguous().t(), None, index, None, 2, 8, 4), "contiguous"),
        ((x, values, None, index + 4, None, 2, 8, 4), "columns below 8"),
        ((x, values, None, index.flip(-1), None, 2, 8, 4), "ascend"),
        ((x, blocks[0], blocks[1][:-1], blocks[2], None, 2, 8, 4), "crow of 3"),
        ((x, blocks[0], blocks[1] * 9, blocks[2], None, 2, 8, 4), "never falls"),
        ((x, blocks[0], blocks[1], blocks[2] + 9, None, 2, 8, 4), "columns below 4"),
        ((x, blocks[0][:, :1].contiguous(), blocks[1], blocks[2], None, 2, 8, 4), "Expected values"),
        ((x[:, :5], blocks[0], blocks[1], blocks[2], None, 2, 9, 4), "blocks of 2"),
    ]


@pytest.mark.parametrize("case", range(15))
def test_wrong_calls_raise(case):
    arguments, message = wrong_calls()[case]
    with pytest.raises((RuntimeError, ValueError)) as caught:
        torch.ops.sten.band_linear(*arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_pointwise_convolution(layout):
    torch.manual_seed(0)
    weight = random_weight(layout, (18, 13)).to_dense().view(18, 13, 1, 1)
    weight = sten.from_dense(weight, layout, weight != 0)
    x, bias = torch.randn(2, 13, 7, 6).to(memory_format=torch.channels_last), torch.randn(18)
    assert sten.which("conv2d", x, weight, bias).kernel.endswith("_conv")
    for geometry in ({}, {"stride": 2, "padding": 1}):
        exact = F.conv2d(x.double(), weight.to_dense().double(), bias.double(), **geometry)
        torch.testing.assert_close(F.conv2d(x, weight, bias, **geometry).double(), exact, rtol=1e-5, atol=1e-5)
