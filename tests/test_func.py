"""torch.func on a model in trainable form equals torch.func on its dense twin."""

import copy

import pytest
import torch
from small import every_layout as small_layout
from small import rate
from torch import nn

import sten

LAYOUTS = [sten.CSR(), sten.NM(2, 4), sten.BSR((4, 8)), sten.GroupedNM(1, 4, 2)]


@pytest.fixture(params=LAYOUTS, ids=str)
def pair(request):
    model = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 9)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sten.sparsify(model, request.param, sparsity=None if request.param.rate else 0.8, optimizer=optimizer)
    return model, sten.densify(copy.deepcopy(model)), torch.randn(5, 24, dtype=torch.float64)


def test_over_the_input(pair):
    model, dense, x = pair
    torch.testing.assert_close(torch.vmap(model)(x), dense(x))
    for transform in (torch.func.grad, torch.func.jacrev):
        got, expected = (transform(lambda a, m=m: m(a).square().sum())(x) for m in (model, dense))
        torch.testing.assert_close(got, expected)


def test_backward_through_vmap(pair):
    model, _, x = pair
    gradients = []
    for run in (torch.vmap(model), model):
        model.zero_grad()
        run(x).square().sum().backward()
        gradients.append(model[0]._parameters["weight"].grad.clone())
    torch.testing.assert_close(*gradients)


def test_over_the_parameters(pair):
    model, _, x = pair
    model.zero_grad()
    model(x).square().sum().backward()
    values = dict(model.named_parameters())
    grads = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().sum())(values)
    for name, param in values.items():
        torch.testing.assert_close(grads[name], param.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_forward_mode_raises(pair):
    """No rule of sten propagates a tangent: it must not be dropped silently, also for a weight that was used before."""
    model, _, x = pair
    sten.finalize(model).requires_grad_(False)
    for _ in range(3):
        with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
            model(torch.autograd.forward_ad.make_dual(x, x))
        assert not model(x).requires_grad


# gradients by torch.func of a model in training


def of_each_sample(model, x):
    """Per-sample gradients of the parameters, by torch.func."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params, row):
        return torch.func.functional_call(model, params, row[None]).square().sum()

    return torch.func.vmap(torch.func.grad(loss), (None, 0))(params, x)


@pytest.mark.cell("func.grad", form="trainable")
@pytest.mark.cell("vmap", form="trainable")
@small_layout
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_of_each_sample(layout, transposed):
    make = (
        pytest.importorskip("transformers").pytorch_utils.Conv1D
        if transposed
        else lambda out, size: nn.Linear(size, out)
    )
    torch.manual_seed(0)
    model = sten.trainable(sten.sparsify(make(8, 12), layout, sparsity=rate(layout)))
    x = torch.randn(5, 12)
    for name, got in of_each_sample(model, x).items():
        for row, grad in zip(x, got, strict=True):
            want = torch.autograd.grad(model(row[None]).square().sum(), model._parameters[name])[0]
            torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-4)


@pytest.mark.cell("func.grad", form="dense weight", layout="NM")
@pytest.mark.cell("vmap", form="dense weight", layout="NM")
@pytest.mark.parametrize("method", [sten.STE(), sten.SRSTE(), sten.DecayingMask(20)], ids=lambda m: type(m).__name__)
def test_gradients_of_each_sample_of_a_dense_weight(method):
    model = nn.Sequential(nn.Linear(12, 8))
    sten.sparsify(model, sten.NM(2, 4), method, optimizer=torch.optim.SGD(model.parameters(), 0.1))
    x = torch.randn(5, 12)
    got = of_each_sample(model, x)["0.weight"]
    model(x).square().sum().backward()
    torch.testing.assert_close(got.sum(0), model[0]._parameters["weight"].grad, rtol=1e-4, atol=1e-4)


@small_layout
def test_a_gradient_of_a_gradient_by_torch_func(layout):
    torch.manual_seed(0)
    model, x = sten.trainable(sten.sparsify(nn.Linear(12, 8), layout, sparsity=rate(layout))), torch.randn(5, 12)

    def loss(params):
        return torch.func.functional_call(model, params, x).square().sum()

    def penalty(params):
        return sum(g.square().sum() for g in torch.func.grad(loss)(params).values())

    got = torch.func.grad(penalty)({name: p.detach() for name, p in model.named_parameters()})
    grads = torch.autograd.grad(model(x).square().sum(), list(model.parameters()), create_graph=True)
    sum(g.square().sum() for g in grads).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-3, atol=1e-3)
