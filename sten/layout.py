"""Layout: how a sparsity pattern is stored.

The contract, in one line: `mask(score) -> which`, `pack(dense, which) -> parts`, `unpack(parts, shape) -> dense`.
A layout is a frozen dataclass: hashable, printable, without tensors. It is the dispatch key and the repr.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

Parts = dict[str, Tensor]

REGISTERED: dict[str, type[Layout]] = {}


class Layout(ABC):
    """A way to store a sparse weight as a dictionary of plain tensors, its *parts*.

    Exactly one part, `values`, holds weights; the others, listed in `pattern`, are the pattern. Laws, which
    `sten.testing.check_layout` tests:

    - `unpack(pack(w, m), shape) == w * m` bit for bit, for every mask `m` that the layout can hold;
    - `support(pack(w, m), shape) == m` for every `m = mask(score, sparsity)`: exactly `m` is stored;
    - `pack_like(unpack(parts, shape), parts) == parts["values"]`;
    - shapes that do not divide are padded inside (padded slots of `values` are zero), or `check` refuses them.

    A subclass is a frozen dataclass; its class name is its name in files, so it must be unique.

    Example:
        >>> import sten
        >>> sten.NM(2, 4).rate
        0.5
    """

    pattern: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        known = REGISTERED.get(cls.__name__)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(
                f"A layout named {cls.__name__!r} is registered already, by {known.__module__}; choose another name."
            )
        REGISTERED[cls.__name__] = cls

    @property
    def rate(self) -> float | None:
        """The density that the layout itself fixes (n/m), or None where `sparsity` decides."""
        return None

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError, with one sentence that says what would fit, if a weight of this shape cannot be stored."""
        if len(shape) < 2 or 0 in shape:
            raise ValueError(f"{self} stores weights of two or more dimensions, none empty; got shape {tuple(shape)}.")

    @abstractmethod
    def mask(self, score: Tensor, sparsity: float | None = None) -> Tensor:
        """The bool mask, of score's shape, of the entries to keep: the highest scores the layout can hold together.

        Args:
            score: importance of each entry, any floating dtype; higher is better. Ties go to the lower index.
            sparsity: fraction of entries to drop; required where `rate` is None, must be None or 1 - rate elsewhere.
        """

    @abstractmethod
    def pack(self, dense: Tensor, mask: Tensor) -> Parts:
        """Store `dense * mask`; ValueError, in one sentence, if the layout cannot hold the mask.

        A layout with a fixed number of slots fills the ones that the mask leaves free with explicit zeros.
        """

    @abstractmethod
    def unpack(self, parts: Parts, shape: tuple[int, ...]) -> Tensor:
        """The dense tensor of this shape, in the dtype of `parts["values"]` (any dtype, integers included)."""

    def pack_like(self, dense: Tensor, parts: Parts) -> Tensor:
        """New `values` for the same pattern: the entries of `dense` where `parts` has slots, zero in padded slots."""
        values = parts["values"]
        slots = torch.arange(1, values.numel() + 1, device=values.device).view_as(values)
        where = self.unpack({**parts, "values": slots}, tuple(dense.shape)).flatten()
        live = where > 0
        out = torch.zeros(values.numel(), dtype=dense.dtype, device=values.device)
        out[where[live] - 1] = dense.flatten()[live]
        return out.view_as(values)

    def unpack_rows(self, parts: Parts, shape: tuple[int, ...], rows: Tensor) -> Tensor:
        """The dense rows `rows` (a 1-D int64 tensor) of the weight, shape (len(rows), *shape[1:])."""
        return self.unpack(parts, shape)[rows]

    def support(self, parts: Parts, shape: tuple[int, ...]) -> Tensor:
        """The bool mask of the stored entries (explicit zeros count, padding does not)."""
        ones = torch.ones_like(parts["values"], dtype=torch.bool)
        return self.unpack({**parts, "values": ones}, shape)

    @abstractmethod
    def validate(self, parts: Parts, shape: tuple[int, ...]) -> None:
        """Check parts that come from outside (a file, a state_dict): names, shapes, dtypes and every index.

        ValueError with one sentence. After it, no kernel can read or write out of bounds.
        """


def expect_parts(layout: Layout, parts: Parts, expected: dict[str, tuple[tuple[int, ...], torch.dtype | None]]) -> None:
    """Raise ValueError unless `parts` has exactly the expected names, shapes and dtypes (None: any floating one).

    A size of -1 in an expected shape accepts any size.
    """
    if set(parts) != set(expected):
        raise ValueError(f"{layout} has the parts {sorted(expected)}; got {sorted(parts)}.")
    for name, (shape, dtype) in expected.items():
        part = parts[name]
        if not isinstance(part, Tensor) or part.layout != torch.strided:
            raise ValueError(f"Part {name!r} of {layout} must be a plain dense tensor; got {type(part).__name__}.")
        have = tuple(part.shape)
        if len(have) != len(shape) or any(want not in (-1, size) for want, size in zip(shape, have, strict=True)):
            raise ValueError(f"Part {name!r} of {layout} must have shape {tuple(shape)}; got {have}.")
        if part.dtype != dtype if dtype is not None else not part.dtype.is_floating_point:
            raise ValueError(
                f"Part {name!r} of {layout} must be {dtype or 'of a floating-point dtype'}; got {part.dtype}."
            )
        device = parts["values"].device
        if part.device != device:
            raise ValueError(f"Part {name!r} of {layout} lies on {part.device} but its values on {device}; move one.")


def expect_range(layout: Layout, name: str, index: Tensor, low: int, high: int) -> None:
    """Raise ValueError unless every entry of `index` lies in [low, high)."""
    if index.numel() and (int(index.min()) < low or int(index.max()) >= high):
        raise ValueError(
            f"Part {name!r} of {layout} must hold numbers from {low} to {high - 1}; "
            f"got {int(index.min())} to {int(index.max())}."
        )


def kept(total: int, sparsity: float | None, layout: Layout) -> int:
    """How many of `total` entries stay at this sparsity: round((1 - sparsity) * total), with the argument checked."""
    check_sparsity(sparsity, layout)
    return round((1.0 - sparsity) * total)


def check_sparsity(sparsity: float | None, layout: Layout) -> None:
    """Raise ValueError unless `sparsity` is a number from 0 to 1 and agrees with the layout's own rate."""
    if layout.rate is not None:
        if sparsity is not None and not math.isclose(sparsity, 1 - layout.rate, abs_tol=1e-6):
            raise ValueError(
                f"{layout} has sparsity {1 - layout.rate:g} by construction; got sparsity={sparsity:g}: leave it out."
            )
    elif sparsity is None:
        raise ValueError(f"{layout} has no rate of its own: pass sparsity=, for example sparsity=0.9.")
    elif not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity is the fraction of entries to drop, from 0 to 1; got {sparsity}.")


def top(score: Tensor, count: int) -> Tensor:
    """Bool mask of the `count` highest entries of a score of any shape, exactly; ties go to the lower index.

    NaN counts as the lowest score. A threshold alone would keep every tie, so ties are counted off by index.
    """
    flat = torch.nan_to_num(score.detach().flatten(), nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    if count <= 0 or flat.numel() == 0:
        return torch.zeros(score.shape, dtype=torch.bool, device=score.device)
    count = min(count, flat.numel())
    edge = edge_by_topk(flat, count) if flat.is_cuda else torch.kthvalue(flat, flat.numel() - count + 1).values
    above = flat > edge
    ties = flat == edge
    room = count - above.sum()
    return (above | (ties & (ties.cumsum(0) <= room))).view(score.shape)


def edge_by_topk(score: Tensor, count: int) -> Tensor:
    """The `count`-th highest along the last dimension, which stays with size 1, from the shorter side.

    For a GPU, where kthvalue gives a whole row to one block of threads.
    """
    rest = score.shape[-1] - count + 1
    if count < rest:
        return torch.topk(score, count, sorted=False).values.amin(-1, keepdim=True)
    return torch.topk(score, rest, largest=False, sorted=False).values.amax(-1, keepdim=True)


def top_of_groups(score: Tensor, n: int) -> Tensor:
    """Bool mask of the `n` highest along the last dimension; ties go to the lower index, NaN counts as the lowest."""
    score = torch.nan_to_num(score.detach(), nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    if score.shape[-1] > 8:
        order = torch.sort(score, dim=-1, descending=True, stable=True).indices
        return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order[..., :n], True)
    # Small groups: counting who beats whom is seven times faster than a sort of four.
    columns = score.unbind(-1)
    beaten = [torch.zeros(score.shape[:-1], dtype=torch.uint8, device=score.device) for _ in columns]
    for i, first in enumerate(columns):
        for j in range(i + 1, len(columns)):
            wins = first >= columns[j]
            beaten[j] += wins
            beaten[i] += ~wins
    return torch.stack(beaten, dim=-1) < n


def complete_groups(mask: Tensor, n: int) -> Tensor:
    """The mask with the lowest free entries of each group (the last dimension) switched on, until it has `n`."""
    room = n - mask.sum(-1, keepdim=True)
    if not bool((room > 0).any()):
        return mask
    return mask | (~mask & ((~mask).cumsum(-1) <= room))


def expect_dense(layout: Layout, dense: Tensor, mask: Tensor) -> None:
    """Raise ValueError unless `dense` is a floating weight that fits the layout and `mask` a bool mask of its shape."""
    layout.check(tuple(dense.shape))
    if not dense.dtype.is_floating_point:
        raise ValueError(f"{layout} stores floating-point weights; got {dense.dtype}: convert it first.")
    if mask.dtype != torch.bool:
        raise ValueError(f"A mask is a bool tensor (True keeps the entry); got {mask.dtype}: compare with zero first.")
    if mask.shape != dense.shape:
        raise ValueError(f"The mask has shape {tuple(mask.shape)}, the weight {tuple(dense.shape)}; make them equal.")


def expect_score(layout: Layout, score: Tensor, sparsity: float | None) -> None:
    """Raise ValueError unless the layout can choose a mask from this score at this sparsity."""
    layout.check(tuple(score.shape))
    check_sparsity(sparsity, layout)
    if not score.dtype.is_floating_point:
        raise ValueError(f"A score is a floating-point tensor; got {score.dtype}: call .float() on it first.")


def expect_whole(owner: object, name: str, low: int, high: int) -> None:
    """Raise TypeError or ValueError unless the field `name` of a layout is a whole number from `low` to `high`."""
    value, kind = getattr(owner, name), type(owner).__name__
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{kind} takes a whole number for {name}; got {value!r}.")
    if not low <= value <= high:
        raise ValueError(f"{kind} takes {name} from {low} to {high}; got {value}.")


def pad_matrix(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """The matrix with zero rows below and zero columns on the right, up to this size; itself if it has it already."""
    more_rows, more_columns = rows - matrix.shape[0], columns - matrix.shape[1]
    return torch.nn.functional.pad(matrix, (0, more_columns, 0, more_rows)) if more_rows or more_columns else matrix


def cut(matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The weight of this shape from the upper left corner of a padded matrix, contiguous."""
    return matrix[: shape[0], : math.prod(shape[1:])].reshape(shape).contiguous()


def reduction_last(weight: Tensor, m: int) -> Tensor:
    """A weight (O, I, *rest) as the matrix (O, prod(rest) * Ip): inputs last, padded to Ip, a multiple of m."""
    last = weight.movedim(1, -1)
    pad = -weight.shape[1] % m
    last = torch.nn.functional.pad(last, (0, pad)) if pad else last
    return last.reshape(weight.shape[0], -1)


def reduction_back(matrix: Tensor, shape: tuple[int, ...], m: int) -> Tensor:
    """The inverse of `reduction_last`: the weight of this shape, its padding cut off."""
    inputs = shape[1]
    last = matrix.view(shape[0], *shape[2:], inputs + -inputs % m)
    return last[..., :inputs].movedim(-1, 1).contiguous()


def reduction_width(shape: tuple[int, ...], m: int) -> int:
    """The columns of `reduction_last`'s matrix for a weight of this shape: prod(rest) * Ip."""
    return math.prod(shape[2:]) * (shape[1] + -shape[1] % m)


def reduction_place(shape: tuple[int, ...], column: int, m: int) -> str:
    """Words that name a column of `reduction_last`'s matrix, for error messages: 'input 3, kernel position (0, 1)'."""
    width = shape[1] + -shape[1] % m
    spot, where = column // width, []
    for size in reversed(shape[2:]):
        where.insert(0, spot % size)
        spot //= size
    return f"input {column % width}" + (f", kernel position {tuple(where)}" if where else "")


def row_of_slots(crow: Tensor, slots: int) -> Tensor:
    """The row that owns each of `slots` slots; the number of rows for slots behind crow[-1]. Shapes stay static."""
    count = torch.cat([crow.diff(), slots - crow[-1:]])
    return torch.arange(len(crow), device=crow.device).repeat_interleave(count, output_size=slots)


def slots_of_rows(crow: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """All slots of the chosen rows, in order: (which of the rows, slot number). Their count depends on the data."""
    start = crow[rows].long()
    count = crow[rows + 1] - start
    which = torch.arange(len(rows), device=rows.device).repeat_interleave(count)
    first = count.cumsum(0) - count
    slot = torch.arange(len(which), device=rows.device) + (start - first)[which]
    return which, slot


def expect_compressed(layout: Layout, name: str, crow: Tensor, index_name: str, index: Tensor, size: int) -> None:
    """Raise ValueError unless `crow` delimits the rows of `index`, whose numbers lie in [0, size) and ascend in a row.

    Slots behind crow[-1] may exist (a fixed capacity); their numbers must lie in the range as well.
    """
    if int(crow[0]) != 0 or int(crow[-1]) > len(index) or bool((crow[1:] < crow[:-1]).any()):
        raise ValueError(
            f"Part {name!r} of {layout} must start at 0, never fall, and end at {len(index)} (the slots) at most; "
            f"got {int(crow[0])} to {int(crow[-1])}."
        )
    expect_range(layout, index_name, index, 0, size)
    row = row_of_slots(crow, len(index))
    falls = (row[1:] == row[:-1]) & (index[1:] <= index[:-1]) & (row[1:] < len(crow) - 1)
    if bool(falls.any()):
        slot = int(falls.nonzero()[0]) + 1
        raise ValueError(f"Part {index_name!r} of {layout} must ascend within a row, without repeats; see slot {slot}.")


def expect_zero(layout: Layout, padding: Tensor) -> None:
    """Raise ValueError unless these values, which belong to padding, are zero."""
    wrong = int((padding != 0).sum())
    if wrong:
        raise ValueError(
            f"Part 'values' of {layout} must be zero in slots that are padding or dropped; {wrong} are not."
        )


def fields(layout: Layout) -> dict[str, int | float | bool | tuple]:
    """The dataclass fields of a layout, as JSON can hold them (tuples become lists there)."""
    return {f.name: getattr(layout, f.name) for f in dataclasses.fields(layout)}


def layout_from(name: str, values: dict) -> Layout:
    """Build a registered layout from its class name and fields; ValueError where name or fields do not fit."""
    cls = REGISTERED.get(name)
    if cls is None:
        known = ", ".join(sorted(REGISTERED))
        raise ValueError(f"No layout named {name!r} is registered (known: {known}); import the module that defines it.")
    names = {f.name for f in dataclasses.fields(cls)}
    if set(values) != names:
        raise ValueError(f"Layout {name} has the fields {sorted(names)}; got {sorted(values)}.")
    plain = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        return cls(**plain)
    except TypeError as error:
        raise ValueError(f"Layout {name} does not accept {plain}: {error}.") from None
