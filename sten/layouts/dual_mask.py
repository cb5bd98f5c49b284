"""DualMask: a weight that the forward product sees through one mask and the gradient of the input through another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sten.layouts.base import Layout, Parts
from sten.layouts.checks import count_to_keep, expect_dense, expect_parts, expect_score, expect_zero
from sten.layouts.topk import top


@dataclass(frozen=True)
class DualMask(Layout):
    """Values and two bool masks, all of the weight's own shape; any mask fits, and `pack` takes it for both directions.

    Parts: `values` (zero where both masks are off); `forward`, what the product sees, which is the weight itself;
    `backward`, what the gradient of the input sees. A form for training alone: it saves no memory, and its kernels give
    the values a dense gradient, as straight-through estimators want it.

    Example:
        >>> import torch, sten
        >>> from sten.layouts import DualMask
        >>> w = sten.from_dense(torch.ones(1, 2), DualMask(), torch.tensor([[True, False]]))
        >>> w.to_dense()
        tensor([[1., 0.]])
    """

    pattern: ClassVar[tuple[str, ...]] = ("forward", "backward")
    unstructured: ClassVar[bool] = True

    def mask(self, score: Tensor, sparsity: float | None = None) -> Tensor:
        """The round((1 - sparsity) * numel) highest scores of the whole weight."""
        expect_score(self, score, sparsity)
        return top(score, count_to_keep(score.numel(), sparsity, self))

    def pack(self, dense: Tensor, mask: Tensor) -> Parts:
        expect_dense(self, dense, mask)
        copies = {name: mask.clone(memory_format=torch.contiguous_format) for name in self.pattern}
        return {"values": dense.masked_fill(~mask, 0).contiguous(), **copies}

    def unpack(self, parts: Parts, shape: tuple[int, ...]) -> Tensor:
        return parts["values"].masked_fill(~parts["forward"], 0)

    def unpack_backward(self, parts: Parts) -> Tensor:
        """The dense weight that the gradient of the input sees."""
        return parts["values"].masked_fill(~parts["backward"], 0)

    def pack_like(self, dense: Tensor, parts: Parts) -> Tensor:
        return dense.masked_fill(~parts["forward"], 0).contiguous()

    def unpack_rows(self, parts: Parts, shape: tuple[int, ...], rows: Tensor) -> Tensor:
        return parts["values"][rows].masked_fill(~parts["forward"][rows], 0)

    def support(self, parts: Parts, shape: tuple[int, ...]) -> Tensor:
        return parts["forward"].clone()

    def validate(self, parts: Parts, shape: tuple[int, ...]) -> None:
        self.check(shape)
        masks = dict.fromkeys(self.pattern, (shape, torch.bool))
        expect_parts(self, parts, {"values": (shape, None), **masks})
        expect_zero(self, parts["values"][~(parts["forward"] | parts["backward"])])
