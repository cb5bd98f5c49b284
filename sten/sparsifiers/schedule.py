"""Schedule: the steps of mask updates, and a value at each step.

The contract, in one line: `due(step) -> bool` and `value(step) -> float`. A step is counted from 1, the first call of
`optimizer.step()`; 0 is the state before it. `value` also takes a 0-d tensor and then returns one, so that
compiled models do not recompile at each step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

FOREVER = 2**62


@dataclass(frozen=True)
class Schedule(ABC):
    """Every `every` steps from `start` to `stop`, both included, with a value that goes from one number to another.

    Before `start` the value is `initial_value`, after `stop` it is `final_value`. With `include_stop`, the step `stop`
    itself is always due, so that `final_value` is reached where `every` does not divide the length.

    Raises:
        ValueError: stop before start, or every below 1.

    Example:
        >>> import sten
        >>> plan = sten.schedule.Linear(0.0, 1.0, start=10, stop=20, every=4, include_stop=True)
        >>> [step for step in range(30) if plan.due(step)], plan.value(15)
        ([10, 14, 18, 20], 0.5)
    """

    initial_value: float
    final_value: float
    start: int = 0
    stop: int = FOREVER
    every: int = 1
    include_stop: bool = False

    def __post_init__(self) -> None:
        whole = all(isinstance(x, int) and not isinstance(x, bool) for x in (self.start, self.stop, self.every))
        if not whole or not 0 <= self.start <= self.stop or self.every < 1:
            raise ValueError(
                f"Expected whole numbers 0 <= start <= stop and every >= 1 for {type(self).__name__}, "
                f"got start={self.start}, stop={self.stop}, every={self.every}."
            )

    def due(self, step: int) -> bool:
        """Whether a mask update happens at this step."""
        inside = self.start <= step <= self.stop
        return inside and ((step - self.start) % self.every == 0 or (self.include_stop and step == self.stop))

    def value(self, step: int | Tensor) -> float | Tensor:
        """The number at this step."""
        length = max(self.stop - self.start, 1)
        part = (step - self.start) / length
        part = part.clamp(0, 1) if isinstance(step, Tensor) else min(max(part, 0.0), 1.0)
        return self.initial_value + (self.final_value - self.initial_value) * self.curve(part)

    @abstractmethod
    def curve(self, part: float | Tensor) -> float | Tensor:
        """The fraction of the way to `final_value`, 0 to 1, after the fraction `part` of the time."""


@dataclass(frozen=True)
class Linear(Schedule):
    """A straight line.

    Example:
        >>> import sten
        >>> sten.schedule.Linear(1.0, 0.0, stop=4).value(1)
        0.75
    """

    def curve(self, part):
        return part


@dataclass(frozen=True)
class Cubic(Schedule):
    """final + (initial - final) * (1 - part)**3: fast at the start, slow at the end.

    Source: Zhu and Gupta, To prune, or not to prune, https://arxiv.org/abs/1710.01878, section 3.

    Example:
        >>> import sten
        >>> [sten.schedule.Cubic(0.0, 0.8, stop=2).value(step) for step in (0, 1, 2)]
        [0.0, 0.7000000000000001, 0.8]
    """

    def curve(self, part):
        return 1 - (1 - part) ** 3


@dataclass(frozen=True)
class Cosine(Schedule):
    """final + (initial - final) / 2 * (1 + cos(pi * part)).

    Source: Evci et al., Rigging the Lottery, https://arxiv.org/abs/1911.11134, section 3 (2), with final = 0.

    Example:
        >>> import sten
        >>> round(sten.schedule.Cosine(0.5, 0.0, stop=2).value(1), 6)
        0.25
    """

    def curve(self, part):
        cosine = torch.cos(math.pi * part) if isinstance(part, Tensor) else math.cos(math.pi * part)
        return (1 - cosine) / 2


@dataclass(frozen=True)
class Constant(Schedule):
    """The same number at every step; `Constant(0.3, every=100)`.

    Example:
        >>> import sten
        >>> sten.schedule.Constant(0.3, every=100).value(7)
        0.3
    """

    final_value: float = 0.0

    def value(self, step: int | Tensor) -> float:
        return self.initial_value

    def curve(self, part):
        return 0.0 * part


@dataclass(frozen=True)
class Exponential(Schedule):
    """initial * exp(-rate * (step - start)), and exactly `final_value` from `stop` on.

    Example:
        >>> import sten
        >>> plan = sten.schedule.Exponential(1.0, 0.0, stop=100, rate=0.5)
        >>> round(plan.value(2), 4), plan.value(100)
        (0.3679, 0.0)
    """

    rate: float = 1.0

    def value(self, step):
        if isinstance(step, Tensor):
            past = (step - self.start).clamp(min=0)
            return torch.where(step >= self.stop, self.final_value, self.initial_value * torch.exp(-self.rate * past))
        past = max(step - self.start, 0)
        return self.final_value if step >= self.stop else self.initial_value * math.exp(-self.rate * past)

    def curve(self, part):
        return part
