"""Gradual magnitude pruning, and iterative magnitude pruning with rewinding."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..layouts.base import Layout
from .allocation import Allocation
from .schedule import Cubic, Schedule
from .sparsifier import DenseWeightMethod, Edit, View


@dataclass(frozen=True)
class GradualPruning(DenseWeightMethod):
    """A mask whose sparsity rises by a cubic from 0 at `start` to that of `sten.sparsify` at `stop`.

    Entries off the mask are zero. Mask updates happen every `every` steps and at `stop`; the value of `schedule`, from
    0 to 1, is the fraction of the sparsity that is reached.
    """

    start: int
    stop: int
    every: int = 100
    schedule: Schedule | None = field(default=None, kw_only=True)

    zero_pruned: ClassVar[bool] = True

    def default_schedule(self) -> Schedule:
        return Cubic(0.0, 1.0, self.start, self.stop, self.every, include_stop=True)

    def allocate(self, views: Mapping[str, View], allocation: Allocation) -> dict[str, int]:
        shapes = {name: tuple(view.weight.shape) for name, view in views.items()}
        done = self.schedule.value(next(iter(views.values())).step)
        now = dataclasses.replace(allocation, sparsity=allocation.sparsity * done)
        return now.assign(shapes, lambda name: self.score(views[name]))


@dataclass(frozen=True)
class Gradual(GradualPruning):
    """Prune the smallest |w| step by step: from dense at `start` to sparsify's sparsity at `stop`, by a cubic.

    s(t) = s_final * (1 - (1 - (t - start) / (stop - start))**3), every `every` steps and at `stop`. Pruned weights are
    zero from then on: they are zeroed after every optimizer step, as momentum would change them. With `sten.Global` the
    budget is distributed again at each mask update.

    Source: Zhu and Gupta, To prune, or not to prune, https://arxiv.org/abs/1710.01878, section 3.

    Example:
        >>> import torch, sten
        >>> model = torch.nn.Linear(8, 8)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        >>> method = sten.Gradual(start=1, stop=3, every=1)
        >>> model = sten.sparsify(model, sten.CSR(), method, sparsity=0.75, optimizer=optimizer)
        >>> for step in range(3):
        ...     model(torch.randn(2, 8)).sum().backward()
        ...     optimizer.step()
        ...     print(int((model.weight != 0).sum()))
        64
        22
        16
    """

    def check(self, layout: Layout) -> None:
        super().check(layout)
        if layout.rate is not None:
            raise ValueError(
                f"Expected a layout without a rate of its own for Gradual, which raises the sparsity, got {layout}; "
                "use sten.DecayingMask or sten.SRSTE."
            )

    def apply(self, w: Tensor, view: View) -> Tensor:
        return w * view.mask

    def update(self, view: View) -> Edit:
        if view.mask is None:
            return super().update(view)
        mask = view.layout.mask(self.score(view).masked_fill(~view.mask, -1), view.sparsity)
        fits = view.mask.sum() <= mask.sum()  # it began sparser than the schedule is yet: nothing comes back
        return Edit(mask=torch.where(fits, view.mask, mask))


class Rewind:
    """Iterative magnitude pruning: the sparsities of its rounds, and the weights to return to between them.

    For a loop of your own: each round trains, prunes the same fraction of the remaining weights, and starts again from
    the weights of step `k`, in the new mask. Round r of K has sparsity 1 - (1 - sparsity)**(r / K).

    Source: Frankle et al., Linear Mode Connectivity and the Lottery Ticket Hypothesis, https://arxiv.org/abs/1912.05671

    Example:
        >>> import torch, sten
        >>> model = torch.nn.Linear(16, 16)
        >>> rewind = sten.Rewind(model, sparsity=0.75, rounds=2)   # after the first k steps
        >>> for sparsity in rewind:
        ...     masks = {"weight": sten.CSR().mask(model.weight.detach().abs(), sparsity)}  # ... after training
        ...     rewind.apply(masks)
        >>> int((model.weight == 0).sum())
        192
    """

    def __init__(self, model: nn.Module, sparsity: float, rounds: int) -> None:
        if not 0 < sparsity < 1 or rounds < 1:
            raise ValueError(f"Expected a sparsity between 0 and 1 and rounds >= 1, got {sparsity} and {rounds}.")
        self.model, self.sparsity, self.rounds = model, sparsity, rounds
        self.start = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    def __iter__(self):
        return iter([1 - (1 - self.sparsity) ** (r / self.rounds) for r in range(1, self.rounds + 1)])

    @torch.no_grad()
    def apply(self, masks: dict[str, Tensor]) -> None:
        """Load the first weights again, with zeros off the masks (by name)."""
        if any(mask.dtype != torch.bool for mask in masks.values()):
            raise TypeError("Expected bool masks, where True is an active entry; compare with zero first.")
        state = {name: value * masks[name] if name in masks else value for name, value in self.start.items()}
        self.model.load_state_dict(state)
