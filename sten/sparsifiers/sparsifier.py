"""Sparsifier: which entries of a weight live.

Methods decide, the engine acts: a sparsifier reads a `View` and answers with an `Edit`; it changes nothing itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..layout import Layout


@dataclass(frozen=True)
class View:
    """What a sparsifier may read of one weight.

    Attributes:
        name: full name of the parameter.
        weight: dense, detached, in the orientation of the layout (a transposed weight is already turned).
        layout: how the weight is, or will be, stored.
        sparsity: the fraction to drop that the allocation gave this weight; None where the layout fixes it.
        mask: bool mask of the entries that live now; None before the first.
        step: optimizer steps done.
        generator: random numbers, the same on every rank.
        grad, momentum, stats: what the sparsifier's `needs` asked for; None otherwise.
    """

    name: str
    weight: Tensor
    layout: Layout
    sparsity: float | None = None
    mask: Tensor | None = None
    step: int = 0
    generator: torch.Generator | None = None
    grad: Tensor | None = None
    momentum: Tensor | None = None
    stats: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Edit:
    """What a sparsifier decided for one weight; None leaves a thing as it is.

    Attributes:
        mask: bool, which entries live from now on.
        value: dense, new values of the weight.
        fresh: bool, entries whose weight and every optimizer slot become zero.
        state: the method's new state.
    """

    mask: Tensor | None = None
    value: Tensor | None = None
    fresh: Tensor | None = None
    state: dict[str, Any] | None = None


class Sparsifier(ABC):
    """Decides which entries live. A one-shot method defines `score` alone.

    Attributes:
        needs: what its View must hold, of {"grad", "momentum", "x_norm", "x_gram", "x_mean_var"}.
        one_shot: whether it acts once, at `sten.sparsify`, or during training.
        seed: of the random numbers in its View.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    one_shot: ClassVar[bool] = True
    seed = 0

    @abstractmethod
    def score(self, view: View) -> Tensor:
        """Importance of each entry, in the weight's shape; higher is better, ties go to the lower index."""

    def update(self, view: View, state: dict[str, Any]) -> Edit:
        """The decision: by default the highest scores that the layout can hold at the view's sparsity."""
        return Edit(mask=view.layout.mask(self.score(view), view.sparsity))
