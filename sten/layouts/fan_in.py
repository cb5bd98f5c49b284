"""FanIn: the same number of inputs for every stored output, as SRigL trains; outputs without inputs are left out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sten.layouts.base import Layout, Parts
from sten.layouts.checks import chunks, count_to_keep, expect_dense, expect_parts, expect_range, expect_score
from sten.layouts.compiled import runs
from sten.layouts.topk import block_sums, complete_groups, top_of_groups


@dataclass(frozen=True)
class FanIn(Layout):
    """Constant fan-in: every stored row of the weight seen as a matrix (R, C) = (O, prod(rest)) has f entries.

    Parts, with L stored rows: `values` (L, f); `index` (L, f) int32, columns, ascending in a row; `row` (L,) int32,
    which rows they are, ascending. Rows that a mask leaves empty are not stored ("ablated neurons"). A mask whose
    stored rows have different counts is refused by `sten.from_dense` and in training; `pack`, as for the non-zeros of a
    weight, takes the highest count for f and stores the lowest free columns as explicit zeros.

    Example:
        >>> import torch, sten
        >>> w = torch.tensor([[0.0, 3.0, 1.0], [0.0, 0.0, 0.0], [2.0, 0.0, 4.0]])
        >>> parts = sten.FanIn().pack(w, w != 0)
        >>> parts["row"].tolist(), parts["index"].tolist(), parts["values"].tolist()
        ([0, 2], [[1, 2], [0, 2]], [[3.0, 1.0], [2.0, 4.0]])

    Source: Lasby et al., Dynamic Sparse Training with Structured Sparsity, https://arxiv.org/abs/2305.02299, section 3.
    """

    pattern: ClassVar[tuple[str, ...]] = ("index", "row")
    omits_empty_rows: ClassVar[bool] = True

    def check(self, shape: tuple[int, ...]) -> None:
        super().check(shape)
        if max(shape[0], math.prod(shape[1:])) >= 2**31:
            raise ValueError(f"Expected fewer than 2**31 rows and columns for {self}, got shape {tuple(shape)}.")

    def mask(self, score: Tensor, sparsity: float | None = None) -> Tensor:
        """The f highest scores of every row; f = round((1 - sparsity) * numel) // R."""
        expect_score(self, score, sparsity)
        matrix = score.reshape(len(score), -1)
        return top_of_groups(matrix, count_to_keep(matrix.numel(), sparsity, self) // len(matrix)).view(score.shape)

    def covering(self, mask: Tensor) -> Tensor:
        expect_dense(self, torch.zeros((), device=mask.device).expand(mask.shape), mask)
        counts = block_sums(mask.reshape(len(mask), -1), (1, math.prod(mask.shape[1:])))
        equal = counts is not None and bool(((counts == 0) | (counts == counts.max())).all())
        return mask if equal else super().covering(mask)

    def column_groups(self, shape: tuple[int, ...]) -> Tensor:
        return torch.arange(math.prod(shape[1:]))

    def tile(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return 1, 1

    def pack(self, dense: Tensor, mask: Tensor) -> Parts:
        expect_dense(self, dense, mask)
        matrix = mask.reshape(len(mask), -1)
        if runs("compress_masked", dense, matrix):
            numbers = dense.reshape(matrix.shape).contiguous()
            values, crow, index = torch.ops.sten.compress_masked(numbers, matrix.contiguous())
            count = crow.diff()
            row = count.nonzero()[:, 0]
            if bool((count[row] == count.max()).all()):
                size = len(row), int(count.max())
                return {"values": values.view(size), "index": index.view(size), "row": row.int()}
        else:
            count = matrix.sum(1)
        row, fan_in = count.nonzero()[:, 0], int(count.max())
        stored = matrix if len(row) == len(matrix) else matrix[row]
        if bool((count[row] < fan_in).any()):
            stored = complete_groups(stored, fan_in)
        index = stored.nonzero()[:, 1].view(len(row), fan_in).int()
        parts = {"index": index, "row": row.int()}
        return {"values": self.pack_like(dense.masked_fill(~mask, 0), parts), **parts}

    def pack_columns(self, dense: Tensor, index: Tensor) -> Parts:
        row = torch.arange(len(dense), dtype=torch.int32, device=dense.device)
        return {"values": dense.gather(1, index), "index": index.int(), "row": row}

    def packs_rows(self, count: int | None, block: int | None) -> bool:
        return count is not None

    def pack_rows(self, values: Tensor, crow: Tensor, col: Tensor, shape: tuple[int, ...]) -> Parts:
        row = torch.arange(shape[0], dtype=torch.int32, device=values.device)
        return {"values": values.view(shape[0], -1), "index": col.view(shape[0], -1), "row": row}

    def join_rows(self, each: Sequence[Parts], rows: Sequence[int]) -> Parts:
        widths = {parts["values"].shape[1] for parts in each}
        if len(widths) > 1:
            raise ValueError(f"Expected one number of entries in every row for {self}, got {sorted(widths)}.")
        first = itertools.accumulate(rows, initial=0)
        row = torch.cat([parts["row"] + start for parts, start in zip(each, first, strict=False)])
        return {name: torch.cat([parts[name] for parts in each]) for name in ("values", "index")} | {"row": row}

    def unpack(self, parts: Parts, shape: tuple[int, ...]) -> Tensor:
        values, row = parts["values"], parts["row"].long()
        rows = values.new_zeros(len(row), math.prod(shape[1:])).scatter(1, parts["index"].long(), values)
        if len(row) == shape[0]:  # all of them, in order
            return rows.view(shape)
        return values.new_zeros(shape[0], rows.shape[1]).index_copy(0, row, rows).view(shape)

    def pack_like(self, dense: Tensor, parts: Parts) -> Tensor:
        return dense.reshape(len(dense), -1)[parts["row"].long()].gather(1, parts["index"].long())

    def validate(self, parts: Parts, shape: tuple[int, ...]) -> None:
        self.check(shape)
        values = parts.get("values")
        size = tuple(values.shape) if isinstance(values, Tensor) and values.dim() == 2 else (-1, -1)
        pattern = {"index": (size, torch.int32), "row": (size[:1], torch.int32)}
        has_numbers = expect_parts(self, parts, {"values": (size, None), **pattern})
        if values.shape[1] > math.prod(shape[1:]):
            raise ValueError(
                f"Expected at most {math.prod(shape[1:])} entries a row, the number of columns, for {self}, got "
                f"{values.shape[1]}."
            )
        if not has_numbers:
            return
        expect_range(self, "index", parts["index"], 0, math.prod(shape[1:]))
        expect_range(self, "row", parts["row"], 0, shape[0])
        for name in ("index", "row"):
            pieces = chunks(parts["index"]) if name == "index" else chunks(parts["row"], overlap=1)
            if any(bool((piece[..., 1:] <= piece[..., :-1]).any()) for (piece,) in pieces):
                raise ValueError(
                    f"Expected part {name!r} of {self} to ascend, each number once, got numbers in another order."
                )
