"""Static, SET, RigL, DST-EE: sparse in every step; mask updates drop small weights and grow others."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..layouts.base import Layout
from . import scores
from .granularity import expect_independent_units, fill_up, keep_largest
from .schedule import Constant, Cosine, Schedule
from .sparsifier import Edit, PatternMethod, Sparsifier, State, View


@dataclass(frozen=True)
class Static(PatternMethod):
    """A random, fixed pattern: the baseline of dynamic methods. Use `sparsity=sten.ERK(...)`.

    Source: Mocanu et al., https://arxiv.org/abs/1707.04780 (the random initialisation of SET).

    Example:
        >>> import torch, sten
        >>> model = sten.sparsify(torch.nn.Linear(8, 8), layout=sten.CSR(), sparsifier=sten.Static(), sparsity=0.75)
        >>> model.weight.density
        0.25
    """

    seed: int = 0

    def score(self, view: View) -> Tensor:
        return scores.random(view.weight, view.generator)


def expect_to_act(method: Sparsifier, stop: float) -> None:
    """Raise ValueError if no mask update falls into the first `stop` of the method's total_steps."""
    most, kind = int(stop * method.total_steps), type(method).__name__
    if not 1 <= method.every <= most:
        hint = f"pass every={max(most // 10, 1)}, say" if most >= 1 else "raise total_steps"
        steps = f"{stop:g} * {method.total_steps} steps"
        raise ValueError(f"Expected a mask update of {kind} in {steps}, got every={method.every}: {hint}.")


@dataclass(frozen=True)
class DropGrow(PatternMethod):
    """Every `every` steps, drop a fraction of the active entries, those of smallest |w|, and grow as many elsewhere.

    A weight's count of active entries does not change. New entries start at zero, in the weight and in every optimizer
    slot. Layouts of blocks or vectors drop and grow whole ones, by the means of their scores.

    Attributes:
        total_steps: optimizer steps of the whole training.
        drop_fraction: the fraction to drop at the start.
        every: steps between two mask updates.
        stop: the last mask update, as a fraction of total_steps.
        schedule: the steps of mask updates; its value is the fraction to drop. None: made of the fields above.
    """

    total_steps: int
    drop_fraction: float = 0.3
    every: int = 100
    stop: float = 1.0
    seed: int = 0
    schedule: Schedule | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not 0 < self.drop_fraction <= 1 or not 0 < self.stop <= 1:
            raise ValueError(f"Expected drop_fraction and stop between 0 and 1 for {type(self).__name__}, got {self}.")
        if self.schedule is None:
            expect_to_act(self, self.stop)
        super().__post_init__()

    def default_schedule(self) -> Schedule:
        return Cosine(self.drop_fraction, 0.0, 0, int(self.stop * self.total_steps), self.every)

    def check(self, layout: Layout) -> None:
        super().check(layout)
        expect_independent_units(layout)

    def score(self, view: View) -> Tensor:
        return scores.random(view.weight, view.generator)

    @abstractmethod
    def growth(self, view: View) -> Tensor:
        """The score by which entries grow; entries that stay are not read."""

    def update(self, view: View) -> Edit:
        if view.mask is None:
            return super().update(view)  # the first pattern, at random
        keep = keep_largest(view, self.schedule.value(view.step))
        return Edit(mask=fill_up(view, keep, self.growth(view)))


@dataclass(frozen=True)
class SET(DropGrow):
    """Sparse evolutionary training: grow at random, a constant fraction each time, after the optimizer step.

    Source: Mocanu et al., https://arxiv.org/abs/1707.04780, section "SET"; drop_fraction 0.3 is theirs (zeta).

    Example:
        >>> import torch, sten
        >>> model = torch.nn.Linear(8, 8)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> method = sten.SET(total_steps=100, every=10)
        >>> model = sten.sparsify(model, sten.CSR(), method, sparsity=0.75, optimizer=optimizer)
        >>> model.weight.density
        0.25
    """

    def default_schedule(self) -> Schedule:
        return Constant(self.drop_fraction, start=self.every, stop=int(self.stop * self.total_steps), every=self.every)

    def growth(self, view: View) -> Tensor:
        score = scores.random(view.weight, view.generator, portable=False)  # the engine shares rank 0's masks
        return score.masked_fill(view.mask, -1)  # entries that were just dropped come last


@dataclass(frozen=True)
class RigL(DropGrow):
    """Rigged lottery: grow where the dense gradient is largest. A mask update takes the place of the optimizer step.

    Entries that were just dropped may grow at once; then value and optimizer slots do not change.

    Source: Evci et al., https://arxiv.org/abs/1911.11134, section 3 (drop fraction by cosine until 75 % of training).

    Example:
        >>> import torch, sten
        >>> model = torch.nn.Linear(8, 8)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> method = sten.RigL(total_steps=1000)
        >>> model = sten.sparsify(model, sten.CSR(), method, sparsity=sten.ERK(0.75), optimizer=optimizer)
        >>> [step for step in range(1, 1000) if method.schedule.due(step)]
        [100, 200, 300, 400, 500, 600, 700]
    """

    stop: float = 0.75

    needs: ClassVar[frozenset[str]] = frozenset({"grad"})
    replaces_step: ClassVar[bool] = True
    ranks_only: ClassVar[bool] = True

    def growth(self, view: View) -> Tensor:
        return view.grad.abs()


@dataclass(frozen=True)
class DSTEE(DropGrow):
    """RigL with exploration: growth |g| + c * ln(t) / (N + eps), N = mask updates after which it was active.

    Source: Huang et al., Dynamic Sparse Training via Balancing the Exploration-Exploitation Trade-off,
    https://arxiv.org/abs/2211.16667. UNVERIFIED: the formula's constants c and eps.

    Example:
        >>> import sten
        >>> sten.DSTEE(total_steps=1000).schedule.every
        100
    """

    stop: float = 0.75
    c: float = 1e-3
    eps: float = 1.0

    needs: ClassVar[frozenset[str]] = frozenset({"grad"})
    replaces_step: ClassVar[bool] = True

    def init(self, view: View) -> State:
        return {"lived": view.mask.to(torch.int32)}

    def growth(self, view: View) -> Tensor:
        return view.grad.abs() + self.c * math.log(view.step) / (view.state["lived"] + self.eps)

    def update(self, view: View) -> Edit:
        edit = super().update(view)
        if view.mask is None:
            return edit
        return Edit(mask=edit.mask, state={"lived": view.state["lived"] + edit.mask})
