"""VectorNM: n of every m inputs, the same for v outputs, so that a product gathers once for v rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sten.layouts.base import Layout, Parts
from sten.layouts.checks import (
    chunks,
    expect_dense,
    expect_n_of_m,
    expect_parts,
    expect_range,
    expect_score,
    expect_whole,
    expect_zero,
)
from sten.layouts.padding import (
    describe_column,
    pad_matrix,
    reduction_back,
    reduction_groups,
    reduction_last,
    reduction_width,
)
from sten.layouts.topk import complete_groups, top_of_groups, widest_float


@dataclass(frozen=True)
class VectorNM(Layout):
    """n of every m consecutive inputs are stored, the same n for v consecutive outputs (the last vector may be short).

    The weight (O, I, *rest) is stored as the matrix (R, C) with the inputs last and padded to a multiple of m. With
    G = C / m groups a row:

    Parts: `values` (R, G * n); `index` (ceil(R / v), G * n) int32, columns of the padded matrix, ascending, n in each
    group. A product with it is a dense product of gathered activations, so it runs at full rate on tensor cores.

    Example:
        >>> import torch, sten
        >>> w = torch.tensor([[3.0, 0.0, 1.0, 0.0], [2.0, 0.0, 4.0, 1.0]])
        >>> parts = sten.VectorNM(1, 2, v=2).pack(w, sten.VectorNM(1, 2, v=2).mask(w))
        >>> parts["index"].tolist(), parts["values"].tolist()
        ([[0, 2]], [[3.0, 1.0], [2.0, 4.0]])
    """

    n: int
    m: int
    v: int

    pattern: ClassVar[tuple[str, ...]] = ("index",)

    def __post_init__(self) -> None:
        expect_n_of_m(self, 2**31 - 1)
        expect_whole(self, "v", 1, 2**31 - 1)

    @property
    def rate(self) -> float:
        return self.n / self.m

    def stacks(self, rows: Sequence[int]) -> bool:
        return all(count % self.v == 0 for count in rows[:-1])

    def check(self, shape: tuple[int, ...]) -> None:
        super().check(shape)
        if reduction_width(shape, self.m) >= 2**31:
            raise ValueError(f"Expected fewer than 2**31 columns for {self}, got shape {tuple(shape)}.")

    def vectors(self, weight: Tensor) -> Tensor:
        """The weight as (ceil(R / v), v, G, m), zero-padded; v is at most R."""
        matrix = reduction_last(weight, self.m)
        v = min(self.v, len(matrix))
        height = -(-len(matrix) // v)
        return pad_matrix(matrix, height * v, matrix.shape[1]).view(height, v, -1, self.m)

    def columns(self, index: Tensor, rows: int) -> Tensor:
        """The stored columns of every row, (R, G * n) int64."""
        return index[torch.arange(rows, device=index.device) // self.v].long()

    def column_groups(self, shape: tuple[int, ...]) -> Tensor:
        return reduction_groups(shape, self.m)

    def tile(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return self.v, 1

    def mask(self, score: Tensor, sparsity: float | None = None) -> Tensor:
        """The n columns of every (vector, group) with the highest sums over the vector's rows."""
        expect_score(self, score, sparsity)
        total = self.unit_totals(score.detach())
        if score.shape[1] % self.m:  # padding comes last
            real = self.vectors(torch.ones_like(score[:1], dtype=torch.bool)).any(1)
            total = total.masked_fill(~real, -torch.inf)
        keep = top_of_groups(total, self.n).flatten(1)
        rows = torch.arange(len(score), device=keep.device) // self.v
        return reduction_back(keep[rows], tuple(score.shape), self.m)

    def unit_totals(self, score: Tensor) -> Tensor:
        """The sum over each vector, (vectors, G, m)."""
        return self.vectors(score).sum(1, dtype=widest_float(score.device))

    def unit_entries(self, chosen: Tensor, shape: tuple[int, ...]) -> Tensor:
        rows = torch.arange(shape[0], device=chosen.device) // self.v
        return reduction_back(chosen.flatten(1)[rows], shape, self.m)

    def pack(self, dense: Tensor, mask: Tensor) -> Parts:
        expect_dense(self, dense, mask)
        union = self.vectors(mask).any(1)
        count = union.sum(-1)
        if bool((count > self.n).any()):
            vector, group = (count > self.n).nonzero()[0].tolist()
            start = describe_column(tuple(dense.shape), group * self.m, self.m)
            last = min((vector + 1) * self.v, len(dense)) - 1
            raise ValueError(
                f"Expected a mask with at most {self.n} of {self.m} inputs for {self.v} outputs together for {self}, "
                f"got {int(count[vector, group])} inputs in the group of outputs {vector * self.v} to {last} that "
                f"starts at {start}; use {self}.mask(score)."
            )
        index = complete_groups(union, self.n).flatten(1).nonzero()[:, 1].view(len(union), -1).int()
        return {"values": self.pack_like(dense.masked_fill(~mask, 0), {"index": index}), "index": index}

    def unpack(self, parts: Parts, shape: tuple[int, ...]) -> Tensor:
        values = parts["values"]
        return self.scatter(values, self.columns(parts["index"], len(values)), shape)

    def scatter(self, values: Tensor, columns: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Dense rows with these values at these columns."""
        out = values.new_zeros(len(values), reduction_width(shape, self.m)).scatter(1, columns, values)
        return reduction_back(out, (len(values), *shape[1:]), self.m)

    def pack_like(self, dense: Tensor, parts: Parts) -> Tensor:
        return reduction_last(dense, self.m).gather(1, self.columns(parts["index"], len(dense)))

    def unpack_rows(self, parts: Parts, shape: tuple[int, ...], rows: Tensor) -> Tensor:
        return self.scatter(parts["values"][rows], parts["index"][rows // self.v].long(), shape)

    def validate(self, parts: Parts, shape: tuple[int, ...]) -> None:
        self.check(shape)
        groups = reduction_width(shape, self.m) // self.m
        slots, height = groups * self.n, -(-shape[0] // self.v)
        index = ((height, slots), torch.int32)
        if not expect_parts(self, parts, {"values": ((shape[0], slots), None), "index": index}):
            return
        expect_range(self, "index", parts["index"], 0, groups * self.m)
        inputs, v, row = shape[1] + -shape[1] % self.m, min(self.v, shape[0]), 0
        first = torch.arange(groups, dtype=torch.int32, device=parts["index"].device).repeat_interleave(self.n) * self.m
        for (index,) in chunks(parts["index"]):
            offset = index - first
            if not bool(((offset >= 0) & (offset < self.m)).all()) or bool((index[:, 1:] <= index[:, :-1]).any()):
                raise ValueError(
                    f"Expected part 'index' of {self} to ascend in a row, {self.n} columns in each group of {self.m}, "
                    "got others."
                )
            if inputs != shape[1]:
                for vector in index % inputs >= shape[1]:
                    expect_zero(self, parts["values"][row : row + v, vector])
                    row += v
