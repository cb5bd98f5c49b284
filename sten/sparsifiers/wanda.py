"""Wanda: weights times activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .calibration import mask_by_row, wanda_score
from .sparsifier import Edit, PatternMethod, View

ROW, LAYER = "row", "layer"


@dataclass(frozen=True)
class Wanda(PatternMethod):
    """The entries of the largest |w_ij| * ||x_j||, where ||x_j|| is the root mean square of input j in calibration.

    In a layout that takes any mask, entries are compared within each output (`per="row"`), or over the whole weight
    (`per="layer"`); other layouts compare what they choose from, with the mean score of a block or the sum of a vector.

    Source: Sun et al., A Simple and Effective Pruning Approach for Large Language Models,
    https://arxiv.org/abs/2306.11695, section 3.

    Example:
        >>> import torch, sten
        >>> stats = {"x_norm": torch.tensor([1.0, 9.0, 1.0, 1.0]), "tokens": torch.tensor(64)}
        >>> view = sten.extend.View("w", torch.tensor([[4.0, 1.0, 3.0, 2.0]]), sten.NM(2, 4), stats=stats)
        >>> sten.Wanda().update(view).mask
        tensor([[ True,  True, False, False]])
    """

    per: str = ROW

    needs: ClassVar[frozenset[str]] = frozenset({"x_norm"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per not in (ROW, LAYER):
            raise ValueError(f"Expected per='row' or 'layer' for Wanda, got {self.per!r}.")

    def score(self, view: View) -> Tensor:
        return wanda_score(view)

    def update(self, view: View) -> Edit:
        if not view.layout.unstructured or self.per == LAYER:
            return super().update(view)
        return Edit(mask=mask_by_row(view.layout, self.scored(view), view.sparsity, view.allowed))
