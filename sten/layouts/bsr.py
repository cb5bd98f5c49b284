"""BSR: compressed rows of dense blocks, which tensor cores multiply at full rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sten.layouts.base import Layout, Parts
from sten.layouts.checks import chunks, expect_dense, expect_parts, expect_range, expect_zero
from sten.layouts.compressed_rows import expect_compressed, offsets_of, row_of_slots, slots_of_rows
from sten.layouts.padding import cut, pad_matrix
from sten.layouts.topk import block_sums, widest_float

LIMIT = 2**16  # rows or columns of a block


@dataclass(frozen=True)
class BSR(Layout):
    """Compressed sparse rows of dense (bh, bw) blocks of the weight seen as a matrix (R, C) = (O, prod(rest)).

    Parts: `values` (blocks, bh, bw), `crow` (ceil(R / bh) + 1,) and `col` (blocks,), and the same blocks column by
    column: `t_crow` (ceil(C / bw) + 1,), `t_row` (blocks,), `t_block` (blocks,: which block of `values`); all int32.
    A block with a non-zero is stored, with its zeros. `mask` makes masks of whole blocks, those with the highest mean
    scores over their real entries: at a ragged edge a small block competes with the whole ones on equal terms. A mask
    that cuts through blocks is refused by `sten.from_dense` and in training; `pack` stores every block that it touches.
    A transposed product reads the transposed index, as in stk.

    Example:
        >>> import torch, sten
        >>> parts = sten.BSR(block=(2, 2)).pack(torch.eye(4), torch.eye(4) > 0)
        >>> parts["values"].shape, parts["col"].tolist(), parts["t_row"].tolist()
        (torch.Size([2, 2, 2]), [0, 1], [0, 1])

    Source: Gale et al., MegaBlocks, https://arxiv.org/abs/2211.15841 (the transposed index).
    """

    block: tuple[int, int] = (64, 64)

    pattern: ClassVar[tuple[str, ...]] = ("crow", "col", "t_crow", "t_row", "t_block")

    def __post_init__(self) -> None:
        block = self.block
        whole = isinstance(block, tuple) and all(isinstance(b, int) and not isinstance(b, bool) for b in block)
        if not whole or len(block) != 2:
            raise TypeError(f"Expected block=(rows, columns), two whole numbers, for BSR, got {block!r}.")
        if min(block) < 1 or max(block) > LIMIT:
            raise ValueError(f"Expected block sizes of at least 1, and {LIMIT} at most, for BSR, got {block}.")

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """How many rows and columns of blocks a weight of this shape has."""
        return -(-shape[0] // self.block[0]), -(-math.prod(shape[1:]) // self.block[1])

    def check(self, shape: tuple[int, ...]) -> None:
        super().check(shape)
        rows, columns = self.grid(shape)
        if rows * columns >= 2**31:
            raise ValueError(
                f"Expected fewer than 2**31 blocks of {self}, got more in shape {tuple(shape)}; use larger blocks."
            )

    def column_groups(self, shape: tuple[int, ...]) -> Tensor:
        return torch.arange(math.prod(shape[1:])) // self.block[1]

    def tile(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return self.block

    def unit_totals(self, score: Tensor) -> Tensor:
        """The sum over each block; padding counts zero."""
        totals = block_sums(score.reshape(len(score), -1), self.block)
        return self.blocks(score).sum((2, 3), dtype=widest_float(score.device)) if totals is None else totals

    def unit_means(self, score: Tensor) -> Tensor:
        """As of any layout; the sizes of blocks follow from the shape, without sums of ones."""
        sizes = zip((len(score), math.prod(score.shape[1:])), self.grid(tuple(score.shape)), self.block, strict=True)
        height, width = ((size - torch.arange(0, n * b, b, device=score.device)).clamp(max=b) for size, n, b in sizes)
        return self.unit_totals(score) / (height.unsqueeze(1) * width)

    def touched(self, mask: Tensor) -> Tensor:
        """Which blocks have entries of the mask."""
        totals = block_sums(mask.reshape(len(mask), -1), self.block)
        return self.blocks(mask).any(3).any(2) if totals is None else totals > 0

    def covering(self, mask: Tensor) -> Tensor:
        expect_dense(self, torch.zeros((), device=mask.device).expand(mask.shape), mask)
        return self.unit_entries(self.touched(mask), tuple(mask.shape))

    def unit_entries(self, chosen: Tensor, shape: tuple[int, ...]) -> Tensor:
        bh, bw = self.block
        return cut(chosen.repeat_interleave(bh, 0).repeat_interleave(bw, 1), shape)

    def blocks(self, weight: Tensor) -> Tensor:
        """The weight as (block rows, block columns, bh, bw), zero-padded; a view where it can be one."""
        (rows, columns), (bh, bw) = self.grid(tuple(weight.shape)), self.block
        padded = pad_matrix(weight.reshape(len(weight), -1), rows * bh, columns * bw)
        return padded.view(rows, bh, columns, bw).transpose(1, 2)

    def join(self, blocks: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The inverse of `blocks`: the weight of this shape, its padding cut off."""
        (rows, columns), (bh, bw) = self.grid(shape), self.block
        return cut(blocks.transpose(1, 2).reshape(rows * bh, columns * bw), shape)

    def pack(self, dense: Tensor, mask: Tensor) -> Parts:
        expect_dense(self, dense, mask)
        stored = self.touched(mask)
        row, col = stored.nonzero(as_tuple=True)
        return {
            "values": self.blocks(dense)[row, col].masked_fill(~self.blocks(mask)[row, col], 0),
            "crow": offsets_of(stored.sum(1)),
            "col": col.int(),
            **self.by_columns(row, col, stored.sum(0)),
        }

    @staticmethod
    def by_columns(row: Tensor, col: Tensor, counts: Tensor) -> Parts:
        """The parts that list blocks, given row by row, in the order of their columns, which have `counts` of them."""
        by_column = torch.argsort(col, stable=True)
        return {"t_crow": offsets_of(counts), "t_row": row[by_column].int(), "t_block": by_column.int()}

    def unpack(self, parts: Parts, shape: tuple[int, ...]) -> Tensor:
        values, col = parts["values"], parts["col"].long()
        row = row_of_slots(parts["crow"], len(col))
        blocks = values.new_zeros(*self.grid(shape), *self.block).index_put((row, col), values)
        return self.join(blocks, shape)

    def pack_like(self, dense: Tensor, parts: Parts) -> Tensor:
        col = parts["col"].long()
        return self.blocks(dense)[row_of_slots(parts["crow"], len(col)), col]

    def unpack_rows(self, parts: Parts, shape: tuple[int, ...], rows: Tensor) -> Tensor:
        bh, bw = self.block
        which, slot = slots_of_rows(parts["crow"], rows // bh)
        values = parts["values"][slot, (rows % bh)[which]]
        out = values.new_zeros(len(rows), self.grid(shape)[1], bw)
        out = out.index_put((which, parts["col"][slot].long()), values)
        return cut(out.flatten(1), (len(rows), *shape[1:]))

    def validate(self, parts: Parts, shape: tuple[int, ...]) -> None:
        self.check(shape)
        rows, columns = self.grid(shape)
        index = dict.fromkeys(("col", "t_row", "t_block"), ((-1,), torch.int32))
        offsets = {"crow": ((rows + 1,), torch.int32), "t_crow": ((columns + 1,), torch.int32)}
        has_numbers = expect_parts(self, parts, {"values": ((-1, *self.block), None), **index, **offsets})
        count = len(parts["values"])
        if any(len(parts[name]) != count for name in index):
            raise ValueError(
                f"Expected {count} entries in the parts 'col', 't_row' and 't_block' of {self}, one for each block, "
                f"got {[len(parts[name]) for name in index]}."
            )
        if not has_numbers:
            return
        for crow, col, size in (("crow", "col", columns), ("t_crow", "t_row", rows)):
            expect_compressed(self, crow, parts[crow], col, parts[col], size)
            if int(parts[crow][-1]) != count:
                raise ValueError(
                    f"Expected part {crow!r} of {self} to end at {count}, the number of blocks, "
                    f"got {int(parts[crow][-1])}."
                )
        self._expect_same_blocks(parts)
        self._expect_zero_padding(parts, shape)

    def _expect_same_blocks(self, parts: Parts) -> None:
        """The blocks column by column are those row by row. Both lists are strictly ascending here, so no two entries
        of one name the same block, and it is enough that each entry finds its own."""
        expect_range(self, "t_block", parts["t_block"], 0, len(parts["col"]))
        start = 0
        for t_row, t_block in chunks(parts["t_row"], parts["t_block"]):
            slot = torch.arange(start, start + len(t_row), dtype=torch.int32, device=t_row.device)
            start += len(t_row)
            row = torch.searchsorted(parts["crow"], t_block, right=True) - 1
            column = torch.searchsorted(parts["t_crow"], slot, right=True) - 1
            if bool((row != t_row).any()) or bool((column != parts["col"][t_block.long()]).any()):
                raise ValueError(
                    f"Expected parts 't_crow', 't_row' and 't_block' of {self} to list the blocks of 'crow' and 'col', "
                    "got others; make the parts with pack."
                )

    def _expect_zero_padding(self, parts: Parts, shape: tuple[int, ...]) -> None:
        """Zeros beyond the matrix, in the last row and the last column of blocks."""
        values, (bh, bw), rows, columns = parts["values"], self.block, shape[0], math.prod(shape[1:])
        if rows % bh:
            expect_zero(self, values[int(parts["crow"][-2]) :, rows % bh :])
        if columns % bw:
            for blocks, col in chunks(values, parts["col"]):
                expect_zero(self, blocks[col == columns // bw, :, columns % bw :])
