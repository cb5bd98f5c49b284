"""What calibrated methods read of a View, checked: norms and Gram matrix of the inputs, and the mask to start from."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from ..layouts.base import Layout
from ..layouts.checks import count_to_keep
from ..layouts.topk import top, top_of_groups
from .precision import in_float32
from .sparsifier import Edit, PatternMethod, View


def float32_update(update: Callable[..., Edit]) -> Callable[..., Edit]:
    """The method's `update` with products in float32, and without gradients."""

    @functools.wraps(update)
    def run(self, view: View) -> Edit:
        with torch.no_grad(), in_float32(view.weight.device):
            return update(self, view)

    return run


def statistic(view: View, name: str, square: bool = False) -> Tensor:
    """A statistic of `View.stats` in float32; ValueError unless it is there, finite and of the weight's columns."""
    columns = view.weight.flatten(1).shape[1]
    if name not in view.stats:
        raise ValueError(
            f"Expected {name!r} in View.stats of {view.name}, got {sorted(view.stats)}; pass calibration=."
        )
    found = view.stats[name].to(device=view.weight.device, dtype=torch.float32)
    shape = (columns, columns) if square else (columns,)
    if tuple(found.shape) != shape:
        raise ValueError(f"Expected {name} of shape {shape} for {view.name}, got {tuple(found.shape)}.")
    if not bool(found.isfinite().all()):
        raise ValueError(f"Expected finite inputs in calibration of {view.name}, got NaN or inf in its {name}.")
    return found


def input_norms(view: View) -> Tensor:
    """The root mean square of every input, (columns,): x_norm, or from the diagonal of the Gram matrix."""
    if "x_norm" in view.stats or "x_gram" not in view.stats:
        return statistic(view, "x_norm")
    return statistic(view, "x_gram", square=True).diagonal().clamp(min=0).sqrt()


def input_gram(view: View) -> Tensor:
    """The mean of x x^T over tokens, (columns, columns)."""
    return statistic(view, "x_gram", square=True)


def wanda_score(view: View) -> Tensor:
    """|w_ij| * ||x_j||, in the weight's shape, float32."""
    weight = view.weight
    return (weight.flatten(1).abs().float() * input_norms(view)).view(weight.shape)


def allowed_score(view: View, score: Tensor) -> Tensor:
    """The score with the entries that an earlier pruning left out below all others."""
    return score if view.allowed is None else score.masked_fill(~view.allowed, -torch.inf)


def mask_by_row(layout: Layout, score: Tensor, sparsity: float | None, allowed: Tensor | None = None) -> Tensor:
    """The highest scores of each row, equally many in each; where the count does not divide, the best of the next.

    Of an earlier pruning's `allowed` entries a row may have fewer than its share: the others get what it lacks.
    """
    matrix = score.flatten(1)
    count, (rows, columns) = count_to_keep(matrix.numel(), sparsity, layout), matrix.shape
    each, more = divmod(count, rows)
    may = None if allowed is None else allowed.flatten(1)
    if may is not None:
        matrix = matrix.masked_fill(~may, -torch.inf)
        enough = may.sum(1, keepdim=True) > torch.arange(columns, device=matrix.device)
        totals = [0, *enough.sum(0).cumsum(0).tolist()]  # of entries, with at most 0, 1, 2, ... of each row
        each = bisect.bisect_right(totals, count) - 1
        more = count - totals[each]
    mask = top_of_groups(matrix, each)
    mask = mask if may is None else mask & may
    if more and each < columns:
        following = top_of_groups(matrix, each + 1) & ~mask  # one of each row that has so many
        following = following if may is None else following & may
        mask = mask | (following & top(matrix.masked_fill(~following, -torch.inf).amax(1), more).unsqueeze(1))
    elif more:  # nothing allowed is left: pruned entries, in turn from all rows
        mask = mask | top((~mask).cumsum(1).masked_fill(mask, columns + 1).neg().float(), more)
    return mask.view(score.shape)


def starting_mask(view: View) -> Tensor:
    """The mask of the method before in a chain, else Wanda's, row by row where the layout lets entries be chosen."""
    if view.previous is not None:
        return view.previous.mask
    if view.layout.unstructured:
        return mask_by_row(view.layout, wanda_score(view), view.sparsity, view.allowed)
    return view.layout.mask(allowed_score(view, wanda_score(view)), view.sparsity)


def filled(view: View, mask: Tensor) -> Tensor:
    """The entries of a mask that have a value: without those that an earlier pruning left out, which stay zero."""
    return mask if view.left is None else mask & view.left


class Refinement(PatternMethod):
    """A method that starts from a mask: that of the method before in a chain, else Wanda's, whose scores it has."""

    refines: ClassVar[bool] = True

    def score(self, view: View) -> Tensor:
        return wanda_score(view)
