"""What activation methods put into the graph: a tensor stored in a layout, and a gradient that is sparsified."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._torch_private import is_compiling, level, tracing_state, transforms_active
from ..layouts.base import Layout
from ..rule import Rule
from ..tensor import SparseTensor, project, traced, without_view
from .epilogue import Kept, compressed


class Store(Rule):
    """A matrix at a mask, at columns of each row or by a rule, in a layout; the gradient is its own, made dense."""

    @staticmethod
    def forward(x, where, layout, full_gradient):
        if isinstance(where, Kept):
            parts = compressed(x, where, layout)[0]
        else:
            parts = (layout.pack if where.dtype == torch.bool else layout.pack_columns)(x.detach(), where)
        w = SparseTensor(layout, parts, tuple(x.shape))
        w.cache.activation, w.cache.full_gradient = True, full_gradient
        return w

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, where, _, full_gradient = inputs
        masked = full_gradient or (isinstance(where, Tensor) and where.dtype == torch.bool)  # x is zero off the mask
        ctx.save_for_backward(None if masked else output)

    @staticmethod
    def backward(ctx, grad):
        [y] = ctx.saved_tensors
        if not isinstance(grad, SparseTensor):
            return (grad if y is None else project(grad, y).to_dense()), None, None, None
        return grad.to_dense(), None, None, None


def records(x: Tensor) -> bool:
    """Whether autograd in either direction, or a tracer, has to see an operator on x."""
    return (torch.is_grad_enabled() and x.requires_grad) or level._current_level >= 0 or tracing_state() is not None


def is_seen(x: Tensor) -> bool:
    """Whether a compiler or torch.func traces, which see x dense."""
    return is_compiling() or transforms_active() or traced(x)


def stores(x: Tensor, layout: Layout | None) -> bool:
    """Whether a layout stores x: not if it is empty, nor where it is seen dense."""
    return layout is not None and x.numel() > 0 and not is_seen(x)


def stored(x: Tensor, where: Tensor | Kept, layout: Layout, full_gradient: bool) -> Tensor:
    """x in a layout, at a mask, at the columns (rows, k), or by a rule that has a kernel.

    ValueError if the layout cannot hold it.

    With `full_gradient` the operators that read it compute the gradient of all entries.
    """
    layout.check(tuple(x.shape))
    if not records(x):
        return Store.forward(x, where, layout, full_gradient)
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
