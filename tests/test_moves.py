"""model.to(memory_format=...), to("meta"), to_empty and lazy modules, in every form of a weight."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from forms import every_form
from small import every_layout, mlp, rate
from torch import nn
from weights import one_sentence

import sten


def images(dims: int = 2) -> nn.Module:
    torch.manual_seed(0)
    conv, pool = (nn.Conv2d, nn.AdaptiveAvgPool2d) if dims == 2 else (nn.Conv3d, nn.AdaptiveAvgPool3d)
    return nn.Sequential(conv(4, 8, 3, padding=1), pool(1), nn.Flatten(), nn.Linear(8, 12))


def sparse(model: nn.Module, layout, form: str) -> nn.Module:
    method = sten.Gradual(1, 2) if layout.rate is None else sten.SRSTE()
    method = method if form == "dense weight" else sten.Magnitude()
    sten.sparsify(model, layout, method, sparsity=rate(layout), weights="*weight")
    return sten.trainable(model) if form == "trainable" else model


def form_of(model: nn.Module) -> list:
    """How every weight is stored, as `sten.summary` says."""
    return [(row.name, row.layout, row.density) for row in sten.summary(model).rows]


@pytest.mark.cell("state_dict")
@every_layout
@every_form
@pytest.mark.parametrize("dims", [2, 3])
def test_channels_last(layout, form, dims):
    model = sparse(images(dims), layout, form)
    x = torch.randn(2, 4, *[5] * dims)
    want, before = model(x), form_of(model)
    want.square().sum().backward()
    grads = [p.grad.to_dense() for p in model.parameters()]
    model.zero_grad()
    memory_format = torch.channels_last if dims == 2 else torch.channels_last_3d
    model.to(memory_format=memory_format)
    got = model(x.to(memory_format=memory_format))
    torch.testing.assert_close(got, want)
    got.square().sum().backward()
    for p, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad.to_dense(), grad)
    assert form_of(model) == before
    state = model.state_dict()
    again = sparse(images(dims), layout, form)
    again.load_state_dict(state)
    torch.testing.assert_close(again(x), want)


@every_layout
@pytest.mark.parametrize("form", ["finalized", "trainable"])
def test_a_model_on_meta(layout, form):
    """Shapes without numbers: it can be copied, shown and called, and takes the numbers of a state dict."""
    model = sparse(mlp(), layout, form)
    x, state = torch.randn(3, 12), copy.deepcopy(model.state_dict())
    meta = copy.deepcopy(copy.deepcopy(model).to("meta"))
    assert meta(x.to("meta")).shape == (3, 8) and "meta" in repr(meta[0].weight)
    meta.load_state_dict(state, assign=True)
    assert torch.equal(meta(x), model(x)) and form_of(meta) == form_of(model)


@every_layout
@pytest.mark.parametrize("on_meta", [True, False])
def test_to_empty_of_a_finalized_model_is_refused(layout, on_meta):
    model = sparse(mlp(), layout, "finalized")
    with pytest.raises(RuntimeError, match=r"use load_state_dict\(\.\.\., assign=True\)") as error:
        (model.to("meta") if on_meta else model).to_empty(device="cpu")
    assert one_sentence(error) and isinstance(model[0].weight, sten.SparseTensor)


@every_layout
@pytest.mark.parametrize("form", ["trainable", "dense weight"])
def test_to_empty_of_a_model_in_training_waits_for_a_state_dict(layout, form):
    model = sparse(mlp(), layout, form)
    x, state = torch.randn(3, 12), copy.deepcopy(model.state_dict())
    empty = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    for use in (lambda: empty(x), lambda: sten.finalize(empty), lambda: sten.densify(empty)):
        with pytest.raises(RuntimeError, match="load a state dict of the sparse model first") as error:
            use()
        assert one_sentence(error)
    with pytest.raises(RuntimeError, match="after to_empty, got a dense"):
        empty.load_state_dict(mlp().state_dict())
    empty.load_state_dict(state)
    assert torch.equal(empty(x), model(x)) and form_of(empty) == form_of(model)
    assert all(torch.equal(value, empty.state_dict()[key]) for key, value in state.items())


@every_layout
def test_to_empty_of_numbers_keeps_the_pattern(layout):
    """The values are lost, as of every Parameter; what pattern they belong to is not."""
    model = sparse(mlp(), layout, "trainable")
    x, mask, values = torch.randn(3, 12), model[0].weight.mask(), [p.detach().clone() for p in model.parameters()]
    want = model(x)
    model.to_empty(device="cpu")
    assert torch.equal(model[0].weight.mask(), mask)
    with torch.no_grad():
        for p, value in zip(model.parameters(), values, strict=True):
            p.copy_(value)
    assert torch.equal(model(x), want)


def test_a_run_after_to_empty():
    """The state of a method is loaded with the masks, and the run goes on as the one that it was taken from."""
    model, other = mlp(), mlp()
    states = []
    for each in (model, other):
        optimizer = torch.optim.SGD(each.parameters(), 0.1)
        sten.sparsify(each, sten.CSR(), sten.SET(total_steps=8, every=2), 0.5, optimizer=optimizer)
        for step in range(3):
            each(torch.randn(4, 12, generator=torch.Generator().manual_seed(step))).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        states.append(copy.deepcopy(each.state_dict()))
    empty = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    empty.load_state_dict(states[1])
    for key, value in empty.state_dict().items():
        assert torch.equal(value, states[1][key]), key


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(4))


@pytest.mark.parametrize("call", [
    lambda m: sten.sparsify(m, sten.NM(2, 4)),
    lambda m: sten.sparsify(m, sten.CSR(), sparsity=0.5, weights="0.weight"),
    lambda m: sten.plan(m, sten.NM(2, 4)),
    lambda m: sten.finalize(m),
    lambda m: sten.summary(m),
], ids=["sparsify", "named", "plan", "finalize", "summary"])  # fmt: skip
def test_lazy_modules_are_run_first(call):
    model = lazy()
    with pytest.raises(ValueError, match=r"got 0\.weight of LazyLinear without a shape; run the model once") as error:
        call(model)
    assert one_sentence(error)
    x = torch.randn(3, 16)
    model(x)
    torch.manual_seed(1)
    dense = copy.deepcopy(model)
    sten.sparsify(model, sten.NM(2, 4))
    with torch.no_grad():
        dense[0].weight.mul_(model[0].weight.mask())
        dense[2].weight.mul_(model[2].weight.mask())
    torch.testing.assert_close(model(x), dense(x))


@every_layout
@every_form
@pytest.mark.filterwarnings("error")
def test_another_dtype_makes_no_dense_copy(layout, form):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = sparse(mlp(), layout, form)
    known, want = form_of(model), model(torch.ones(3, 12)).detach()
    with sten.strict():
        model.double().to("cpu", torch.float32)
    torch.testing.assert_close(model(torch.ones(3, 12)), want)
    assert form_of(model) == known
