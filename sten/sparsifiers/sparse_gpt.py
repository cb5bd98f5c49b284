"""SparseGPT: column by column, the error of what is dropped is made up for by the columns that follow."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..layouts.base import Layout
from ..layouts.checks import expect_whole
from .calibration import filled, float32_update, input_gram, input_norms
from .sparsifier import Edit, PatternMethod, View

DEAD = 1e-12  # damping of inputs that are always zero
ENOUGH = 1e3  # damping, with which any mean of x x^T is far from singular
PIECE = 16  # columns whose errors are solved for together
Spans = list[tuple[int, int]]
Chooser = Callable[[int, int, list[Tensor], Callable[[int, int], Tensor]], Tensor]


@dataclass(frozen=True)
class SparseGPT(PatternMethod):
    """Choose and update block by block of columns: the remaining weights make up for what is dropped.

    With H = mean of x x^T + damping * mean(diag H) * I and U the upper Cholesky factor of its inverse, dropping w_ij
    costs (w_ij / U_jj)^2 and moves the later columns k of its row by -w_ij / U_jj * U_jk. What costs least is dropped:

    - n:m layouts choose group after group, from weights that hold all updates so far; a vector costs the sum of its
      entries, and GroupedNM chooses a chunk of columns at a time;
    - layouts whose count is that of the whole weight (CSR, Masked, FanIn, BSR) choose for `block` columns at a time, by
      the costs in all columns that are left. (The source keeps the same fraction of every `block` columns; on layers of
      a language model that made the error 10 % larger, and 35 % with blocks.) A block of BSR costs what dropping all of
      it costs, |w U^-1|^2 with U of its columns.

    In a chain behind another method it takes that mask and only updates the weights.

    Source: Frantar and Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot,
    https://arxiv.org/abs/2301.00774, section 3 and algorithm 1.

    Args:
        block: columns after which the update reaches all later columns.
        damping: fraction of the mean of H's diagonal that is added to it. Where H is too close to singular (few
            tokens), it rises tenfold until the factorization succeeds, with a warning.

    Example:
        >>> import torch, sten
        >>> x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, 1)
        >>> stats = {"x_gram": x.T @ x / 64, "tokens": torch.tensor(64)}  # each input twice: one weight does for both
        >>> view = sten.extend.View("w", torch.ones(1, 4), sten.NM(2, 4), stats=stats)
        >>> sten.SparseGPT().update(view).value.round(decimals=1)
        tensor([[0., 2., 0., 2.]])
    """

    block: int = 128
    damping: float = 0.01

    needs: ClassVar[frozenset[str]] = frozenset({"x_gram"})
    refines: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_whole(self, "block", 1)
        if not 0 < self.damping < math.inf:
            raise ValueError(f"Expected a finite damping > 0 for SparseGPT, got {self.damping!r}.")

    def score(self, view: View) -> Tensor:
        """(w_ij / U_jj)^2 of the weights as they are. Where an allocation compares all weights, whose Gram matrices
        would not fit in memory together, H is its diagonal, and 1 / U_jj^2 is H_jj."""
        if "x_gram" not in view.stats:
            diagonal = input_norms(view).square()
            costs = diagonal + self.damping * diagonal.mean()
            return (view.weight.flatten(1).float().square() * costs).view(view.weight.shape)
        factor = inverse_factor(input_gram(view), self.damping, view.name)
        return (view.weight.flatten(1).float() / factor.diagonal()).square().view(view.weight.shape)

    @float32_update
    def update(self, view: View) -> Edit:
        weight, device = view.weight, view.weight.device
        groups = view.layout.column_groups(tuple(weight.shape))
        order = groups.argsort(stable=True).to(device)
        factor = inverse_factor(input_gram(view)[order][:, order], self.damping, view.name)
        columns = weight.flatten(1).float().t()[order].contiguous()  # (columns, rows): a column is contiguous
        width = (view.layout.tile(tuple(weight.shape)) or (1, 1))[1]
        spans = blocks_of(groups, self.block, view.layout.rate is None)
        left = None if view.left is None else view.left.flatten(1).t()[order]
        mask = eliminate(columns, factor, width, spans, chooser(view, order), least_kept(view), left)
        back = order.argsort()
        mask = mask[back].t().reshape(weight.shape).contiguous()
        value = columns[back].t().reshape(weight.shape).to(weight.dtype).masked_fill(~filled(view, mask), 0)
        return Edit(mask=mask, value=value.contiguous())


def inverse_factor(gram: Tensor, damping: float, name: str) -> Tensor:
    """The upper triangular U with U^T U = (H + damping * mean(diag H) * I)^-1, in one factorization and one inverse.

    H reversed in both directions is L L^T, so H is R R^T with R, L reversed, upper triangular; then U = R^-1.
    """
    diagonal = gram.diagonal()
    mean = diagonal.mean()
    mean = torch.where(mean > 0, mean, 1.0)
    used = damping
    while True:
        # A dead input, always zero, costs next to nothing, so it goes first.
        more = torch.where(diagonal > 0, used, DEAD) * mean
        lower, failed = torch.linalg.cholesky_ex((gram + torch.diag(more)).flip(0, 1))
        if not int(failed):
            break
        used *= 10
        if used > ENOUGH * max(damping, 1):
            raise ValueError(
                f"Expected the Gram matrix of {name} to have a Cholesky factorization, got none even with damping "
                f"{used:g}; its inputs are too large for float32, or it is not positive semidefinite."
            )
    if used > damping:
        warnings.warn(
            f"sten: the Gram matrix of {name} is close to singular; damping was raised from {damping:g} to {used:g}. "
            "More calibration tokens would help.",
            stacklevel=2,
        )
    eye = torch.eye(len(gram), device=gram.device)
    return torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)


def blocks_of(groups: Tensor, block: int, whole: bool) -> Iterator[Spans]:
    """Blocks of at least `block` columns, each as the spans in which entries are chosen together: single groups, or
    with `whole` all groups of a block, of which there are as many as fit in `block`."""
    ends = groups.bincount().cumsum(0).tolist()
    spans, first = [], 0
    for i, (start, stop) in enumerate(itertools.pairwise([0, *ends])):
        spans.append((start, stop))
        following = ends[i + 1] if i + 1 < len(ends) else None
        if following is None or following - first > block:
            yield [(first, stop)] if whole else spans
            spans, first = [], stop


def least_kept(view: View) -> float:
    """The fraction of each row of a group that the layout keeps at least, where it chooses and says so."""
    layout = view.layout
    own = layout.independent_units and type(layout).column_groups is not Layout.column_groups
    chooses = own and view.previous is None and view.left is None
    return layout.rate if chooses and layout.rate is not None else 0.0


def eliminate(
    columns: Tensor,
    factor: Tensor,
    width: int,
    blocks: Iterable[Spans],
    choose: Chooser,
    kept: float,
    left: Tensor | None = None,
) -> Tensor:
    """Choose, and let later columns make up for what is dropped: `columns` (columns, rows) changes; returns the mask.

    Entries off the mask keep numbers without meaning. `width`: columns of a tile; `kept`: the fraction of each row of a
    span that is kept at least; `left`: what an earlier pruning has left, in the shape of `columns`.

    The errors e of dropped entries, zero where kept, solve e_j U_jj = w_j - sum of e_i U_ij over i < j: a triangular
    system of each row, over its own dropped columns. Substitution for all of them at once, repeated as often as a row
    has dropped columns in a piece, is exact, and takes few and large operations.
    """
    masks: list[Tensor] = []
    scale, strict = factor.diagonal().reciprocal().unsqueeze(1), factor.triu(1)
    for spans in blocks:
        first, last, errors = spans[0][0], spans[-1][1], []
        for start, stop in spans:
            masks.append(choose(start, stop, masks, lambda a, b: costs(columns, factor, width, a, b)))
            stays = masks[-1] if left is None else masks[-1] & left[start:stop]
            dropped = scale[start:stop] * ~stays
            most = stop - start - math.floor(kept * (stop - start) + 1e-6)
            for a in range(start, stop, PIECE):
                b = min(a + PIECE, stop)
                piece, among, inner = columns[a:b], dropped[a - start : b - start], strict[a:b, a:b].t()
                solved = piece * among
                for _ in range(min(b - a, most) - 1):
                    solved = torch.addmm(piece, inner, solved, alpha=-1).mul_(among)
                columns[a:last].addmm_(strict[a:b, a:last].t(), solved, alpha=-1)
                errors.append(solved)
        columns[last:].addmm_(factor[first:last, last:].t(), torch.cat(errors), alpha=-1)
    return torch.cat(masks)


def costs(columns: Tensor, factor: Tensor, width: int, start: int, stop: int) -> Tensor:
    """What dropping each entry costs, (rows, columns from start to stop); its sum over a tile is the cost of the tile.

    An entry alone costs (w_j / U_jj)^2. The columns of a tile are dropped together: e U = w, with U of the tile.
    """
    if width == 1:
        return (columns[start:stop] / factor.diagonal()[start:stop].unsqueeze(1)).square_().t()
    whole = stop - (stop - start) % width
    tiles = columns[start:whole].view(-1, width, columns.shape[1])
    own = factor[start:whole, start:whole].view(len(tiles), width, len(tiles), width).diagonal(dim1=0, dim2=2)
    error = torch.linalg.solve_triangular(own.permute(2, 1, 0), tiles, upper=False).flatten(0, 1)
    if whole < stop:  # a short tile at the end
        own = factor[whole:stop, whole:stop].t()
        error = torch.cat([error, torch.linalg.solve_triangular(own, columns[whole:stop], upper=False)])
    return error.square().t()


def chooser(view: View, order: Tensor) -> Chooser:
    """The mask (columns, rows) of one span of columns: given by the method before, or the layout's.

    A layout without a rate looks at the whole weight, whose columns before the span are decided.
    """
    layout, sparsity = view.layout, view.sparsity
    allowed = None if view.allowed is None else view.allowed.flatten(1)[:, order]
    given = None if view.previous is None else view.previous.mask.flatten(1).t()[order]

    def choose(start: int, stop: int, before: list[Tensor], cost: Callable[[int, int], Tensor]) -> Tensor:
        if given is not None:
            return given[start:stop]
        end = stop if layout.rate is not None else len(order)
        score = cost(start, end)
        if allowed is not None:
            score = score.masked_fill(~allowed[:, start:end], -torch.inf)
        if layout.rate is not None:
            return layout.mask(score).t()
        decided = [torch.where(mask.t(), torch.inf, -torch.inf) for mask in before]
        return layout.mask(torch.cat([*decided, score], 1), sparsity)[:, start:stop].t()

    return choose
