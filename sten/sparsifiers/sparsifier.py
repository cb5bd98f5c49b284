"""Sparsifier: which entries of a weight live.

Methods decide, the engine acts: a sparsifier reads a `View` and answers with an `Edit`; it changes nothing itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..allocation import Allocation
from ..layout import Layout
from ..schedule import Schedule

State = dict[str, Tensor]


@dataclass(frozen=True)
class View:
    """What a sparsifier may read of one weight.

    Attributes:
        name: full name of the parameter.
        weight: dense, detached, in the orientation of the layout (a transposed weight is already turned).
        layout: how the weight is, or will be, stored.
        sparsity: the fraction to drop that the allocation gave this weight; None where the layout fixes it.
        mask: bool mask of the entries that live now; None before the first.
        step: optimizer steps, the present one included; in `apply` a 0-d tensor with the steps done.
        generator: random numbers, the same on every rank.
        grad, momentum, stats: what the sparsifier's `needs` asked for; None otherwise.
        last: whether it is the last of the chosen weights, mostly the classifier.
        memo: what a method works out once about this very weight; `dataclasses.replace` starts an empty one.
    """

    name: str
    weight: Tensor
    layout: Layout
    sparsity: float | None = None
    mask: Tensor | None = None
    step: int | Tensor = 0
    generator: torch.Generator | None = None
    grad: Tensor | None = None
    momentum: Tensor | None = None
    stats: dict[str, Tensor] = field(default_factory=dict)
    last: bool = False
    memo: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)


@dataclass(frozen=True)
class Edit:
    """What a sparsifier decided for one weight; None leaves a thing as it is.

    Attributes:
        mask: bool, which entries live from now on. Entries that did not live before start at zero, in the weight and in
            every optimizer slot.
        value: dense, new values of the weight, also where entries are new.
        fresh: bool, further entries whose weight and every optimizer slot become zero.
        state: the method's new state.
    """

    mask: Tensor | None = None
    value: Tensor | None = None
    fresh: Tensor | None = None
    state: State | None = None


class Sparsifier(ABC):
    """Decides which entries live. A one-shot method defines `score` alone; a dynamic one says `one_shot = False`.

    A dynamic method has one of two forms. With `master = False` the trained Parameter is what the layout stores, and
    `update` moves the pattern (SET, RigL). With `master = True` the dense Parameter stays, and `apply` says what the
    model computes with (SR-STE, Gradual).

    Attributes:
        needs: what its View must hold on ticks, of {"grad", "momentum"}; calibration: {"x_norm", "x_gram",
        "x_mean_var"}.
        one_shot: whether it acts once, at `sten.sparsify`, or during training.
        master: the form, as above.
        hard: of a master: whether entries off the mask are zero in the master itself, after every step.
        replaces_step: whether a tick takes the place of the optimizer step (RigL) or follows it.
        ranks_only: whether only the order of |grad| matters; then the engine frees each dense gradient at once.
        alone: whether nothing happens around steps (STE), so that no engine is missed.
        resizes: whether ticks change the shapes of compressed weights (SRigL), which DDP cannot follow.
        optimizer: name of the optimizer class that the method is defined for; None: any.
        capacity: slots of a compressed weight as a multiple of its first count, where `allocate` moves counts (CSR).
        seed: of the random numbers in its View.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    one_shot: ClassVar[bool] = True
    master: ClassVar[bool] = False
    hard: ClassVar[bool] = False
    replaces_step: ClassVar[bool] = False
    ranks_only: ClassVar[bool] = False
    alone: ClassVar[bool] = False
    resizes: ClassVar[bool] = False
    optimizer: ClassVar[str | None] = None
    capacity: ClassVar[float] = 1.0
    seed = 0

    @property
    def ticks(self) -> Schedule | None:
        """When `update` is asked; None: never."""
        return None

    def check(self, layout: Layout) -> None:
        """Raise ValueError, in one sentence, if a weight in this layout cannot be trained so."""
        del layout

    def init(self, view: View) -> State:
        """Tensors that go with a weight, saved and resumed with the run; an nn.Parameter among them is trained."""
        del view
        return {}

    @abstractmethod
    def score(self, view: View) -> Tensor:
        """Importance of each entry, in the weight's shape; higher is better, ties go to the lower index."""

    def apply(self, w: Tensor, view: View, state: State) -> Tensor:
        """The weight that the model computes with, differentiable; of a master only."""
        del view, state
        return w

    def grad(self, view: View, state: State) -> Tensor | None:
        """What to add to the gradient of a master, once an optimizer step, on unscaled gradients; None: nothing."""
        del view, state
        return None

    def allocate(self, views: Mapping[str, View], spread: Allocation | None) -> dict[str, int] | None:
        """How many entries of each weight live after this tick, where counts move; None: as many as now."""
        del views, spread
        return None

    def update(self, view: View, state: State) -> Edit:
        """The decision of a tick: by default the highest scores that the layout can hold at the view's sparsity."""
        del state
        return Edit(mask=view.layout.mask(self.score(view), view.sparsity))

    def finish(self, view: View, state: State) -> Edit:
        """The end of training: mask and value of what is stored; of a master only."""
        if self.hard:
            return Edit(mask=view.mask)
        return self.update(view, state)
