"""Drop and grow at the granularity of a layout: entry by entry mostly, whole blocks of BSR, whole vectors of VectorNM.

What a unit is, a layout says itself, with `Layout.unit_totals` and `Layout.unit_entries`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layouts.base import Layout
from ..layouts.checks import count_to_keep
from .sparsifier import View
from .topk import highest


def expect_independent_units(layout: Layout) -> None:
    """Raise ValueError for a layout in which a unit cannot move without moving others."""
    if not layout.independent_units:
        raise ValueError(
            f"Expected a layout whose entries can move one by one, got {layout}, which ties the patterns of its "
            "columns together; use sten.VectorNM."
        )


def keep_largest(view: View, fraction: float) -> Tensor:
    """The present units without the int(fraction * their number) of the smallest |w|, as a mask."""
    present = view.layout.unit_totals(view.mask).bool()
    size = view.layout.unit_totals(view.weight.abs())
    index = present.flatten().nonzero()[:, 0]
    chosen = highest(size.flatten()[index], len(index) - int(fraction * len(index)))
    mask = torch.zeros_like(present, memory_format=torch.contiguous_format)
    mask.view(-1)[index[chosen]] = True
    return view.layout.unit_entries(mask, tuple(view.weight.shape))


def fill_up(view: View, keep: Tensor, growth: Tensor) -> Tensor:
    """`keep` and, among the entries that the layout can hold beside it, the highest growth scores."""
    score = growth.float().masked_fill(keep, torch.inf)
    if not view.layout.unstructured:
        return view.layout.mask(score, view.sparsity)
    # any mask of the right count fits, so nothing needs to be sorted
    count = count_to_keep(score.numel(), view.sparsity, view.layout)
    return highest(score.flatten(), count).view(score.shape)
