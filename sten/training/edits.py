"""What a method decided, checked before it is carried out."""

from __future__ import annotations

import torch

from ..sparsifiers import Edit, Sparsifier
from .distributed import agreed, ranks
from .trained_weight import TrainedWeight


def checked(edit: Edit, weight: TrainedWeight, method: Sparsifier) -> Edit:
    """The same edit on every rank; TypeError if its masks are not bool."""
    for name in ("mask", "fresh"):
        mask = getattr(edit, name)
        if mask is not None and mask.dtype != torch.bool:
            raise TypeError(
                f"Expected a bool tensor for Edit.{name} of {method} for {weight.name}, got {mask.dtype}; compare with "
                "zero first."
            )
    if edit.mask is None or ranks() == 1:
        return edit
    return Edit(agreed(edit.mask), edit.value, edit.fresh, edit.state)
