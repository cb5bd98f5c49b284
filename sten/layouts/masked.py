"""Masked: dense values and a bool mask. The simplest layout, with which every other can be compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sten.layouts.base import Layout, Parts
from sten.layouts.checks import expect_dense, expect_parts, expect_zero_off


@dataclass(frozen=True)
class Masked(Layout):
    """Dense values and a bool mask, both of the weight's own shape; any mask fits. It saves no memory.

    Parts: `values` (the weight's shape, zero where the mask is off), `mask` (the same shape, bool).

    Example:
        >>> import torch, sten
        >>> w = torch.tensor([[1.0, -3.0], [0.5, 2.0]])
        >>> sten.Masked().mask(w.abs(), sparsity=0.5)
        tensor([[False,  True],
                [False,  True]])
    """

    pattern: ClassVar[tuple[str, ...]] = ("mask",)
    unstructured: ClassVar[bool] = True

    def column_groups(self, shape: tuple[int, ...]) -> Tensor:
        return torch.arange(math.prod(shape[1:]))

    def pack(self, dense: Tensor, mask: Tensor) -> Parts:
        expect_dense(self, dense, mask)
        # masked_fill, not a product: NaN * 0 is NaN, and the mask part must not alias the caller's.
        copy = mask.clone(memory_format=torch.contiguous_format)
        return {"values": dense.masked_fill(~mask, 0).contiguous(), "mask": copy}

    def join_rows(self, each: Sequence[Parts], rows: Sequence[int]) -> Parts:
        return {name: torch.cat([parts[name] for parts in each]) for name in each[0]}

    def unpack(self, parts: Parts, shape: tuple[int, ...]) -> Tensor:
        return parts["values"].masked_fill(~parts["mask"], 0)

    def pack_like(self, dense: Tensor, parts: Parts) -> Tensor:
        return dense.masked_fill(~parts["mask"], 0).contiguous()

    def unpack_rows(self, parts: Parts, shape: tuple[int, ...], rows: Tensor) -> Tensor:
        return parts["values"][rows].masked_fill(~parts["mask"][rows], 0)

    def support(self, parts: Parts, shape: tuple[int, ...]) -> Tensor:
        return parts["mask"].clone()

    def validate(self, parts: Parts, shape: tuple[int, ...]) -> None:
        self.check(shape)
        if expect_parts(self, parts, {"values": (shape, None), "mask": (shape, torch.bool)}):
            expect_zero_off(self, parts["values"], parts["mask"])
