"""Rows that a mask leaves empty: their outputs are constant, which is rarely meant."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ..layout import Layout
from ..tensor import SparseTensor


def listed(names: list[str], most: int = 5) -> str:
    """The first names, and how many more there are: a large model must not flood the terminal."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def can_empty(layout: Layout) -> bool:
    """Whether it can leave a row without entries: n:m layouts cannot."""
    return layout.rows_may_be_empty


def emptiness(mask: Tensor, layout: Layout) -> str | None:
    """What a mask leaves empty, in words; None: nothing, or neurons that FanIn ablates on purpose."""
    if not can_empty(layout):
        return None
    rows = mask.flatten(1).view(torch.uint8).amax(1) > 0  # forty times faster than any(1)
    dead = len(rows) - int(torch.count_nonzero(rows))
    if dead == len(rows):
        return f"all {dead}"
    return f"{dead} of {len(rows)}" if dead and not layout.omits_empty_rows else None


def emptiness_of(w: SparseTensor) -> str | None:
    """The same of a weight as it is stored."""
    return emptiness(w.spec.support(w.parts, w.stored_shape), w.spec) if can_empty(w.spec) else None


def say_empty(found: dict[str, str], stacklevel: int) -> None:
    """One warning for the weights, by name, that have empty rows."""
    if found:
        names = listed([f"{name} ({what})" for name, what in found.items()])
        warnings.warn(
            f"sten: the masks leave rows empty: {names}; lower the sparsity, or use sten.ERK.",
            stacklevel=stacklevel + 1,
        )
