"""Activations, methods and the storing in one pass over finished outputs, against PyTorch's operators."""

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sten
from sten.backends import cpp
from sten.layouts import BSR, CSR, NM, FanIn, GroupedNM, VectorNM
from sten.ops import fused
from sten.ops.epilogue import ACTIVATIONS, NUMBERS, Epilogue, Kept, activate, compressed, has_kernel

if not cpp.available():
    pytest.skip("the extension sten._C is not built", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("one_thread")
METHODS = [
    (sten.Threshold(0.3), CSR()),
    (sten.Threshold(0.1, signed=True), CSR()),
    (sten.TopK(5), FanIn()),
    (sten.TopK(0.3), CSR()),
    (sten.TopK(2, block=4), NM(2, 4)),
    (sten.TopK(5, block=8), NM(5, 8)),
    (sten.TopK(1, block=6), CSR()),
    (sten.TopK(2, block=4), FanIn()),
    (sten.RandomFraction(0.5), CSR()),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations(instruction_set, poisoned, dtype):
    x = torch.cat([torch.linspace(-40, 40, 4001), torch.tensor([0.0, 1e-30, torch.nan, 300.0, -300.0])]).to(dtype)
    for name, function in ACTIVATIONS.items():
        y = x.clone()
        torch.ops.sten.epilogue_(y, NUMBERS[name], *Kept("all").numbers(dtype))
        torch.testing.assert_close(y, function(x.double()).to(dtype), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize(("method", "layout"), METHODS, ids=str)
def test_stored_and_finished(poisoned, method, layout, activation, dtype):
    """The parts of the layout, the slopes and the dense rows, with ties, NaN and an odd number of rows."""
    for rows in (1, 7, 100):
        z = torch.randn(rows, 24).to(dtype)
        z[0, :9], z[-1, 11] = 0.5, torch.nan
        end = Epilogue(method, {}, True, layout, activation)
        assert end.rule(z) is not None
        torch.manual_seed(1)
        parts, slopes = end.stored(z.clone(), True)
        torch.manual_seed(1)
        y, mask = method.apply(activate(z, activation), {}, True)
        layout.validate(parts, (rows, 24))
        torch.testing.assert_close(layout.unpack(parts, (rows, 24)), y, equal_nan=True)
        assert torch.equal(layout.support(parts, (rows, 24)), mask)
        scale = 2.0 if isinstance(method, sten.RandomFraction) else 1.0
        want = scale * mask * ((z > 0) | (activation == "none") | z.isnan())
        slopes = torch.ones_like(parts["values"]) if slopes is None else slopes
        torch.testing.assert_close(layout.unpack({**parts, "values": slopes.to(dtype)}, z.shape), want.to(dtype))
        if not isinstance(method, sten.RandomFraction):
            end = end._replace(layout=None)
            before = z.clone()
            torch.testing.assert_close(end.finish(z, own=False), y, equal_nan=True)
            torch.testing.assert_close(z, before, equal_nan=True, rtol=0, atol=0)
            assert end.finish(z, own=True).data_ptr() == z.data_ptr()


def test_bad_operands():
    x = torch.randn(3, 8)
    with pytest.raises(RuntimeError, match="a count from 1 to the 8"):
        compressed(x, Kept("row", count=9), CSR())
    with pytest.raises(RuntimeError, match="whole blocks"):
        compressed(x, Kept("blocks", count=2, block=3), NM(2, 3))
    with pytest.raises(RuntimeError, match="Expected a matrix"):
        compressed(x[0], Kept("all"), CSR())
    with pytest.raises(RuntimeError, match="contiguous"):
        torch.ops.sten.epilogue_(torch.randn(8, 3).t(), 1, 0, 0.0, 0, 0)
    assert not has_kernel(x.double()) and not has_kernel(x.half())


@dataclass(frozen=True)
class Even(sten.Threshold):
    """Another mask than the rule that it inherits says."""

    def mask(self, x, state, training):
        return super().mask(x, state, training) & (torch.arange(x.shape[1]) % 2 == 0)


def test_a_method_with_another_mask_runs_by_its_mask():
    x = torch.randn(5, 16)
    for out in ((Even(0.1), CSR()), Even(0.1)):
        with torch.no_grad():
            y = sten.sparse_op(torch.clone, out=out)(x)
        assert not (y.to_dense() if isinstance(y, sten.SparseTensor) else y)[:, 1::2].any()


# sites of linear layers


def layer(bias=True):
    torch.manual_seed(0)
    return nn.Linear(16, 24, bias=bias)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("method", "layout"), [m for m in METHODS if not isinstance(m[0], sten.RandomFraction)], ids=str
)
def test_output_site_runs_inside(method, layout, bias):
    """The numbers and gradients of the dense output times the mask; in the layout or dense."""
    x, grad = torch.randn(7, 16), torch.randn(7, 24)
    plain, a = layer(bias), x.clone().requires_grad_()
    y = plain(a)
    y = y * method.mask(y.detach(), {}, True)
    (y * grad).sum().backward()
    for own in (layout, None):
        sparse, b = layer(bias), x.clone().requires_grad_()
        sten.sparsify(sparse, own, method, site="output", modules="")
        end = "in the epilogue, by one C++ pass" if own else "after it, by one C++ pass where no gradient is needed"
        sentence = sten.which("linear", (7, 16), sparse).reason.partition("; ")[2]
        assert f"{method} {end}" in sentence and sentence.endswith(f"stored as {own}" if own else "dense with zeros")
        for table in (sten.summary(sparse), sten.explain(sparse, x, seconds=0.001)):
            assert f"output of the model: {sentence}" in str(table)
        another = sparse.register_forward_hook(lambda *call: None, prepend=True)
        assert f"output of the model: {method} after it, by" in str(sten.summary(sparse))
        another.remove()
        with torch.no_grad():
            z = sparse(x)
            torch.testing.assert_close(z.to_dense() if own else z, y.detach())
        z = sparse(b)
        assert own is None or z.sparse_layout == own
        ((z.to_dense() if own else z) * grad).sum().backward()
        torch.testing.assert_close(b.grad, a.grad)
        for p, q in zip(sparse.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        assert "forward" not in vars(sten.densify(sparse))


def test_second_derivatives():
    x, results = torch.randn(3, 16), []
    for own in (CSR(), None):
        one, a = sten.sparsify(layer(), own, sten.Threshold(0.3), site="output", modules=""), x.clone().requires_grad_()
        [grad] = torch.autograd.grad(one(a).to_dense().pow(3).sum(), a, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), [a, one.weight]))
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second)
    op = sten.sparse_op(F.linear, out=(sten.TopK(2), FanIn()), inline=True, activation="gelu")
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(op(a, one.weight).to_dense().sum(), a, create_graph=True)


def test_output_site_with_other_hooks():
    """A hook that comes first sees the dense output; a gradient's site and copies work as without it."""
    x, seen = torch.randn(5, 16), []
    first = layer()
    first.register_forward_hook(lambda module, args, y: seen.append(type(y)))
    sten.sparsify(first, FanIn(), sten.TopK(4), site="output", modules="")
    first(x)
    assert seen == [torch.Tensor]
    both = layer()
    sten.sparsify(both, FanIn(), sten.TopK(4), site="output", modules="")
    sten.sparsify(both, None, sten.TopK(1), site="grad_output", modules="")
    both(x).to_dense().sum().backward()
    assert int((both.weight.grad.abs().sum(1) > 0).sum()) <= 5
    for same in (copy.deepcopy(both), pickle.loads(pickle.dumps(both))):
        assert vars(same)["forward"].module is same and vars(same)["forward"].site is not vars(both)["forward"].site
        torch.testing.assert_close(same(x).to_dense(), both(x).to_dense())
    sten.sparsify(both, sparsifier=None, site="output", modules="")
    assert type(both(x)) is torch.Tensor


def test_output_site_elsewhere():
    """Compiled, under autocast, with a sparse weight, of no tokens, and of a layer that is no nn.Linear."""
    x, one = torch.randn(5, 16), layer()
    sten.sparsify(one, CSR(), sten.Threshold(0.2), site="output", modules="")
    want = F.linear(x, one.weight, one.bias)
    want = want * (want.abs() > 0.2)
    torch.testing.assert_close(torch.compile(one, backend="aot_eager", fullgraph=True)(x), want)
    with torch.autocast("cpu", torch.bfloat16):
        assert one(x).dtype == torch.bfloat16
    assert one(x[:0]).shape == (0, 24)
    with pytest.raises(ValueError, match="Expected a matrix"):
        one(x[None])
    for layout in (None, CSR()):
        other = sten.sparsify(layer(), CSR(), sparsity=0.5)
        sten.sparsify(other, layout, sten.Threshold(0.2), site="output", modules="")
        want = F.linear(x, other.weight.to_dense(), other.bias).detach()
        with torch.no_grad():
            y = other(x)
        torch.testing.assert_close(y if layout is None else y.to_dense(), want * (want.abs() > 0.2))
        assert "C++ pass" in sten.which("linear", (5, 16), other).reason

    class Other(nn.Linear):
        def forward(self, input):
            return -super().forward(input)

    other = sten.sparsify(Other(16, 24), CSR(), sten.Threshold(0.2), site="output", modules="")
    want = -F.linear(x, other.weight, other.bias)
    torch.testing.assert_close(other(x).to_dense(), want * (want.abs() > 0.2))


@pytest.mark.parametrize("layout", [FanIn(), CSR()], ids=str)
def test_a_dense_gradient_reaches_kept_entries_only(layout):
    x = torch.randn(4, 8, requires_grad=True)
    y = sten.sparse_op(torch.clone, out=(sten.TopK(2), layout))(x)
    y.sum().backward()
    assert torch.equal(x.grad, y.mask().float())


def test_plans_of_a_site():
    """One for each share of kept entries, of a site's activations; a copy begins without them."""
    model = layer().requires_grad_(False)
    model.weight.data = model.weight.data.t().contiguous().t()
    sten.sparsify(model, FanIn(), sten.TopK(4), site="input", modules="")
    site = vars(model)["_sten_sites"]["input"]
    model(torch.randn(1, 16))
    [plan] = site.plans.values()
    assert plan.variant == "codes"
    model(torch.randn(1, 16))
    assert [*site.plans.values()] == [plan]
    model(torch.randn(2, 16))
    assert len(site.plans) == 2
    copied = copy.deepcopy(model)
    assert not vars(copied)["_sten_sites"]["input"].plans
    torch.testing.assert_close(copied(torch.ones(1, 16)), model(torch.ones(1, 16)))
    x = sten.from_dense(torch.ones(1, 16), CSR())
    dense = F.linear(x, model.weight)
    torch.testing.assert_close(dense, F.linear(torch.ones(1, 16), model.weight))
    assert [p.variant for p in x.cache.plans.values()] == ["dense"]


def sparse(layout, rows, columns, dtype):
    dense = torch.randn(rows, columns).to(dtype)
    return sten.from_dense(dense, layout, layout.mask(dense.abs(), None if layout.rate else 0.5))


PRODUCTS = [CSR(), GroupedNM(2, 4, 2), GroupedNM(1, 10, 8), VectorNM(2, 4, 4), BSR((4, 4)), FanIn(), NM(2, 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("activation", [*ACTIVATIONS])
@pytest.mark.parametrize("layout", PRODUCTS, ids=str)
@torch.no_grad()
def test_activation_in_a_product(instruction_set, poisoned, layout, activation, dtype):
    """Of float32 to the last bit what a pass over the output makes of it; for any number of tokens."""
    w, bias = sparse(layout, 44, 36, dtype), torch.randn(44).to(dtype)
    for tokens in (0, 1, 2, 9, 70, 130):
        x = torch.randn(tokens, 36).to(dtype)
        product = F.linear(x, w, bias)
        got = fused.linear_activation(x, w, bias, activation, False)
        exact = activate(F.linear(x.double(), w.to_dense().double(), bias.double()), activation)
        close = 1e-5 if dtype in (torch.float32, torch.float64) else 2e-2
        torch.testing.assert_close(got, exact.to(dtype), rtol=close, atol=close)
        if dtype == torch.float32:
            torch.ops.sten.epilogue_(product, NUMBERS[activation], *Kept("all").numbers(dtype))
            assert torch.equal(got, product)
    reason = sten.which("linear_activation", (9, 36), w, bias, activation=activation).reason
    assert dtype == torch.float64 or reason.endswith(f"{activation} in the product")


@pytest.mark.parametrize("layout", [layout for layout in PRODUCTS if not isinstance(layout, NM)], ids=str)
@torch.no_grad()
def test_sums_of_bfloat16_are_activated_before_they_are_rounded(instruction_set, layout):
    dense, bias = torch.zeros(20, 20, dtype=torch.bfloat16), torch.full((20,), -0.01171875, dtype=torch.bfloat16)
    dense[:, 0] = -4.0  # with the bias it would be rounded to itself
    w = sten.from_dense(dense, layout, layout.mask(dense.abs(), None if layout.rate else 0.5))
    x = torch.ones(70, 20, dtype=torch.bfloat16)
    got = fused.linear_activation(x, w, bias, "gelu", False).double()
    exact = F.gelu(F.linear(x.double(), w.to_dense().double(), bias.double()))
    torch.testing.assert_close(got, exact, rtol=1e-2, atol=0.0)  # of -4 it is 4 % more


@torch.no_grad()
def test_activation_of_rows_that_are_not_stored():
    """Their outputs are the bias."""
    dense = torch.randn(6, 8)
    dense[::2] = 0
    x, w, bias = torch.randn(5, 8), sten.from_dense(dense, FanIn(), dense != 0), torch.randn(6)
    assert len(w.parts["row"]) == 3
    torch.testing.assert_close(fused.linear_activation(x, w, bias, "silu", False), F.silu(F.linear(x, dense, bias)))


@torch.no_grad()
def test_a_dense_product_is_finished_by_a_pass():
    w = sparse(NM(2, 4), 8, 16, torch.float32)
    reason = sten.which("linear_activation", (200, 16), w, None, activation="gelu").reason
    assert reason.endswith("gelu after it, in place")
    with pytest.raises(RuntimeError, match="Expected the number of an activation, got 9"):
        torch.ops.sten.nm_linear(torch.randn(200, 16), *w.parts.values(), None, 2, 4, 128, 8, activation=9)
