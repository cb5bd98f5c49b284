"""Layout: how a sparsity pattern is stored.

The contract, in one line: `mask(score) -> mask`, `pack(dense, mask) -> parts`, `unpack(parts, shape) -> dense`.
A layout is a frozen dataclass: hashable, printable, without tensors. It is the dispatch key and the repr.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from sten.layouts.checks import count_to_keep, expect_score
from sten.layouts.construct import Constructor
from sten.layouts.registry import register
from sten.layouts.topk import top

Parts = dict[str, Tensor]


class Layout(metaclass=Constructor):
    """A way to store a sparse weight as a dictionary of plain tensors, its *parts*.

    Exactly one part, `values`, holds weights; the others, listed in `pattern`, are the pattern. Laws, which
    `sten.testing.check_layout` tests:

    - `unpack(pack(w, m), shape) == w * m` bit for bit, for every mask `m` that the layout can hold;
    - `support(pack(w, m), shape) == m` for every `m = mask(score, sparsity)`: exactly `m` is stored;
    - `pack_like(unpack(parts, shape), parts) == parts["values"]`;
    - shapes that do not divide are padded inside (padded slots of `values` are zero), or `check` refuses them;
    - the traits below hold.

    A subclass is a frozen dataclass; its class name is its name in files, so it must be unique. Traits, not the class,
    decide what methods and conversion can do with a weight in a layout.

    Attributes:
        pattern: names of the parts other than `values`.
        rate: the density that the layout itself fixes (n/m); None where `sparsity` decides.
        holds_any_mask: whether `pack` takes every mask, filling up with explicit zeros where it must.
        unstructured: whether `mask` takes the highest scores of the whole weight and `pack` stores exactly any mask, so
            that entries can be chosen one by one and counts can move between weights.
        independent_units: whether a unit can be dropped or grown without moving others.
        rows_may_be_empty: whether a high sparsity can leave rows without entries, which sten then looks for and names.
        omits_empty_rows: whether rows without entries are left out on purpose, so that no warning names them.
        free_slots: whether slots may stay free behind the last entry (`with_slots`), so that shapes stay as they are
            when the number of entries changes.

    Example:
        >>> import sten
        >>> sten.NM(2, 4).rate, sten.NM(2, 4).holds_any_mask, sten.CSR().unstructured
        (0.5, False, True)
    """

    pattern: ClassVar[tuple[str, ...]] = ()
    unstructured: ClassVar[bool] = False
    independent_units: ClassVar[bool] = True
    omits_empty_rows: ClassVar[bool] = False
    free_slots: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        register(cls)

    @property
    def rate(self) -> float | None:
        """The density that the layout itself fixes (n/m), or None where `sparsity` decides."""
        return None

    @property
    def holds_any_mask(self) -> bool:
        """Whether `pack` takes every mask. By default: those without a rate do."""
        return self.rate is None

    @property
    def rows_may_be_empty(self) -> bool:
        """Whether a high sparsity can leave rows without entries. By default: of those without a rate it can."""
        return self.rate is None

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError if a weight of this shape cannot be stored, with what would fit."""
        if len(shape) < 2 or 0 in shape:
            raise ValueError(
                f"Expected a weight of two or more dimensions, none empty, for {self}, got shape {tuple(shape)}."
            )

    def mask(self, score: Tensor, sparsity: float | None = None) -> Tensor:
        """The bool mask, of score's shape, of the entries to keep: the highest scores the layout can hold together.

        By default the round((1 - sparsity) * units) units with the highest mean scores.

        Args:
            score: importance of each entry, any floating dtype; higher is better. Ties go to the lower index.
            sparsity: fraction of entries to drop; required where `rate` is None, must be None or 1 - rate elsewhere.
        """
        expect_score(self, score, sparsity)
        means = self.unit_means(score.detach())
        return self.unit_entries(top(means, count_to_keep(means.numel(), sparsity, self)), tuple(score.shape))

    @abstractmethod
    def pack(self, dense: Tensor, mask: Tensor) -> Parts:
        """Store `dense * mask`; ValueError if the layout cannot hold the mask.

        A layout with a fixed number of slots fills the ones that the mask leaves free with explicit zeros.
        """

    def pack_columns(self, dense: Tensor, index: Tensor) -> Parts:
        """Store the entries at the columns `index`, (rows, k), distinct and ascending, of each row of a matrix."""
        mask = torch.zeros(dense.shape, dtype=torch.bool, device=dense.device)
        return self.pack(dense, mask.scatter_(1, index, True))

    def packs_rows(self, count: int | None, block: int | None) -> bool:
        """Whether `pack_rows` takes rows of `count` entries (None: of any number), or of so many in each block."""
        del count, block
        return False

    def pack_rows(self, values: Tensor, crow: Tensor, col: Tensor, shape: tuple[int, ...]) -> Parts:
        """Store compressed rows, columns ascending in a row, as the kernels of epilogues make them."""
        raise NotImplementedError(f"{self} has no packs_rows")

    @abstractmethod
    def unpack(self, parts: Parts, shape: tuple[int, ...]) -> Tensor:
        """The dense tensor of this shape, in the dtype of `parts["values"]` (any dtype, integers included)."""

    def pack_like(self, dense: Tensor, parts: Parts) -> Tensor:
        """New `values` for the same pattern: the entries of `dense` where `parts` has slots, zero in padded slots."""
        values = parts["values"]
        slots = torch.arange(1, values.numel() + 1, device=values.device).view_as(values)
        where = self.unpack({**parts, "values": slots}, tuple(dense.shape)).flatten()
        used = where > 0
        out = torch.zeros(values.numel(), dtype=dense.dtype, device=values.device)
        out[where[used] - 1] = dense.flatten()[used]
        return out.view_as(values)

    def unpack_rows(self, parts: Parts, shape: tuple[int, ...], rows: Tensor) -> Tensor:
        """The dense rows `rows` (a 1-D int64 tensor) of the weight, shape (len(rows), *shape[1:])."""
        return self.unpack(parts, shape)[rows]

    def support(self, parts: Parts, shape: tuple[int, ...]) -> Tensor:
        """The bool mask of the stored entries (explicit zeros count, padding does not)."""
        ones = torch.ones_like(parts["values"], dtype=torch.bool)
        return self.unpack({**parts, "values": ones}, shape)

    def covering(self, mask: Tensor) -> Tensor:
        """The mask that it stores for this one: the same, or with more entries where it cannot hold it exactly."""
        shape = tuple(mask.shape)
        return self.support(self.pack(torch.zeros((), device=mask.device).expand(shape), mask), shape)

    def with_slots(self, parts: Parts, slots: int) -> Parts:
        """The parts with `slots` slots, the last ones free and zero; unchanged where `free_slots` is False."""
        del slots
        return parts

    def stacks(self, rows: Sequence[int]) -> bool:
        """Whether weights of so many rows, as one weight, have the parts of each of them one behind the other.

        If so, each part of the tall weight is `torch.cat` of theirs, and operators may read weights that lie so in
        memory as one.
        """
        del rows
        return False

    def join_rows(self, each: Sequence[Parts], rows: Sequence[int]) -> Parts:
        """The parts of matrices of so many rows, one below the other, as of one; by default if the layout `stacks`."""
        if len(each) > 1 and not self.stacks(rows):
            raise ValueError(f"Expected a layout whose rows can be joined, such as FanIn() or CSR(), got {self}.")
        return {name: torch.cat([parts[name] for parts in each]) for name in each[0]}

    def column_groups(self, shape: tuple[int, ...]) -> Tensor:
        """The group of each column of `weight.flatten(1)`, int64 on the CPU, for methods that go column by column.

        `mask` of a slice of whole groups, in the order of their numbers, chooses as `mask` of the whole weight does,
        but for the count where the layout has no rate. If units are independent, each row keeps at least the rate of
        each group. By default all columns are one group, which is always true.
        """
        return torch.zeros(math.prod(shape[1:]), dtype=torch.int64)

    def tile(self, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """The rows and columns, in the order of `column_groups`, of a tile: of entries whose mask moves together.

        Two tiles of the same rows may exchange their masks: within a group of columns, or anywhere if there is no rate.
        By default a tile is a unit, where the layout is unstructured or its units are rectangles; else None: nothing is
        exchanged.
        """
        if type(self).unit_totals is Layout.unit_totals:
            return (1, 1) if self.unstructured else None
        first = torch.zeros_like(self.unit_totals(torch.ones(shape)), dtype=torch.bool)
        first.view(-1)[0] = True
        entries = self.unit_entries(first, shape).flatten(1)
        rows, columns = int(entries.any(1).sum()), int(entries.any(0).sum())
        return (rows, columns) if rows * columns == int(entries.sum()) else None

    def unit_totals(self, score: Tensor) -> Tensor:
        """The sum of the scores of each unit, which is kept or dropped as a whole; by default, of each entry."""
        return score

    def unit_means(self, score: Tensor) -> Tensor:
        """The mean score of each unit over the entries that it really has: a block at the edge competes on equal terms.

        So entries, not their number, decide what is kept. Needs no definition of your own.
        """
        totals = self.unit_totals(score)
        if totals.shape == score.shape:  # a unit is an entry
            return totals
        return totals / self.unit_totals(torch.ones_like(score))

    def unit_entries(self, chosen: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The bool mask, of the weight's shape, of all entries of the chosen units (bool, shaped as `unit_totals`)."""
        del shape
        return chosen

    def upgrade(self, parts: Parts, shape: tuple[int, ...]) -> Parts:
        """The parts as this version stores them, of parts from outside that an earlier version may have stored.

        ValueError if they are recognized and wrong. Others are returned as they are, for `validate` to check.
        """
        del shape
        return parts

    @abstractmethod
    def validate(self, parts: Parts, shape: tuple[int, ...]) -> None:
        """Raise ValueError unless parts from a file or a state dict have the right names, shapes, dtypes and indices.

        Afterwards no kernel can read or write out of bounds.
        """
