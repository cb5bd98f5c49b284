"""The CPU kernels of linear with a sparse input, and of its gradients, against dense products in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import sten
from sten.backends import cpp, sparse_input
from sten.dispatch import planned_input

if not cpp.available():
    pytest.skip("the extension sten._C is not built", allow_module_level=True)

SHAPES = [(1, 1, 1), (1, 17, 3), (1, 300, 2500), (2, 9, 70), (5, 64, 33), (40, 130, 100), (3, 6, 0)]
LAYOUTS = [sten.FanIn(), sten.CSR(), sten.BSR((1, 1)), sten.BSR((4, 1)), sten.BSR((40, 1))]
EPS = {torch.float32: 2e-6, torch.bfloat16: 2**-8 + 2e-6}


def activation(layout, tokens, features, dtype=torch.float32, density=0.08):
    """A sparse activation with few entries; its third token has none, where the layout allows it."""
    x = torch.randn(tokens, features).to(dtype)
    keep = torch.zeros(tokens, features, dtype=torch.bool)
    if isinstance(layout, sten.BSR):
        for block in keep.split(layout.block[0]):
            block[:] = torch.rand(features) < density
    else:
        count = max(1, int(density * features))
        keep.scatter_(1, torch.rand(tokens, features).topk(count).indices, True)
        if isinstance(layout, sten.CSR):
            keep &= torch.rand(tokens, features) < 0.8
        keep[2:3] = False
    return sten.from_dense(x * keep, layout, keep)


def weight_of(outputs, features, dtype=torch.float32):
    """An input-major weight (outputs, features)."""
    return torch.randn(features, outputs).to(dtype).t()


def run(name, x, weight, *operands):
    """Run an operator; its Plan has to name the kernel."""
    plan = planned_input(name, x, weight, x.shape[0])
    assert plan.variant == "codes", plan
    return plan.run(*operands)


def assert_product(got, left, right, bias=0.0, where=slice(None)):
    """Check `got` against left @ right + bias in float64, within rounding of the sum of magnitudes and the result."""
    left, right = left.double(), right.double()
    exact = left @ right + bias
    bound = 2e-6 * (left.abs() @ right.abs() + abs(bias)) + (EPS[got.dtype] - 2e-6) * exact.abs() + 1e-30
    assert got.shape == exact.shape and ((got.double() - exact).abs() <= bound)[where].all()


def check_products(layout, tokens, features, outputs, dtype, bias):
    x, weight = activation(layout, tokens, features, dtype), weight_of(outputs, features, dtype)
    grad, dense = torch.randn(tokens, outputs).to(dtype), x.to_dense()
    bias = torch.randn(outputs).to(dtype) if bias else None
    y = run("linear", x, weight, x.parts, weight, bias)
    assert y.dtype == dtype
    assert_product(y, dense, weight.t(), 0.0 if bias is None else bias.double())
    values = run("linear_grad_sparse_input", x, weight, grad, weight, x.parts)
    assert values.shape == x.parts["values"].shape and values.dtype == dtype
    stored = layout.unpack({**x.parts, "values": torch.ones_like(x.parts["values"])}, dense.shape).bool()
    assert_product(layout.unpack({**x.parts, "values": values}, dense.shape), grad, weight, where=stored)
    assert_product(run("linear_grad_weight", x, weight, grad, x.parts, weight), grad.t(), dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_products(instruction_set, poisoned, monkeypatch, layout, dtype):
    monkeypatch.setattr(sparse_input, "why_dense", lambda *arguments: None)  # also where dense is faster
    for number, (tokens, features, outputs) in enumerate(SHAPES):
        check_products(layout, tokens, features, outputs, dtype, bias=number % 2 == 0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_on_two_threads(layout, poisoned):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for tokens in (1, 64):
            check_products(layout, tokens, 2000, 1100, torch.float32, bias=True)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gradients_of_linear(layout):
    """F.linear as a user calls it, with all gradients, for an input-major and an output-major weight."""
    x, grad = activation(layout, 40, 130), torch.randn(40, 100)
    for weight in (weight_of(100, 130), weight_of(100, 130).contiguous()):
        dense, operands = x.to_dense().requires_grad_(), [weight.clone().requires_grad_() for _ in range(2)]
        bias = torch.randn(100, requires_grad=True)
        sparse = x.detach().clone().requires_grad_()
        F.linear(sparse, operands[0], bias).backward(grad)
        got_bias, bias.grad = bias.grad, None
        F.linear(dense, operands[1], bias).backward(grad)
        torch.testing.assert_close(operands[0].grad, operands[1].grad, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got_bias, bias.grad)
        expected = layout.pack_like(dense.grad, x.parts)
        torch.testing.assert_close(sparse.grad.parts["values"], expected, rtol=1e-5, atol=1e-5)


def test_the_profiler_sees_what_runs_without_it():
    """And a dispatch mode, which sees every operator, a dense product."""
    x, weight = activation(sten.CSR(), 40, 130), weight_of(100, 130).requires_grad_()
    x.requires_grad_()

    def step():
        return torch.autograd.grad(F.linear(x, weight).square().sum(), (x, weight))

    exact = step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        got = step()
    names = {event.key for event in profile.key_averages()}
    for name in sparse_input.PRODUCTS:
        assert f"sten::{name}(CSR()): sparse_input_{name} [codes]" in names
    assert {"sten::codes_linear", "sten::codes_grad_values", "sten::codes_grad_weight"} <= names
    assert all(torch.equal(one.to_dense(), other.to_dense()) for one, other in zip(got, exact, strict=True))

    class Seen(TorchDispatchMode):
        names = ()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names = (*self.names, str(func))
            return func(*args, **(kwargs or {}))

    with Seen() as seen:
        y = F.linear(x, weight)
    torch.testing.assert_close(y, F.linear(x.to_dense(), weight))
    assert not any("codes" in name for name in seen.names)


def test_without_tokens_or_entries():
    ops, none, weight = torch.ops.sten, torch.zeros(0, 3), torch.randn(8, 5)
    index = none.int()
    assert ops.codes_linear(none, None, index, weight, None, 1, 0).shape == (0, 5)
    assert ops.codes_grad_values(torch.zeros(0, 5), None, index, weight, 1, False).shape == (0, 3)
    assert torch.equal(ops.codes_grad_weight(none, None, index, torch.zeros(0, 5), 1, 8), torch.zeros(8, 5))
    empty, bias = torch.zeros(2, 0), torch.randn(5)
    assert torch.equal(ops.codes_linear(empty, None, empty.int(), weight, bias, 1, 2), bias.repeat(2, 1))
    assert torch.equal(ops.codes_grad_weight(empty, None, empty.int(), torch.ones(2, 5), 1, 8), torch.zeros(8, 5))


def test_free_slots_are_not_read():
    x, weight = activation(sten.CSR(), 9, 40), weight_of(30, 40)
    parts = {**x.parts, "values": torch.cat([x.parts["values"], torch.full((5,), torch.nan)])}
    parts["col"] = torch.cat([parts["col"], torch.zeros(5, dtype=torch.int32)])
    grad = torch.randn(9, 30)
    assert_product(run("linear", x, weight, parts, weight, None), x.to_dense(), weight.t())
    assert_product(run("linear_grad_weight", x, weight, grad, parts, weight), grad.t(), x.to_dense())
    values = run("linear_grad_sparse_input", x, weight, grad, weight, parts)
    assert values.shape == parts["values"].shape and (values[-5:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_the_input_does_not_use_is_not_read(dtype):
    x, weight = activation(sten.FanIn(), 3, 50, dtype), weight_of(20, 50, dtype).clone()
    weight[:, ~x.to_dense().bool().any(0)] = torch.nan
    assert torch.isfinite(F.linear(x, weight)).all()
    used = int(x.parts["index"][0, 0])
    for value in (torch.nan, torch.inf):
        weight[4, used] = value
        y = F.linear(x, weight)
        assert not torch.isfinite(y[0, 4]) and torch.isfinite(y[0, :4]).all()


def test_bfloat16_is_rounded_to_nearest_even(instruction_set):
    """A product with one entry of 1: the weight, plus a bias that lies on every side of a tie."""
    x = sten.from_dense(torch.ones(1, 10).bfloat16(), sten.FanIn(), torch.arange(10)[None] == 3)
    weight, bias = (torch.randn(1000, 10) * 100).bfloat16(), torch.randn(1000).bfloat16()
    got = F.linear(x, weight.t().contiguous().t(), bias)
    assert torch.equal(got[0], (weight[:, 3].float() + bias.float()).bfloat16())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_plan_says_why(layout):
    height = layout.block[0] if isinstance(layout, sten.BSR) else 1

    def plan(tokens, density, weight=None, dtype=torch.float32):
        x = activation(layout, tokens, 400, dtype, density)
        return planned_input("linear", x, weight_of(64, 400, dtype) if weight is None else weight, tokens)

    assert plan(1, 0.5).variant == plan(40, 0.05).variant == "codes"
    assert plan(1, 0.5).kernel == "sparse_input_linear"
    many = plan(40, 0.7)
    assert many.variant == "dense" and "faster" in many.reason
    assert ("each its own" in many.reason) == (height == 1)
    assert "output-major" in plan(1, 0.1, weight_of(64, 400).contiguous()).reason
    assert "float64" in plan(1, 0.1, dtype=torch.float64).reason


def test_wide_blocks_are_expanded():
    x = sten.from_dense(torch.eye(4).repeat(1, 2), sten.BSR((2, 2)))
    plan = planned_input("linear", x, weight_of(6, 8), 4)
    assert plan.variant == "dense" and "width 1" in plan.reason


def test_opcheck():
    ops, weight, grad = torch.ops.sten, torch.randn(30, 12), torch.randn(8, 12)
    for layout in (sten.FanIn(), sten.CSR(), sten.BSR((4, 1))):
        parts = activation(layout, 8, 30).parts
        if "row" in parts:
            parts = activation(layout, 2, 30).parts
        tokens = len(parts["values"]) if "row" in parts else 8
        pattern = parts.get("crow"), parts["index"] if "index" in parts else parts["col"]
        height, blocks = (4, True) if parts["values"].dim() == 3 else (1, False)
        bias = torch.randn(12)
        torch.library.opcheck(ops.codes_linear, (parts["values"], *pattern, weight, bias, height, tokens))
        torch.library.opcheck(ops.codes_grad_values, (grad[:tokens], *pattern, weight, height, blocks))
        torch.library.opcheck(ops.codes_grad_weight, (parts["values"], *pattern, grad[:tokens], height, 30))
    torch.library.opcheck(ops.codes_topk, (grad, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_topk(dtype):
    """As the mask of sten.TopK says: ties to the lower column, NaN last."""
    for rows, columns, k in ((3, 5, 5), (4, 100, 1), (50, 1000, 32), (20, 300, 299), (0, 4, 2)):
        x = torch.randn(rows, columns).to(dtype)
        if rows > 2:
            x[0, :3], x[1, 1], x[2] = torch.nan, -torch.inf, x[2].relu()
        kept = torch.ops.sten.codes_topk(x, k)
        assert kept.dtype == torch.int32 and (kept.diff() > 0).all()
        mask = torch.zeros_like(x, dtype=torch.bool).scatter(1, kept.long(), True)
        assert torch.equal(mask, sten.TopK(k).mask(x, {}, True))
        assert torch.equal(sten.TopK(k).columns(x), kept.long())
    for k in (0, 5):
        with pytest.raises(RuntimeError, match="Expected a count from 1 to the 4 columns"):
            torch.ops.sten.codes_topk(torch.randn(2, 4), k)


def wrong_calls():
    """Each way to call codes_linear wrongly, and a part of its message."""
    values, index, weight = torch.randn(2, 3), torch.tensor([[0, 2, 4], [1, 2, 3]]).int(), torch.randn(5, 7)
    crow, col, entries = torch.tensor([0, 2, 3]).int(), torch.tensor([0, 4, 1]).int(), torch.randn(3)
    return [
        ((values, None, index, weight.double(), None, 1, 2), "Float or BFloat16"),
        ((values, None, index, weight.bfloat16(), None, 1, 2), "values of dtype"),
        ((values, None, index, weight.t(), None, 1, 2), "contiguous weight"),
        ((values, None, index.long(), weight, None, 1, 2), "col of dtype"),
        ((values, None, index + 1, weight, None, 1, 2), "columns below 5"),
        ((values, None, index - 1, weight, None, 1, 2), "columns below 5"),
        ((values, None, index.flip(1), weight, None, 1, 2), "ascend"),
        ((values, None, index, weight, torch.randn(6), 1, 2), "bias of 7"),
        ((values, None, index, weight, None, 1, 3), "col of 3 rows"),
        ((values, None, index, weight, None, 0, 2), "height"),
        ((values[:, :2].contiguous(), None, index, weight, None, 1, 2), "Expected values"),
        ((entries, crow, col, weight, None, 1, 3), "crow of 4"),
        ((entries, crow * 9, col, weight, None, 1, 2), "never falls"),
        ((entries[:2], crow, col, weight, None, 1, 2), "Expected values"),
        ((torch.randn(3, 1, 2), crow, col.clamp(max=1), weight[:4].contiguous(), None, 1, 2), "width 1"),
    ]


@pytest.mark.parametrize("case", range(15))
def test_wrong_calls_raise(case):
    arguments, message = wrong_calls()[case]
    with pytest.raises((RuntimeError, ValueError)) as caught:
        torch.ops.sten.codes_linear(*arguments)
    assert message in str(caught.value)
    assert torch.ops.sten.codes_linear(*wrong_calls()[0][0][:3], torch.randn(5, 7), None, 1, 2).shape == (2, 7)
