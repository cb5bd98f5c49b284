"""linear whose output is sparsified inside the operator: tiles of tokens, so that the dense output is never stored.

    y = sparsify(activation(x @ weight.T + bias)), in a layout

A tile is computed, sparsified and packed before the next one (`sten.ops.epilogue`), with its slopes. So the backward
pass has a sparse gradient of the product, in the layout of y, and both of its products run on kernels for a sparse
input:

    grad_x = grad @ weight      linear of the input `grad` and weight.T
    grad_weight = grad.T @ x    the transpose of linear_grad_weight, x.T @ grad
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._torch_private import PLAIN_TENSORS, autocast_somewhere
from ..dispatch import planned_input
from ..layouts.base import Layout
from ..rule import Rule
from ..tensor import SparseTensor, project
from .epilogue import Epilogue
from .sparse_input import grads_of_sparse_grad
from .sparsified import stores

TILE, TILE_OF_GPU = 2**23, 2**27  # entries of a tile of the output: on a GPU enough to hide what the host does for one


def tile_tokens(outputs: int, device: torch.device) -> int:
    """The tokens of a tile, a multiple of four."""
    return max(4, (TILE_OF_GPU if device.type == "cuda" else TILE) // max(1, outputs) // 4 * 4)


def tiles(x: Tensor, outputs: int) -> tuple[Tensor, ...]:
    size = tile_tokens(outputs, x.device)
    return (x,) if len(x) <= size else x.split(size)


def packed_tiles(x, weight, bias, epilogue: Epilogue, slopes: bool) -> tuple[dict, Tensor | None]:
    """The parts of the output, and the slopes as its values are stored."""
    pieces = tiles(x, len(weight))
    stored = [epilogue.stored(F.linear(tile, weight, bias), slopes) for tile in pieces]
    if len(stored) == 1:
        return stored[0]
    parts = epilogue.layout.join_rows([parts for parts, _ in stored], [len(tile) for tile in pieces])
    return parts, None if stored[0][1] is None else torch.cat([slope for _, slope in stored])


class InlineLinear(Rule):
    """The operator."""

    @staticmethod
    def forward(x, weight, bias, epilogue, slopes):
        parts, slopes = packed_tiles(x, weight, bias, epilogue, slopes)
        y = SparseTensor(epilogue.layout, parts, (len(x), len(weight)))
        y.cache.activation = True
        if epilogue.plans is not None:
            y.cache.plans = epilogue.plans
        vars(y)["slopes"] = slopes
        return y

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.slopes, ctx.activation = vars(output).pop("slopes"), inputs[3].activation
        # the parts, since an output that is saved itself is wrapped twice more
        ctx.like = output.sparse_layout, tuple(output.parts), output.stored_shape, output.cache
        ctx.save_for_backward(*inputs[:2], *output.parts.values())

    @staticmethod
    def backward(ctx, grad) -> Any:
        x, weight, *parts = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        layout, names, shape, cache = ctx.like
        y = SparseTensor(layout, dict(zip(names, parts, strict=True)), shape, cache=cache)
        received = grad = project(grad, y)
        if torch.is_grad_enabled():  # create_graph: of operators that have gradients themselves
            if ctx.activation != "none":
                raise RuntimeError(
                    f"Expected first derivatives only of a product with {ctx.activation} in its epilogue, got "
                    "create_graph=True; leave inline= out."
                )
            grad = grad.to_dense()
            if ctx.slopes is not None:
                grad = grad * y.with_values(ctx.slopes).to_dense()
            by_x = grad @ weight if needs_x else None
            return by_x, grad.t() @ x if needs_weight else None, grad.sum(0) if needs_bias else None, None, None
        if ctx.slopes is not None:
            grad = grad.with_values(grad.parts["values"] * ctx.slopes)
        grad.cache.activation = True
        of_x = None
        if needs_x:
            of_x = planned_input("linear", grad, weight.t(), len(x)).run(grad.parts, weight.t(), None)
        return of_x, *grads_of_sparse_grad(grad, x, weight, received, needs_weight, needs_bias), None, None


def runs_inline(x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout) -> bool:
    """Whether a call may be sparsified inside: of dense operands, which nothing traces."""
    plain = all(t is None or type(t) in PLAIN_TENSORS for t in (x, weight, bias))
    return plain and x.dim() == 2 and stores(x, layout)


def inline_linear(x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: Epilogue) -> SparseTensor:
    """The operator on x (tokens, features), in autocast's dtype where that is on."""
    if autocast_somewhere() and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    epilogue.layout.check((len(x), len(weight)))
    tensors = [t for t in (x, weight, bias) if t is not None]
    slopes = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return InlineLinear.run(x, weight, bias, epilogue, slopes)
