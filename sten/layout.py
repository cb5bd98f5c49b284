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
                f"A layout named {cls.__name__!r} is registered already (by {known.__module__}); choose another class name."
            )
        REGISTERED[cls.__name__] = cls

    @property
    def rate(self) -> float | None:
        """The density that the layout itself fixes (n/m), or None where `sparsity` decides."""
        return None

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError, with one sentence that says what would fit, if a weight of this shape cannot be stored."""
        if len(shape) < 2:
            raise ValueError(f"{self} stores weights of two or more dimensions; got shape {tuple(shape)}.")

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
            raise ValueError(f"Part {name!r} of {layout} must be a plain dense tensor.")
        fits = part.dim() == len(shape) and all(want in (-1, have) for want, have in zip(shape, part.shape, strict=True))
        if not fits:
            raise ValueError(f"Part {name!r} of {layout} must have shape {tuple(shape)}; got {tuple(part.shape)}.")
        if part.dtype != dtype if dtype is not None else not part.dtype.is_floating_point:
            raise ValueError(f"Part {name!r} of {layout} must have dtype {dtype or 'floating point'}; got {part.dtype}.")
        if part.device != parts["values"].device:
            raise ValueError(f"Part {name!r} of {layout} lies on {part.device} but its values on {parts['values'].device}.")


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
    edge = torch.kthvalue(flat, max(flat.numel() - count, 0) + 1).values
    above = flat > edge
    ties = flat == edge
    room = count - above.sum()
    return (above | (ties & (ties.cumsum(0) <= room))).view(score.shape)


def fields(layout: Layout) -> dict[str, int | float | bool | tuple]:
    """The dataclass fields of a layout, as JSON can hold them (tuples become lists there)."""
    return {f.name: getattr(layout, f.name) for f in dataclasses.fields(layout)}


def layout_from(name: str, values: dict) -> Layout:
    """Build a registered layout from its class name and fields; ValueError where name or fields do not fit."""
    cls = REGISTERED.get(name)
    if cls is None:
        raise ValueError(f"No layout named {name!r} is registered (known: {', '.join(sorted(REGISTERED))}); import the module that defines it.")
    names = {f.name for f in dataclasses.fields(cls)}
    if set(values) != names:
        raise ValueError(f"Layout {name} has the fields {sorted(names)}; got {sorted(values)}.")
    plain = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        return cls(**plain)
    except TypeError as error:
        raise ValueError(f"Layout {name} does not accept {plain}: {error}.") from None
