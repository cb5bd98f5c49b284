"""CSR: compressed sparse rows, for patterns without any structure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sten.layouts.base import Layout, Parts
from sten.layouts.checks import expect_dense, expect_parts, expect_zero
from sten.layouts.compiled import runs
from sten.layouts.compressed_rows import expect_compressed, offsets_of, row_of_slots, slots_of_rows

LIMIT = 2**31 - 1  # the indices are int32


@dataclass(frozen=True)
class CSR(Layout):
    """Compressed sparse rows of the weight as a matrix (R, C) = (O, prod(rest)); any mask fits.

    Parts: `values` (capacity,), `crow` (R + 1,) int32, `col` (capacity,) int32. Row r owns the slots crow[r] to
    crow[r + 1] - 1, columns ascending. `pack` makes the capacity equal to the number of entries; a longer one is
    allowed, so that shapes stay the same when a pattern changes in training, or where only a GPU knows how many entries
    an activation has: the slots behind crow[-1] hold zeros.

    Example:
        >>> import torch, sten
        >>> w = torch.tensor([[0.0, 3.0], [1.0, 2.0]])
        >>> parts = sten.CSR().pack(w, w != 0)
        >>> parts["crow"].tolist(), parts["col"].tolist(), parts["values"].tolist()
        ([0, 1, 3], [1, 0, 1], [3.0, 1.0, 2.0])
    """

    pattern: ClassVar[tuple[str, ...]] = ("crow", "col")
    unstructured: ClassVar[bool] = True
    free_slots: ClassVar[bool] = True

    def check(self, shape: tuple[int, ...]) -> None:
        super().check(shape)
        if max(shape[0], math.prod(shape[1:])) >= LIMIT:
            raise ValueError(f"Expected at most {LIMIT - 1} rows and columns for {self}, got shape {tuple(shape)}.")

    def column_groups(self, shape: tuple[int, ...]) -> Tensor:
        return torch.arange(math.prod(shape[1:]))

    def pack(self, dense: Tensor, mask: Tensor) -> Parts:
        expect_dense(self, dense, mask)
        stored = mask.reshape(len(mask), -1)
        if runs("compress_masked", dense, stored):
            matrix = dense.reshape(stored.shape).contiguous()
            values, crow, col = torch.ops.sten.compress_masked(matrix, stored.contiguous())
            self._expect_few(len(col))
            return {"values": values, "crow": crow.int(), "col": col}
        row, col = stored.nonzero(as_tuple=True)
        self._expect_few(len(col))
        crow = offsets_of(stored.sum(1))
        return {"values": dense.reshape(stored.shape)[row, col], "crow": crow, "col": col.int()}

    def packs_rows(self, count: int | None, block: int | None) -> bool:
        return True

    def pack_rows(self, values: Tensor, crow: Tensor, col: Tensor, shape: tuple[int, ...]) -> Parts:
        return {"values": values, "crow": crow, "col": col}

    def _expect_few(self, count: int) -> None:
        if count > LIMIT:
            raise ValueError(f"Expected at most {LIMIT} entries for {self}, got {count}; use sten.BSR or sten.NM.")

    def join_rows(self, each: Sequence[Parts], rows: Sequence[int]) -> Parts:
        crow = offsets_of(torch.cat([parts["crow"].diff() for parts in each]))
        return {name: torch.cat([parts[name] for parts in each]) for name in ("values", "col")} | {"crow": crow}

    def unpack(self, parts: Parts, shape: tuple[int, ...]) -> Tensor:
        values, col = parts["values"], parts["col"].long()
        row = row_of_slots(parts["crow"], len(col))
        # One row too many: slots behind crow[-1] land there and are cut off, so that no shape depends on the data.
        out = values.new_zeros(shape[0] + 1, math.prod(shape[1:]))
        return out.index_put((row, col), values)[:-1].view(shape)

    def pack_like(self, dense: Tensor, parts: Parts) -> Tensor:
        matrix, col = dense.reshape(len(dense), -1), parts["col"].long()
        row = row_of_slots(parts["crow"], len(col))
        values = matrix[row.clamp(max=len(matrix) - 1), col]
        return values.masked_fill(row == len(matrix), 0)

    def unpack_rows(self, parts: Parts, shape: tuple[int, ...], rows: Tensor) -> Tensor:
        which, slot = slots_of_rows(parts["crow"], rows)
        out = parts["values"].new_zeros(len(rows), math.prod(shape[1:]))
        out = out.index_put((which, parts["col"][slot].long()), parts["values"][slot])
        return out.view(len(rows), *shape[1:])

    def with_slots(self, parts: Parts, slots: int) -> Parts:
        more = slots - len(parts["values"])
        if more <= 0:
            return parts
        return {"crow": parts["crow"]} | {n: torch.nn.functional.pad(parts[n], (0, more)) for n in ("values", "col")}

    def validate(self, parts: Parts, shape: tuple[int, ...]) -> None:
        self.check(shape)
        rows, columns = shape[0], math.prod(shape[1:])
        pattern = {"crow": ((rows + 1,), torch.int32), "col": ((-1,), torch.int32)}
        has_numbers = expect_parts(self, parts, {"values": ((-1,), None), **pattern})
        if len(parts["values"]) != len(parts["col"]):
            lengths = f"{len(parts['values'])} and {len(parts['col'])}"
            raise ValueError(f"Expected equally long parts 'values' and 'col' of {self}, got {lengths}.")
        if has_numbers:
            expect_compressed(self, "crow", parts["crow"], "col", parts["col"], columns)
            expect_zero(self, parts["values"][int(parts["crow"][-1]) :])
