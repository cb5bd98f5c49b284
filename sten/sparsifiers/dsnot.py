"""DSnoT: a mask made better by drops and growths that lower the expected error of every output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..layouts.base import Layout
from ..layouts.checks import expect_whole
from .calibration import Refinement, float32_update, starting_mask, statistic, wanda_score
from .granularity import expect_independent_units
from .sparse_swaps import Tiling, expect_groups
from .sparsifier import Edit, View

EVERY = 8  # cycles after which it is looked at whether all rows have stopped


@dataclass(frozen=True)
class DSnoT(Refinement):
    """Dynamic sparse no training: in every row, grow and drop one entry a cycle, while the expected error falls.

    With D_ij = w_ij * mean(x_j), the expected error of row i is e_i, the sum of D over its dropped entries. What grows
    is the dropped entry with the largest sign(e_i) * D_ij / var(x_j); what is dropped for it, in the same group of an
    n:m layout, the kept entry of the lowest |w_ij| * ||x_j|| among those with sign(D_ij) != sign(e_i). A row stops when
    |e_i| would not fall. (The source goes on to a threshold, 0.1, whose unit depends on the length of sequences.)
    Vectors and blocks count with the sums over their entries, and the sum of their rows' |e_i| falls. Weights stay.

    The mask is that of the method before in a chain, else Wanda's.

    Source: Zhang et al., Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs,
    https://arxiv.org/abs/2310.08915, section 3.

    Example:
        >>> import torch, sten
        >>> mean, one = torch.tensor([1.0, 1.0, -1.0, 0.5]), torch.ones(4)
        >>> stats = {"x_mean": mean, "x_var": one, "x_norm": one, "tokens": torch.tensor(64)}
        >>> view = sten.extend.View("w", torch.tensor([[2.0, 0.5, 0.6, 0.4]]), sten.CSR(), 0.5, stats=stats)
        >>> sten.Wanda().update(view).mask  # the dropped entries give 0.5 + 0.2 on average
        tensor([[ True, False,  True, False]])
        >>> sten.DSnoT().update(view).mask  # 0.2 - 0.6
        tensor([[ True,  True, False, False]])
    """

    cycles: int = 50

    needs: ClassVar[frozenset[str]] = frozenset({"x_norm", "x_mean_var"})

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_whole(self, "cycles", 1)

    def check(self, layout: Layout) -> None:
        super().check(layout)
        expect_independent_units(layout)
        expect_groups(layout, self)

    @float32_update
    def update(self, view: View) -> Edit:
        weight, tiles = view.weight.float(), Tiling(view.layout, tuple(view.weight.shape), view.weight.device)
        var = statistic(view, "x_var").clamp(min=torch.finfo(torch.float32).tiny)
        effect = weight.flatten(1) * statistic(view, "x_mean")
        growth = tiles.split((effect / var).view(weight.shape)).sum(3)
        effect = tiles.split(effect.view(weight.shape)).sum(3)  # (bands, rows, tiles)
        cost = tiles.split(wanda_score(view)).sum((1, 3))
        on = tiles.split(starting_mask(view)).any(3).any(1)  # (bands, tiles)
        barred = torch.zeros_like(on) if view.allowed is None else ~tiles.split(view.allowed).any(3).any(1)
        group = tiles.groups()
        groups = int(group[-1]) + 1
        error = (effect * ~on.unsqueeze(1)).sum(2)  # (bands, rows)
        moving = torch.ones(len(on), 1, dtype=torch.bool, device=on.device)
        for cycle in range(self.cycles):
            sign = error.sign().unsqueeze(1)
            helps = (sign @ effect).squeeze(1)  # if it grows; if it is dropped, the opposite
            loose = on & (helps < 0)
            count = torch.zeros(len(on), groups, device=on.device).index_add_(1, group, loose.float())
            free = ~on & ~barred & (helps > 0) & (count[:, group] > 0)
            grown = (sign @ growth).squeeze(1).masked_fill(~free, -torch.inf).argmax(1, keepdim=True)
            loose &= group == group[grown]
            gone = cost.masked_fill(~loose, torch.inf).argmin(1, keepdim=True)
            moved = effect.gather(2, torch.stack([gone, grown], 2).expand(-1, error.shape[1], -1))
            after = error + moved[..., 0] - moved[..., 1]
            falls = after.abs().sum(1, keepdim=True) < error.abs().sum(1, keepdim=True)
            moving = moving & falls & free.gather(1, grown) & loose.gather(1, gone)
            if cycle % EVERY == EVERY - 1 and not bool(moving.any()):  # waits for the device; nothing moves any more
                break
            on = on.scatter(1, grown, on.gather(1, grown) | moving)
            on = on.scatter(1, gone, on.gather(1, gone) & ~moving)
            error = torch.where(moving, after, error)
        return Edit(mask=tiles.join(on.unsqueeze(1).expand_as(effect)))
