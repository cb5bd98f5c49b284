"""FlopCounterMode counts the work of sparse weights: two operations for a stored entry and a token or pixel."""

from __future__ import annotations

import pytest
import torch
from small import every_layout, rate
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import sten


def count(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def entries(model):
    """How many entries each sparse weight stores."""
    return [int(p.mask().sum()) for p in model.parameters() if isinstance(p, sten.SparseTensor)]


@pytest.mark.cell("flop counter")
@every_layout
@pytest.mark.parametrize("form", ["finalized", "trainable"])
def test_linear(layout, form):
    torch.manual_seed(0)
    model = sten.sparsify(nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 8)), layout, sparsity=rate(layout))
    first, second = entries(model)
    if form == "trainable":
        sten.trainable(model)
    x = torch.randn(3, 5, 12)
    assert count(lambda: model(x)) == 2 * 15 * (first + second)
    with torch.no_grad():
        assert count(lambda: model(x)) == 2 * 15 * (first + second)
    both = 2 * 15 * (2 * first + 3 * second)  # the input of the first layer needs no gradient
    assert count(lambda: model(x).sum().backward()) == both
    dense = sten.densify(model)
    assert count(lambda: dense(x)) == 2 * 15 * (12 * 20 + 20 * 8)  # the unit is torch's own


@pytest.mark.cell("flop counter")
@every_layout
@pytest.mark.parametrize("form", ["finalized", "trainable"])
def test_conv_with_groups(layout, form):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.Conv2d(8, 8, 3, stride=2))
    model = sten.sparsify(model, layout, sparsity=rate(layout), weights="*weight")
    first, second = entries(model)
    if form == "trainable":
        sten.trainable(model)
    x = torch.randn(2, 4, 7, 7)
    assert count(lambda: model(x)) == 2 * 2 * (49 * first + 9 * second)
    assert count(lambda: model(x).sum().backward()) == 2 * 2 * (2 * 49 * first + 3 * 9 * second)


def test_a_look_up_is_no_operation_as_of_a_dense_table():
    model = sten.sparsify(nn.Embedding(16, 8), sten.NM(2, 4), weights="*")
    assert count(lambda: model(torch.tensor([1, 3]))) == count(lambda: sten.densify(model)(torch.tensor([1, 3]))) == 0


@pytest.mark.cell("flop counter", form="dense weight")
@every_layout
def test_under_a_method_the_dense_product_runs(layout):
    method = sten.STE() if layout.rate else sten.Gradual(1, 2)
    model, x = sten.sparsify(nn.Linear(12, 20), layout, method, rate(layout)), torch.randn(3, 12)
    assert count(lambda: model(x)) == 2 * 3 * 12 * 20


def test_results_are_those_without_a_counter():
    model = sten.sparsify(nn.Linear(12, 20), sten.CSR(), sparsity=0.5)
    x = torch.randn(3, 12)
    with FlopCounterMode(display=False):
        y = model(x)
    torch.testing.assert_close(y, model(x))
