"""What a method may decide for a weight: checked in one place, for built-in methods and your own alike."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layouts.base import Layout
from ..layouts.checks import count_to_keep, expect_held
from .sparsifier import Edit, Sparsifier, State, View


def check_edit(edit: Edit, shape: tuple[int, ...], device: torch.device, state: State | None = None) -> None:
    """Raise TypeError or ValueError unless the tensors of an Edit fit a weight and the method's state of it."""
    if not isinstance(edit, Edit):
        raise TypeError(f"Expected update to return an Edit, got {type(edit).__name__}; return Edit() for no change.")
    for name in ("mask", "fresh", "value"):
        tensor = getattr(edit, name)
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"Expected a tensor for Edit.{name}, got {type(tensor).__name__}.")
        if name != "value" and tensor.dtype != torch.bool:
            raise TypeError(f"Expected a bool tensor for Edit.{name}, got {tensor.dtype}; compare with zero first.")
        if tuple(tensor.shape) != tuple(shape) or tensor.device != device:
            raise ValueError(
                f"Expected Edit.{name} of the weight's shape {tuple(shape)} on {device}, got {tuple(tensor.shape)} on "
                f"{tensor.device}."
            )
    for name, tensor in (edit.state or {}).items() if state is not None else ():
        if name not in state or tensor.shape != state[name].shape:
            known = {key: tuple(value.shape) for key, value in state.items()}
            raise ValueError(
                f"Expected Edit.state to have tensors of init, {known}, got {name!r} of shape {tuple(tensor.shape)}."
            )


def expect_edit(edit: Edit, view: View, method: Sparsifier, exact: bool) -> None:
    """Raise TypeError or ValueError, with the method's name, unless an Edit fits its View.

    `exact`: its mask is stored as it is, so it must keep to the budget and to what the layout can hold. The mask of a
    dense weight in training may be wider.
    """
    try:
        check_edit(edit, tuple(view.weight.shape), view.weight.device)
        if edit.mask is None and view.mask is None:
            kind = type(method).__name__
            raise ValueError(f"Expected a first mask from {kind}.update, where view.mask is None, got Edit(mask=None).")
        if exact and edit.mask is not None:
            check_mask(edit.mask, view.layout, view.sparsity)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{method}: {error}") from error


def check_mask(mask: Tensor, layout: Layout, sparsity: float | None) -> None:
    """Raise ValueError if a mask has more entries than its budget, or entries that the layout cannot hold.

    The budget is counted in units of the layout, as `Layout.mask` counts it.
    """
    if layout.rate is not None:
        return  # pack refuses what an n:m layout cannot hold
    if sparsity is not None:
        units = layout.unit_totals(mask)
        active, budget = int(units.count_nonzero()), count_to_keep(units.numel(), sparsity, layout)
        if active > budget and active > _most(layout, mask, sparsity):
            raise ValueError(
                f"Expected a mask of at most {budget} of {units.numel()} units of {layout}, at sparsity {sparsity:g}, "
                f"got {active}; keep as many as the View's sparsity allows."
            )
    expect_held(layout, mask)


def _most(layout: Layout, mask: Tensor, sparsity: float) -> int:
    """The units of a mask that the layout makes itself: some round up."""
    own = layout.mask(torch.zeros(mask.shape, device=mask.device), sparsity)
    return int(layout.unit_totals(own).count_nonzero())
