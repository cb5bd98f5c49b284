"""SparseSwaps: a mask made better by exchanges, each of which lowers the error of the outputs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layouts.base import Layout
from ..layouts.checks import expect_whole
from .calibration import Refinement, float32_update, input_gram, starting_mask
from .sparsifier import Edit, Sparsifier, View

WINDOW = 32  # tiles that are compared with each other where a layout has no groups
BLOCK = 128  # tiles, about, after which the effect of exchanges reaches all columns
TOGETHER = 16  # groups of a block that are visited together, if there are so many of one size
ROUNDS = 3  # of such visits in a sweep
NEVER = 1e30  # the cost of keeping what an earlier pruning left out; finite, as it is multiplied by zero


@dataclass(frozen=True)
class SparseSwaps(Refinement):
    """Exchange kept and dropped entries of a mask, while that lowers the error d G d^T of a row.

    G is the mean of x x^T and d the weights that are dropped. With c = G d, dropping p and keeping u instead changes
    the error by 2 w_p c_p + w_p^2 G_pp - 2 w_u c_u + w_u^2 G_uu - 2 w_p w_u G_pu, exactly. A sweep visits the groups of
    the layout in turn and makes the best exchange in each row of each: of many small ones (2:4, 4:8) together, as far
    as all lower the error at once; without groups (CSR, FanIn, BSR), of windows of 32 neighbours, and every other sweep
    of entries that lie far apart. Whole tiles are exchanged: vectors, blocks, and the patterns of two columns of
    GroupedNM. The weights stay those of the dense layer: follow it with `sten.ADMM`.

    The mask is that of the method before in a chain, else Wanda's.

    Source: Zimmer et al., SparseSwaps: Tractable LLM Pruning Mask Refinement at Scale,
    https://arxiv.org/abs/2512.10922.

    Example:
        >>> import torch, sten
        >>> stats = {"x_gram": torch.tensor([[1.0, 0.9], [0.9, 2.0]]), "tokens": torch.tensor(64)}
        >>> view = sten.extend.View("w", torch.tensor([[1.1, 1.0]]), sten.NM(1, 2), stats=stats)
        >>> sten.chain(sten.Magnitude(), sten.SparseSwaps()).update(view).mask
        tensor([[False,  True]])
    """

    sweeps: int = 4

    needs: ClassVar[frozenset[str]] = frozenset({"x_gram"})

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_whole(self, "sweeps", 1)

    def check(self, layout: Layout) -> None:
        super().check(layout)
        expect_groups(layout, self)

    @float32_update
    def update(self, view: View) -> Edit:
        mask, layout, shape = starting_mask(view), view.layout, tuple(view.weight.shape)
        tiles = Tiling(layout, shape, view.weight.device)
        weight, gram = tiles.split(view.weight.float()), tiles.gram(input_gram(view))
        kept = tiles.split(mask).any(3)
        barred = None if view.allowed is None else ~tiles.split(view.allowed).any(3)
        for sweep in range(self.sweeps):
            before = kept
            effect = ((weight * ~before.unsqueeze(3)).flatten(2) @ gram.flatten(0, 1).flatten(1)).view(weight.shape)
            for at, sizes in tiles.blocks(apart=sweep % 2 == 1):
                local = gram[at][:, :, at]
                barred_here = None if barred is None else barred[:, :, at]
                now, delta = exchange(weight[:, :, at], kept[:, :, at], effect[:, :, at], local, barred_here, sizes)
                kept = kept.index_copy(2, at, now)
                effect += (delta.flatten(2) @ gram[at].flatten(0, 1).flatten(1)).view(weight.shape)
            if torch.equal(kept, before):
                break
        return Edit(mask=tiles.join(kept))


def expect_groups(layout: Layout, method: Sparsifier) -> None:
    """Raise ValueError for a layout that does not say which entries may be exchanged."""
    unknown = layout.rate is not None and type(layout).column_groups is Layout.column_groups
    if unknown or layout.tile((1, 1)) is None:
        raise ValueError(
            f"Expected a layout that defines column_groups and tile for {method}, which exchanges entries, got "
            f"{layout}; use sten.Wanda() or sten.SparseGPT()."
        )


class Tiling:
    """How a layout divides a weight: (bands, rows of a tile, tiles, columns of a tile), zero-padded at the end."""

    def __init__(self, layout: Layout, shape: tuple[int, ...], device: torch.device) -> None:
        rows, columns = shape[0], math.prod(shape[1:])
        groups = layout.column_groups(shape)
        self.shape, self.order = shape, groups.argsort(stable=True).to(device)
        height, width = layout.tile(shape)
        self.height, self.width = min(height, rows), min(width, columns)
        self.down, self.right = -rows % self.height, -columns % self.width
        self.count = (columns + self.right) // self.width
        self.sizes = None if layout.rate is None else groups.bincount().tolist()

    def split(self, tensor: Tensor) -> Tensor:
        """A weight, or its mask, as tiles."""
        padded = F.pad(tensor.flatten(1)[:, self.order], (0, self.right, 0, self.down))
        return padded.view(-1, self.height, self.count, self.width)

    def gram(self, gram: Tensor) -> Tensor:
        """(tiles, columns of a tile, tiles, columns of a tile)."""
        padded = F.pad(gram[self.order][:, self.order], (0, self.right, 0, self.right))
        return padded.view(self.count, self.width, self.count, self.width)

    def join(self, kept: Tensor) -> Tensor:
        """The mask, of the weight's shape, of the kept (bands, rows, tiles)."""
        matrix = kept.unsqueeze(3).expand(-1, -1, -1, self.width).flatten(2).flatten(0, 1)
        return matrix[: self.shape[0], self.order.argsort()].view(self.shape).contiguous()

    def groups(self) -> Tensor:
        """The number of each tile's group; all zero without groups."""
        if self.sizes is None:
            return torch.zeros(self.count, dtype=torch.int64, device=self.order.device)
        sizes = torch.tensor(self.sizes, device=self.order.device)
        return torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)

    def blocks(self, apart: bool) -> Iterator[tuple[Tensor, list[int]]]:
        """Tiles whose groups are visited together, and the sizes of these groups; without groups, windows: neighbours,
        or tiles that lie far apart. Made on the device: a copy to it would wait for all exchanges so far."""
        every = torch.arange(self.count, device=self.order.device)
        if self.sizes is None:
            count = -(-self.count // WINDOW)
            for window in [every[start::count] for start in range(count)] if apart else every.split(WINDOW):
                yield window, [len(window)]
            return
        start, sizes = 0, []
        for i, size in enumerate(self.sizes):
            sizes.append(size)
            if sum(sizes) >= BLOCK or i == len(self.sizes) - 1:
                yield every[start : start + sum(sizes)], sizes
                start, sizes = start + sum(sizes), []


def visits(sizes: list[int]) -> Iterator[tuple[slice, int]]:
    """Where the groups of a block of tiles are, and how many of them are visited together: many of one size, several
    times, or one after the other. On a GPU a group alone costs as many launches as many together."""
    same = next((i for i, size in enumerate(sizes) if size != sizes[0]), len(sizes))
    together = same if same >= TOGETHER else 0
    for _ in range(ROUNDS if together else 0):
        yield slice(0, together * sizes[0]), together
    start = together * sizes[0]
    for size in sizes[together:]:
        yield slice(start, start := start + size), 1


def exchange(
    weight: Tensor, kept: Tensor, effect: Tensor, gram: Tensor, barred: Tensor | None, sizes: list[int]
) -> tuple[Tensor, Tensor]:
    """The best exchange of two tiles in each band of each group of a block of tiles, where it lowers the error.

    Returns the new `kept` (bands, rows, tiles) and the change of d, of the weight's shape. `effect` is c = G d.
    """
    kept, effect, delta = kept.clone(), effect.contiguous(), torch.zeros_like(weight)
    for here, count in visits(sizes):
        if here.stop - here.start == count:  # nothing to exchange
            continue
        forbidden, local = None if barred is None else barred[:, :, here], gram[here][:, :, here]
        now, moved = exchange_groups(weight[:, :, here], kept[:, :, here], effect[:, :, here], local, forbidden, count)
        effect += (moved.flatten(2) @ gram[here].flatten(0, 1).flatten(1)).view(effect.shape)
        kept[:, :, here] = now
        delta[:, :, here] += moved
    return kept, delta


def exchange_groups(
    weight: Tensor, kept: Tensor, effect: Tensor, gram: Tensor, barred: Tensor | None, count: int
) -> tuple[Tensor, Tensor]:
    """`exchange` in `count` groups of one size, all at once.

    The error changes by the sum of what each exchange changes alone, and by 2 a G b for the changes a and b of each
    two groups. Of the groups in order, as many are exchanged as make the sum the lowest.
    """
    bands, rows, tiles, width = weight.shape
    size = tiles // count

    def grouped(t: Tensor) -> Tensor:  # (bands, groups, rows, tiles of a group, ...)
        return t.unflatten(2, (count, size)).transpose(1, 2)

    part, on = grouped(weight), grouped(kept)
    own = gram.view(count, size, width, count, size, width).diagonal(dim1=0, dim2=3).permute(4, 0, 1, 2, 3)
    forbidden = None if barred is None else grouped(barred)
    least, pair = exchange_costs(part, on.float(), grouped(effect), own, forbidden).flatten(2).min(2, keepdim=True)
    first, second = (torch.where(least < 0, index, 0) for index in (pair // size, pair % size))
    source = torch.arange(size, device=pair.device).expand(bands, count, size)
    source = source.scatter(2, first, second).scatter(2, second, first)
    now = on.gather(3, source.unsqueeze(2).expand_as(on))
    moved = part * (on.float() - now.float()).unsqueeze(4)
    if count > 1:
        number = torch.arange(count, device=pair.device)
        group = number.repeat_interleave(size * width)
        matrix = gram.flatten(0, 1).flatten(1) * (group.unsqueeze(1) < group)
        flat = moved.transpose(1, 2).reshape(bands, rows, -1)
        mutual = ((flat @ matrix) * flat).view(bands, rows, count, -1).sum((1, 3))
        lowest, last = (least.squeeze(2) + 2 * mutual).cumsum(1).min(1, keepdim=True)
        accepted = ((number <= last) & (lowest < 0)).view(bands, count, 1, 1)
        now, moved = torch.where(accepted, now, on), moved * accepted.unsqueeze(4)
    return now.transpose(1, 2).reshape(kept.shape), moved.transpose(1, 2).reshape(weight.shape)


def exchange_costs(weight: Tensor, on: Tensor, effect: Tensor, gram: Tensor, barred: Tensor | None) -> Tensor:
    """(bands, groups, tiles, tiles): by how much the error changes if two tiles of a group exchange their masks.

    The weight is (bands, groups, rows, tiles, columns), the matrix of each group (tiles, columns, tiles, columns). Rows
    in which both tiles are kept, or both dropped, contribute nothing.
    """
    off, (count, width) = 1 - on, gram.shape[1:3]
    if width == 1:
        own = weight[..., 0].square() * gram[:, :, 0, :, 0].diagonal(dim1=1, dim2=2).unsqueeze(1)
    else:
        own = torch.einsum("bghtw,gtwv,bghtv->bght", weight, gram.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2), weight)
    slope = 2 * (weight * effect).sum(4)
    drop, keep = (own + slope) * on, (own - slope) * off
    if barred is not None:
        keep = keep + NEVER * off * barred
    single = outer(drop, off) + outer(keep, on)
    cross = outer((weight * on.unsqueeze(4)).flatten(3), (weight * off.unsqueeze(4)).flatten(3))
    cross = cross * gram.flatten(1, 2).flatten(2)
    if width > 1:
        cross = cross.view(*cross.shape[:2], count, width, count, width).sum((3, 5))
    change = single.sub_(cross, alpha=2)
    return change + change.transpose(2, 3)


def outer(a: Tensor, b: Tensor) -> Tensor:
    """The sum over rows of all products of two columns, (bands, groups, columns, columns)."""
    return a.transpose(2, 3) * b if a.shape[2] == 1 else a.transpose(2, 3) @ b
