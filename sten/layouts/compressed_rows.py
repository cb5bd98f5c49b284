"""Compressed rows: offsets `crow` into an index, as in CSR and BSR."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sten.layouts.checks import expect_range

if TYPE_CHECKING:
    from sten.layouts.base import Layout


def row_of_slots(crow: Tensor, slots: int) -> Tensor:
    """The row of each of `slots` slots; the number of rows for slots behind crow[-1]. Shapes stay static."""
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
    if int(crow[0]) != 0 or int(crow[-1]) > len(index) or bool((crow[1:] < crow[:-1]).any()):
        raise ValueError(
            f"Expected part {name!r} of {layout} to start at 0, never fall, and end at {len(index)} (slots) at most, "
            f"got {int(crow[0])} to {int(crow[-1])}."
        )
    expect_range(layout, index_name, index, 0, size)
    row = row_of_slots(crow, len(index))
    falls = (row[1:] == row[:-1]) & (index[1:] <= index[:-1]) & (row[1:] < len(crow) - 1)
    if bool(falls.any()):
        slot = int(falls.nonzero()[0]) + 1
        raise ValueError(
            f"Expected part {index_name!r} of {layout} to ascend within a row, without repeats, got "
            f"{int(index[slot - 1])} and {int(index[slot])} in slots {slot - 1} and {slot}."
        )
