"""What each chosen weight becomes: the sparsifier's mask, packed. Nothing is changed here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .allocation import Allocation
from .layout import check_sparsity
from .sparsifiers import DenseWeightMethod, Edit, Sparsifier, View
from .targets import Target
from .tensor import SparseTensor, from_dense
from .training.pattern import Method


@dataclass
class Change:
    """A target, what it becomes (a dense master: at the end), and the share of sum |w| that this keeps."""

    target: Target
    tensor: SparseTensor
    energy: float
    method: Method | None = None  # of a dynamic sparsifier, and what it sees of the weight at the start
    view: View | None = None


def decide(targets: list[Target], sparsifier: Sparsifier | None, spread: Allocation | None) -> list[Change]:
    """The change of every target. ValueError where rate, sparsity and layout do not go together."""
    free = [t for t in targets if t.layout.rate is None]
    if spread is not None and sparsifier is None:
        raise ValueError("sparsifier=None keeps the existing non-zeros: leave sparsity= out.")
    if spread is not None and not free:
        for target in targets:
            check_sparsity(spread.sparsity, target.layout)
    with torch.no_grad():
        if sparsifier is None:
            return [_pack(t, _dense(t), _existing(t)) for t in targets]
        return _choose(targets, free, sparsifier, spread)


def _choose(
    targets: list[Target], free: list[Target], sparsifier: Sparsifier, spread: Allocation | None
) -> list[Change]:
    """By scores. Those that the allocation asks for are kept until they are used, the others made one at a time."""
    generator = torch.Generator().manual_seed(sparsifier.seed)
    by_name = {t.name: t for t in targets}
    scores: dict[str, Tensor] = {}

    def score(name: str) -> Tensor:
        if name not in scores:
            scores[name] = _score(by_name[name], sparsifier, generator)
        return scores[name]

    shapes = {t.name: tuple(_dense(t).shape) for t in free}
    counts = spread.assign(shapes, score) if free and spread else {}
    changes = []
    for target in targets:
        sparsity = 1 - counts[target.name] / target.tensor.numel() if target.name in counts else None
        edit = _first(target, sparsifier, sparsity, score(target.name), generator)
        mask = first = edit.mask
        if isinstance(sparsifier, DenseWeightMethod):  # what it ends with; the first mask may be wider
            mask = target.layout.mask(score(target.name), sparsity)
        del scores[target.name]
        change = _pack(target, _dense(target) if edit.value is None else edit.value, mask)
        if not sparsifier.acts_once:
            change.method = Method(target.name, sparsifier, sparsity, spread, target is targets[-1])
            change.view = _start(target, change.method, first)
        changes.append(change)
    return changes


def _start(target: Target, method: Method, mask: Tensor) -> View:
    """What a dynamic method sees first: a hard master all (or an earlier pruning's rest), others their mask."""
    zero_pruned = getattr(method.sparsifier, "zero_pruned", False)
    if zero_pruned:
        mask = torch.ones_like(mask) if target.mask is None else _oriented(target, target.mask)
    return View(target.name, _dense(target), target.layout, method.sparsity, mask, last=method.last)


def _score(target: Target, sparsifier: Sparsifier, generator: torch.Generator) -> Tensor | None:
    """A method's scores; entries that an earlier pruning masked out come after all others."""
    if type(sparsifier).score is Sparsifier.score:
        return None
    mask = _oriented(target, target.mask)
    score = sparsifier.score(View(target.name, _dense(target), target.layout, generator=generator))
    return score if mask is None else score.masked_fill(~mask, -torch.inf)


def _first(target: Target, sparsifier: Sparsifier, sparsity, score, generator) -> Edit:
    """The first decision; scores that an allocation asked for are not drawn again."""
    allowed = _oriented(target, target.mask)
    view = View(target.name, _dense(target), target.layout, sparsity, generator=generator, allowed=allowed)
    if score is not None:
        view.memo["score"] = score
    return sparsifier.update(view)


def _oriented(target: Target, tensor: Tensor | None) -> Tensor | None:
    return tensor.t() if target.transposed and tensor is not None else tensor


def _dense(target: Target) -> Tensor:
    """The weight as a detached dense tensor in the orientation of the layout, pruning masks applied."""
    tensor = target.tensor.detach()
    tensor = tensor.to_dense() if isinstance(tensor, SparseTensor) else tensor
    return _oriented(target, tensor if target.mask is None else tensor * target.mask)


def _existing(target: Target) -> Tensor:
    """The mask that keeps what is there; an n:m layout fills the slots that are left with zeros."""
    dense = _dense(target)
    mask = dense != 0 if target.mask is None else _oriented(target, target.mask)
    if target.layout.holds_any_mask:
        return mask
    full = target.layout.mask(torch.where(mask, dense.abs(), -torch.ones_like(dense)))
    if bool((mask & ~full).any()):
        raise ValueError(f"The non-zeros of {target.name} do not fit {target.layout}: pass a sparsifier to choose.")
    return full


def _pack(target: Target, dense: Tensor, mask: Tensor) -> Change:
    tensor = from_dense(dense, target.layout, mask)
    if bool(dense.isnan().any()):
        raise ValueError(f"{target.name} holds NaN, which pruning would hide: load weights that did not diverge.")
    size = dense.abs().double()
    total = float(size.sum())
    energy = float((size * mask).sum()) / total if total > 0 else 1.0
    return Change(target, tensor.t() if target.transposed else tensor, energy)
