"""Operators built on others, and gradients of dense operands beside a sparse one: as those of the dense twin."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from weights import LAYOUTS, every_layout, make

import sten
from sten.layouts import CSR

pytestmark = pytest.mark.filterwarnings("ignore:sten. operator")

# of a sparse tensor w and a dense one x
COMPOSITES = {
    "hinge_embedding_loss": lambda w, x: F.hinge_embedding_loss(w, x.sign()),
    "lerp by w": lambda w, x: torch.lerp(x, torch.zeros_like(x), w),
    "lerp from w": lambda w, x: torch.lerp(w, x, 0.3),
    "addcmul": lambda w, x: torch.addcmul(torch.zeros_like(x), x, w),
    "addcdiv": lambda w, x: torch.addcdiv(torch.zeros_like(x), w, x.abs() + 1),
    "vecdot": lambda w, x: torch.linalg.vecdot(x, w),
    "bce_with_logits of w": lambda w, x: F.binary_cross_entropy_with_logits(w, x.sigmoid()),
    "bce_with_logits to w": lambda w, x: F.binary_cross_entropy_with_logits(x, w.sigmoid()),
    "gaussian_nll_loss": lambda w, x: F.gaussian_nll_loss(x, torch.zeros_like(x), w.abs()),
    "poisson_nll_loss": lambda w, x: F.poisson_nll_loss(x, w.abs(), full=True),
    "huber_loss": lambda w, x: F.huber_loss(x, w),
    "index_reduce": lambda w, x: torch.index_reduce(x, 0, torch.tensor([0, 1, 1, 2, 3, 0, 0]), w, "mean"),
    "scatter_reduce": lambda w, x: torch.scatter_reduce(x, 0, torch.zeros(7, 5, dtype=torch.long), w, "mean"),
    "product": lambda w, x: x * w,
    "in-place product": lambda w, x: x.clone().mul_(w),
    "in-place sum": lambda w, x: x.clone().add_(w, alpha=2),
    "difference": lambda w, x: (1 - w) * x,
    "einsum": lambda w, x: torch.einsum("ij,ij->i", x, w),
    "broadcast": lambda w, x: (x.unsqueeze(0) * w).sum(),
    "maximum": lambda w, x: torch.maximum(w, x),
    "where": lambda w, x: torch.where(x > 0, x, w),
    "cat": lambda w, x: torch.cat([w, x]),
    "take": lambda w, x: torch.take(w, torch.tensor([1, 5, 9])) * x[0, :3],
    "masked_select": lambda w, x: torch.masked_select(w, x > 0) * torch.masked_select(x, x > 0),
    "softmax": lambda w, x: w.softmax(1) * x,
    "cdist": lambda w, x: torch.cdist(x, w),
    "foreach": lambda w, x: torch._foreach_mul([w], [x])[0],
    "division by w": lambda w, x: x / (w + 2),
    "cosine_similarity": lambda w, x: F.cosine_similarity(x, w),
    "layer_norm": lambda w, x: F.layer_norm(w + x, (5,)),
}


@every_layout
@pytest.mark.parametrize("name", COMPOSITES)
def test_composites(layout, name):
    w, dense = make(layout, (7, 5), torch.float64)
    torch.manual_seed(1)
    start = torch.randn(7, 5, dtype=torch.float64)
    results = []
    for weight in (w.requires_grad_(), dense.requires_grad_()):
        x = start.clone().requires_grad_()
        out = COMPOSITES[name](weight, x)
        out = out.to_dense() if isinstance(out, sten.SparseTensor) else out
        grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        for _ in range(2):  # the second accumulates
            out.backward(grad, retain_graph=True)
        (x * 3).sum().backward()
        results.append((out, x.grad, weight.grad))
    (got, x_grad, w_grad), (want, x_want, w_want) = results
    torch.testing.assert_close(got, want, equal_nan=True)
    assert type(x_grad) is torch.Tensor
    torch.testing.assert_close(x_grad, x_want, equal_nan=True)
    if w_want is not None:
        assert w_grad.same_pattern(w)
        torch.testing.assert_close(w_grad.to_dense(), w_want.masked_fill(~w.mask(), 0), equal_nan=True)


def test_gradients_have_the_pattern_wherever_they_are_asked_for():
    w, dense = make(CSR(), (7, 5), torch.float64)
    mask = w.mask()
    for f in (
        lambda t: (t.exp() * t).sum(), lambda t: F.gelu(t).sum(), lambda t: t.square().sum(), lambda t: t.std(),
        lambda t: torch.cat([t, t]).norm(), lambda t: t.pow(3).mean(), lambda t: F.linear(t.tanh().to_dense(), t).sum(),
    ):  # fmt: skip
        (want,) = torch.autograd.grad(f(v := dense.clone().requires_grad_()), v)
        sparse = w.detach().requires_grad_()
        (got,) = torch.autograd.grad(f(sparse), sparse)
        assert got.same_pattern(w)
        torch.testing.assert_close(got.to_dense(), want * mask)
        f(sparse).backward()
        assert sparse.grad.same_pattern(w)
        torch.testing.assert_close(sparse.grad.to_dense(), want * mask)


def test_addmm_ignores_an_input_that_is_multiplied_by_zero():
    w, dense = make(CSR(), (7, 5))
    hole = torch.full((7, 7), float("nan"))
    torch.testing.assert_close(torch.addmm(hole, w, dense.t(), beta=0), dense @ dense.t())
    torch.testing.assert_close(torch.addmm(hole, dense, w.t(), beta=0, alpha=2), 2 * dense @ dense.t())
    torch.testing.assert_close(torch.addmm(w, torch.eye(7), dense), dense + dense)
    with pytest.raises(RuntimeError, match="broadcast"):
        torch.addmm(torch.ones(3), w, dense.t(), beta=0)


@every_layout
def test_products_into_a_given_tensor(layout):
    w, dense = make(layout, (7, 5))
    x, b = torch.randn(3, 7), torch.randn(5)
    for product in (
        lambda w, out: torch.mm(x, w, out=out), lambda w, out: torch.matmul(x, w, out=out),
        lambda w, out: torch.addmm(b, x, w, out=out),
    ):  # fmt: skip
        out = torch.empty(3, 5)
        assert product(w, out) is out
        torch.testing.assert_close(out, product(dense, torch.empty(3, 5)))
    torch.testing.assert_close(torch.mm(x, w, out=torch.empty(0)), x @ dense)


def test_fused_steps_act_on_the_stored_entries():
    for kind in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD):
        w, dense = make(CSR(), (7, 5))
        models = nn.Parameter(w), nn.Parameter(dense)
        for p in models:
            optimizer = kind([p], lr=0.1, fused=True, weight_decay=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                F.linear(torch.ones(2, 5), p).square().sum().backward()
                p.grad.mul_(w.mask()) if p is models[1] else None
                optimizer.step()
        torch.testing.assert_close(models[0].to_dense(), models[1].data)
    p = nn.Parameter(make(CSR(), (7, 5))[0])
    optimizer = torch.optim.Adagrad([p], fused=True)
    F.linear(torch.ones(2, 5), p).sum().backward()
    with pytest.raises(NotImplementedError, match="fused=False"):
        optimizer.step()


# random programs

UNARY = [
    lambda t, x: t * 2, lambda t, x: t.relu(), lambda t, x: t.abs().sqrt(), lambda t, x: t * x, lambda t, x: x * t,
    lambda t, x: t / (x.abs() + 1), lambda t, x: t + t, lambda t, x: t - t * 3, lambda t, x: t.tanh(),
    lambda t, x: t.clone(), lambda t, x: t.masked_fill(x > 0, 0), lambda t, x: t.pow(2), lambda t, x: -t,
    lambda t, x: torch.maximum(t, t * 2), lambda t, x: torch.lerp(t, t * 2, 0.3), lambda t, x: t.t().clone().t(),
]  # fmt: skip
LEAVING = [
    lambda t, x: t + x, lambda t, x: t.exp(), lambda t, x: t[1:, :2] * x[1:, :2], lambda t, x: t @ x.t(),
    lambda t, x: F.linear(x, t), lambda t, x: torch.cat([t, x]), lambda t, x: t.softmax(0), lambda t, x: t.sum(0),
    lambda t, x: t.std(), lambda t, x: t.flatten()[3:], lambda t, x: torch.where(x > 0, t, x), lambda t, x: 1 - t,
    lambda t, x: t.norm(), lambda t, x: t.mean(), lambda t, x: x.clone().addcmul_(t, x), lambda t, x: t.amax(1),
]  # fmt: skip


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    layout=st.sampled_from(LAYOUTS), flip=st.booleans(), steps=st.lists(st.integers(0, len(UNARY) - 1), max_size=4),
    last=st.integers(0, len(LEAVING) - 1), seed=st.integers(0, 99),
)  # fmt: skip
def test_random_programs(layout, flip, steps, last, seed):
    """A chain of operators that keep the pattern, one that leaves it, and all gradients."""
    w, dense = make(layout, (7, 5), torch.float64, seed=seed)
    start = torch.randn(7, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if flip:
        w, dense, start = w.t().detach(), dense.t(), start.t()
    results = []
    for weight in (w.requires_grad_(), dense.clone().requires_grad_()):
        x = start.clone().requires_grad_()
        t = weight
        for step in steps:
            t = UNARY[step](t, x)
        out = LEAVING[last](t, x)
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape))
        results.append((out.detach(), x.grad, weight.grad))
    (got, x_grad, w_grad), (want, x_want, w_want) = results
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(w_grad.to_dense().nan_to_num(0), (w_want * w.mask()).nan_to_num(0))
    assert (x_grad is None) == (x_want is None)
    if x_want is not None:
        assert type(x_grad) is torch.Tensor
        torch.testing.assert_close(x_grad.nan_to_num(0), x_want.nan_to_num(0))
