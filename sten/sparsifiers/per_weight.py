"""PerWeight: a sparsity for each weight by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from .allocation import Allocation, Uniform


@dataclass(frozen=True)
class PerWeight(Allocation):
    """round((1 - s) * size) entries of each weight, with s by its name, as `sten.sensitivity` finds them.

    Args:
        sparsities: {name of the weight: fraction of entries to drop}; further names do no harm.

    Raises:
        ValueError: a number that is no fraction, or, at `sten.sparsify`, a weight without a number.

    Example:
        >>> import torch, sten
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        >>> model = sten.sparsify(model, sten.CSR(), sparsity=sten.PerWeight({"0.weight": 0.5, "1.weight": 0.75}))
        >>> model[0].weight.density, model[1].weight.density
        (0.5, 0.25)
    """

    sparsity: float = field(init=False, repr=False, default=0.0)
    sparsities: Mapping[str, float] | tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        given = self.sparsities.items() if isinstance(self.sparsities, Mapping) else self.sparsities
        pairs = tuple((str(name), float(Uniform(s).sparsity)) for name, s in given)
        object.__setattr__(self, "sparsities", pairs)

    def assign(self, shapes, score):
        known = dict(self.sparsities)
        missing = [name for name in shapes if name not in known]
        if missing:
            raise ValueError(
                f"Expected a sparsity for {missing[0]} in sten.PerWeight, got none; add it, or leave the weight out "
                "with weights=."
            )
        return {name: round((1 - known[name]) * math.prod(shape)) for name, shape in shapes.items()}
