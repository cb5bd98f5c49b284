"""What activation methods put into the graph: a tensor stored in a layout, and a gradient that is sparsified."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._torch_private import is_compiling, transforms_active
from ..layouts.base import Layout
from ..rule import Rule
from ..tensor import SparseTensor, traced, without_view


class Store(Rule):
    """A matrix at a mask, or at columns of each row, in a layout; the gradient is its own, made dense."""

    @staticmethod
    def forward(x, where, layout, full_gradient):
        pack = layout.pack if where.dtype == torch.bool else layout.pack_columns
        w = SparseTensor(layout, pack(x.detach(), where), tuple(x.shape))
        w.cache.activation, w.cache.full_gradient = True, full_gradient
        return w

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return (grad.to_dense() if isinstance(grad, SparseTensor) else grad), None, None, None


def stores(x: Tensor, layout: Layout | None) -> bool:
    """Whether a layout stores x: not if it is empty, nor where a compiler or torch.func traces, which see it dense."""
    return layout is not None and x.numel() > 0 and not (is_compiling() or transforms_active() or traced(x))


def stored(x: Tensor, where: Tensor, layout: Layout, full_gradient: bool) -> Tensor:
    """x in a layout, at the entries of a mask or at the columns (rows, k); ValueError if the layout cannot hold it.

    With `full_gradient` the operators that read it compute the gradient of all entries.
    """
    layout.check(tuple(x.shape))
    return Store.run(x, where, layout, full_gradient)


class SparsifiedGradient(torch.autograd.Function):
    """x as it is; its gradient is what `change` makes of it."""

    @staticmethod
    def forward(x, change):
        return x.view_as(x) if is_compiling() else without_view(x.view_as(x))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.change = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        return ctx.change(grad), None


def with_gradient(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """x, whose gradient is changed on its way back."""
    return SparsifiedGradient.apply(x, change) if torch.is_grad_enabled() and x.requires_grad else x
