"""GroupedNM: STen's n:m:g. Blocks of m outputs by one input; every pattern is used by exactly g columns of a chunk.

Letters: R, C rows and columns of the weight as a matrix; m, n, g of the layout; P = C(m, n) patterns; N = P * g columns
of a chunk; a strip is m rows; B = chunks * strips, the independent assignment problems.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sten._torch_private import exports_to_onnx
from sten.layouts.assignment import assign, choose, comparable
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
)  # fmt: skip
from sten.layouts.compiled import runs
from sten.layouts.padding import cut, pad_matrix
from sten.layouts.patterns import patterns, revolving_door

BATCH = 2**23  # entries of the (strip, column, pattern) table worked on at a time: 32 MiB, so that memory is bounded


@dataclass(frozen=True)
class GroupedNM(Layout):
    """STen's n:m:g: in a strip of m outputs, every input has n of its m weights, each pattern equally often.

    The weight is seen as the matrix (R, C) = (O, prod(rest)). Rows are cut into strips of m, columns into chunks of
    P * g, where P = C(m, n); in a chunk of a strip each of the P patterns is used by exactly g columns (padding
    columns count). So the slot number says the pattern, and only one column offset per column is stored.

    Parts: `values` (chunks, strips, P, g, n); `index` (chunks, strips, P, g) int16, the column's offset in its chunk.
    Slot (c, s, p, j) holds rows m*s + patterns(n, m)[p] of column P*g*c + index[c, s, p, j].

    Example:
        >>> import torch, sten
        >>> w = torch.tensor([[1.0, 4.0], [3.0, 2.0]])  # two columns, two patterns, each used once
        >>> sten.GroupedNM(1, 2, g=1).mask(w)
        tensor([[False,  True],
                [ True, False]])

    Source: Ivanov et al., STen: Productive and Efficient Sparsity in PyTorch, https://arxiv.org/abs/2304.07613.
    """

    n: int
    m: int
    g: int

    pattern: ClassVar[tuple[str, ...]] = ("index",)
    independent_units: ClassVar[bool] = False  # a column takes its pattern from another one
    order: ClassVar[tuple[tuple[int, ...], ...]]  # patterns(n, m); not a field, so not part of repr, equality and files

    def __post_init__(self) -> None:
        expect_n_of_m(self, 256)
        expect_whole(self, "g", 1, 2**15 - 1)
        if self.width >= 2**15:
            raise ValueError(
                f"Expected chunks of at most 32767 columns for {self}, got C(m, n) * g = {self.width}; choose a "
                "smaller m or g."
            )
        # An attribute, not read from the cache at each use: torch.compile cannot see through a cached function.
        object.__setattr__(self, "order", patterns(self.n, self.m))

    @property
    def rate(self) -> float:
        return self.n / self.m

    @property
    def width(self) -> int:
        """N, the columns of a chunk."""
        return math.comb(self.m, self.n) * self.g

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Chunks and strips of a weight of this shape."""
        return -(-math.prod(shape[1:]) // self.width), -(-shape[0] // self.m)

    def rows(self, device: torch.device) -> Tensor:
        """The patterns as a tensor (P, n), made at each call: a cached tensor would leak between tracing modes.

        Copied asynchronously: `torch.tensor(..., device=)` would synchronize with the GPU.
        """
        if torch.compiler.is_exporting():  # which loses constants in `run_decompositions`
            return revolving_door(self.n, self.m, device)
        return torch.tensor(self.order, device="cpu").to(device, non_blocking=True)

    def padded(self, weight: Tensor) -> Tensor:
        """The weight as a zero-padded matrix (strips * m, chunks * N)."""
        chunks, strips = self.sizes(tuple(weight.shape))
        return pad_matrix(weight.reshape(len(weight), -1), strips * self.m, chunks * self.width)

    def columns(self, weight: Tensor, problems: Tensor | None = None) -> Tensor:
        """The weight as columns (B, N, m) of its strips, zero-padded; all of them, or those of these problems."""
        chunks, strips = self.sizes(tuple(weight.shape))
        blocks = self.padded(weight).view(strips, self.m, chunks, self.width)
        if problems is not None:
            return blocks[problems % strips, :, problems // strips].transpose(1, 2)
        return blocks.permute(2, 0, 3, 1).reshape(-1, self.width, self.m)

    def energy(self, columns: Tensor) -> Tensor:
        """The sum of each column's entries in each pattern, (B, N, P). No matmul: autocast would round it."""
        rows = self.rows(columns.device)
        return sum(columns[..., rows[:, k]] for k in range(self.n))

    def mask(self, score: Tensor, sparsity: float | None = None) -> Tensor:
        """The assignment of columns to patterns with (nearly) the highest sum: prices, greedy choice, then swaps."""
        expect_score(self, score, sparsity)
        if torch.compiler.is_compiling():  # the number of exchanges depends on the numbers
            return _mask(score, self.n, self.m, self.g)
        if runs("grouped_nm_choose", score.detach()):
            matrix = score.detach().reshape(len(score), -1)
            if matrix.dtype is torch.float64:
                matrix = comparable(matrix, self.n)
            mask = torch.ops.sten.grouped_nm_choose(matrix.float().contiguous(), self.n, self.m, self.g)
            return mask.view(score.shape)
        chunks, strips = self.sizes(tuple(score.shape))
        columns = self.columns(comparable(score.detach(), self.n))
        chosen = torch.cat([assign(self.energy(part), self.g) for part in columns.split(self.batch)])
        stored = torch.zeros_like(columns, dtype=torch.bool).scatter_(-1, self.rows(score.device)[chosen], True)
        blocks = stored.view(chunks, strips, self.width, self.m).permute(1, 3, 0, 2)
        return cut(blocks.reshape(strips * self.m, -1), tuple(score.shape))

    def column_groups(self, shape: tuple[int, ...]) -> Tensor:
        return torch.arange(math.prod(shape[1:])) // self.width

    def tile(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return self.m, 1

    @property
    def batch(self) -> int:
        """How many of the B problems to work on at a time, so that memory stays bounded."""
        return max(1, BATCH * self.g // self.width**2)

    def pack(self, dense: Tensor, mask: Tensor) -> Parts:
        expect_dense(self, dense, mask)
        index, full = self.index_of(mask)
        return {
            "values": self.pack_like(dense if full else dense.masked_fill(~mask, 0), {"index": index}),
            "index": index,
        }

    def index_of(self, mask: Tensor) -> tuple[Tensor, bool]:
        """The part `index` of a mask, and whether every slot is known to be one of the mask's entries or padding.

        ValueError where there is none.
        """
        shape, sizes = tuple(mask.shape), self.sizes(tuple(mask.shape))
        if runs("grouped_nm_index", mask):  # which leaves columns of fewer than n entries to what follows
            matrix = mask.reshape(len(mask), -1).contiguous()
            index, unsolved = torch.ops.sten.grouped_nm_index(matrix, self.n, self.m, self.g)
            problems = unsolved.flatten().nonzero()[:, 0]
        else:
            index = torch.empty(*sizes, len(self.order), self.g, dtype=torch.int16, device=mask.device)
            problems = torch.arange(math.prod(sizes), device=mask.device)
        if len(problems):
            chosen = self.recover(self.columns(mask, problems), shape, problems)
            index.view(-1, self.width)[problems] = torch.argsort(chosen, dim=1, stable=True).to(torch.int16)
        return index, not len(problems)

    def recover(self, stored: Tensor, shape: tuple[int, ...], problems: Tensor) -> Tensor:
        """A pattern for every column (B, N) of a mask's columns (B, N, m); ValueError where there is none.

        The B problems have these numbers among those of the shape.
        """
        count = stored.sum(-1)
        if bool((count > self.n).any()):
            problem, column = (count > self.n).nonzero()[0].tolist()
            where = self.describe(int(problems[problem]), shape, column)
            raise ValueError(
                f"Expected a mask with at most {self.n} of {self.m} outputs at every input for {self}, got "
                f"{int(count[problem, column])} {where}; use {self}.mask(score)."
            )
        chosen = torch.cat([self.rank(part) for part in stored.split(self.batch)])
        full = count == self.n
        load = torch.zeros(len(stored), self.width // self.g + 1, dtype=torch.int32, device=stored.device)
        # Columns with fewer than n entries are counted in a last pattern that does not exist.
        where = chosen.masked_fill(~full, load.shape[1] - 1)
        load.scatter_add_(1, where, torch.ones_like(where, dtype=torch.int32))
        if bool((load[:, :-1] > self.g).any()):
            problem, pattern = (load[:, :-1] > self.g).nonzero()[0].tolist()
            where = self.describe(int(problems[problem]), shape)
            raise ValueError(
                f"Expected a mask that uses every pattern for exactly {self.g} columns of a chunk for {self}, got "
                f"{self.order[pattern]} for {int(load[problem, pattern])} {where}; "
                f"use {self}.mask(score)."
            )
        if bool(full.all()):
            return chosen
        # Padding columns take the patterns that are left, in order; other columns of fewer than n entries follow below.
        left = (self.g - load[:, :-1]).cumsum(1)
        chosen = torch.where(full, chosen, torch.searchsorted(left, (~full).cumsum(1) - 1, right=True))
        real = self.columns(torch.ones(shape, dtype=torch.bool, device=stored.device), problems)
        short = (~full & real.any(-1)).any(-1).nonzero()[:, 0]
        for part in short.split(self.batch) if len(short) else ():
            chosen[part] = self.fit(stored[part], real[part], problems[part], shape)
        return chosen

    def rank(self, stored: Tensor) -> Tensor:
        """The number of the pattern that each column's n stored rows are, in revolving-door order (Knuth 7.2.1.3)."""
        n = self.n
        term = [(-1) ** (n - k) * math.comb(r + 1, k) if k else 0 for r in range(self.m) for k in range(n + 1)]
        term = torch.tensor(term, device=stored.device)
        nth = stored.cumsum(-1).clamp_(max=n) * stored
        nth += torch.arange(self.m, device=stored.device) * (n + 1)
        return term[nth].sum(-1) - n % 2

    def fit(self, stored: Tensor, real: Tensor, problems: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A pattern that contains each column's stored rows, for problems with columns of fewer than n.

        In a short strip the pattern should add no real row to them, so that exactly the mask is stored; where that is
        impossible (a subset of what fits), it may.
        """
        count = stored.sum(-1, keepdim=True)
        fits = self.energy(stored.float()) == count
        chosen = torch.full(stored.shape[:2], -1, device=stored.device)
        for options in (fits & (self.energy(real.float()) == count), fits):
            todo = (options.any(-1).all(-1) & (chosen[:, 0] < 0)).nonzero()[:, 0]
            if len(todo):
                chosen[todo] = choose(options[todo], self.g)
        if bool((chosen[:, 0] < 0).any()):
            problem = int(problems[(chosen[:, 0] < 0).nonzero()[0, 0]])
            raise ValueError(
                f"Expected a mask that uses every pattern for exactly {self.g} columns of a chunk for {self}, got one "
                f"that no such choice covers {self.describe(problem, shape)}; use {self}.mask(score)."
            )
        return chosen

    def describe(self, problem: int, shape: tuple[int, ...], column: int | None = None) -> str:
        """One of the B problems, or a column of it, in words, for error messages."""
        chunk, strip = divmod(problem, self.sizes(shape)[1])
        rows = f"outputs {strip * self.m} to {min((strip + 1) * self.m, shape[0]) - 1}"
        first = chunk * self.width
        if column is not None:
            return f"in column {first + column} of {rows}"
        return f"in columns {first} to {min(first + self.width, math.prod(shape[1:])) - 1} of {rows}"

    def slots(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Row and column of every slot in the padded matrix, as two tensors that broadcast to `values`."""
        chunks, strips = index.shape[:2]
        row = torch.arange(0, strips * self.m, self.m, device=index.device).view(-1, 1, 1, 1)
        row = row + self.rows(index.device).unsqueeze(1)
        first = torch.arange(0, chunks * self.width, self.width, device=index.device)
        return row, (index + first.view(-1, 1, 1, 1)).unsqueeze(-1)

    def unpack(self, parts: Parts, shape: tuple[int, ...]) -> Tensor:
        values, (chunks, strips) = parts["values"], self.sizes(shape)
        if runs("grouped_nm_expand", values, parts["index"]):
            stored, columns = (values.contiguous(), parts["index"].contiguous()), math.prod(shape[1:])
            return torch.ops.sten.grouped_nm_expand(*stored, self.n, self.m, self.g, shape[0], columns).view(shape)
        out = values.new_zeros(strips * self.m, chunks * self.width).index_put(self.slots(parts["index"]), values)
        return cut(out, shape)

    def pack_like(self, dense: Tensor, parts: Parts) -> Tensor:
        if runs("grouped_nm_collect", dense, parts["index"]):
            matrix, index = dense.reshape(len(dense), -1).contiguous(), parts["index"].contiguous()
            return torch.ops.sten.grouped_nm_collect(matrix, index, self.n, self.m, self.g)
        return self.padded(dense)[self.slots(parts["index"])]

    def unpack_rows(self, parts: Parts, shape: tuple[int, ...], rows: Tensor) -> Tensor:
        values, index = parts["values"], parts["index"]
        # For each row of a strip: the patterns that contain it, and its position in each of them.
        patterns_of = [[(p, s.index(r)) for p, s in enumerate(self.order) if r in s] for r in range(self.m)]
        table = torch.tensor(patterns_of, device="cpu").to(rows.device, non_blocking=True)[rows % self.m]
        strip, p, nth = (rows // self.m).unsqueeze(1), table[..., 0], table[..., 1]
        first = torch.arange(0, len(index) * self.width, self.width, device=rows.device)
        column = (index[:, strip, p] + first.view(-1, 1, 1, 1)).transpose(0, 1).flatten(1)
        # Indexing around a slice puts the indexed dimensions first: (len(rows), patterns, chunks, g).
        gathered = values[:, strip, p, :, nth].transpose(1, 2).flatten(1)
        out = values.new_zeros(len(rows), len(index) * self.width).scatter(1, column, gathered)
        return cut(out, (len(rows), *shape[1:]))

    def validate(self, parts: Parts, shape: tuple[int, ...]) -> None:
        self.check(shape)
        slots = (*self.sizes(shape), self.width // self.g, self.g)
        if not expect_parts(self, parts, {"values": ((*slots, self.n), None), "index": (slots, torch.int16)}):
            return
        expect_range(self, "index", parts["index"], 0, self.width)
        for (columns,) in chunks(parts["index"].flatten(2).flatten(0, 1)):
            listed = torch.zeros(columns.shape, dtype=torch.bool, device=columns.device)
            if not bool(listed.scatter_(1, columns.long(), True).all()):
                raise ValueError(
                    f"Expected part 'index' of {self} to list each of the {self.width} columns of a chunk once, got "
                    "others."
                )
        rows, last = shape[0] % self.m, math.prod(shape[1:]) - (slots[0] - 1) * self.width
        if rows:
            beyond = self.rows(parts["values"].device) >= rows
            expect_zero(self, parts["values"][:, -1].permute(1, 3, 0, 2)[beyond])
        if last < self.width:
            expect_zero(self, parts["values"][-1][parts["index"][-1] >= last])


@torch.library.custom_op(
    "sten::grouped_nm_mask", mutates_args=(), schema="(Tensor score, int n, int m, int g) -> Tensor"
)
def _mask(score, n, m, g):
    return GroupedNM(n, m, g).mask(score)


@_mask.register_fake
def _(score, n, m, g):
    if exports_to_onnx():
        raise RuntimeError("Expected a finalized model for ONNX, got GroupedNM under a method; call sten.finalize.")
    return torch.empty_like(score, dtype=torch.bool, memory_format=torch.contiguous_format)
