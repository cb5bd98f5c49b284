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
NEVER = 1e30  # the cost of keeping what an earlier pruning left out; finite, as it is multiplied by zero


@dataclass(frozen=True)
class SparseSwaps(Refinement):
    """Exchange kept and dropped entries of a mask, while that lowers the error d G d^T of a row.

    G is the mean of x x^T and d the weights that are dropped. With c = G d, dropping p and keeping u instead changes
    the error by 2 w_p c_p + w_p^2 G_pp - 2 w_u c_u + w_u^2 G_uu - 2 w_p w_u G_pu, exactly. A sweep visits the groups of
    the layout in turn and makes the best exchange in each row of each; without groups (CSR, FanIn, BSR), windows of 32
    neighbours, and every other sweep of entries that lie far apart. Whole tiles are exchanged: vectors, blocks, and the
    patterns of two columns of GroupedNM. The weights stay those of the dense layer: follow it with `sten.ADMM`.

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


def exchange(
    weight: Tensor, kept: Tensor, effect: Tensor, gram: Tensor, barred: Tensor | None, sizes: list[int]
) -> tuple[Tensor, Tensor]:
    """The best exchange of two tiles in each band of each group of a block of tiles, where it lowers the error.

    Returns the new `kept` (bands, rows, tiles) and the change of d, of the weight's shape. `effect` is c = G d.
    """
    kept, effect, delta, start = kept.clone(), effect.contiguous(), torch.zeros_like(weight), 0
    for size in sizes:
        here = slice(start, start := start + size)
        if size == 1:
            continue
        part, on = weight[:, :, here], kept[:, :, here]
        forbidden = None if barred is None else barred[:, :, here]
        change = exchange_costs(part, on.float(), effect[:, :, here], gram[here][:, :, here], forbidden)
        least, pair = change.flatten(1).min(1, keepdim=True)
        first, second = (torch.where(least < 0, index, 0) for index in (pair // size, pair % size))
        source = torch.arange(size, device=pair.device).repeat(len(pair), 1)
        source = source.scatter(1, first, second).scatter(1, second, first)
        now = on.gather(2, source.unsqueeze(1).expand_as(on))
        moved = part * (on.float() - now.float()).unsqueeze(3)
        effect += (moved.flatten(2) @ gram[here].flatten(0, 1).flatten(1)).view(effect.shape)
        kept[:, :, here], delta[:, :, here] = now, moved
    return kept, delta


def exchange_costs(weight: Tensor, on: Tensor, effect: Tensor, gram: Tensor, barred: Tensor | None) -> Tensor:
    """(bands, tiles, tiles): by how much the error changes if two tiles exchange their masks.

    Rows in which both are kept, or both dropped, contribute nothing.
    """
    off = 1 - on
    if gram.shape[1] == 1:
        own = weight[..., 0].square() * gram[:, 0, :, 0].diagonal()
    else:
        own = torch.einsum("bhtw,twv,bhtv->bht", weight, gram.diagonal(dim1=0, dim2=2).permute(2, 0, 1), weight)
    slope = 2 * (weight * effect).sum(3)
    drop, keep = (own + slope) * on, (own - slope) * off
    if barred is not None:
        keep = keep + NEVER * off * barred
    single = outer(drop, off) + outer(keep, on)
    cross = outer((weight * on.unsqueeze(3)).flatten(2), (weight * off.unsqueeze(3)).flatten(2))
    cross = cross * gram.flatten(0, 1).flatten(1)
    count, width = gram.shape[:2]
    if width > 1:
        cross = cross.view(-1, count, width, count, width).sum((2, 4))
    change = single.sub_(cross, alpha=2)
    return change + change.transpose(1, 2)


def outer(a: Tensor, b: Tensor) -> Tensor:
    """The sum over rows of all products of two columns, (bands, columns, columns)."""
    return a.transpose(1, 2) * b if a.shape[1] == 1 else a.transpose(1, 2) @ b
