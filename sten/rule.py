"""Rule: the autograd.Function that every differentiable operator of sten is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import _torch_private as private


class Rule(torch.autograd.Function):
    """An autograd.Function with `setup_context` (torch.func needs it) whose call costs little host time.

    A rule of an operator on a sparse weight defines `compute` and `weight_position`; the decorator
    `sten.ops.traceable.traceable` makes its `forward` of them.

    Attributes:
        weight_position: the position of the sparse weight among the arguments.
        compute: `compute(*args, intercepted)`: the result, without autograd.
        record: `apply`, for calls where neither torch.compile nor torch.func is active.
    """

    weight_position: ClassVar[int]
    compute: ClassVar[Callable[..., Tensor]]
    record: ClassVar[Callable[..., Any]]

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        cls.record = private.apply_of(cls)

    @classmethod
    def run(cls, *args):
        """Call the rule, so that autograd records it if needed."""
        private.refuse_tracing()
        return cls.apply(*args) if private.must_apply() else cls.record(*args)

    @classmethod
    def call(cls, *args):
        """Call the rule only if the call is intercepted or an argument requires a gradient; otherwise `compute`."""
        intercepted = private.is_intercepted()
        if intercepted and private.must_apply():
            return cls.apply(*args)
        if torch.is_grad_enabled():
            for a in args:
                if isinstance(a, Tensor) and a.requires_grad:
                    return cls.record(*args)
        return cls.compute(*args, intercepted)


# what the rules of an operand and a sparse weight save for backward


def save_operands(ctx, inputs: tuple, output: Any) -> None:
    """The `setup_context` of a rule whose first arguments are an operand x and a SparseTensor w.

    Autograd counts writes to a tensor, not to the parts of a wrapper: the values are saved as a tensor of their own, if
    the gradient of x needs them, so that backward raises when an optimizer has stepped in between. Of a leaf only the
    parts are saved, since `module.to(...)` refuses to swap a Parameter that a graph holds.
    """
    x, w = inputs[:2]
    if private.is_compiling() or private.transforms_active() or private.level._current_level >= 0:
        ctx.weight = None  # they save the parts themselves
        ctx.save_for_backward(x, w)
        if not private.is_compiling():
            ctx.save_for_forward(x, w)
        return
    leaf, values = w.is_leaf, w.parts["values"] if ctx.needs_input_grad[0] else None
    ctx.weight = (type(w), w.sparse_layout, w.parts, w.stored_shape, w.transposed, w.cache) if leaf else ()
    ctx.save_for_backward(x, None if leaf else w, values)


def saved_operands(ctx) -> tuple[Tensor, Any]:
    """(x, w) of `save_operands`; RuntimeError if the weight has changed since."""
    if ctx.weight is None:
        return ctx.saved_tensors
    x, w, _ = ctx.saved_tensors
    return x, _leaf(ctx, 1) if w is None else w


def save_pattern(ctx, inputs: tuple, output: Any) -> None:
    """The same for a rule whose first argument is a SparseTensor, of which backward reads only the pattern."""
    w = inputs[0]
    leaf = not private.must_apply() and w.is_leaf
    ctx.weight = (type(w), w.sparse_layout, w.parts, w.stored_shape, w.transposed, w.cache) if leaf else None
    ctx.save_for_backward(None if leaf else w)


def saved_pattern(ctx) -> Any:
    """A SparseTensor with the pattern of `save_pattern`; RuntimeError if it has changed since."""
    [w] = ctx.saved_tensors
    return _leaf(ctx, 0) if w is None else w


def _leaf(ctx, position: int) -> Any:
    """The leaf whose parts were saved, the argument at `position`; without a gradient, another SparseTensor of them."""
    kind, layout, parts, shape, transposed, cache = ctx.weight
    node = ctx.next_functions[position][0]  # of the tensors among the arguments: x, w, ...
    if node is None:
        return kind(layout, parts, shape, transposed, cache=cache)
    w = node.variable
    if w.parts is not parts:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: a "
            f"{layout} weight has another pattern than in the forward pass; call backward() before changing it."
        )
    return w
