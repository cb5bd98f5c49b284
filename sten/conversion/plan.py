"""What each chosen weight becomes: the sparsifier's mask, packed. Nothing is changed here."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..layouts.checks import check_sparsity
from ..layouts.topk import widest_float
from ..sparsifiers import DenseWeightMethod, Edit, Sparsifier, View
from ..sparsifiers.allocation import Allocation
from ..tensor import SparseTensor, from_dense
from .select import Target


def decide(targets: list[Target], sparsifier: Sparsifier | None, allocation: Allocation | None) -> dict[str, View]:
    """Set `result` and `energy` of every target; of a dynamic method return what it sees of each weight at the start.

    Raises:
        ValueError: rate, sparsity and layout do not go together.
    """
    if allocation is not None and sparsifier is None:
        raise ValueError("sparsifier=None keeps the existing non-zeros: leave sparsity= out.")
    if allocation is not None and all(target.layout.rate is not None for target in targets):
        for target in targets:
            check_sparsity(allocation.sparsity, target.layout)
    with torch.no_grad():
        if sparsifier is not None:
            return _choose(targets, sparsifier, allocation)
        for target in targets:
            dense = _dense(target)
            _pack(target, dense, _existing(target, dense))
        return {}


def _choose(targets: list[Target], sparsifier: Sparsifier, allocation: Allocation | None) -> dict[str, View]:
    """By the method. What an allocation asks for is kept until it is used, the rest is made one weight at a time."""
    generator = torch.Generator().manual_seed(sparsifier.seed)
    free = {t.name: t for t in targets if t.layout.rate is None}
    views: dict[str, View] = {}

    def view_of(target: Target) -> View:
        if target.name not in views:
            allowed = _oriented(target, target.mask)
            given = {"generator": generator, "last": target is targets[-1], "allowed": allowed}
            views[target.name] = View(target.name, _dense(target), target.layout, **given)
        return views[target.name]

    def score(name: str) -> Tensor:
        view = view_of(free[name])
        return _allowed(view, sparsifier.scored(view))

    shapes = {name: _stored_shape(t) for name, t in free.items()}
    counts = allocation.assign(shapes, score) if free and allocation else {}
    starts: dict[str, View] = {}
    for target in targets:
        view = view_of(target)
        if target.name in counts:
            sized = dataclasses.replace(view, sparsity=1 - counts[target.name] / target.tensor.numel())
            sized.memo.update(view.memo)
            view = sized
        del views[target.name]
        edit = sparsifier.update(view)
        end = edit.mask
        if isinstance(sparsifier, DenseWeightMethod):  # what it ends with; its first mask may be wider
            end = target.layout.mask(_allowed(view, sparsifier.scored(view)), view.sparsity)
        _pack(target, view.weight if edit.value is None else edit.value, end)
        if not sparsifier.acts_once:
            starts[target.name] = _start(view, sparsifier, edit)
    return starts


def _allowed(view: View, score: Tensor) -> Tensor:
    """The score with the entries that an earlier pruning left out below all others."""
    return score if view.allowed is None else score.masked_fill(~view.allowed, -torch.inf)


def _start(view: View, sparsifier: Sparsifier, edit: Edit) -> View:
    """What a dynamic method sees first: all entries (or an earlier pruning's rest) where pruned ones will be zeroed
    step by step, its first mask otherwise."""
    mask = edit.mask
    if isinstance(sparsifier, DenseWeightMethod) and sparsifier.zero_pruned:
        mask = torch.ones_like(mask) if view.allowed is None else view.allowed
    return dataclasses.replace(view, mask=mask, generator=None, allowed=None)


def _oriented(target: Target, tensor: Tensor | None) -> Tensor | None:
    return tensor.t() if target.transposed and tensor is not None else tensor


def _stored_shape(target: Target) -> tuple[int, ...]:
    shape = tuple(target.tensor.shape)
    return shape[::-1] if target.transposed else shape


def _dense(target: Target) -> Tensor:
    """The weight as a detached dense tensor in the orientation of the layout, pruning masks applied."""
    tensor = target.tensor.detach()
    tensor = tensor.to_dense() if isinstance(tensor, SparseTensor) else tensor
    return _oriented(target, tensor if target.mask is None else tensor * target.mask)


def _existing(target: Target, dense: Tensor) -> Tensor:
    """The mask that keeps what is there; an n:m layout fills the slots that are left with zeros."""
    mask = dense != 0 if target.mask is None else _oriented(target, target.mask)
    if target.layout.holds_any_mask:
        return mask
    full = target.layout.mask(torch.where(mask, dense.abs(), -torch.ones_like(dense)))
    if bool((mask & ~full).any()):
        raise ValueError(f"The non-zeros of {target.name} do not fit {target.layout}: pass a sparsifier to choose.")
    return full


def _pack(target: Target, dense: Tensor, mask: Tensor) -> None:
    result = from_dense(dense, target.layout, mask)
    size = dense.abs()
    total = float(size.sum(dtype=widest_float(size.device)))
    if total != total:
        raise ValueError(f"{target.name} holds NaN, which pruning would hide: load weights that did not diverge.")
    kept = float(size.masked_fill_(~mask, 0).sum(dtype=widest_float(size.device)))
    target.energy = kept / total if total > 0 else 1.0
    target.result = result.t() if target.transposed else result
