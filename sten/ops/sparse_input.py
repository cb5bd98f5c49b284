"""linear with a sparse input and a dense weight, and its gradients: y = x @ W.T for x (tokens, features) in a layout.

    linear                      (input, weight, bias) -> y, dense
    linear_grad_weight          (grad, input, weight) -> grad.T @ x, dense, in the shape of the weight
    linear_grad_sparse_input    (grad, weight, input) -> the entries of grad @ W at the pattern of x: its values

Kernels are registered with `input=`. They get `layout` and `shape` as tuples, (layout of x, None) and (its shape, shape
of W), and the weight as it lies in memory: of x @ M the weight is M.t(), whose `t()` is contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._torch_private import facts, is_intercepted
from ..dispatch import operator, planned_input
from ..rule import Rule
from ..tensor import SparseTensor, project


def unpacked(operands: tuple, layout, shape) -> tuple[Tensor, ...]:
    """Operands of a reference implementation with those in a layout unpacked; a single layout is that of the last."""
    if not isinstance(layout, tuple):
        layout, shape = (*[None] * (len(operands) - 1), layout), (*[None] * (len(operands) - 1), shape)
    rows = zip(operands, layout, shape, strict=True)
    return tuple(a if each is None else each.unpack(a, size) for a, each, size in rows)


@operator("linear_grad_sparse_input", sparse=("input", "weight"), required=("input",))
def linear_grad_sparse_input_reference(grad, weight, input, *, layout, shape):
    return layout[0].pack_like(grad @ weight, input)


def input_can_be_sparse(x: SparseTensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a kernel for a sparse input may run: of a matrix, not transposed, in a call that nobody intercepts."""
    if x.dim() != 2 or weight.dim() != 2 or x.transposed or is_intercepted():
        return False
    return facts(x.parts["values"], weight, bias) is not None


def _expect(x: SparseTensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.shape[1] != weight.shape[1]:
        got = f"got shape {tuple(x.shape)}"
        raise RuntimeError(
            f"Expected an input with {weight.shape[1]} features for a weight of shape {tuple(weight.shape)}, {got}."
        )
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != weight.dtype):
        got = f"input {x.dtype}, weight {weight.dtype}" + ("" if bias is None else f", bias {bias.dtype}")
        raise RuntimeError(f"Expected operands of one dtype, got {got}; convert one or use autocast.")
    if bias is not None and bias.shape != (len(weight),):
        raise RuntimeError(f"Expected a bias of shape ({len(weight)},), got {tuple(bias.shape)}.")


class InputLinear(Rule):
    """y = x @ weight.T + bias for a sparse x."""

    weight_position = 0

    @staticmethod
    def compute(x: SparseTensor, weight: Tensor, bias: Tensor | None, intercepted: bool = False) -> Tensor:
        _expect(x, weight, bias)
        return planned_input("linear", x, weight, x.shape[0]).run(x.parts, weight, bias)

    @staticmethod
    def forward(x, weight, bias):
        return InputLinear.compute(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad = grad.to_dense() if isinstance(grad, SparseTensor) else grad  # of a site at the output's gradient
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph: of operators that have gradients themselves
            dense = grad @ weight
            return (
                (dense if x.cache.full_gradient else project(dense, x)) if needs_x else None,
                grad.t() @ x.to_dense() if needs_weight else None,
                grad.sum(0) if needs_bias else None,
            )
        of_x = grad_of_input(grad, weight, x) if needs_x else None
        return (
            of_x,
            grad_of_weight(grad, x, weight, of_x if isinstance(of_x, SparseTensor) else None) if needs_weight else None,
            grad.sum(0) if needs_bias else None,
        )


def grad_of_input(grad: Tensor, weight: Tensor, x: SparseTensor) -> Tensor:
    """grad @ weight at the pattern of x; all of it, dense, for a straight-through activation."""
    if x.cache.full_gradient:
        return grad @ weight
    plan = planned_input("linear_grad_sparse_input", x, weight, len(grad))
    return x.with_values(plan.run(grad, weight, x.parts))


def grad_of_weight(grad: Tensor, x: SparseTensor, weight: Tensor, like: SparseTensor | None = None) -> Tensor:
    """grad.T @ x, dense. `like`: a gradient with the pattern of x, with which further products may come."""
    plan = planned_input("linear_grad_weight", x, weight, len(grad))
    if plan.derive is None or like is None:
        return plan.run(grad, x.parts, weight)
    return plan.run(grad, x.parts, weight, derived=_derived(plan.derive, like))


def _derived(derive: Callable[..., Any], like: SparseTensor) -> Any:
    """What a kernel derives from the pattern of a gradient, which has it from then on.

    The activation has it not: it may outlive a recorded CUDA graph, whose memory that would be.
    """
    known = vars(like).setdefault("derived", {})
    if derive not in known:
        known[derive] = derive(like.parts, like.stored_shape)
    return known[derive]


def grads_of_sparse_grad(
    grad: SparseTensor, x: Tensor, weight: Tensor, like: SparseTensor, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Of a linear product whose gradient is sparse: the gradients of weight and bias, grad.T @ x and the sums of its
    columns. `like`: a tensor with its pattern, which may have what products before have derived from it."""
    of_weight = of_bias = None
    if needs_weight and needs_bias and x.shape[1] > 0:
        plan = planned_input("linear_grad_weight", grad, weight.t(), len(x))
        if plan.derive is not None:
            derived = _derived(plan.derive, like)
            of_weight, of_bias = plan.run(x, grad.parts, weight.t(), derived=derived, sums=True)
            return of_weight.t(), of_bias
    if needs_weight:
        of_weight = grad_of_weight(x, grad, weight.t(), like).t()
    if needs_bias:
        of_bias = grad_of_weight(x.new_ones(len(x), 1), grad, weight.t()[:1], like)[0]
    return of_weight, of_bias
