"""linear whose output is sparsified inside the operator, against the same method after it."""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import sten
from sten.layouts import BSR, CSR, NM, FanIn, Masked

pytestmark = pytest.mark.usefixtures("one_thread")
TOP = sten.TopK(4)


def mlp():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def by_hand(x, k):
    return x * torch.zeros_like(x).scatter(-1, x.abs().topk(k).indices, 1.0)


INLINE = [
    (sten.TopK(4), FanIn()),
    (sten.Threshold(0.3), CSR()),
    (sten.TopK(2, block=4), NM(2, 4)),
    (sten.TopK(0.25), Masked()),
    (sten.RandomFraction(0.5), CSR()),
]


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu"])
@pytest.mark.parametrize(("method", "layout"), INLINE, ids=str)
def test_inline(method, layout, activation, monkeypatch):
    """In one tile or many the numbers and gradients of the same method after the operator."""
    torch.manual_seed(0)
    tiles = (1 << 20,) if isinstance(method, sten.RandomFraction) else (1 << 20, 64)
    x, grad = torch.randn(11, 16), torch.randn(11, 32)
    for tile in tiles:
        monkeypatch.setattr(sys.modules["sten.ops.inline_linear"], "TILE", tile)
        found = []
        for inline in (True, False):
            layer, a = mlp()[0], x.clone().requires_grad_()
            op = sten.sparse_op(F.linear, out=(method, layout), inline=inline, activation=activation)
            torch.manual_seed(0)
            y = op(a, layer.weight, layer.bias)
            assert y.sparse_layout == layout
            (y.to_dense() * grad).sum().backward()
            found.append((y.to_dense(), a.grad, layer.weight.grad, layer.bias.grad))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other)


def test_inline_stores_nothing_dense(monkeypatch):
    """The largest tensor that is made, forward and backward, is a tile of the output or a weight's gradient."""

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if type(out) is torch.Tensor:
                self.most = max(self.most, out.numel())
            return out

    monkeypatch.setattr(sys.modules["sten.ops.inline_linear"], "TILE", 4 * 512)
    weight = torch.randn(512, 4, requires_grad=True)
    op = sten.sparse_op(F.linear, out=(sten.TopK(3), FanIn()), inline=True)
    with Largest() as seen:
        op(torch.randn(400, 4), weight)
    assert seen.most <= 4 * 512


def test_inline_elsewhere():
    op = sten.sparse_op(F.linear, out=(TOP, FanIn()), inline=True, activation="relu")
    assert "inline" in repr(op)
    x, layer = torch.randn(6, 16), mlp()[0]
    want = by_hand(F.relu(layer(x)), 4)
    with torch.no_grad():
        torch.testing.assert_close(op(x, layer.weight, layer.bias).to_dense(), want.detach())
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, layer.weight, layer.bias), want)
    with torch.autocast("cpu", torch.bfloat16):
        y = op(x, layer.weight, layer.bias)
        assert y.dtype == torch.bfloat16
    y.to_dense().float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    sparse = sten.sparsify(mlp(), CSR(), sparsity=0.5)[0]
    dense = by_hand(F.relu(F.linear(x, sparse.weight.to_dense(), sparse.bias)), 4)
    torch.testing.assert_close(op(x, sparse.weight, sparse.bias).to_dense(), dense)
    with pytest.raises(ValueError, match="Expected a matrix"):
        op(x.view(2, 3, 16), layer.weight)
    with pytest.raises(ValueError, match="whose rows can be joined"):
        BSR((2, 4)).join_rows([{}, {}], [4, 4])


@pytest.mark.parametrize("method", [TOP, sten.Threshold(0.3), sten.TopK(2, block=4), sten.RandomFraction(1.0)], ids=str)
def test_an_activation_by_name(method):
    """With and without gradients, in any shape, dense or in a layout, compiled: what function and method do."""
    functions = {"relu2": lambda x: F.relu(x).square(), "relu": F.relu, "silu": F.silu}
    for name, function in functions.items():
        op, by_hand = sten.sparse_op(name, out=method), sten.sparse_op(function, out=method)
        for shape in ((6, 16), (2, 3, 16), (16,), (0, 16)):
            x = torch.randn(shape)
            torch.testing.assert_close(op(x), by_hand(x))
            x, other = x.clone().requires_grad_(), x.clone().requires_grad_()
            op(x).sum().backward()
            by_hand(other).sum().backward()
            torch.testing.assert_close(x.grad, other.grad)
        x = torch.randn(6, 16)
        torch.compiler.reset()  # its limit of compiled instances of one class
        torch.testing.assert_close(torch.compile(op, backend="aot_eager", fullgraph=True)(x), by_hand(x))
        torch.testing.assert_close(copy.deepcopy(op)(x), by_hand(x))
        stored = sten.sparse_op(name, out=(method, CSR()), grad=sten.TopK(4))(x)
        torch.testing.assert_close(stored.to_dense(), by_hand(x))
        assert torch.equal(sten.sparse_op(name)(x), function(x)) and f"output of {name}" in repr(op)
    with pytest.raises(TypeError):
        op(x, x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"out": (sten.BatchTopK(4), CSR())}, "got BatchTopK.*, which needs the whole tensor"),
        ({"out": (sten.TopK(4, straight_through=True), CSR())}, "without gradients of dropped entries"),
        ({"out": TOP}, "with a layout and without grad="),
        ({"out": (TOP, CSR()), "grad": TOP}, "with a layout and without grad="),
        ({"operator": torch.add, "out": (TOP, CSR())}, "Expected F.linear for inline=True, got add"),
        ({"out": (TOP, CSR()), "activation": "tanh"}, "one of relu, silu"),
        ({"operator": "relu", "out": (TOP, CSR())}, "without inline= and activation=, got 'relu'"),
        ({"operator": "tanh", "out": TOP, "inline": False}, "one of relu, .*relu2, .*got 'tanh'"),
    ],
)
def test_inline_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        sten.sparse_op(**{"operator": F.linear, "inline": True, **arguments})
