"""Allocation: how many active entries each weight gets of a budget for all of them.

The contract, in one line: `assign(shapes, score) -> counts`, by the names of the weights, exact in sum.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layouts.construct import Constructor
from ..layouts.topk import top


@dataclass(frozen=True)
class Allocation(metaclass=Constructor):
    """A sparsity for the whole model, and the rule that distributes it among the weights.

    Attributes:
        sparsity: fraction of entries to drop, 0 to 1, over all chosen weights whose layout has no rate.
    """

    sparsity: float

    def __post_init__(self) -> None:
        if not isinstance(self.sparsity, (int, float)) or not 0 <= self.sparsity <= 1:
            percent = isinstance(self.sparsity, (int, float)) and 1 < self.sparsity <= 100
            hint = f"; for {self.sparsity:g} %, write {self.sparsity / 100:g}" if percent else ""
            raise ValueError(f"Expected a sparsity from 0 to 1, the fraction to drop, got {self.sparsity!r}{hint}.")

    @abstractmethod
    def assign(self, shapes: dict[str, tuple[int, ...]], score: Callable[[str], Tensor]) -> dict[str, int]:
        """How many active entries each weight gets; `score(name)` is called where the rule needs scores."""


@dataclass(frozen=True)
class Uniform(Allocation):
    """round((1 - sparsity) * size) entries of every weight.

    Example:
        >>> import sten
        >>> sten.Uniform(0.75).assign({"a": (4, 4), "b": (2, 4)}, None)
        {'a': 4, 'b': 2}
    """

    def assign(self, shapes, score):
        return {name: round((1 - self.sparsity) * math.prod(shape)) for name, shape in shapes.items()}


@dataclass(frozen=True)
class Global(Allocation):
    """The round((1 - sparsity) * total) highest scores of all weights together, ties by order of the weights.

    `floor` is the least fraction of active entries of every weight, so that no layer collapses.

    Example:
        >>> import torch, sten
        >>> scores = {"a": torch.tensor([[4.0, 3]]), "b": torch.tensor([[2.0, 1]])}
        >>> sten.Global(0.5).assign({"a": (1, 2), "b": (1, 2)}, scores.get)
        {'a': 2, 'b': 0}
    """

    floor: float = 0.0

    def __post_init__(self) -> None:
        Allocation.__post_init__(self)
        if not 0 <= self.floor <= 1:
            raise ValueError(f"Expected a floor from 0 to 1 for Global, got {self.floor}.")

    def assign(self, shapes, score):
        sizes = [math.prod(shape) for shape in shapes.values()]
        floor = min(self.floor, 1 - self.sparsity)
        flat = [score(name).detach().flatten().float() for name in shapes]
        scores = torch.cat([s.masked_fill(top(s, math.floor(floor * len(s))), torch.inf) for s in flat])
        chosen = top(scores, round((1 - self.sparsity) * sum(sizes)))
        return {name: int(part.sum()) for name, part in zip(shapes, chosen.split(sizes), strict=True)}


@dataclass(frozen=True)
class ERK(Allocation):
    """Erdos-Renyi-Kernel: the density of a weight is proportional to sum(shape) / prod(shape).

    Weights whose density would exceed 1 stay dense, and the others get less. The sum is exact: the largest remainders
    of the rounding get one more.

    Source: Evci et al., Rigging the Lottery, 2020, section 3 (1); Mocanu et al., 2018 (for matrices).

    Example:
        >>> import sten
        >>> sten.ERK(0.5).assign({"wide": (16, 16), "narrow": (2, 16)}, None)
        {'wide': 112, 'narrow': 32}
    """

    def assign(self, shapes, score):
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        raw = {name: sum(shape) / max(sizes[name], 1) for name, shape in shapes.items()}
        budget = round((1 - self.sparsity) * sum(sizes.values()))
        dense: set[str] = set()
        while True:
            rest = [name for name in shapes if name not in dense]
            weight = sum(raw[name] * sizes[name] for name in rest)
            scale = (budget - sum(sizes[name] for name in dense)) / weight if weight else 0.0
            full = {name for name in rest if scale * raw[name] > 1}
            if not full:
                break
            highest = max(raw[name] for name in full)
            dense |= {name for name in full if raw[name] == highest}
        exact = {name: float(sizes[name]) if name in dense else scale * raw[name] * sizes[name] for name in shapes}
        return _rounded(exact, budget, sizes)


def proportional(shares: dict[str, float], total: int, caps: dict[str, int]) -> dict[str, int]:
    """`total` entries in proportion to `shares`, none above its cap; what exceeds a cap goes to the others.

    Exact in sum, as far as the caps allow; equal shares where all are zero.

    Source: Dettmers and Zettlemoyer, https://arxiv.org/abs/1907.04840, section 4 (shares are mean momenta).

    Example:
        >>> sten.allocation.proportional({"a": 3.0, "b": 1.0, "c": 0.0}, 8, {"a": 4, "b": 9, "c": 9})
        {'a': 4, 'b': 4, 'c': 0}
    """
    counts, left = dict.fromkeys(shares, 0), min(total, sum(caps.values()))
    while left:
        open_ = [name for name in shares if counts[name] < caps[name]]
        whole = sum(shares[name] for name in open_)
        part = {name: left * (shares[name] / whole if whole > 0 else 1 / len(open_)) for name in open_}
        more = _rounded(part, left, {name: caps[name] - counts[name] for name in open_})
        counts.update({name: counts[name] + more[name] for name in open_})
        left = left - sum(more.values())
    return counts


def _rounded(exact: dict[str, float], budget: int, sizes: dict[str, int]) -> dict[str, int]:
    """Whole numbers near `exact` with the sum `budget`: rounded down, then one more for the largest remainders."""
    counts = {name: min(math.floor(x + 1e-9), sizes[name]) for name, x in exact.items()}
    order = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in order[: budget - sum(counts.values())]:
        counts[name] += counts[name] < sizes[name]
    return counts


def allocation(sparsity: float | Allocation | None) -> Allocation | None:
    """`sparsity=` as users write it: a number means Uniform."""
    if sparsity is None or isinstance(sparsity, Allocation):
        return sparsity
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)):
        raise TypeError(
            "Expected for sparsity= a number from 0 to 1, or sten.Uniform, sten.ERK or sten.Global of one, "
            f"got {sparsity!r}; where weights differ, pass sten.PerWeight."
        )
    return Uniform(sparsity)
