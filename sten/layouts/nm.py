"""NM: n of every m inputs; NM(2, 4) is the pattern of sparse tensor cores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sten._torch_private import exports_to_onnx
from sten.layouts.base import Layout, Parts
from sten.layouts.bitmap import bytes_of, collect, count_bits, spread
from sten.layouts.checks import (
    chunks,
    expect_dense,
    expect_n_of_m,
    expect_parts,
    expect_range,
    expect_score,
    expect_zero,
)
from sten.layouts.compiled import runs
from sten.layouts.padding import describe_column, reduction_back, reduction_groups, reduction_last, reduction_width
from sten.layouts.topk import complete_groups, top_of_groups

COMPILED = (torch.float32, torch.bfloat16, torch.float16)  # what the C++ operators take


@dataclass(frozen=True)
class NM(Layout):
    """n of every m consecutive inputs of an output are stored (n counts the entries, not the zeros).

    The weight (O, I, *rest) is stored as the matrix (R, C) with the inputs last and padded to a multiple of m, so a
    group lies along the input channels of a convolution, too; a last, short group has up to n entries. With G = C / m
    groups a row:

    Parts: `values` (R, G * n), the entries of a row in ascending order; `index`, uint8, in the smaller of two forms:

    - (R, ceil(G * n * bits / 8)): the position of each entry in its group, `bits` wide (2 for m <= 4, 4 for m <= 16,
      else 8), the first slot in the lowest bits; spare bits are zero;
    - (R, G, m / 8), where m is 8, 16 or 32 and n * bits >= m: a bitmap. Bit c % 8 of byte c // 8 is entry c of a group.

    Example:
        >>> import torch, sten
        >>> w = torch.tensor([[4.0, 1.0, 3.0, 2.0]])
        >>> parts = sten.NM(2, 4).pack(w, sten.NM(2, 4).mask(w))
        >>> parts["values"].tolist(), parts["index"].tolist()  # positions 0 and 2: 0b1000
        ([[4.0, 3.0]], [[8]])
        >>> parts = sten.NM(2, 8).pack(torch.cat([w, w], 1), torch.tensor([[True, *[False] * 6, True]]))
        >>> parts["values"].tolist(), parts["index"].tolist()  # bits 0 and 7
        ([[4.0, 2.0]], [[[129]]])

    Source: Mishra et al., Accelerating Sparse Deep Neural Networks, https://arxiv.org/abs/2104.08378.
    """

    n: int
    m: int

    pattern: ClassVar[tuple[str, ...]] = ("index",)

    def __post_init__(self) -> None:
        expect_n_of_m(self, 256)  # a position is a byte at most

    @property
    def rate(self) -> float:
        return self.n / self.m

    def stacks(self, rows: Sequence[int]) -> bool:
        return True

    @property
    def bits(self) -> int:
        """The width of a stored position."""
        return 2 if self.m <= 4 else 4 if self.m <= 16 else 8

    @property
    def has_bitmap(self) -> bool:
        """Whether the index is a bitmap: of a machine word a group, where positions are not smaller."""
        return self.m in (8, 16, 32) and self.n * self.bits >= self.m

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Groups and bytes of packed positions of a row."""
        groups = reduction_width(shape, self.m) // self.m
        return groups, -(-groups * self.n * self.bits // 8)

    def groups(self, weight: Tensor) -> Tensor:
        """The weight as (R, G, m), zero-padded."""
        return reduction_last(weight, self.m).view(len(weight), -1, self.m)

    def positions(self, index: Tensor, groups: int) -> Tensor:
        """The index as int64 positions (R, G, n)."""
        if not self.has_bitmap:
            return self.unpacked(index, groups).long()
        return collect(index, torch.arange(self.m, device=index.device).expand(*index.shape[:-1], self.m), self.n)

    def unpacked(self, index: Tensor, groups: int) -> Tensor:
        """Packed positions as uint8 (R, G, n)."""
        if self.bits < 8 and exports_to_onnx():  # whose files shift no uint8
            digits = [index.int() // 2**shift % 2**self.bits for shift in range(0, 8, self.bits)]
            index = torch.stack(digits, -1)
        elif self.bits < 8:
            shift = torch.arange(0, 8, self.bits, dtype=torch.uint8, device=index.device)
            index = (index.unsqueeze(-1) >> shift) & (2**self.bits - 1)
        return index.flatten(1)[:, : groups * self.n].reshape(len(index), groups, self.n)

    def column_groups(self, shape: tuple[int, ...]) -> Tensor:
        return reduction_groups(shape, self.m)

    def tile(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return 1, 1

    def mask(self, score: Tensor, sparsity: float | None = None) -> Tensor:
        """The n highest scores of every group; all columns of a last group that has no more than n."""
        expect_score(self, score, sparsity)
        grouped = self.groups(score.detach())
        if grouped.numel() > score.numel():
            # Padding comes last, behind NaN: it is -inf, and ties go to the lower (real) column.
            real = self.groups(torch.ones_like(score[:1], dtype=torch.bool))
            grouped = grouped.masked_fill(~real, -torch.inf)
        keep = top_of_groups(grouped, self.n)
        return reduction_back(keep, tuple(score.shape), self.m)

    def pack(self, dense: Tensor, mask: Tensor) -> Parts:
        expect_dense(self, dense, mask)
        grouped = self.groups(mask)
        if runs("nm_index", grouped):
            index, free = torch.ops.sten.nm_index(grouped.contiguous(), self.n, self.has_bitmap)
            if free >= 0:  # most slots that a group leaves free, which hold zeros; -1: one has too many
                kept = dense.masked_fill(~mask, 0) if free else dense
                return {"values": self.pack_like(kept, {"index": index}), "index": index}
        count = grouped.sum(-1)
        if bool((count > self.n).any()):
            row, group = (count > self.n).nonzero()[0].tolist()
            start = describe_column(tuple(dense.shape), group * self.m, self.m)
            raise ValueError(
                f"Expected a mask with at most {self.n} of {self.m} inputs for {self}, got {int(count[row, group])} in "
                f"the group of output {row} that starts at {start}; use {self}.mask(score)."
            )
        keep = complete_groups(grouped, self.n)
        values = self.groups(dense.masked_fill(~mask, 0))[keep].view(len(keep), -1)
        if self.has_bitmap:
            return {"values": values, "index": bytes_of(keep)}
        return {"values": values, "index": self.packed(keep.flatten().nonzero().view(*count.shape, self.n) % self.m)}

    def packed(self, position: Tensor) -> Tensor:
        """Positions (R, G, n), packed."""
        flat, each = position.flatten(1).to(torch.uint8), 8 // self.bits
        flat = torch.nn.functional.pad(flat, (0, -flat.shape[1] % each)).view(len(flat), -1, each)
        shift = torch.arange(0, 8, self.bits, dtype=torch.uint8, device=flat.device)
        return (flat << shift).sum(-1, dtype=torch.uint8)

    def unpack(self, parts: Parts, shape: tuple[int, ...]) -> Tensor:
        groups, values = self.sizes(shape)[0], parts["values"]
        if values.dtype in COMPILED and runs("nm_expand", values, parts["index"]):
            slots, index = values.contiguous(), parts["index"].contiguous()
            out = torch.ops.sten.nm_expand(slots, index, self.n, self.m, groups * self.m)
        elif self.has_bitmap:
            out = spread(parts["index"], values)
        else:
            position = self.positions(parts["index"], groups)
            out = values.new_zeros(len(values), groups, self.m)
            out = out.scatter(-1, position, values.view(position.shape))
        return reduction_back(out, (len(values), *shape[1:]), self.m)

    def pack_like(self, dense: Tensor, parts: Parts) -> Tensor:
        grouped = self.groups(dense)
        if dense.dtype in COMPILED and runs("nm_collect", dense, parts["index"]):
            return torch.ops.sten.nm_collect(
                grouped.flatten(1).contiguous(), parts["index"].contiguous(), self.n, self.m
            )
        if self.has_bitmap:
            return collect(parts["index"], grouped, self.n).flatten(1)
        return grouped.gather(-1, self.positions(parts["index"], grouped.shape[1])).flatten(1)

    def packs_rows(self, count: int | None, block: int | None) -> bool:
        return (count, block) == (self.n, self.m)

    def pack_rows(self, values: Tensor, crow: Tensor, col: Tensor, shape: tuple[int, ...]) -> Parts:
        position = col.view(shape[0], -1, self.n) % self.m
        if not self.has_bitmap:
            return {"values": values.view(shape[0], -1), "index": self.packed(position)}
        keep = torch.zeros(*position.shape[:-1], self.m, dtype=torch.bool, device=col.device)
        return {"values": values.view(shape[0], -1), "index": bytes_of(keep.scatter_(-1, position.long(), True))}

    def unpack_rows(self, parts: Parts, shape: tuple[int, ...], rows: Tensor) -> Tensor:
        return self.unpack({name: part[rows] for name, part in parts.items()}, shape)

    def upgrade(self, parts: Parts, shape: tuple[int, ...]) -> Parts:
        """Until version 2 of the files there were no bitmaps: positions become one, if they are in order."""
        index, (groups, width) = parts["index"], self.sizes(shape)
        if not self.has_bitmap or index.shape != (shape[0], width) or index.dtype != torch.uint8:
            return parts
        if index.is_meta:
            return {**parts, "index": index.new_empty(shape[0], groups, self.m // 8)}
        self._expect_packed(index, groups)
        made = []
        for (some,) in chunks(index):
            keep = torch.zeros(len(some), groups, self.m, dtype=torch.bool, device=index.device)
            made.append(bytes_of(keep.scatter_(-1, self.unpacked(some, groups).long(), True)))
        return {**parts, "index": torch.cat(made)}

    def validate(self, parts: Parts, shape: tuple[int, ...]) -> None:
        self.check(shape)
        groups, width = self.sizes(shape)
        size = (shape[0], groups, self.m // 8) if self.has_bitmap else (shape[0], width)
        if not expect_parts(self, parts, {"values": ((shape[0], groups * self.n), None), "index": (size, torch.uint8)}):
            return
        each = groups // math.prod(shape[2:])  # groups of the inputs of one kernel position; the last is padded
        last = shape[1] - (each - 1) * self.m
        if self.has_bitmap:
            for (index,) in chunks(parts["index"]):
                self._expect_bits(index)
        else:
            self._expect_packed(parts["index"], groups)
        if last < self.m:
            for values, index in chunks(parts["values"], parts["index"]):
                beyond = self.positions(index, groups)[:, each - 1 :: each] >= last
                expect_zero(self, values.reshape(len(values), groups, self.n)[:, each - 1 :: each][beyond])

    def _expect_bits(self, index: Tensor) -> None:
        """Raise ValueError unless each group of a bitmap (R, G, m / 8) has n bits."""
        count = count_bits(index)
        if bool((count != self.n).any()):
            row, group = (count != self.n).nonzero()[0].tolist()
            raise ValueError(
                f"Expected {self.n} bits for each {self.m} columns in part 'index' of {self}, got "
                f"{int(count[row, group])} for columns {group * self.m} to {group * self.m + self.m - 1} of a row."
            )

    def _expect_packed(self, index: Tensor, groups: int) -> None:
        """Raise ValueError unless packed positions (R, bytes) ascend within their groups, and spare bits are zero."""
        width, size = index.shape[1], self.n * self.bits
        if 8 % size == 0:  # a byte holds whole groups: each value of a byte is checked once
            seen = torch.zeros(256, dtype=torch.int64, device=index.device)
            for (part,) in chunks(index):
                seen += part[:, :-1].flatten().bincount(minlength=256)
            self._expect_positions(seen.nonzero().to(torch.uint8), 8 // size)
            self._expect_positions(index[:, -1:], groups - (width - 1) * 8 // size)
        else:
            for (part,) in chunks(index):
                self._expect_positions(part, groups)
        bits = groups * size % 8
        if bits and bool((index[:, -1] >> bits).any()):
            raise ValueError(f"Expected zeros in the spare bits of part 'index' of {self}, got others.")

    def _expect_positions(self, index: Tensor, groups: int) -> None:
        if not index.numel():
            return
        position = self.unpacked(index, groups)
        expect_range(self, "index", position, 0, self.m)
        if bool((position[..., 1:] <= position[..., :-1]).any()):
            raise ValueError(
                f"Expected ascending positions in each group of part 'index' of {self}, each once, got another order."
            )
