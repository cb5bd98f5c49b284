"""What each chosen weight becomes: the sparsifier's mask, packed. Nothing is changed here."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from ..layouts.checks import check_sparsity, expect_held, starting_mask
from ..layouts.topk import widest_float
from ..sparsifiers import DenseWeightMethod, Edit, Sparsifier, View
from ..sparsifiers.allocation import Allocation, Uniform
from ..sparsifiers.edits import expect_edit
from ..tensor import SparseTensor
from .select import Target


@dataclasses.dataclass(frozen=True)
class Decision:
    """What becomes of the chosen weights.

    Attributes:
        targets: those that become sparse, with `result` and `energy`.
        dense: those that the allocation would keep so dense that they need fewer bytes dense, with the reason.
        views: what a dynamic method sees of each target at the start, by name.
        allocation: the rule that divides what `dense` leaves of the budget.
    """

    targets: list[Target]
    dense: list[Target]
    views: dict[str, View]
    allocation: Allocation | None


def decide(targets: list[Target], sparsifier: Sparsifier | None, allocation: Allocation | None) -> Decision:
    """Decide what each target becomes. A weight that the allocation keeps nearly dense stays dense if that is smaller.

    The sum of all active entries stays what the allocation makes it, unless the others would get less than half of the
    density that was asked for: then all are stored as allocated.

    Raises:
        ValueError: rate, sparsity and layout do not go together, or a layout cannot hold a weight.
    """
    if allocation is not None and sparsifier is None:
        raise ValueError("sparsifier=None keeps the existing non-zeros: leave sparsity= out.")
    free = {}
    for target in targets:
        if target.layout.rate is None:
            free[target.name] = target
    if allocation is not None and not free:
        for target in targets:
            check_sparsity(allocation.sparsity, target.layout)
    views = _choose_all(targets, free, sparsifier, allocation)
    costly = []
    if _divides(allocation):
        costly = [t for t in free.values() if t.stored is None and _costs_more(t.result)]
    rest = _rest(allocation, free, costly) if costly else None
    if rest is None:
        return Decision(targets, [], views, allocation)
    for target in costly:
        layout, density = target.layout, target.result.density
        target.why = f"{allocation} keeps {density:.0%} of it, for which {layout} needs more bytes than dense"
        target.result = target.energy = None
    decision = decide([t for t in targets if not t.why], sparsifier, rest)
    return dataclasses.replace(decision, dense=[*costly, *decision.dense])


def _divides(allocation: Allocation | None) -> bool:
    """Whether the density of one weight is the rule's choice, not the user's."""
    return allocation is not None and not isinstance(allocation, Uniform)


def _costs_more(w: SparseTensor) -> bool:
    """Whether a weight is larger than a dense one because of its density; with dense values (Masked), only if full."""
    if w.stored_bytes <= w.numel() * w.element_size():
        return False
    return w.parts["values"].shape != w.stored_shape or w.density == 1


def _rest(allocation: Allocation, free: dict[str, Target], dense: list[Target]) -> Allocation | None:
    """The same rule for the other weights, with what these leave of the budget; None if that is too little."""
    size = {name: math.prod(target.shape) for name, target in free.items()}
    taken = sum(size[target.name] for target in dense)
    others = sum(size.values()) - taken
    left = round((1 - allocation.sparsity) * sum(size.values())) - taken
    if not others or left / others < (1 - allocation.sparsity) / 2:
        return None
    return dataclasses.replace(allocation, sparsity=1 - left / others)


def _choose_all(
    targets: list[Target], free: dict[str, Target], sparsifier: Sparsifier | None, allocation: Allocation | None
) -> dict[str, View]:
    """Set `result` and `energy` of every target; of a dynamic method return what it sees of each at the start."""
    starts: dict[str, View] = {}
    with torch.no_grad():
        views = _Views(targets, sparsifier)
        counts = _counts(views, free, sparsifier, allocation) if sparsifier is not None else {}
        for target in targets:
            try:
                if sparsifier is None:
                    dense = _dense(target)
                    _pack(target, dense, _existing(target, dense))
                else:
                    _choose(target, views.take(target), counts.get(target.name), sparsifier, starts)
            except ValueError as error:
                raise ValueError(f"{target.name}: {error}") from None
    return starts


class _Views(dict):
    """What the method sees of each target; made when an allocation or the choice wants it, and given up by `take`."""

    def __init__(self, targets: list[Target], sparsifier: Sparsifier | None) -> None:
        super().__init__()
        self.last = targets[-1]
        self.generator = torch.Generator().manual_seed(sparsifier.seed) if sparsifier is not None else None

    def of(self, target: Target) -> View:
        if target.name not in self:
            allowed = _allowed_units(target)
            given = {"generator": self.generator, "last": target is self.last, "allowed": allowed}
            self[target.name] = View(target.name, _dense(target), target.layout, **given)
        return self[target.name]

    def take(self, target: Target) -> View:
        view = self.of(target)
        del self[target.name]
        return view


def _counts(
    views: _Views, free: dict[str, Target], sparsifier: Sparsifier, allocation: Allocation | None
) -> dict[str, int]:
    """How many entries of each weight without a rate stay."""
    if not free or allocation is None:
        return {}
    shapes = {name: _stored_shape(target) for name, target in free.items()}

    def score(name: str) -> Tensor:
        view = views.of(free[name])
        return _allowed(view, sparsifier.scored(view))

    return allocation.assign(shapes, score)


def _choose(target: Target, view: View, count: int | None, sparsifier: Sparsifier, starts: dict[str, View]) -> None:
    """The method's first decision for a weight, and what that makes of it."""
    if count is not None:
        sized = dataclasses.replace(view, sparsity=1 - count / math.prod(target.shape))
        sized.memo.update(view.memo)
        view = sized
    edit = sparsifier.update(view)
    expect_edit(edit, view, sparsifier, exact=not isinstance(sparsifier, DenseWeightMethod))
    end = edit.mask
    if isinstance(sparsifier, DenseWeightMethod):  # what it ends with; its first mask may be wider
        end = target.layout.mask(_allowed(view, sparsifier.scored(view)), view.sparsity)
    _pack(target, view.weight if edit.value is None else edit.value, end)
    if not sparsifier.acts_once:
        starts[target.name] = _start(view, sparsifier, edit)


def _allowed(view: View, score: Tensor) -> Tensor:
    """The score with the entries that an earlier pruning left out below all others."""
    return score if view.allowed is None else score.masked_fill(~view.allowed, -torch.inf)


def _start(view: View, sparsifier: Sparsifier, edit: Edit) -> View:
    """What a dynamic method sees first: where pruned entries will be zeroed step by step, all that an earlier pruning,
    by a mask or by zeros, has left; otherwise the method's first mask."""
    mask = edit.mask
    if isinstance(sparsifier, DenseWeightMethod) and sparsifier.zero_pruned:
        mask = starting_mask(view.layout, view.weight != 0 if view.allowed is None else view.allowed)
    return dataclasses.replace(view, mask=mask, generator=None, allowed=None)


def _oriented(target: Target, tensor: Tensor | None) -> Tensor | None:
    return tensor.t() if target.transposed and tensor is not None else tensor


def _stored_shape(target: Target) -> tuple[int, ...]:
    return target.shape[::-1] if target.transposed else target.shape


def _dense(target: Target) -> Tensor:
    """The weight as a detached dense tensor in the orientation of the layout, pruning masks applied."""
    if (stored := target.stored) is not None:
        return _oriented(target, stored.to_dense())
    tensor = target.tensor.detach()
    return _oriented(target, tensor if target.mask is None else tensor * target.mask)


def _mask(target: Target) -> Tensor | None:
    """The entries that an earlier pruning left, in the orientation of the layout; None if there was none."""
    stored = target.stored
    return _oriented(target, target.mask if stored is None else stored.mask())


def _allowed_units(target: Target) -> Tensor | None:
    """The same as whole units: a block of which something is left competes with the entries that are left."""
    mask = _mask(target)
    if mask is None:
        return None
    shape = tuple(mask.shape)
    return target.layout.unit_entries(target.layout.unit_totals(mask.float()) > 0, shape)


def _existing(target: Target, dense: Tensor) -> Tensor:
    """The mask that keeps what is there; an n:m layout fills the slots that are left with zeros."""
    mask = _mask(target)
    if mask is not None and target.layout.rate is None:
        expect_held(target.layout, mask)
    mask = dense != 0 if mask is None else mask
    if target.layout.holds_any_mask:
        return mask
    full = target.layout.mask(torch.where(mask, dense.abs(), -torch.ones_like(dense)))
    if bool((mask & ~full).any()):
        raise ValueError(f"Expected non-zeros that fit {target.layout}, got others; pass a sparsifier to choose.")
    return full


def _pack(target: Target, dense: Tensor, mask: Tensor) -> None:
    result = SparseTensor(target.layout, target.layout.pack(dense, mask), dense.shape)
    size, exact = dense.abs(), widest_float(dense.device)
    total = float(size.sum(dtype=exact))
    if total != total:
        raise ValueError("Expected numbers, got NaN, which pruning would hide; load weights that did not diverge.")
    kept = float(size.masked_fill_(~mask, 0).sum(dtype=exact))
    target.energy = kept / total if total > 0 else 1.0
    target.result = result.t() if target.transposed else result
