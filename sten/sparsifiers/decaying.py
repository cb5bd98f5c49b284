"""DecayingMask and DecayingStructure: from dense to n:m, by a decaying factor or by tighter masks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..layouts import NM
from ..layouts.base import Layout
from .schedule import Constant, Exponential, Linear, Schedule
from .sparsifier import DenseWeightMethod, Edit, View
from .straight_through import StraightThrough, masked_straight_through


def expect_fractions(method: DecayingMask | DecayingStructure) -> None:
    """Raise ValueError unless there are steps between the dense and the fine-tuning phase."""
    if not 0 <= method.dense < 1 - method.fine_tune <= 1:
        kind = type(method).__name__
        raise ValueError(f"Expected fractions with dense + fine_tune below 1 for {kind}, got {method}.")


@dataclass(frozen=True)
class DecayingMask(DenseWeightMethod):
    """Compute with w * (M + beta * (1 - M)), where beta falls from 1 to 0.

    beta is 1 for the first `dense` of the steps, then exp(-rate * t) or max(0, 1 - rate * t), and 0 for the last
    `fine_tune` of them. The gradient of w is without the factor beta, as in the authors' code; whether the paper scales
    it is UNVERIFIED.

    Attributes:
        beta: the factor of entries off the mask, by optimizer steps done; made of the other fields.

    Source: Bambhaniya et al., Progressive Gradient Flow for Robust N:M Sparsity Training,
    https://arxiv.org/abs/2402.04744, section 4 (MdGf-Linear, MdGf-Exponential).

    Example:
        >>> import sten
        >>> beta = sten.DecayingMask(total_steps=1000, rate=0.01).beta
        >>> beta.value(0), round(beta.value(100), 3), beta.value(900)
        (1.0, 0.368, 0.0)
    """

    total_steps: int
    rate: float = 2e-4
    curve: str = "exponential"
    dense: float = 0.0
    fine_tune: float = 0.1
    beta: Schedule = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.curve not in ("exponential", "linear") or not self.rate > 0:
            raise ValueError(f'Expected curve="exponential" or "linear" and rate > 0 for DecayingMask, got {self}.')
        expect_fractions(self)
        start, stop = int(self.dense * self.total_steps), int((1 - self.fine_tune) * self.total_steps)
        if self.curve == "exponential":
            beta = Exponential(1.0, 0.0, start, stop, rate=self.rate)
        else:
            beta = Linear(1.0, 0.0, start, min(stop, start + max(round(1 / self.rate), 1)))
        object.__setattr__(self, "beta", beta)
        super().__post_init__()

    def apply(self, w: Tensor, view: View) -> Tensor:
        faded = view.weight * self.beta.value(view.step)
        return StraightThrough.apply(w, torch.where(self.present_mask(view), view.weight, faded.to(w.dtype)))


@dataclass(frozen=True)
class DecayingStructure(DenseWeightMethod):
    """Masks whose structure tightens to n:m over equal frames between a dense phase and a fine-tuning phase.

    kind "stepwise": m-1:m, m/2:m, m/4:m, ..., n:m. kind "geometric": 8n:8m, 4n:4m, 2n:2m, n:m.

    Source: Bambhaniya et al., https://arxiv.org/abs/2402.04744, section 4 (SdGf-Stepwise, SdGf-Geometric).

    Example:
        >>> import sten
        >>> [str(frame) for frame in sten.DecayingStructure(total_steps=100).frames(sten.NM(1, 8))]
        ['NM(n=7, m=8)', 'NM(n=4, m=8)', 'NM(n=2, m=8)', 'NM(n=1, m=8)']
    """

    total_steps: int
    kind: str = "stepwise"
    dense: float = 0.0
    fine_tune: float = 0.1
    schedule: Schedule | None = field(default=None, kw_only=True)

    layouts: ClassVar[tuple[type[Layout], ...]] = (NM,)

    def __post_init__(self) -> None:
        if self.kind not in ("stepwise", "geometric"):
            raise ValueError(f'Expected kind="stepwise" or "geometric" for DecayingStructure, got {self.kind!r}.')
        expect_fractions(self)
        super().__post_init__()

    def default_schedule(self) -> Schedule:
        return Constant(0.0, start=1)

    def frames(self, layout: NM) -> list[NM]:
        """The structures in order; the last is the layout."""
        n, m = layout.n, layout.m
        if self.kind == "geometric":
            return [NM(f * n, f * m) for f in (8, 4, 2, 1)]
        counts = [m - 1, *(m >> i for i in range(1, m.bit_length()) if m >> i > n)]
        return [NM(count, m) for count in dict.fromkeys((*counts, n))]

    def update(self, view: View) -> Edit:
        frames = self.frames(view.layout)
        start, stop = self.dense * self.total_steps, (1 - self.fine_tune) * self.total_steps
        if view.step < start:
            return Edit(mask=torch.ones_like(view.weight, dtype=torch.bool))
        frame = int((view.step - start) / (stop - start) * len(frames))
        return Edit(mask=frames[min(frame, len(frames) - 1)].mask(self.score(view)))

    def apply(self, w: Tensor, view: View) -> Tensor:
        return masked_straight_through(w, view.mask)

    def finish(self, view: View) -> Edit:
        return Edit(mask=self.present_mask(view))
