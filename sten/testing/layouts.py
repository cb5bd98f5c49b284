"""`check_layout`: the laws of every layout, built-in or your own.

The cases come from hypothesis where it is installed, which shrinks a failing one, else from a fixed list.
Tensors are made on torch's default device: `with torch.device("cuda"): check_layout(...)` checks a GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..layouts.base import Layout, Parts
from ..layouts.checks import count_to_keep
from ..layouts.registry import REGISTERED, fields, layout_from
from ..layouts.topk import top

SHAPES = ((1, 1), (1, 9), (8, 1), (13, 17), (16, 32), (63, 100), (5, 3, 3), (6, 7, 3, 3), (3, 4, 2, 2, 2))
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SCORES = ("magnitude", "random", "ties", "constant", "negative", "nan")
EXAMPLES = 40
LAWS = (
    "the class is a frozen dataclass, registered by its name",
    "check and mask refuse bad arguments",
    "mask is bool, deterministic, prefers high scores and takes NaN for the lowest",
    "unpack(pack(w, m)) is w * m, bit for bit",
    "support(pack(w, m)) is m for m = mask(score)",
    "another mask is stored exactly or refused",
    "pack_like, unpack_rows, support and the gradient of unpack agree with unpack",
    "padded slots are zero",
    "column_groups and tile: masks chosen group by group, and with two tiles exchanged, are held",
    "traits hold: holds_any_mask, unstructured, independent_units, free_slots, units",
    "validate accepts what pack makes and refuses corrupted parts",
)


@dataclass(frozen=True)
class Checked:
    """What `check_layout` checked: the laws, on `cases` pairs of a weight and a score of these shapes and dtypes."""

    layout: Layout
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    cases: int
    laws: tuple[str, ...] = LAWS


class Case(NamedTuple):
    """One weight and one score."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    scores: str
    sparsity: float
    seed: int

    def weight(self) -> Tensor:
        """Normal numbers with some zeros, among them negative ones, infinities and NaN."""
        random = torch.Generator("cpu").manual_seed(self.seed)
        w = torch.randn(self.shape, generator=random, device="cpu").to(self.dtype)
        special = torch.randint(0, 40, self.shape, generator=random, device="cpu")
        for code, value in enumerate((0.0, -0.0, math.inf, -math.inf, math.nan)):
            w[special == code] = value
        return w.to(torch.get_default_device())

    def score(self, weight: Tensor) -> Tensor:
        """A score of the kind that the case names."""
        if self.scores == "magnitude":
            return weight.abs()
        random = torch.Generator("cpu").manual_seed(self.seed + 1)
        score = torch.rand(self.shape, generator=random, device="cpu")
        if self.scores == "ties":
            score = (score * 3).floor()
        elif self.scores == "constant":
            score = torch.full_like(score, 0.5)
        elif self.scores == "negative":
            score = score - 2
        elif self.scores == "nan":
            score[score < 0.3] = math.nan
        return score.to(weight)


def check_layout(
    layout: Layout,
    shapes: Sequence[tuple[int, ...]] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
) -> Checked:
    """Check every law of `sten.Layout` on one layout.

    Args:
        layout: the instance to check.
        shapes: weight shapes, each of which the layout must accept. Default: linear and convolution weights,
            odd ones among them, without those that `layout.check` refuses.
        dtypes: dtypes of the weight. Default: float64, float32, float16, bfloat16.

    The laws are listed in `Checked.laws` of the result. Infinities and NaN are among the weights; `validate` gets parts
    that are missing, surplus, of another shape or dtype, with a number out of range (integer parts: -1, and the largest
    of the dtype), or with a number in a padded slot.

    Returns:
        What was checked: layout, shapes, dtypes, the number of cases, and the laws in words.

    Raises:
        AssertionError: the law that does not hold, and where.

    Example:
        >>> import sten
        >>> checked = sten.testing.check_layout(sten.NM(2, 4), shapes=[(5, 12)])
        >>> checked.shapes, len(checked.laws)
        (((5, 12),), 11)
    """
    check_class(layout)
    if shapes is None:
        shapes = [shape for shape in SHAPES if accepts(layout, shape)]
        claim(shapes, f"{layout}.check refuses every default shape; pass shapes= that it accepts")
    shapes, dtypes = tuple(tuple(shape) for shape in shapes), tuple(dtypes or DTYPES)
    for shape in shapes:
        claim(accepts(layout, shape), f"{layout}.check refuses the shape {shape}")
    check_arguments(layout, shapes[0])
    cases = for_cases(shapes, dtypes, lambda case: check_case(layout, case))
    check_corrupt(layout, Case(shapes[-1], dtypes[0], "random", 0.5, 0))
    return Checked(layout, shapes, dtypes, cases)


def for_cases(shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype], check: Callable[[Case], None]) -> int:
    """Run a check on many cases; returns how many."""
    done = 0

    def count(case: Case) -> None:
        nonlocal done
        check(case)
        done += 1

    try:
        from hypothesis import HealthCheck, given, settings
        from hypothesis import strategies as st
    except ImportError:
        for i, scores in enumerate(SCORES):
            for j, shape in enumerate(shapes):
                count(Case(shape, dtypes[(i + j) % len(dtypes)], scores, (0.5, 0.0, 0.9, 1.0)[(i + j) % 4], i))
        return done
    parts = (shapes, dtypes, SCORES, (0.5, 0.9, 0.3, 0.0, 1.0))
    cases = st.builds(Case, *map(st.sampled_from, parts), st.integers(0, 9999))
    quiet = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck), "print_blob": False}
    steady = settings(max_examples=EXAMPLES, derandomize=True, report_multiple_bugs=False, **quiet)
    steady(given(cases)(count))()
    return done


def claim(holds: object, sentence: str) -> None:
    """Raise AssertionError with this sentence unless it holds (python -O removes `assert`)."""
    if not holds:
        raise AssertionError(sentence + ".")


@contextlib.contextmanager
def saying(context: str) -> Iterator[None]:
    """Turn any other exception into an AssertionError with its context."""
    try:
        yield
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(f"{context} raised {type(error).__name__}: {error}") from error


def refuses(call: Callable[[], object], what: str) -> bool:
    """Whether the call raises ValueError with a message; any other exception becomes an AssertionError."""
    try:
        call()
    except ValueError as error:
        claim(str(error), f"{what} is refused without a message")
        return True
    except Exception as error:
        raise AssertionError(f"{what} must raise ValueError; got {type(error).__name__}: {error}") from error
    return False


def accepts(layout: Layout, shape: tuple[int, ...]) -> bool:
    """Whether `layout.check` accepts this shape."""
    return not refuses(lambda: layout.check(shape), f"{layout}.check({shape})")


def check_class(layout: Layout) -> None:
    """The class: a frozen, hashable dataclass, registered by its name, with fields that JSON can hold."""
    cls, name = type(layout), type(layout).__name__
    claim(isinstance(layout, Layout), f"{name} must derive from sten.Layout")
    frozen = dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen
    claim(frozen, f"{name} must be a @dataclass(frozen=True)")
    claim(REGISTERED.get(name) is cls, f"{name} is not the layout registered by this name")
    with saying(f"Making {layout} again from its name and fields"):
        again = layout_from(name, json.loads(json.dumps(fields(layout))))
    claim(again == layout and repr(again) == repr(layout), f"{layout} made again from its fields is {again}")
    claim(hash(again) == hash(layout), f"{layout} and its equal {again} have different hashes")
    claim(layout.rate is None or 0 < layout.rate <= 1, f"{layout}.rate must be None or in (0, 1]; got {layout.rate}")
    claim("values" not in layout.pattern, f"{name}.pattern lists the parts other than values")


def check_arguments(layout: Layout, shape: tuple[int, ...]) -> None:
    """Arguments that `check` and `mask` must refuse."""
    claim(not accepts(layout, (4,)), f"{layout}.check must refuse a weight of one dimension")
    wrong = [-0.1, 1.1, math.nan, None if layout.rate is None else layout.rate / 2]
    for sparsity in wrong:
        refused = refuses(lambda s=sparsity: layout.mask(torch.rand(shape), s), f"{layout}.mask(score, {sparsity})")
        claim(refused, f"{layout}.mask must refuse sparsity={sparsity} (sten.extend.check_sparsity does it)")


def check_case(layout: Layout, case: Case) -> None:
    """All laws on one weight and score."""
    with saying(f"{layout} at {case}"):
        where = f"{layout} at shape {case.shape}, {case.dtype}, scores {case.scores!r}, seed {case.seed}"
        w = case.weight()
        mask = check_mask(layout, case, w, where)
        parts = check_pack(layout, w, mask, where)
        claim(torch.equal(layout.support(parts, case.shape), mask), f"{where}: support(pack(w, m)) is not m")
        check_parts(layout, w, parts, where)
        check_traits(layout, case, w, mask, parts, where)
        check_columns(layout, case, w, mask, where)
        random = torch.Generator("cpu").manual_seed(case.seed)
        some = (torch.rand(case.shape, generator=random, device="cpu") < 0.5).to(w.device)
        for other in (mask & some, torch.zeros_like(mask), torch.ones_like(mask), some):
            # Masks that `mask` does not make: refused or stored exactly, never changed.
            refused = refuses(lambda m=other: layout.pack(w, m), f"{where}: pack of a mask that cannot be held")
            claim(not (refused and layout.holds_any_mask), f"{where}: pack refuses a mask, against holds_any_mask")
            if not refused:
                parts = check_pack(layout, w, other, where)
                check_parts(layout, w, parts, where)
                exact = not layout.unstructured or torch.equal(layout.support(parts, case.shape), other)
                claim(exact, f"{where}: support(pack(w, m)) is not m, against unstructured")


def check_traits(layout: Layout, case: Case, w: Tensor, mask: Tensor, parts: Parts, where: str) -> None:
    """The traits of the layout, for a mask of its own."""
    units = layout.unit_totals(mask).bool()
    same_mask = torch.equal(layout.unit_entries(units, case.shape), mask)
    claim(same_mask, f"{where}: unit_entries(unit_totals(mask) > 0) is not mask: a mask has whole units")
    random = torch.Generator("cpu").manual_seed(case.seed + 2)
    sparsity = case.sparsity if layout.rate is None else None
    if layout.independent_units:
        some = units & (torch.rand(units.shape, generator=random, device="cpu") < 0.5).to(w.device)
        keep = layout.unit_entries(some, case.shape) & mask
        score = torch.rand(case.shape, generator=random, device="cpu").to(w.device).masked_fill(keep, math.inf)
        held = not bool((keep & ~layout.mask(score, sparsity)).any())
        claim(held, f"{where}: mask drops units of infinite score, against independent_units")
    if layout.unstructured:
        highest = top(case.score(w), count_to_keep(w.numel(), sparsity, layout))
        claim(torch.equal(mask, highest), f"{where}: mask is not the highest scores of all, against unstructured")
    slots = len(parts["values"]) + 3
    more = layout.with_slots(parts, slots)
    if not layout.free_slots:
        claim(more is parts, f"{where}: with_slots changes parts, against free_slots")
        return
    claim(len(more["values"]) == slots, f"{where}: with_slots(parts, {slots}) makes {len(more['values'])} slots")
    claim(
        same(layout.unpack(more, case.shape), layout.unpack(parts, case.shape)), f"{where}: with_slots changes unpack"
    )
    check_parts(layout, w, more, where)
    layout.validate(more, case.shape)


def check_columns(layout: Layout, case: Case, w: Tensor, mask: Tensor, where: str) -> None:
    groups, (height, width) = layout.column_groups(case.shape), layout.tile(case.shape) or (1, math.inf)
    order, score, mask = groups.argsort(stable=True), case.score(w).flatten(1), mask.flatten(1).clone()
    if layout.rate is not None:
        joined = torch.zeros_like(mask)
        for group in groups.unique():
            part = joined[:, groups == group] = layout.mask(score[:, groups == group])
            enough = part.sum(1).min() >= int(layout.rate * part.shape[1] + 1e-6) or not groups.any()
            claim(enough or not layout.independent_units, f"{where}: a row keeps too little of a group of columns")
        stored = layout.support(layout.pack(w, joined.view(case.shape)), case.shape)
        claim(torch.equal(stored.flatten(1), joined), f"{where}: masks of groups of columns, joined, are not held")
    last = int((groups == groups[order[0]]).sum()) if layout.rate is not None else len(order)
    if last >= width:
        first, second = order[:width], order[(last // width - 1) * width :][:width]  # the first and last whole tiles
        mask[:height, first], mask[:height, second] = mask[:height, second], mask[:height, first]
        stored = layout.support(layout.pack(w, mask.view(case.shape)), case.shape)
        claim(torch.equal(stored.flatten(1), mask), f"{where}: a mask with two tiles exchanged is not held")


def check_mask(layout: Layout, case: Case, w: Tensor, where: str) -> Tensor:
    """The laws of `mask`; returns it."""
    sparsity = case.sparsity if layout.rate is None else None
    score = case.score(w)
    mask = layout.mask(score, sparsity)
    claim(mask.dtype == torch.bool, f"{where}: mask must be bool; got {mask.dtype}")
    claim(mask.shape == score.shape, f"{where}: mask has shape {tuple(mask.shape)}, the score {tuple(score.shape)}")
    claim(torch.equal(mask, layout.mask(score.clone(), sparsity)), f"{where}: mask differs from call to call")
    low = score.masked_fill(score.isnan(), -math.inf)
    claim(torch.equal(mask, layout.mask(low, sparsity)), f"{where}: mask must take NaN for the lowest score")
    if sparsity in (0.0, 1.0):
        right = bool((mask == (sparsity == 0)).all())
        claim(right, f"{where}: sparsity={sparsity} must keep {'nothing' if sparsity else 'all'}")
    again = int((layout.mask(mask.float(), sparsity) & mask).sum())
    enough = again >= 0.9 * int(mask.sum()) - 1
    claim(enough, f"{where}: mask prefers low scores: of its own {int(mask.sum())} entries, scored 1, it keeps {again}")
    return mask


def check_pack(layout: Layout, w: Tensor, mask: Tensor, where: str) -> Parts:
    """The laws of `pack` and `unpack` for a mask that the layout holds; returns the parts."""
    before = (w.clone(), mask.clone())
    parts = layout.pack(w, mask)
    claim(same(w, before[0]) and torch.equal(mask, before[1]), f"{where}: pack changed its arguments")
    names = {"values", *layout.pattern}
    claim(set(parts) == names, f"{where}: pack made the parts {sorted(parts)}; `pattern` promises {sorted(names)}")
    claim(parts["values"].dtype == w.dtype, f"{where}: values have dtype {parts['values'].dtype}, the weight {w.dtype}")
    for name, part in parts.items():
        plain = part.device == w.device and part.is_contiguous()
        claim(plain, f"{where}: part {name!r} must be contiguous, on {w.device}")
        held = part.untyped_storage().data_ptr()
        shared = part.numel() and held in (w.untyped_storage().data_ptr(), mask.untyped_storage().data_ptr())
        claim(not shared, f"{where}: part {name!r} shares memory with an argument of pack; clone it")
    shape = tuple(w.shape)
    out = layout.unpack(parts, shape)
    claim(out.shape == shape and out.dtype == w.dtype, f"{where}: unpack made {out.dtype} of shape {tuple(out.shape)}")
    good = same(out.masked_fill(~mask, 0), w.masked_fill(~mask, 0)) and not bool((out[~mask] != 0).any())
    claim(good, f"{where}: unpack(pack(w, m)) is not w * m, bit for bit")
    stored = layout.support(parts, shape)
    claim(
        stored.dtype == torch.bool,
        f"{where}: support is {stored.dtype}, not bool: unpack must keep the dtype of values",
    )
    claim(not bool((mask & ~stored).any()), f"{where}: support does not contain the mask that was packed")
    try:
        layout.validate(parts, shape)
    except ValueError as error:
        raise AssertionError(f"{where}: validate refuses what pack made: {error}") from error
    return parts


def check_parts(layout: Layout, w: Tensor, parts: Parts, where: str) -> None:
    """`pack_like`, `unpack_rows` and `support` agree with `unpack`."""
    shape, values = tuple(w.shape), parts["values"]
    dense, stored = layout.unpack(parts, shape), layout.support(parts, shape)
    claim(same(layout.pack_like(dense, parts), values), f"{where}: pack_like(unpack(parts), parts) is not values")
    new = layout.unpack({**parts, "values": layout.pack_like(w, parts)}, shape)
    claim(same(new, w.masked_fill(~stored, 0)), f"{where}: pack_like(w, parts) does not hold w at the stored entries")
    slots, entries = int(layout.pack_like(torch.ones_like(w), parts).count_nonzero()), int(stored.sum())
    claim(slots == entries, f"{where}: {slots} slots for {entries} entries: padded slots must be zero in pack_like")
    rows = torch.tensor([shape[0] - 1, 0, 0], device=w.device)
    for chosen in (rows, rows[:0]):
        got = layout.unpack_rows(parts, shape, chosen)
        claim(same(got, dense[chosen]), f"{where}: unpack_rows(parts, shape, {chosen.tolist()}) is not unpack[rows]")
    numbers = torch.arange(1, 1 + values.numel(), device=w.device).view_as(values)
    got = layout.unpack({**parts, "values": numbers}, shape)
    claim(got.dtype == numbers.dtype, f"{where}: unpack makes {got.dtype} of int64 values; the dtype must stay")
    leaf, gradient = values.clone().requires_grad_(), torch.ones_like(w)
    (got,) = torch.autograd.grad(layout.unpack({**parts, "values": leaf}, shape), leaf, gradient)
    claim(same(got, layout.pack_like(gradient, parts)), f"{where}: the gradient of unpack is not pack_like")


def check_corrupt(layout: Layout, case: Case) -> None:
    """`validate` refuses every kind of corrupted part."""
    with saying(f"{layout} at {case}"):
        shape, w = case.shape, torch.ones(case.shape, dtype=case.dtype)
        parts = layout.pack(w, layout.mask(case.score(w), case.sparsity if layout.rate is None else None))
        for what, wrong in corrupt(layout, parts, w):
            where = f"{layout} at shape {shape}: validate"
            claim(refuses(lambda p=wrong: layout.validate(p, shape), f"{where} of {what}"), f"{where} accepts {what}")


def corrupt(layout: Layout, parts: Parts, w: Tensor) -> Iterator[tuple[str, Parts]]:
    """(description, parts) that are wrong in one way each."""
    yield "a surplus part", {**parts, "surplus": parts["values"]}
    yield "values that are no floating-point numbers", {**parts, "values": parts["values"].long()}
    for name, part in parts.items():
        yield f"parts without {name!r}", {other: parts[other] for other in parts if other != name}
        yield f"{name!r} of another shape", {**parts, name: part.new_zeros((3, *part.shape))}
        yield f"{name!r} with an entry too many", {**parts, name: torch.cat([part, torch.zeros_like(part[:1])])}
        if name == "values":
            continue
        yield f"{name!r} of another dtype", {**parts, name: part.double()}
        if part.numel() and part.dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
            for slot in (0, -1):
                for number in (-1, torch.iinfo(part.dtype).max):
                    yield f"{number} in {name!r}", {**parts, name: put(part, slot, number)}
    padding = (layout.pack_like(torch.ones_like(w), parts).flatten() == 0).nonzero()
    if len(padding):
        yield "a padded slot that is not zero", {**parts, "values": put(parts["values"], int(padding[0]), 1)}


def put(part: Tensor, slot: int, number: int) -> Tensor:
    """A copy with one number replaced."""
    out = part.clone()
    out.view(-1)[slot] = number
    return out


def same(a: Tensor, b: Tensor) -> bool:
    """Equal in shape, dtype and every bit, except that any NaN equals any other."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool((((a == b) & (a.signbit() == b.signbit())) | (a.isnan() & b.isnan())).all())
