"""Sparse momentum: which entries grow, and how many of each weight, by the momentum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from ..layouts.base import Layout
from . import scores
from .allocation import Allocation, proportional
from .drop_grow import expect_to_act
from .granularity import fill_up, keep_largest
from .schedule import Cosine, Schedule
from .sparsifier import Edit, PatternMethod, View

CAPACITY = 2.0  # slots of a weight, as a multiple of its first count


@dataclass(frozen=True)
class SparseMomentum(PatternMethod):
    """Drop the smallest |w|, distribute their count among the weights by mean |u|, and grow the largest |u| in each.

    u is the direction of the optimizer: SGD's momentum buffer, or m / (sqrt(v) + 1e-8) of Adam. Between mask
    updates everything is compressed, so u of absent entries is gathered from the dense gradients of the 40 steps before
    an update. The total count is exact after every update (the authors correct it in the next one); a weight grows to
    twice its first count at most. A layout with free slots (CSR) has that capacity from the start, so shapes never
    change. New entries start at zero, in the optimizer too. The value of `schedule` is the fraction to drop.

    Source: Dettmers and Zettlemoyer, Sparse Networks from Scratch, https://arxiv.org/abs/1907.04840, section 4; drop
    fraction 0.5 by cosine to 0.005.

    Example:
        >>> import torch, sten
        >>> model = torch.nn.Linear(8, 8)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        >>> method = sten.SparseMomentum(total_steps=1000)
        >>> model = sten.sparsify(model, sten.CSR(), method, sparsity=0.75, optimizer=optimizer)
        >>> [(name, tuple(p.shape)) for name, p in model.named_parameters()]
        [('weight', (32, 1)), ('bias', (8,))]
    """

    total_steps: int
    drop_fraction: float = 0.5
    every: int = 100
    seed: int = 0
    schedule: Schedule | None = field(default=None, kw_only=True)

    needs: ClassVar[frozenset[str]] = frozenset({"momentum"})
    capacity: ClassVar[float] = CAPACITY

    def __post_init__(self) -> None:
        if self.schedule is None:
            expect_to_act(self, 1.0)
        super().__post_init__()

    def default_schedule(self) -> Schedule:
        return Cosine(self.drop_fraction, 0.005, 0, self.total_steps, self.every)

    def check(self, layout: Layout) -> None:
        super().check(layout)
        if not layout.unstructured:
            raise ValueError(
                "Expected an unstructured layout for SparseMomentum, which moves entries between weights, "
                f"got {layout}; use sten.CSR or sten.Masked."
            )

    def score(self, view: View) -> Tensor:
        return scores.random(view.weight, view.generator)

    def dropped(self, view: View) -> float:
        """The fraction of a weight that is dropped; of a nearly dense one no more than can grow."""
        fraction, sparsity = self.schedule.value(view.step), 1 - float(view.mask.float().mean())
        return min(fraction, sparsity) if sparsity < 0.2 else fraction

    def allocate(self, views: Mapping[str, View], allocation: Allocation | None) -> dict[str, int]:
        share, stay, free, total = {}, {}, {}, 0
        for name, view in views.items():
            if view.frozen:
                continue
            count, size = int(view.mask.sum()), view.mask.numel()
            stay[name] = count - int(self.dropped(view) * count)
            share[name] = float(view.momentum.abs()[view.mask].mean()) if count else 0.0
            most = min(round(self.capacity * (1 - view.sparsity) * size), stay[name] + int(0.99 * (size - stay[name])))
            free[name] = max(most - stay[name], 0)
            total += count - stay[name]
        grown = proportional(share, total, free)
        return {name: stay[name] + grown[name] for name in stay}

    def update(self, view: View) -> Edit:
        if view.mask is None:
            return super().update(view)  # the first pattern, at random
        return Edit(mask=fill_up(view, keep_largest(view, self.dropped(view)), view.momentum.abs()))
