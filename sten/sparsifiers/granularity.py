"""Drop and grow by the units of a layout (`Layout.unit_totals`): entries, blocks of BSR, vectors of VectorNM."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layouts.base import Layout
from ..layouts.checks import count_to_keep
from .sparsifier import View
from .topk import highest


def expect_independent_units(layout: Layout) -> None:
    """Raise ValueError for a layout whose units are not independent."""
    if not layout.independent_units:
        raise ValueError(
            f"Expected a layout whose entries can move one by one, got {layout}, which ties the patterns of its "
            "columns together; use sten.VectorNM."
        )


def keep_largest(view: View, fraction: float) -> Tensor:
    """The mask of the active units without the int(fraction * their number) with the smallest mean |w|."""
    active = view.layout.unit_totals(view.mask).bool()
    size = view.layout.unit_means(view.weight.abs())
    index = active.flatten().nonzero()[:, 0]
    chosen = highest(size.flatten()[index], len(index) - int(fraction * len(index)))
    mask = torch.zeros_like(active, memory_format=torch.contiguous_format)
    mask.view(-1)[index[chosen]] = True
    return view.layout.unit_entries(mask, tuple(view.weight.shape))


def fill_up(view: View, keep: Tensor, growth: Tensor) -> Tensor:
    """The mask `keep` and the entries of the highest growth scores, up to the view's sparsity."""
    score = growth.float().masked_fill(keep, torch.inf)
    if not view.layout.unstructured:
        return view.layout.mask(score, view.sparsity)
    # Any mask of the right count fits: no sort.
    count = count_to_keep(score.numel(), view.sparsity, view.layout)
    return highest(score.flatten(), count).view(score.shape)
