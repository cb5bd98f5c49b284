"""STE and SR-STE: a dense weight is trained, the model computes with its largest entries, all get the gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .sparsifier import DenseWeightMethod, View


class StraightThrough(torch.autograd.Function):
    """`effective` in the forward pass; its gradient is that of `w`."""

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


def masked_straight_through(w: Tensor, mask: Tensor) -> Tensor:
    """w * mask with a straight-through gradient. A product, which is faster on a CPU than masked_fill."""
    return StraightThrough.apply(w, w.detach() * mask)


def pruned_decay(view: View, mask: Tensor, decay: float) -> Tensor:
    """SR-STE's term, decay * (1 - M) * w."""
    return (~mask).to(view.weight.dtype).mul_(view.weight).mul_(decay)  # one new tensor, not three


@dataclass(frozen=True)
class STE(DenseWeightMethod):
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

    stateless: ClassVar[bool] = True

    def apply(self, w: Tensor, view: View) -> Tensor:
        return masked_straight_through(w, self.present_mask(view))


@dataclass(frozen=True)
class SRSTE(DenseWeightMethod):
    """STE with decay * (1 - M) * w added to the gradient: entries off the mask shrink, so that masks stabilize.

    The term is added once an optimizer step, before momentum, to unscaled gradients, after the loop's clipping. Adam,
    which normalizes its steps, amplifies a term that never changes sign: take 1e-6 to 1e-5 with it (measured in
    docs/training.md), or `sten.CAST`.

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

    def apply(self, w: Tensor, view: View) -> Tensor:
        return masked_straight_through(w, self.present_mask(view))

    def grad(self, view: View) -> Tensor:
        return pruned_decay(view, self.present_mask(view), self.decay)
