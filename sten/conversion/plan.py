"""What each chosen weight becomes: the sparsifier's mask, packed. Nothing is changed here."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from ..layouts.base import Layout
from ..layouts.checks import check_sparsity, expect_held, starting_mask
from ..layouts.topk import widest_float
from ..sparsifiers import DenseWeightMethod, Edit, Sparsifier, View
from ..sparsifiers.allocation import Allocation, Uniform
from ..sparsifiers.edits import expect_edit
from ..sparsifiers.per_weight import PerWeight
from ..sparsifiers.precision import in_float32
from ..tensor import SparseTensor
from .calibrated import Calibrated
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


def decide(
    targets: list[Target],
    sparsifier: Sparsifier | None,
    allocation: Allocation | None,
    calibrated: Calibrated | None = None,
) -> Decision:
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
    views, counts = {}, {}
    if calibrated is None:
        views = _choose_all(targets, free, sparsifier, allocation)
    else:  # a second walk would take as long as the first: the sizes are found without one
        counts = _calibrated_counts(targets, free, sparsifier, allocation, calibrated)
    costly = {}
    for target in free.values() if _divides(allocation) else ():
        w = target.result if calibrated is None else _sized(target, counts[target.name])
        if target.stored is None and _costs_more(w):
            costly[target.name] = w.density
    rest = _rest(allocation, free, costly) if costly else None
    if rest is None:
        if calibrated is not None:
            _choose_calibrated(targets, counts, sparsifier, calibrated)
        return Decision(targets, [], views, allocation)
    for name, density in costly.items():
        target = free[name]
        target.why = f"{allocation} keeps {density:.0%} of it, for which {target.layout} needs more bytes than dense"
        target.result = target.energy = None
    decision = decide([t for t in targets if not t.why], sparsifier, rest, calibrated)
    return dataclasses.replace(decision, dense=[*(free[name] for name in costly), *decision.dense])


def _divides(allocation: Allocation | None) -> bool:
    """Whether the density of one weight is the rule's choice, not the user's."""
    return allocation is not None and not isinstance(allocation, (Uniform, PerWeight))


def _costs_more(w: SparseTensor) -> bool:
    """Whether a weight is larger than a dense one because of its density; with dense values (Masked), only if full."""
    if w.stored_bytes <= w.numel() * w.element_size():
        return False
    return w.parts["values"].shape != w.stored_shape or w.density == 1


def _rest(allocation: Allocation, free: dict[str, Target], dense: Iterable[str]) -> Allocation | None:
    """The same rule for the other weights, with what these leave of the budget; None if that is too little."""
    size = {name: math.prod(target.shape) for name, target in free.items()}
    taken = sum(size[name] for name in dense)
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
            with _named(target):
                if sparsifier is None:
                    dense = _dense(target)
                    _pack(target, dense, _existing(target, dense), dense)
                else:
                    _choose(target, _with_count(views.take(target), counts.get(target.name)), sparsifier, starts)
    return starts


def _calibrated_counts(targets, free, sparsifier, allocation, calibrated: Calibrated) -> dict[str, int]:
    """How many entries of each weight without a rate stay; scores are those in the model as it is."""
    stats: dict[str, dict[str, Tensor]] = {}

    def measured(view: View) -> View:
        if not stats:
            stats.update(calibrated.measure(targets, sparsifier.needs))
        return dataclasses.replace(view, stats=stats[view.name])

    with torch.no_grad():
        return _counts(_Views(targets, sparsifier), free, sparsifier, allocation, measured)


def _sized(target: Target, count: int) -> SparseTensor:
    """A weight with this many entries, whichever."""
    dense = _dense(target)
    mask = target.layout.mask(dense.abs(), 1 - count / max(dense.numel(), 1))
    return SparseTensor(target.layout, target.layout.pack(dense, mask), dense.shape)


def _choose_calibrated(
    targets: list[Target], counts: dict[str, int], sparsifier: Sparsifier, calibrated: Calibrated
) -> None:
    """As `_choose_all`, of a method that reads calibration, and acts once."""
    views = _Views(targets, sparsifier)

    def choose(target: Target, view: View) -> Edit:
        with _named(target), in_float32(view.weight.device):
            return sparsifier.update(view)

    def pack(target: Target, view: View, edit: Edit) -> None:
        home = target.tensor.device
        with _named(target):
            expect_edit(edit, view, sparsifier, exact=True)
            value = _value(view, edit)
            if edit.value is not None and not bool(value.masked_fill(~edit.mask, 0).isfinite().all()):
                raise ValueError(
                    f"Expected finite values of {sparsifier}, got NaN or inf; its inputs are too large for float32, or "
                    f"the values for {value.dtype}."
                )
            _pack(target, value.to(home), edit.mask.to(home), view.weight.to(home))

    with torch.no_grad():
        calibrated.choose(targets, sparsifier, lambda t: _with_count(views.take(t), counts.get(t.name)), choose, pack)


@contextlib.contextmanager
def _named(target: Target) -> Iterator[None]:
    """A ValueError in the block gets the weight's name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{target.name}: {error}") from None


class _Views(dict):
    """What the method sees of each target; made when an allocation or the choice wants it, and given up by `take`."""

    def __init__(self, targets: list[Target], sparsifier: Sparsifier | None) -> None:
        super().__init__()
        self.last = targets[-1]
        self.generator = torch.Generator().manual_seed(sparsifier.seed) if sparsifier is not None else None

    def of(self, target: Target) -> View:
        if target.name not in self:
            left = _mask(target)
            allowed = None if left is None else _whole_units(target.layout, left)
            given = {"generator": self.generator, "last": target is self.last, "allowed": allowed, "left": left}
            self[target.name] = View(target.name, _dense(target), target.layout, **given)
        return self[target.name]

    def take(self, target: Target) -> View:
        view = self.of(target)
        del self[target.name]
        return view


def _counts(
    views: _Views,
    free: dict[str, Target],
    sparsifier: Sparsifier,
    allocation: Allocation | None,
    measured: Callable[[View], View] = lambda view: view,
) -> dict[str, int]:
    """How many entries of each weight without a rate stay."""
    if not free or allocation is None:
        return {}
    shapes = {name: _stored_shape(target) for name, target in free.items()}

    def score(name: str) -> Tensor:
        view = measured(views.of(free[name]))
        return _allowed(view, sparsifier.scored(view))

    return allocation.assign(shapes, score)


def _with_count(view: View, count: int | None) -> View:
    """The view at the sparsity that the allocation gave the weight; None: the layout has a rate."""
    if count is None:
        return view
    sized = dataclasses.replace(view, sparsity=1 - count / view.weight.numel())
    sized.memo.update(view.memo)
    return sized


def _choose(target: Target, view: View, sparsifier: Sparsifier, starts: dict[str, View]) -> None:
    """The method's first decision for a weight, and what that makes of it."""
    edit = sparsifier.update(view)
    expect_edit(edit, view, sparsifier, exact=not isinstance(sparsifier, DenseWeightMethod))
    end = edit.mask
    if isinstance(sparsifier, DenseWeightMethod):  # what it ends with; its first mask may be wider
        end = target.layout.mask(_allowed(view, sparsifier.scored(view)), view.sparsity)
    _pack(target, _value(view, edit), end, view.weight)
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
    return dataclasses.replace(view, mask=mask, generator=None, allowed=None, left=None)


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


def _whole_units(layout: Layout, mask: Tensor) -> Tensor:
    """The mask as whole units: a block of which something is left competes with the entries that are left."""
    return layout.unit_entries(layout.unit_totals(mask.float()) > 0, tuple(mask.shape))


def _value(view: View, edit: Edit) -> Tensor:
    """The weight's numbers after an Edit; what an earlier pruning has left out stays zero."""
    if edit.value is None or view.left is None:
        return view.weight if edit.value is None else edit.value
    return edit.value.masked_fill(~view.left, 0)


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


def _magnitude(dense: Tensor) -> float:
    """The sum of all |w|: rows in float32, six times as fast as float64, then their sum in float64."""
    rows = dense.flatten(1) if dense.dim() > 1 else dense.unsqueeze(1)
    sums = torch.linalg.vector_norm(rows, 1, dim=1, dtype=torch.promote_types(dense.dtype, torch.float32))
    return float(sums.sum(dtype=widest_float(dense.device)))


def _pack(target: Target, values: Tensor, mask: Tensor, dense: Tensor) -> None:
    """Set `result` to the values in the mask, and `energy` to what the mask keeps of the weight as it was."""
    result = SparseTensor(target.layout, target.layout.pack(values, mask), values.shape)
    total = _magnitude(dense)
    if total != total:
        raise ValueError("Expected numbers, got NaN, which pruning would hide; load weights that did not diverge.")
    kept = _magnitude(result.parts["values"] if values is dense else dense.masked_fill(~mask, 0))
    target.energy = min(kept / total, 1.0) if total > 0 else 1.0
    target.result = result.t() if target.transposed else result
