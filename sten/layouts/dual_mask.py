"""DualMask: a weight with one mask for the forward product and another for the gradient of the input."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sten.layouts.base import Layout, Parts
from sten.layouts.checks import expect_dense, expect_parts, expect_zero_off


@dataclass(frozen=True)
class DualMask(Layout):
    """Values and two bool masks, all of the weight's own shape; any mask fits, and `pack` takes it for both directions.

    Parts: `values` (zero where both masks are False); `forward_mask`, of the product, which is the weight itself;
    `backward_mask`, of the gradient of the input. For training only: it saves no memory, and its kernels give the
    values a dense gradient, as straight-through estimators need it.

    Example:
        >>> import torch, sten
        >>> from sten.layouts import DualMask
        >>> w = sten.from_dense(torch.ones(1, 2), DualMask(), torch.tensor([[True, False]]))
        >>> w.to_dense()
        tensor([[1., 0.]])
    """

    pattern: ClassVar[tuple[str, ...]] = ("forward_mask", "backward_mask")
    unstructured: ClassVar[bool] = True

    def column_groups(self, shape: tuple[int, ...]) -> Tensor:
        return torch.arange(math.prod(shape[1:]))

    def pack(self, dense: Tensor, mask: Tensor) -> Parts:
        expect_dense(self, dense, mask)
        copies = {name: mask.clone(memory_format=torch.contiguous_format) for name in self.pattern}
        return {"values": dense.masked_fill(~mask, 0).contiguous(), **copies}

    def unpack(self, parts: Parts, shape: tuple[int, ...]) -> Tensor:
        return parts["values"].masked_fill(~parts["forward_mask"], 0)

    def unpack_backward(self, parts: Parts) -> Tensor:
        """The dense weight in the gradient of the input."""
        return parts["values"].masked_fill(~parts["backward_mask"], 0)

    def pack_like(self, dense: Tensor, parts: Parts) -> Tensor:
        return dense.masked_fill(~parts["forward_mask"], 0).contiguous()

    def unpack_rows(self, parts: Parts, shape: tuple[int, ...], rows: Tensor) -> Tensor:
        return parts["values"][rows].masked_fill(~parts["forward_mask"][rows], 0)

    def support(self, parts: Parts, shape: tuple[int, ...]) -> Tensor:
        return parts["forward_mask"].clone()

    def validate(self, parts: Parts, shape: tuple[int, ...]) -> None:
        self.check(shape)
        masks = dict.fromkeys(self.pattern, (shape, torch.bool))
        if expect_parts(self, parts, {"values": (shape, None), **masks}):
            expect_zero_off(self, parts["values"], parts["forward_mask"] | parts["backward_mask"])
