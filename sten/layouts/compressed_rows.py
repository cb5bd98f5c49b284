"""Compressed rows: offsets `crow` into an index, as in CSR and BSR."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sten._torch_private import exports_to_onnx
from sten.layouts.checks import chunks, expect_range

if TYPE_CHECKING:
    from sten.layouts.base import Layout


def offsets_of(counts: Tensor) -> Tensor:
    """The offsets of rows (or columns) with so many entries: one more than there are rows, int32."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()


def row_of_slots(crow: Tensor, slots: int) -> Tensor:
    """The row of each of `slots` slots; the number of rows for slots behind crow[-1]. Shapes stay static."""
    if exports_to_onnx():  # which cannot repeat; row r ends before each slot that is counted here
        ends = torch.zeros(slots + 1, dtype=torch.int64, device=crow.device)
        return ends.scatter_add(0, crow[1:].long(), torch.ones_like(crow[1:], dtype=torch.int64)).cumsum(0)[:slots]
    count = torch.cat([crow.diff(), slots - crow[-1:]])
    return torch.arange(len(crow), device=crow.device).repeat_interleave(count, output_size=slots)


def slots_of_rows(crow: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """All slots of the chosen rows, in order: (which of the rows, slot number). Their count depends on the data."""
    start = crow[rows].long()
    count = crow[rows + 1] - start
    which = torch.arange(len(rows), device=rows.device).repeat_interleave(count)
    first = count.cumsum(0) - count
    slot = torch.arange(len(which), device=rows.device) + (start - first)[which]
    return which, slot


def expect_compressed(layout: Layout, name: str, crow: Tensor, index_name: str, index: Tensor, size: int) -> None:
    """Raise ValueError unless `crow` delimits the rows of `index`, whose numbers lie in [0, size) and ascend in a row.

    There may be free slots behind crow[-1]; their numbers must lie in the range as well.
    """
    compiled = crow.device.type == "cpu" and hasattr(torch.ops.sten, "compressed_in_bounds")
    if compiled and torch.ops.sten.compressed_in_bounds(crow, index, size):  # else what follows says why
        expect_range(layout, index_name, index[int(crow[-1]) :], 0, size)  # free slots
        return
    falls = any(bool((piece[1:] < piece[:-1]).any()) for (piece,) in chunks(crow, overlap=1))
    if int(crow[0]) != 0 or int(crow[-1]) > len(index) or falls:
        raise ValueError(
            f"Expected part {name!r} of {layout} to start at 0, never fall, and end at {len(index)} (slots) at most, "
            f"got {int(crow[0])} to {int(crow[-1])}."
        )
    stored, first = index[: int(crow[-1])], crow[:-1][crow.diff() > 0].long()
    expect_range(layout, index_name, index[len(stored) :], 0, size)  # free slots
    expect_range(layout, index_name, stored[first], 0, size)
    expect_range(layout, index_name, stored[first[1:] - 1], 0, size)  # the last of a row, and so all between
    expect_range(layout, index_name, stored[-1:], 0, size)
    # every fall is that from one row to the next
    first = first[1:]
    falls = sum(int((piece[1:] <= piece[:-1]).count_nonzero()) for (piece,) in chunks(stored, overlap=1))
    if falls == int((stored[first] <= stored[first - 1]).count_nonzero()):
        return
    start, starts = 0, torch.zeros(len(stored), dtype=torch.bool, device=stored.device).index_fill_(0, first, True)
    for piece, own in chunks(stored, starts, overlap=1):
        inside = ((piece[1:] <= piece[:-1]) > own[1:]).nonzero()
        if len(inside):
            slot = start + int(inside[0, 0]) + 1
            raise ValueError(
                f"Expected part {index_name!r} of {layout} to ascend within a row, without repeats, got "
                f"{int(index[slot - 1])} and {int(index[slot])} in slots {slot - 1} and {slot}."
            )
        start += len(piece) - 1
