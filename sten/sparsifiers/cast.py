"""CAST: dense training; an adaptive L1 decay drives pruned entries to zero, and trained scales restore the norm."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from .schedule import Constant, Schedule
from .sparsifier import DenseWeightMethod, Edit, State, View


@dataclass(frozen=True)
class CAST(DenseWeightMethod):
    """Continuous, adaptive sparse training: train with `sten.optim.AdamS` and add `sten.distill_loss` to the loop.

    The model computes densely, with A * w: A (rows, groups), trained from ones, scales contiguous blocks of columns.
    Every `refresh` steps the mask is the layout's of |w|; AdamS decays pruned entries, with strength
    decay * t / total_steps. `sten.finalize` masks, and multiplies A into the weight. The decay should be of the
    gradient's order of magnitude; an entry can move by sum_t lr_t * t / total_steps: compare that with typical |w|.

    Source: Huang et al., CAST: Continuous and Differentiable Semi-Structured Sparsity-Aware Training for Large Language
    Models, https://arxiv.org/abs/2509.25996, algorithm 1 and equations 11-13, read through a reproduction's citations.
    UNVERIFIED: the contiguous blocks, which tensors, betas, the learning rate's schedule. decay 4e-7 and refresh 10 are
    cited for a 7B model.

    Example:
        >>> import torch, sten
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = sten.optim.AdamS(model.parameters(), lr=1e-3)
        >>> model = sten.sparsify(model, sten.NM(2, 4), sten.CAST(total_steps=100, decay=1e-2), optimizer=optimizer)
        >>> model(torch.ones(1, 8)).sum().backward()
        >>> optimizer.step()
        >>> sten.finalize(model).weight.density
        0.5
    """

    total_steps: int
    decay: float = 4e-7
    refresh: int = 10
    groups: int = 2
    schedule: Schedule | None = field(default=None, kw_only=True)

    optimizer: ClassVar[str | None] = "AdamS"

    def default_schedule(self) -> Schedule:
        return Constant(0.0, start=self.refresh, every=self.refresh)

    def init(self, view: View) -> State:
        return {"scale": nn.Parameter(view.weight.new_ones(len(view.weight), self.groups))}

    def update(self, view: View) -> Edit:
        return Edit(mask=self.present_mask(view))

    def apply(self, w: Tensor, view: View) -> Tensor:
        columns = w[0].numel()
        scale = view.state["scale"].repeat_interleave(-(-columns // self.groups), 1)[:, :columns]
        return scale.reshape(w.shape) * w

    def strength(self, step: int) -> tuple[float, float]:
        """For AdamS: the decay, and the value of its ramp after `step` steps."""
        return self.decay, min(step / self.total_steps, 1.0)

    def finish(self, view: View) -> Edit:
        return Edit(mask=self.present_mask(view), value=self.apply(view.weight, view).detach())
