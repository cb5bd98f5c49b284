"""The attribute of a layer whose weight is finalized: compilers see the parts, and everybody else the Parameter."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from weights import every_layout

import sten

RATES = {sten.Masked: 0.5, sten.CSR: 0.5, sten.BSR: 0.5, sten.FanIn: 0.5}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model_of(layout):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)).requires_grad_(False)
    return sten.sparsify(model, layout, sparsity=RATES.get(type(layout)))


class Backend:
    """Counts compilations, and refuses a sparse tensor among the inputs of a graph."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        assert not any(isinstance(each, sten.SparseTensor) for each in inputs)
        self.graphs += 1
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)


@every_layout
def test_the_attribute_is_the_parameter(layout):
    model = model_of(layout)
    assert isinstance(model[0], nn.Linear) and type(model[0]).__name__ == "Linear"
    assert model[0].weight is model[0]._parameters["weight"] and isinstance(model[0].weight, sten.SparseTensor)
    assert list(dict(model.named_parameters())) == ["0.weight", "0.bias", "2.weight", "2.bias"]


@every_layout
def test_compiled_graphs_take_the_parts(layout):
    """Forward, the gradient of an input, dynamic token counts; new values and an equal number of other entries are
    seen by the same graphs."""
    model, x, count = model_of(layout), torch.randn(3, 16), Backend()
    run = torch.compile(model, backend=count, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x))
        model[0].weight.mul_(2)
        torch.testing.assert_close(run(x), model(x))
        new = torch.randn(16, 16).masked_fill(~model[0].weight.mask(), 0)
        model[0].weight = nn.Parameter(sten.from_dense(new, layout, model[0].weight.mask()), requires_grad=False)
        torch.testing.assert_close(run(x), model(x))
        assert count.graphs == 1
        for tokens in (5, 7, 9):
            torch.testing.assert_close(run(x.new_ones(tokens, 16)), model(x.new_ones(tokens, 16)))
        assert count.graphs == 2
    x.requires_grad_()
    (want,) = torch.autograd.grad(model(x).square().sum(), x)
    torch.testing.assert_close(torch.autograd.grad(run(x).square().sum(), x)[0], want)


def test_a_write_inside_a_compiled_function_arrives():
    model, x = model_of(sten.CSR()), torch.randn(3, 16)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def scaled(x):
        model[0].weight.mul_(2)
        return model(x)

    twin = copy.deepcopy(model)
    twin[0].weight.data.mul_(2)
    with torch.no_grad():
        torch.testing.assert_close(scaled(x), twin(x))
        torch.testing.assert_close(model(x), twin(x))


def test_tied_weights():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).requires_grad_(False)
    model[1].weight = model[0].weight
    sten.sparsify(model, sten.NM(2, 4))
    run, x = torch.compile(model, backend=Backend(), fullgraph=True), torch.randn(3, 16)
    assert model[0].weight is model[1].weight
    torch.testing.assert_close(run(x), model(x))


@every_layout
def test_copies_and_pickles(layout):
    model, x, file = model_of(layout), torch.randn(3, 16), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert type(other[0]) is type(model[0])
        torch.testing.assert_close(other(x), model(x))


def test_densify_gives_the_class_back():
    model = model_of(sten.CSR())
    assert type(sten.densify(model)[0]) is nn.Linear


class Twice(nn.Module):
    def forward(self, w):
        return w * 2


def test_the_attribute_may_be_replaced():
    """By parametrize, by prune, and by an ordinary Parameter."""
    x = torch.randn(3, 16)
    layer = model_of(sten.CSR())[0]
    dense = layer.weight.to_dense()
    parametrize.register_parametrization(layer, "weight", Twice())
    torch.testing.assert_close(layer(x), nn.functional.linear(x, 2 * dense, layer.bias))
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, dense, layer.bias))
    layer = model_of(sten.CSR())[0]
    kept = torch.rand(16, 16) > 0.5
    prune.custom_from_mask(layer, "weight", kept)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, dense * kept, layer.bias))
    layer = model_of(sten.CSR())[0]
    layer.weight = nn.Parameter(dense + 1)
    want = nn.functional.linear(x, dense + 1, layer.bias)
    torch.testing.assert_close(layer(x), want)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), want)
    del layer.weight
    assert not hasattr(layer, "weight")


@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_keep_the_parameter(strict):
    model, x = model_of(sten.CSR()), torch.randn(3, 16)
    program = torch.export.export(model, (x,), strict=strict)
    assert isinstance(program.state_dict["0.weight"], sten.SparseTensor)
    torch.testing.assert_close(program.module()(x), model(x))


def test_weights_that_others_put_into_place():
    """`sten.from_torch` of a module; `from_pretrained` has its test beside the folders."""
    layer = nn.Linear(16, 8).requires_grad_(False)
    dense = layer.weight.masked_fill(torch.rand(8, 16) < 0.5, 0)
    layer.weight = nn.Parameter(dense.to_sparse_csr(), requires_grad=False)
    run, x = torch.compile(sten.from_torch(layer), backend=Backend(), fullgraph=True), torch.randn(3, 16)
    torch.testing.assert_close(run(x), nn.functional.linear(x, dense, layer.bias))
