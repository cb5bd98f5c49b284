"""STE, SR-STE, decaying masks: a dense master is trained; the model computes with its n:m entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import scores
from ..layouts import NM
from ..schedule import FOREVER, Constant, Exponential, Linear, Schedule
from .sparsifier import Edit, Sparsifier, State, View


class StraightThrough(torch.autograd.Function):
    """`effective` in the forward pass; its gradient goes to `w` as it is."""

    generate_vmap_rule = True

    @staticmethod
    def forward(w, effective):
        return effective.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def masked(w: Tensor, mask: Tensor) -> Tensor:
    """w * mask, with the gradient of w. A product: masked_fill costs a CPU a missed branch for every other entry."""
    return StraightThrough.apply(w, w.detach() * mask)


class DenseMaster(Sparsifier):
    """What the methods here share: by magnitude, on a dense master."""

    one_shot: ClassVar[bool] = False
    master: ClassVar[bool] = True

    def score(self, view: View) -> Tensor:
        return scores.magnitude(view.weight)

    def chosen(self, view: View) -> Tensor:
        """The mask of the present |w|; the gradient's hook gets the one of the forward pass."""
        if "chosen" not in view.memo:
            view.memo["chosen"] = view.layout.mask(self.score(view), view.sparsity)
        return view.memo["chosen"]

    def shrinking(self, view: View, mask: Tensor) -> Tensor:
        """SR-STE's term, decay * (1 - M) * w."""
        return (~mask).to(view.weight.dtype).mul_(view.weight).mul_(self.decay)  # one new tensor, not three


@dataclass(frozen=True)
class STE(DenseMaster):
    """Compute with the largest |w| of each forward pass, M * w, and give the whole gradient to w.

    Source: Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch,
    https://arxiv.org/abs/2102.04010, section 3.2.

    Example:
        >>> import torch, sten
        >>> model = torch.nn.Linear(8, 4)
        >>> model = sten.sparsify(model, sten.NM(2, 4), sten.STE(), optimizer=torch.optim.SGD(model.parameters(), 0.1))
        >>> int((model.weight != 0).sum()), model.weight.shape
        (16, torch.Size([4, 8]))
    """

    alone: ClassVar[bool] = True

    def apply(self, w: Tensor, view: View, state: State) -> Tensor:
        return masked(w, self.chosen(view))


@dataclass(frozen=True)
class SRSTE(DenseMaster):
    """STE, and the gradient gains decay * (1 - M) * w: what is masked out shrinks, so that masks settle.

    The term is added once an optimizer step, before momentum, on unscaled gradients. Adam, which normalises its steps,
    makes much of a term that never changes sign: take 1e-6 to 1e-5 with it (measured in docs/training.md), or
    `sten.CAST`. Gradient clipping that the loop does has happened before.

    Source: Zhou et al., https://arxiv.org/abs/2102.04010, section 3.3; decay 2e-4 is theirs, for SGD.

    Example:
        >>> import torch, sten
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> model = sten.sparsify(model, sten.NM(2, 4), sten.SRSTE(), optimizer=optimizer)
        >>> sten.finalize(model).weight.density
        0.5
    """

    decay: float = 2e-4

    def apply(self, w: Tensor, view: View, state: State) -> Tensor:
        return masked(w, self.chosen(view))

    def grad(self, view: View, state: State) -> Tensor:
        return self.shrinking(view, self.chosen(view))


@dataclass(frozen=True)
class DecayingMask(DenseMaster):
    """Compute with w * (M + beta * (1 - M)): what is masked out fades away as beta falls from 1 to 0.

    beta is 1 for `dense` of the steps, then exp(-rate * t) or max(0, 1 - rate * t), and 0 for the last `fine_tune` of
    them (an exponential never arrives). The gradient goes to w unchanged, without the factor beta, as in the authors'
    code; whether the paper scales it is UNVERIFIED.

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

    def __post_init__(self) -> None:
        if self.curve not in ("exponential", "linear") or not self.rate > 0:
            raise ValueError(f'DecayingMask takes curve="exponential" or "linear" and rate > 0; got {self}.')
        if not 0 <= self.dense < 1 - self.fine_tune <= 1:
            raise ValueError(f"DecayingMask takes fractions with dense + fine_tune below 1; got {self}.")

    @property
    def beta(self) -> Schedule:
        """The factor of what is masked out, by optimizer steps done."""
        start, stop = int(self.dense * self.total_steps), int((1 - self.fine_tune) * self.total_steps)
        if self.curve == "exponential":
            return Exponential(1.0, 0.0, start, stop, rate=self.rate)
        return Linear(1.0, 0.0, start, min(stop, start + max(round(1 / self.rate), 1)))

    def apply(self, w: Tensor, view: View, state: State) -> Tensor:
        faded = view.weight * self.beta.value(view.step)
        return StraightThrough.apply(w, torch.where(self.chosen(view), view.weight, faded.to(w.dtype)))


@dataclass(frozen=True)
class DecayingStructure(DenseMaster):
    """Hard masks whose structure tightens to n:m over equal frames between a dense phase and a fine-tuning phase.

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

    def __post_init__(self) -> None:
        if self.kind not in ("stepwise", "geometric"):
            raise ValueError(f'DecayingStructure takes kind="stepwise" or "geometric"; got {self.kind!r}.')
        if not 0 <= self.dense < 1 - self.fine_tune <= 1:
            raise ValueError(f"DecayingStructure takes fractions with dense + fine_tune below 1; got {self}.")

    @property
    def ticks(self) -> Schedule:
        return Constant(0.0, start=1, stop=FOREVER, every=1)

    def check(self, layout) -> None:
        if not isinstance(layout, NM):
            raise ValueError(f"DecayingStructure tightens to sten.NM; got {layout}.")

    def frames(self, layout: NM) -> list[NM]:
        """The structures in order; the last is the layout."""
        n, m = layout.n, layout.m
        if self.kind == "geometric":
            return [NM(f * n, f * m) for f in (8, 4, 2, 1)]
        kept = [m - 1, *(m >> i for i in range(1, m.bit_length()) if m >> i > n)]
        return [NM(k, m) for k in dict.fromkeys((*kept, n))]

    def update(self, view: View, state: State) -> Edit:
        frames = self.frames(view.layout)
        start, stop = self.dense * self.total_steps, (1 - self.fine_tune) * self.total_steps
        if view.step < start:
            return Edit(mask=torch.ones_like(view.weight, dtype=torch.bool))
        frame = int((view.step - start) / (stop - start) * len(frames))
        return Edit(mask=frames[min(frame, len(frames) - 1)].mask(self.score(view)))

    def apply(self, w: Tensor, view: View, state: State) -> Tensor:
        return masked(w, view.mask)

    def finish(self, view: View, state: State) -> Edit:
        return Edit(mask=self.chosen(view))
