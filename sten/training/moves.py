"""What `model.to(...)`, `to_empty` and the like make of the pattern of a weight and of the state of its run."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

Conversion = Callable[[Tensor], Tensor]


def empties(fn: Conversion) -> bool:
    """Whether the function that `nn.Module._apply` passes on is that of `to_empty`: memory without numbers."""
    return getattr(fn, "__qualname__", "").startswith("Module.to_empty")


def kept(fn: Conversion, t: Tensor) -> Tensor:
    """A tensor of a pattern or run for `to_empty`: moved, since random numbers are no pattern; zeros for a meta one."""
    device = fn(t.new_empty(0)).device
    return torch.zeros_like(t, device=device) if t.is_meta else t.to(device)


def of_vectors(fn: Conversion) -> Conversion:
    """`fn` for parts of a pattern: those of four or more dimensions as vectors, since memory formats are for images."""

    @functools.wraps(fn)
    def convert(t: Tensor) -> Tensor:
        if t.dim() < 4:
            return fn(t)
        vector = t.flatten()
        new = fn(vector)
        return t if new is vector else new.view(t.shape)

    return convert
