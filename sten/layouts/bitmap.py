"""Bitmaps: which entries of each group are stored, one bit each; bit c % 8 of byte c // 8 is column c."""

from __future__ import annotations

import torch
from torch import Tensor

from sten._torch_private import exports_to_onnx


def bytes_of(keep: Tensor) -> Tensor:
    """A bool mask (..., m) as the bytes of its bits, uint8 (..., m / 8)."""
    shift = torch.arange(8, dtype=torch.uint8, device=keep.device)
    return (keep.unflatten(-1, (-1, 8)).to(torch.uint8) << shift).sum(-1, dtype=torch.uint8)


def bits_of(index: Tensor) -> Tensor:
    """The bool mask (..., m) of the bytes (..., m / 8)."""
    if exports_to_onnx():  # whose files shift no uint8
        return torch.stack([index.int() // 2**bit % 2 == 1 for bit in range(8)], -1).flatten(-2)
    shift = torch.arange(8, dtype=torch.uint8, device=index.device)
    return ((index.unsqueeze(-1) >> shift) & 1).flatten(-2).bool()


def positions_of(index: Tensor, n: int) -> Tensor:
    """The positions (..., n) int64 of the n bits of each group; its bytes are (..., m / 8).

    By arithmetic, without a size that depends on numbers, so that compiled forward passes can trace it.
    """
    keep = bits_of(index)
    slot = keep.cumsum(-1, dtype=torch.int64) - 1
    slot = slot.masked_fill(~keep, n).clamp(max=n)  # behind the last one: what is not kept, or too much in garbage
    column = torch.arange(keep.shape[-1], device=index.device).expand_as(slot)
    return column.new_zeros((*slot.shape[:-1], n + 1)).scatter(-1, slot, column)[..., :n]


def count_bits(index: Tensor) -> Tensor:
    """The number of bits of each group, int64; its bytes are the last dimension."""
    ones = bits_of(torch.arange(256, dtype=torch.uint8, device=index.device).unsqueeze(-1)).sum(-1)
    return ones[index.int()].sum(-1)
