"""Methods that decide once, from the weights alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from . import scores
from .sparsifier import PatternMethod, View


@dataclass(frozen=True)
class Magnitude(PatternMethod):
    """The entries of the largest |w|.

    Example:
        >>> import torch, sten
        >>> model = sten.sparsify(torch.nn.Linear(4, 4), layout=sten.NM(2, 4), sparsifier=sten.Magnitude())
        >>> model.weight.density
        0.5
    """

    def score(self, view: View) -> Tensor:
        return scores.magnitude(view.weight)


@dataclass(frozen=True)
class Random(PatternMethod):
    """Entries drawn uniformly; the same ones for the same seed and name order, on every device.

    Example:
        >>> import torch, sten
        >>> method = sten.Random(seed=1)
        >>> model = sten.sparsify(torch.nn.Linear(4, 4), layout=sten.CSR(), sparsifier=method, sparsity=0.75)
        >>> model.weight.density
        0.25
    """

    seed: int = 0

    def score(self, view: View) -> Tensor:
        return scores.random(view.weight, view.generator)
