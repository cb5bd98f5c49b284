"""Every cell of the README's table of layouts and operators works under sten.strict(), forward and backward."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sten
from sten.backends import cpp

TEXT = (Path(__file__).parent.parent / "README.md").read_text()
ROWS = [[cell.strip() for cell in row.strip("| \n").split("|")] for row in re.findall(r"^\|.*\|$", TEXT, re.M)]
HEADER = next(i for i, row in enumerate(ROWS) if row[0] == "layout" and "linear on CPU" in row)
TABLE = {row[0]: dict(zip(ROWS[HEADER], row, strict=True)) for row in ROWS[HEADER + 2 : HEADER + 9]}
LAYOUTS = {
    "Masked": sten.Masked(),
    "CSR": sten.CSR(),
    "BSR": sten.BSR((4, 4)),
    "NM": sten.NM(2, 4),
    "GroupedNM": sten.GroupedNM(1, 4, 2),
    "VectorNM": sten.VectorNM(1, 4, 8),
    "FanIn": sten.FanIn(),
}


def sparse(layout, *shape):
    dense = torch.randn(shape)
    mask = layout.mask(dense.abs(), None if layout.rate else 0.5)
    return nn.Parameter(sten.from_dense(dense, layout, mask))


def products(w):
    x, bias = torch.randn(3, 16, requires_grad=True), torch.randn(12, requires_grad=True)
    y = F.linear(x, w, bias) + torch.addmm(bias, x, w.t()) + x @ w.t() + torch.mm(w, x.t()).t()
    return y + torch.matmul(w, x.t()).t()


def convolution(w):
    return F.conv2d(torch.randn(2, 8, 6, 6, requires_grad=True), w, padding=1)


def attention(layout):
    layer = nn.MultiheadAttention(16, 2)
    layer.in_proj_weight, layer.out_proj.weight = sparse(layout, 48, 16), sparse(layout, 16, 16)
    x = torch.randn(5, 2, 16)
    return layer(x, x, x)[0]


def pointwise(w):
    with torch.no_grad():
        w.mul_(0.5).add_(0.1)
    return (w * w.abs()).sum() + w.norm() + w.t().sum() + (w + 1).sum()


def test_the_table_names_every_layout():
    assert set(TABLE) == set(LAYOUTS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_cells(name):
    layout = LAYOUTS[name]
    with sten.strict():
        for run, w in (
            (products, sparse(layout, 12, 16)),
            (convolution, sparse(layout, 8, 8, 3, 3)),
            (pointwise, sparse(layout, 12, 16)),
        ):
            run(w).square().sum().backward()
            assert w.grad.sparse_layout == layout and bool(w.grad.parts["values"].any())
        table = sparse(layout, 12, 16)
        F.embedding(torch.tensor([[1, 2], [0, 1]]), table).sum().backward()
        assert table.grad.sparse_layout == layout
        attention(layout).sum().backward()


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_cpu_column_is_true(name):
    if not cpp.available():
        pytest.skip("the C++ kernels are not built")
    kernel = sten.which("linear", (64, 16), sparse(LAYOUTS[name], 12, 16)).kernel
    assert TABLE[name]["linear on CPU"] == ("expand" if kernel.endswith("_expand") else "C++"), kernel
