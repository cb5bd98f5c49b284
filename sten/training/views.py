"""What a method sees of all weights of an engine at one mask update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from ..sparsifiers import View
from .trained_weight import TrainedWeight

if TYPE_CHECKING:
    from .engine import Engine


class Views(Mapping):
    """The Views of a mask update by name, each made when it is read, so that one weight is dense at a time.

    Attributes:
        moving: the weights whose masks move in this update; the Views of the others say `frozen`.
    """

    def __init__(self, engine: Engine, step: int, optimizer: Optimizer, moving: list[TrainedWeight]) -> None:
        self.engine, self.step, self.optimizer = engine, step, optimizer
        self.weights = {weight.name: weight for weight in engine.weights if weight.param is not None}
        self.moving = set(moving)

    def needed(self, weight: TrainedWeight) -> dict[str, Any]:
        """What the method reads besides the weight; a tensor that did not arrive is None."""
        gradients, needs = self.engine.gradients, self.engine.method.needs
        found = {}
        if "grad" in needs:
            found["grad"] = gradients.gradient(weight)
        if "momentum" in needs:
            found["momentum"] = gradients.momentum(weight, self.optimizer)
        return found

    def of(self, weight: TrainedWeight, count: int | None = None) -> View:
        """The View of one weight, of which `count` entries shall be active."""
        moves = weight in self.moving
        more = {} if count is None else {"sparsity": 1 - count / max(weight.size, 1)}
        more |= self.needed(weight) if moves else {}
        return weight.view(step=self.step, generator=self.engine.generator, frozen=not moves, **more)

    def __getitem__(self, name: str) -> View:
        return self.of(self.weights[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)
