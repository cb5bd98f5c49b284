"""SRigL: RigL with a constant fan-in and ablation of neurons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..layouts import FanIn
from ..layouts.base import Layout
from ..layouts.checks import count_to_keep
from .drop_grow import DropGrow
from .sparsifier import Edit, View
from .topk import highest


@dataclass(frozen=True)
class SRigL(DropGrow):
    """RigL on rows of equal fan-in. A neuron (row) with too few salient weights is ablated; the others get its entries.

    Salient are the largest |w| that are not dropped and the largest |g| that would grow, over the whole layer. A neuron
    with fewer than max(1, int(ablate * fan_in)) of them is ablated; it may grow again. No neuron of the last of the
    chosen weights, mostly the classifier, is ablated. New entries start at zero. Ablation changes the shape of the
    Parameter, (remaining rows, fan-in), so a compiled model recompiles, and several ranks are refused.

    Source: Lasby et al., Dynamic Sparse Training with Structured Sparsity, https://arxiv.org/abs/2305.02299, section 3
    and appendix; ablate 0.3 is theirs for conv nets (0.95 for transformers).

    Example:
        >>> import torch, sten
        >>> model = torch.nn.Linear(8, 8)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> model = sten.sparsify(model, sten.FanIn(), sten.SRigL(total_steps=1000), sparsity=0.75, optimizer=optimizer)
        >>> model.weight.mask().sum(1).tolist()
        [2, 2, 2, 2, 2, 2, 2, 2]
    """

    stop: float = 0.75
    ablate: float = 0.3

    layouts: ClassVar[tuple[type[Layout], ...]] = (FanIn,)
    needs: ClassVar[frozenset[str]] = frozenset({"grad"})
    replaces_step: ClassVar[bool] = True
    ranks_only: ClassVar[bool] = True
    resizes: ClassVar[bool] = True

    def growth(self, view: View) -> Tensor:
        return view.grad.abs()

    def update(self, view: View) -> Edit:
        if view.mask is None:
            return super().update(view)
        size, grad = view.weight.abs().flatten(), self.growth(view).flatten(1).contiguous()
        rows, columns = grad.shape
        budget = count_to_keep(grad.numel(), view.sparsity, view.layout)
        index = view.mask.flatten().nonzero()[:, 0]  # of active entries; |w| is read there only
        grown = int(self.schedule.value(view.step) * len(index))
        stay = len(index) - grown
        salient = highest(grad.view(-1), grown)
        salient[index[highest(size[index], stay)]] = True
        active = self._active(salient.view(rows, columns), budget, view.last)
        fan_in = min(budget // max(int(active.sum()), 1), columns)
        index = index[active.view(-1)[index // columns]]
        index = index[highest(size[index], stay)]
        # Entries that stay come first, by |w|; then growth, by |g|.
        order = grad / grad.max().clamp(min=1e-30)
        order.view(-1)[index] = (2 + size[index] / size.max()).to(order.dtype)
        return Edit(mask=(highest(order, fan_in) & active).view(view.weight.shape))

    def _active(self, salient: Tensor, budget: int, exempt: bool) -> Tensor:
        """(R, 1), which neurons are not ablated: at least as many as the budget needs at full fan-in."""
        rows, columns = salient.shape
        counts = salient.sum(1)
        fewest = max(-(-budget // columns), 1)
        least = max(1, int(self.ablate * (budget // rows)))
        least = min(least, int(counts.sort(descending=True).values[fewest - 1]))
        return (torch.ones_like(counts, dtype=torch.bool) if exempt else counts >= max(least, 0)).unsqueeze(1)
