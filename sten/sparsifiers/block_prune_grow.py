"""BlockPruneGrow: gradual pruning of blocks, some of which grow back where the gradient is large."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..layouts import BSR
from ..layouts.base import Layout
from .gradual import GradualPruning
from .granularity import fill_up, keep_largest
from .sparsifier import Edit, View
from .straight_through import masked_straight_through


@dataclass(frozen=True)
class BlockPruneGrow(GradualPruning):
    """Gradual on blocks of BSR, where each mask update also exchanges a part of the active blocks for grown ones.

    The block sparsity rises by a cubic from 0 at `start` to sparsify's at `stop`. At a mask update, drop_fraction
    (falling to 0 with the same cubic) of the blocks that would stay, those with the smallest mean |w|, are exchanged
    for those with the largest mean |g|.

    The dense weight is trained, as in BLaST: training begins dense, and growth reads the gradient of every block. So
    Parameter, gradient and optimizer slots take the memory of the dense model until `finalize`. Dropped blocks are
    zero, and start at zero if they grow again. With `RigL` on BSR all of it is compressed.

    Source: Okanovic et al., BLaST, https://arxiv.org/abs/2507.03117. UNVERIFIED: its schedule, its growth score
    (block-gradient norms), its block sizes.

    Example:
        >>> import torch, sten
        >>> model = torch.nn.Linear(8, 8)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> method = sten.BlockPruneGrow(start=1, stop=2, every=1)
        >>> model = sten.sparsify(model, sten.BSR((4, 4)), method, sparsity=0.75, optimizer=optimizer)
        >>> for step in range(2):
        ...     model(torch.randn(2, 8)).sum().backward()
        ...     optimizer.step()
        >>> sten.finalize(model).weight.density
        0.25
    """

    drop_fraction: float = 0.1

    layouts: ClassVar[tuple[type[Layout], ...]] = (BSR,)
    needs: ClassVar[frozenset[str]] = frozenset({"grad"})

    def apply(self, w: Tensor, view: View) -> Tensor:
        return masked_straight_through(w, view.mask)  # the gradient of dropped blocks is what they grow by

    def update(self, view: View) -> Edit:
        if view.mask is None:
            return super().update(view)
        left = view.layout.mask(view.weight.abs().masked_fill(~view.mask, -torch.inf), view.sparsity)
        fraction = self.drop_fraction * (1 - self.schedule.value(view.step))
        keep = keep_largest(dataclasses.replace(view, mask=left), fraction)
        return Edit(mask=fill_up(view, keep, view.grad.abs()))
