"""STE and SR-STE: a dense weight is trained, the model computes with its largest entries, the gradient goes to all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .sparsifier import DenseWeightMethod, View


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


def masked_straight_through(w: Tensor, mask: Tensor) -> Tensor:
    """w * mask, whose gradient goes to w whole. A product: masked_fill costs a CPU a missed branch an entry."""
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

    def apply(self, w: Tensor, view: View) -> Tensor:
        return masked_straight_through(w, self.present_mask(view))

    def grad(self, view: View) -> Tensor:
        return pruned_decay(view, self.present_mask(view), self.decay)
