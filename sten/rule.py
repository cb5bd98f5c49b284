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
        intercepted = private.is_intercepted(args[cls.weight_position], *args)
        if intercepted and private.must_apply():
            return cls.apply(*args)
        if torch.is_grad_enabled():
            for a in args:
                if isinstance(a, Tensor) and a.requires_grad:
                    return cls.record(*args)
        return cls.compute(*args, intercepted)
