"""Units: the smallest pieces of a weight that a layout keeps or drops. An entry mostly; a block of BSR, a vector of
VectorNM.

The contract, in one line: `totals(layout, score) -> one number a unit`, `entries(layout, chosen, shape) -> bool mask`.
Both are open: a layout of one's own registers its rule with `totals.register` and `entries.register`.
"""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor

from ..layout import Layout, cut, kept, reduction_back
from ..layouts import BSR, CSR, GroupedNM, Masked, VectorNM
from .select import highest
from .sparsifier import View


@singledispatch
def totals(layout: Layout, score: Tensor) -> Tensor:
    """The score of each unit: the sum over its entries, in float64 where there are several."""
    return score


@singledispatch
def entries(layout: Layout, chosen: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The mask of all entries of the chosen units."""
    return chosen


@totals.register
def _(layout: BSR, score: Tensor) -> Tensor:
    return layout.blocks(score).sum((2, 3), dtype=torch.float64)


@entries.register
def _(layout: BSR, chosen: Tensor, shape: tuple[int, ...]) -> Tensor:
    bh, bw = layout.block
    return cut(chosen.repeat_interleave(bh, 0).repeat_interleave(bw, 1), shape)


@totals.register
def _(layout: VectorNM, score: Tensor) -> Tensor:
    return layout.vectors(score).sum(1, dtype=torch.float64)


@entries.register
def _(layout: VectorNM, chosen: Tensor, shape: tuple[int, ...]) -> Tensor:
    rows = torch.arange(shape[0], device=chosen.device) // layout.v
    return reduction_back(chosen.flatten(1)[rows], shape, layout.m)


def expect_free_units(layout: Layout) -> None:
    """Raise ValueError for a layout in which a unit cannot move without moving others."""
    if isinstance(layout, GroupedNM):
        raise ValueError(
            f"{layout} ties the patterns of its columns together, so entries cannot move one by one: use sten.VectorNM."
        )


def keep_largest(view: View, fraction: float) -> Tensor:
    """The living units without the int(fraction * their number) of the smallest |w|, as a mask."""
    alive = totals(view.layout, view.mask).bool()
    size = totals(view.layout, view.weight.abs())
    place = alive.flatten().nonzero()[:, 0]
    chosen = highest(size.flatten()[place], len(place) - int(fraction * len(place)))
    mask = torch.zeros_like(alive, memory_format=torch.contiguous_format)
    mask.view(-1)[place[chosen]] = True
    return entries(view.layout, mask, tuple(view.weight.shape))


def fill_up(view: View, keep: Tensor, growth: Tensor) -> Tensor:
    """`keep` and, in the places that the layout has left, the highest growth scores."""
    score = growth.float().masked_fill(keep, torch.inf)
    if type(view.layout).mask not in (CSR.mask, Masked.mask):
        return view.layout.mask(score, view.sparsity)
    return highest(score.flatten(), kept(score.numel(), view.sparsity, view.layout)).view(score.shape)  # any will do
