"""torch.func on a model in trainable form equals torch.func on its dense twin."""

import copy

import pytest
import torch
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
