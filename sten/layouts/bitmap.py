"""Bitmaps: which entries of each group are stored, one bit each; bit c % 8 of byte c // 8 is column c.

No size depends on numbers, so that compiled forward passes can trace this code.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def bytes_of(keep: Tensor) -> Tensor:
    """A bool mask (..., m) as the bytes of its bits, uint8 (..., m / 8)."""
    shift = torch.arange(8, dtype=torch.uint8, device=keep.device)
    return (keep.unflatten(-1, (-1, 8)).to(torch.uint8) << shift).sum(-1, dtype=torch.uint8)


def bits_of(index: Tensor) -> Tensor:
    """The bits of the bytes (..., m / 8), int64 (..., m)."""
    table = torch.arange(256, device=index.device).unsqueeze(1) // 2 ** torch.arange(8, device=index.device) % 2
    return table.index_select(0, index.flatten().int()).view(_spread_shape(index))


def spread(index: Tensor, values: Tensor) -> Tensor:
    """The values in their columns, (..., m), and zero in the others; as many values as there are bits."""
    padded = torch.cat([values.new_zeros(1), values.flatten()])
    return padded.index_select(0, _slots(index)).view(_spread_shape(index))


def collect(index: Tensor, dense: Tensor, n: int) -> Tensor:
    """The entries (..., n) of `dense` (..., m) in the columns of the n bits of each group."""
    out = dense.new_zeros(1 + math.prod(index.shape[:-1]) * n)
    out = out.scatter(0, _slots(index), dense.flatten())[1:]
    return out.view(*index.shape[:-1], n).clone()  # which begins aligned


def _spread_shape(index: Tensor) -> tuple[int, ...]:
    return *index.shape[:-1], index.shape[-1] * 8


def _slots(index: Tensor) -> Tensor:
    """The number of the slot of each column of all groups, from 1 on; 0 of the columns that are not stored."""
    bits = bits_of(index).flatten()
    return bits.cumsum(0) * bits


def count_bits(index: Tensor) -> Tensor:
    """The number of bits of each group, int64; its bytes are the last dimension."""
    return bits_of(index).sum(-1)
