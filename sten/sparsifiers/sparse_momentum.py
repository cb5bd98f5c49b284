"""Sparse momentum: the momentum says which weights, and how many of each layer, grow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .. import scores
from ..allocation import Allocation, proportional
from ..layout import Layout
from ..layouts import CSR, Masked
from ..schedule import Cosine, Schedule
from .drop_grow import expect_to_act
from .sparsifier import Edit, Sparsifier, State, View
from .units import fill_up, keep_largest

CAPACITY = 2.0  # slots of a weight, as a multiple of its first count


@dataclass(frozen=True)
class SparseMomentum(Sparsifier):
    """Drop the smallest |w|, share what was dropped among the weights by their mean |u|, grow the largest |u| in each.

    u is the direction of the optimizer: SGD's momentum buffer, or m / (sqrt(v) + 1e-8) of Adam. Between ticks
    everything is compressed, so u of entries that do not live is gathered from the dense gradients of the 40 steps
    before a tick. The total count is exact at every tick (the authors correct it from tick to tick instead); a weight
    grows to twice its first count at most, its fixed capacity, so shapes never change. New entries start at zero, in
    the optimizer too.

    Source: Dettmers and Zettlemoyer, Sparse Networks from Scratch, https://arxiv.org/abs/1907.04840, section 4; drop
    fraction 0.5 by cosine to 0.005.

    Example:
        >>> import torch, sten
        >>> model = torch.nn.Linear(8, 8)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        >>> method = sten.SparseMomentum(total_steps=1000)
        >>> model = sten.sparsify(model, sten.CSR(), method, sparsity=0.75, optimizer=optimizer)
        >>> [(name, tuple(p.shape)) for name, p in model.named_parameters()]
        [('bias', (8,)), ('sparse_weight.values', (32,))]
    """

    total_steps: int
    drop_fraction: float = 0.5
    every: int = 100
    seed: int = 0

    one_shot: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"momentum"})
    capacity: ClassVar[float] = CAPACITY

    def __post_init__(self) -> None:
        expect_to_act(self, 1.0)

    @property
    def ticks(self) -> Schedule:
        return Cosine(self.drop_fraction, 0.005, 0, self.total_steps, self.every)

    def check(self, layout: Layout) -> None:
        if not isinstance(layout, (CSR, Masked)):
            raise ValueError(
                f"SparseMomentum moves entries between weights; {layout} cannot: use sten.CSR or sten.Masked."
            )

    def score(self, view: View) -> Tensor:
        return scores.random(view.weight, view.generator)

    def dropped(self, view: View) -> float:
        """The fraction of a weight that is dropped; a nearly dense one drops no more than it lacks."""
        fraction, sparsity = self.ticks.value(view.step), 1 - float(view.mask.float().mean())
        return min(fraction, sparsity) if sparsity < 0.2 else fraction

    def allocate(self, views: Mapping[str, View], spread: Allocation | None) -> dict[str, int]:
        share, stay, room = {}, {}, {}
        for name, view in views.items():
            count, size = int(view.mask.sum()), view.mask.numel()
            stay[name] = count - int(self.dropped(view) * count)
            share[name] = float(view.momentum.abs()[view.mask].mean()) if count else 0.0
            most = min(round(self.capacity * (1 - view.sparsity) * size), stay[name] + int(0.99 * (size - stay[name])))
            room[name] = max(most - stay[name], 0)
        total = sum(int(view.mask.sum()) for view in views.values()) - sum(stay.values())
        grown = proportional(share, total, room)
        return {name: stay[name] + grown[name] for name in stay}

    def update(self, view: View, state: State) -> Edit:
        return Edit(mask=fill_up(view, keep_largest(view, self.dropped(view)), view.momentum.abs()))
