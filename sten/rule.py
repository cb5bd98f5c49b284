"""Rule: the autograd.Function that every rule of sten is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import _torch_private as private


class Rule(torch.autograd.Function):
    """An autograd.Function with `setup_context` (torch.func needs it) whose call is cheap.

    A rule of an operator on a sparse weight names the operand that it is (`place`) and `now(*args, seen)`, which
    computes without autograd; `seen` says whether the call is intercepted.
    """

    place: ClassVar[int]
    now: ClassVar[Callable[..., Tensor]]
    record: ClassVar[Callable[..., Any]]  # `apply`, where neither torch.compile nor torch.func is active

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        cls.record = private.apply_of(cls)

    @classmethod
    def run(cls, *args):
        """The rule, for autograd to record where it wants."""
        return cls.apply(*args) if private.differentiates() else cls.record(*args)

    @classmethod
    def call(cls, *args):
        """The rule where it has to see the call; otherwise `now`, at once."""
        seen = private.intercepted(args[cls.place], *args)
        if seen and private.differentiates():
            return cls.apply(*args)
        if torch.is_grad_enabled():
            for a in args:
                if isinstance(a, Tensor) and a.requires_grad:
                    return cls.record(*args)
        return cls.now(*args, seen)
