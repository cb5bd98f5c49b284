"""torch.func on a model in trainable form equals torch.func on its dense twin."""

import copy

import pytest
import torch
from forms import FORMS, every_form
from small import every_layout as small_layout
from small import mlp, rate
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


def test_forward_mode(pair):
    """Also for a weight that was used before, whose Plan is stored."""
    model, dense, x = pair
    tangent = torch.randn_like(x)
    want = torch.func.jvp(dense, (x,), (tangent,))[1]
    for each in (model, sten.finalize(copy.deepcopy(model)), sten.finalize(copy.deepcopy(model)).requires_grad_(False)):
        for _ in range(2):
            with torch.autograd.forward_ad.dual_level():
                y = each(torch.autograd.forward_ad.make_dual(x, tangent))
                torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(y).tangent, want)
            torch.testing.assert_close(torch.func.jvp(each, (x,), (tangent,))[1], want)
            torch.testing.assert_close(each(x), dense(x))


def in_form(layout, form, dtype=torch.float32):
    """(a model in a form, what it computes with, dense)."""
    torch.manual_seed(0)
    model = mlp().to(dtype)
    method = sten.Gradual(1, 2) if layout.rate is None else sten.STE()
    sten.sparsify(model, layout, method if form == "dense weight" else sten.Magnitude(), sparsity=rate(layout))
    model = sten.trainable(model) if form == "trainable" else model
    dense = mlp().to(dtype)
    with torch.no_grad():
        for ours, theirs in zip(model, dense, strict=True):
            if isinstance(ours, nn.Linear):
                theirs.weight.copy_(ours.weight.to_dense())
                theirs.bias.copy_(ours.bias)
    return model, dense


@pytest.mark.cell("jvp")
@small_layout
@every_form
def test_jvp_and_hessian(layout, form):
    (model, dense), x, tangent = in_form(layout, form), torch.randn(5, 12), torch.randn(5, 12)
    got, want = (torch.func.jvp(each, (x,), (tangent,)) for each in (model, dense))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    got, want = (torch.func.hessian(lambda a, m=each: m(a).square().sum())(x[:1]) for each in (model, dense))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.cell("jvp")
@small_layout
@pytest.mark.parametrize("form", FORMS[:2])
def test_jvp_over_the_parameters(layout, form):
    """Against finite differences."""
    model, x = in_form(layout, form, torch.float64)[0], torch.randn(5, 12, dtype=torch.float64)
    params = {name: p.detach() for name, p in model.named_parameters()}
    tangents = {name: p * torch.rand((), dtype=torch.float64) for name, p in params.items()}

    def call(params):
        return torch.func.functional_call(model, params, (x,))

    got = torch.func.jvp(call, (params,), (tangents,))[1]
    ahead, behind = (call({n: p + step * tangents[n] for n, p in params.items()}) for step in (1e-5, -1e-5))
    torch.testing.assert_close(got, (ahead - behind) / 2e-5, rtol=1e-5, atol=1e-5)


@pytest.mark.cell("func.grad")
@pytest.mark.cell("vmap")
@small_layout
@every_form
def test_per_sample_gradients(layout, form):
    """Of a finalized weight, whose class torch.func hides, the gradient of all entries; zero it by `w.mask()`."""
    (model, dense), x = in_form(layout, form), torch.randn(5, 12)
    gradients = [of_each_sample(each, x) for each in (model, dense)]
    loss = [torch.func.grad(lambda a, m=each: m(a).square().sum())(x) for each in (model, dense)]
    torch.testing.assert_close(*loss, rtol=1e-4, atol=1e-4)
    for name, got in gradients[0].items():
        for row, want in zip(got, gradients[1][name], strict=True):
            weight = model[int(name[0])].weight_pattern if form != "finalized" else None
            if form == "trainable" and name.endswith("weight"):
                want = weight.packed(want.t() if weight.transposed else want)
            if form == "finalized" and name.endswith("weight"):
                mask = model.get_parameter(name).mask()
                row, want = row * mask, want * mask
            torch.testing.assert_close(row, want, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


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
