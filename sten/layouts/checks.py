"""Checks of arguments and parts; each error says what was expected, what came, and what would work."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sten.layouts.base import Layout, Parts


CHUNK = 2**18  # numbers that a check reads at a time, so that its memory does not grow with the file


def expect_parts(layout: Layout, parts: Parts, expected: dict[str, tuple[tuple[int, ...], torch.dtype | None]]) -> bool:
    """Raise ValueError unless `parts` has exactly the expected names, shapes and dtypes (None: any floating one).

    A size of -1 in an expected shape accepts any size.

    Returns:
        Whether the parts have numbers, which `validate` goes on to check; parts on the meta device have none.
    """
    if set(parts) != set(expected):
        raise ValueError(f"Expected the parts {sorted(expected)} for {layout}, got {sorted(parts)}.")
    for name, (shape, dtype) in expected.items():
        part = parts[name]
        if not isinstance(part, Tensor) or part.layout != torch.strided:
            kind = f"a tensor of {part.layout}" if isinstance(part, Tensor) else f"a {type(part).__name__}"
            raise ValueError(f"Expected a plain dense tensor for part {name!r} of {layout}, got {kind}.")
        have = tuple(part.shape)
        if len(have) != len(shape) or any(want not in (-1, size) for want, size in zip(shape, have, strict=True)):
            raise ValueError(f"Expected shape {_shape(shape)} for part {name!r} of {layout}, got {have}.")
        if part.dtype != dtype if dtype is not None else not part.dtype.is_floating_point:
            want = dtype or "a floating-point dtype"
            raise ValueError(f"Expected {want} for part {name!r} of {layout}, got {part.dtype}; convert it with .to().")
    _expect_one_device(layout, parts)
    return not parts["values"].is_meta


def chunks(*parts: Tensor, overlap: int = 0) -> Iterator[tuple[Tensor, ...]]:
    """The parts of equal length in pieces of about CHUNK numbers along dimension 0, each with the first `overlap` rows
    of the next one."""
    width = max(1, max(math.prod(part.shape[1:]) for part in parts))
    step = max(1, CHUNK // width)
    for start in range(0, len(parts[0]), step):
        yield tuple(part[start : start + step + overlap] for part in parts)


def _shape(shape: tuple[int, ...]) -> str:
    sizes = ["any" if size == -1 else str(size) for size in shape]
    return f"({', '.join(sizes)}{',' if len(shape) == 1 else ''})"


def _expect_one_device(layout: Layout, parts: Parts) -> None:
    device = parts["values"].device
    for name, part in parts.items():
        if part.device != device:
            raise ValueError(
                f"Expected all parts of {layout} on one device, got {name} on {part.device} and values on {device}; "
                "call .to(device) on the module."
            )


def expect_range(layout: Layout, name: str, index: Tensor, low: int, high: int) -> None:
    """Raise ValueError unless every entry of `index` lies in [low, high)."""
    if not index.numel() or index.is_meta:
        return
    least, most = (int(end) for end in torch.aminmax(index))
    if least < low or most >= high:
        got = most if least >= low else least
        raise ValueError(f"Expected numbers from {low} to {high - 1} in part {name!r} of {layout}, got {got}.")


def expect_zero(layout: Layout, padding: Tensor) -> None:
    """Raise ValueError unless these values, of padding or of dropped entries, are zero."""
    wrong = 0 if padding.is_meta else int(padding.count_nonzero())
    if wrong:
        raise ValueError(
            f"Expected zeros in the slots of part 'values' of {layout} that are padding or dropped, got {wrong} other "
            "numbers."
        )


def expect_zero_off(layout: Layout, values: Tensor, stored: Tensor) -> None:
    """Raise ValueError unless these values are zero where the mask `stored`, of the same shape, is off."""
    for part, on in chunks(values.flatten(), stored.flatten()):
        if bool(((part != 0) > on).any()):
            expect_zero(layout, part.masked_fill(on, 0))


def expect_dense(layout: Layout, dense: Tensor, mask: Tensor) -> None:
    """Raise ValueError unless `dense` is a floating weight that fits the layout and `mask` a bool mask of its shape."""
    layout.check(tuple(dense.shape))
    if not dense.dtype.is_floating_point:
        raise ValueError(f"Expected a floating-point weight for {layout}, got {dense.dtype}; convert it first.")
    if mask.dtype != torch.bool:
        raise ValueError(
            f"Expected a bool tensor for the mask (True is an active entry), got {mask.dtype}; compare with zero first."
        )
    if mask.shape != dense.shape:
        raise ValueError(f"Expected a mask of the weight's shape {tuple(dense.shape)}, got shape {tuple(mask.shape)}.")


def covering(layout: Layout, mask: Tensor) -> Tensor:
    """The mask that the layout stores for this one: the same, or with more entries where it cannot hold it exactly."""
    return mask if layout.unstructured else layout.covering(mask)


def starting_mask(layout: Layout, left: Tensor) -> Tensor:
    """The mask with which gradual pruning begins, of the entries that an earlier pruning left; all, if it left none."""
    return covering(layout, left) if bool(left.any()) else torch.ones_like(left)


def expect_held(layout: Layout, mask: Tensor) -> None:
    """Raise ValueError unless the layout holds exactly this mask; an n:m layout may fill up groups with zeros."""
    stored = covering(layout, mask)
    if layout.rate is None and not torch.equal(stored, mask):
        raise ValueError(
            f"Expected a mask that {layout} can hold, got one of {int(mask.sum())} entries, for which it would store "
            f"{int(stored.sum())}; use {layout}.mask(score, sparsity), or sten.CSR(), which holds any mask."
        )


def expect_score(layout: Layout, score: Tensor, sparsity: float | None) -> None:
    """Raise ValueError unless the layout can choose a mask from this score at this sparsity."""
    layout.check(tuple(score.shape))
    check_sparsity(sparsity, layout)
    if not score.dtype.is_floating_point:
        raise ValueError(f"Expected a floating-point tensor for the score, got {score.dtype}; call .float() on it.")


def expect_whole(owner: object, name: str, low: int, high: int | None = None) -> None:
    """Raise TypeError or ValueError unless the field `name` of a layout is a whole number from `low` to `high`."""
    value, kind = getattr(owner, name), type(owner).__name__
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"Expected a whole number for {name} of {kind}, got {value!r}.")
    if value < low or (high is not None and value > high):
        limits = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"Expected {name} {limits} for {kind}, got {value}.")


def expect_n_of_m(layout: object, high: int) -> None:
    """Raise TypeError or ValueError unless the fields n and m of a layout are whole numbers, 1 <= n <= m <= high."""
    expect_whole(layout, "m", 1, high)
    try:
        expect_whole(layout, "n", 1, layout.m)
    except ValueError as error:
        if layout.n <= layout.m:
            raise
        kind = type(layout).__name__
        hint = f"{kind} keeps n of every m entries: for {layout.m} of {layout.n}, write n={layout.m}, m={layout.n}."
        raise ValueError(f"{str(error).rstrip('.')}; {hint}") from None


def check_sparsity(sparsity: float | None, layout: Layout) -> None:
    """Raise ValueError unless `sparsity` is a number from 0 to 1 and agrees with the layout's own rate."""
    if layout.rate is not None:
        if sparsity is not None and not math.isclose(sparsity, 1 - layout.rate, abs_tol=1e-6):
            raise ValueError(
                f"Expected no sparsity= for {layout}, which fixes it at {1 - layout.rate:g}, got {sparsity:g}: leave "
                "it out."
            )
    elif sparsity is None:
        raise ValueError(f"Expected sparsity= for {layout}, got None; pass the fraction to drop, such as sparsity=0.9.")
    elif not 0 <= sparsity <= 1:
        raise ValueError(f"Expected a sparsity from 0 to 1, the fraction of entries to drop, got {sparsity}.")


def count_to_keep(total: int, sparsity: float | None, layout: Layout) -> int:
    """How many of `total` entries or units stay: round((1 - sparsity) * total), after `check_sparsity`."""
    check_sparsity(sparsity, layout)
    return round((layout.rate if sparsity is None else 1.0 - sparsity) * total)
