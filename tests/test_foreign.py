"""Libraries that fuse, quantize or merge layers: right, or one sentence, in every form of a weight."""

import pytest
import torch
from cases import SMALL
from small import mlp, rate
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from weights import one_sentence

import sten
from sten.layouts import CSR, NM

METHODS = {
    "Gradual": (sten.Gradual(1, 3, 1), CSR()),
    "SRSTE": (sten.SRSTE(), NM(2, 4)),
    "BiMask": (sten.BiMask(), NM(2, 4)),
}
CASES = {str(layout): (sten.Magnitude(), layout) for layout in SMALL} | METHODS
every_case = pytest.mark.parametrize("case", CASES)


def in_training(case, model, weights="0.weight"):
    method, layout = CASES[case]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return sten.sparsify(model, layout, method, rate(layout), weights=weights, optimizer=optimizer)


def numbers(module):
    return module.weight.detach().to_dense().clone()


@every_case
@pytest.mark.parametrize("finalized", [False, True])
def test_batch_norm_is_fused(case, finalized):
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(12, 20), nn.BatchNorm1d(20))
    image = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8))
    for model, x, fuse in (
        (linear, torch.randn(6, 12), fuse_linear_bn_eval),
        (image, torch.randn(2, 4, 6, 6), fuse_conv_bn_eval),
    ):
        if (model is image and not isinstance(CASES[case][1], (CSR, NM))) or case == "BiMask":
            continue  # not every layout stores a kernel of 3 x 3; a dual mask has no single product
        nn.init.normal_(model[1].running_mean)
        nn.init.uniform_(model[1].running_var, 0.5, 2)
        in_training(case, model)
        if finalized:
            sten.finalize(model)
        want = model.eval()(x).detach()
        fused = fuse(model[0], model[1])
        torch.testing.assert_close(fused(x).detach(), want, rtol=1e-4, atol=1e-5)
        assert torch.equal(model(x), want)  # the layer that was fused is left as it was


@every_case
def test_dynamic_quantization_does_not_skip_layers(case):
    x = torch.randn(6, 12)
    for form in (lambda model: model, sten.finalize):
        model = form(in_training(case, mlp().eval()))
        want = model(x).detach()
        with pytest.raises(
            RuntimeError, match=r"torch\.ao\.quantization, got Linear with a sparse weight; call sten\.densify"
        ) as error:
            torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        assert one_sentence(error) and torch.equal(model(x), want)
    model = sten.densify(model)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert "quantized" in type(quantized[0]).__module__
    torch.testing.assert_close(quantized(x), want, rtol=0.05, atol=0.05)


def add_to_data(layer, delta):
    layer.weight.data += delta


def replace_data(layer, delta):
    merged = layer.weight.data.clone()
    merged += delta
    layer.weight.data = merged


@every_case
@pytest.mark.parametrize("merge", [add_to_data, replace_data])
def test_an_adapter_is_merged_or_refused(case, merge):
    """As PEFT merges LoRA's product into `base_layer.weight.data`: it is dense, and fits no pattern."""
    model = in_training(case, mlp())
    before, delta = numbers(model[0]), torch.full((20, 12), 0.5)
    try:
        merge(model[0], delta)
    except (ValueError, RuntimeError) as error:
        assert (str(error).startswith("Expected ") and "sten.densify" in str(error)) or "assign to" in str(error)
        assert torch.equal(numbers(model[0]), before)
    else:
        assert torch.equal(model[0]._parameters["weight"].detach(), before + delta)  # the method masks it in use
    model = in_training(case, mlp())
    before = numbers(model[0])
    if case != "BiMask":
        merge(model[0], delta * (before != 0))
        torch.testing.assert_close(numbers(model[0]), before + delta * (before != 0))
    dense = sten.densify(in_training(case, mlp()))
    before = numbers(dense[0])
    merge(dense[0], delta)
    torch.testing.assert_close(numbers(dense[0]), before + delta)


class Quantized(torch.Tensor):
    """A foreign wrapper, as torchao's `quantize_` puts it in the place of a weight."""

    @staticmethod
    def __new__(cls, w):
        return torch.Tensor._make_wrapper_subclass(cls, w.shape, dtype=w.dtype)

    def __init__(self, w):
        self.scale = w.abs().max() / 127
        self.numbers = (w / self.scale).round().to(torch.int8)

    def __repr__(self):
        return "Quantized()"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]
        args = [a.numbers * a.scale if isinstance(a, cls) else a for a in args]
        return func(*args, **(kwargs or {}))


@every_case
def test_a_foreign_tensor_is_refused_and_works_when_finalized(case):
    model = in_training(case, mlp())
    before = numbers(model[0])
    with pytest.raises(TypeError, match=r"got a Quantized; call sten\.finalize or sten\.densify") as error:
        model[0].weight = nn.Parameter(Quantized(before), requires_grad=False)
    assert one_sentence(error) and torch.equal(numbers(model[0]), before)
    for form in (sten.finalize, sten.densify):
        model = form(in_training(case, mlp()))
        want = model(torch.ones(6, 12)).detach()
        model[0].weight = nn.Parameter(Quantized(numbers(model[0])), requires_grad=False)
        torch.testing.assert_close(model(torch.ones(6, 12)).detach(), want, rtol=0.05, atol=0.05)


def test_a_quantized_weight_is_left_with_a_warning():
    model = mlp()
    model[0].weight = nn.Parameter(Quantized(model[0].weight.detach()), requires_grad=False)
    want = model[0](torch.ones(6, 12)).detach()
    with pytest.warns(UserWarning, match=r"sten: left as they are: 0\.weight \(it is stored as a Quantized of"):
        sten.sparsify(model, sten.NM(2, 4))
    assert type(model[0].weight) is Quantized and model[2].weight.density == 0.5
    assert torch.equal(model[0](torch.ones(6, 12)).detach(), want)
    assert "Quantized" in next(row.why for row in sten.summary(model).rows if row.name == "0.weight")
    for call in (
        lambda: sten.sparsify(model, sten.CSR(), sparsity=0.5, weights="0"),
        lambda: sten.sparsify(model[0], sten.NM(2, 4)),
    ):
        with pytest.raises(ValueError, match="it is stored as a Quantized of") as error:
            call()
        assert one_sentence(error)
