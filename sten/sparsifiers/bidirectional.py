"""Transposable masks, BDWP and Bi-Mask: n:m in the forward product and in that of the input's gradient."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .._torch_private import refuse_tracing
from ..layouts import NM, DualMask
from ..layouts.base import Layout
from ..layouts.topk import widest_float
from ..tensor import SparseTensor
from .schedule import Constant, Schedule
from .sparsifier import DenseWeightMethod, Edit, State, View
from .straight_through import masked_straight_through, pruned_decay


class DualMaskWeight(torch.autograd.Function):
    """A dense weight as a SparseTensor in DualMask; its gradient comes back dense."""

    @staticmethod
    def forward(ctx, w, forward, backward):
        values = w.masked_fill(~(forward | backward), 0)
        return SparseTensor(DualMask(), {"values": values, "forward_mask": forward, "backward_mask": backward}, w.shape)

    @staticmethod
    def backward(ctx, grad):
        return grad.parts["values"] if isinstance(grad, SparseTensor) else grad, None, None


@torch.compiler.allow_in_graph
def dual_masked(w: Tensor, forward: Tensor, backward: Tensor) -> Tensor:
    """The weight with one mask for a product and another for the gradient of its input."""
    refuse_tracing()
    return DualMaskWeight.apply(w, forward, backward)


def along_outputs(layout: NM, score: Tensor) -> Tensor:
    """The n:m mask whose groups run along the outputs."""
    return layout.mask(score.transpose(0, 1).contiguous()).transpose(0, 1)


@functools.cache
def square_patterns(n: int, m: int) -> Tensor:
    """All m x m masks with n in every row and column, (patterns, m, m); 90 of them for 2:4."""
    rows = [tuple(i in chosen for i in range(m)) for chosen in itertools.combinations(range(m), n)]
    squares = itertools.product(rows, repeat=m)
    return torch.tensor([p for p in squares if all(sum(column) == n for column in zip(*p, strict=True))])


def transposable(layout: NM, score: Tensor) -> Tensor:
    """A mask that is n:m along inputs and outputs: the best one for m <= 4, a greedy one (at most n) above."""
    n, m = layout.n, layout.m
    score = score.to(widest_float(score.device))
    rows, columns = (-(-size // m) for size in score.shape)
    padded = F.pad(score, (0, columns * m - score.shape[1], 0, rows * m - score.shape[0]))
    blocks = padded.view(rows, m, columns, m).transpose(1, 2).reshape(-1, m, m)
    if m <= 4:
        patterns = square_patterns(n, m).to(score.device)
        chosen = patterns[(blocks.flatten(1) @ patterns.flatten(1).to(score.dtype).t()).argmax(1)]
    else:
        chosen = _greedy(blocks, n)
    matrix = chosen.view(rows, columns, m, m).transpose(1, 2).reshape(rows * m, columns * m)
    return matrix[: score.shape[0], : score.shape[1]]


def _greedy(blocks: Tensor, n: int) -> Tensor:
    """Entries in falling order, each taken if its row and its column have fewer than n."""
    count, m, _ = blocks.shape
    taken = torch.zeros(count, m, m, dtype=torch.bool, device=blocks.device)
    block = torch.arange(count, device=blocks.device)
    for index in blocks.flatten(1).sort(descending=True, stable=True).indices.unbind(1):
        row, column = index // m, index % m
        taken[block, row, column] = (taken[block, row].sum(1) < n) & (taken[block, :, column].sum(1) < n)
    return taken


@dataclass(frozen=True)
class Transposable(DenseWeightMethod):
    """One mask that is n:m along rows and columns, so that forward and backward products are both sparse; STE gradient.

    The mask is updated every `refresh` steps; `decay` as in SR-STE (FST adds it). Exact for m <= 4 (all 90 patterns of
    2:4); above, greedy: some groups have fewer than n entries.

    Source: Hubara et al., https://arxiv.org/abs/2102.08124, section 4 (transposable masks); Hu et al.,
    https://arxiv.org/abs/2404.01847 (the 90 patterns, refresh 40, masked decay).

    Example:
        >>> import torch, sten
        >>> model = torch.nn.Linear(8, 8)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> model = sten.sparsify(model, sten.NM(2, 4), sten.Transposable(), optimizer=optimizer)
        >>> (model.weight != 0).sum(0).tolist(), (model.weight != 0).sum(1).tolist()
        ([4, 4, 4, 4, 4, 4, 4, 4], [4, 4, 4, 4, 4, 4, 4, 4])
    """

    refresh: int = 40
    decay: float = 2e-4
    schedule: Schedule | None = field(default=None, kw_only=True)

    layouts: ClassVar[tuple[type[Layout], ...]] = (NM,)

    def default_schedule(self) -> Schedule:
        return Constant(0.0, start=self.refresh, every=self.refresh)

    def update(self, view: View) -> Edit:
        return Edit(mask=transposable(view.layout, self.score(view)))

    def apply(self, w: Tensor, view: View) -> Tensor:
        return masked_straight_through(w, view.mask)

    def grad(self, view: View) -> Tensor:
        return pruned_decay(view, view.mask, self.decay)

    def finish(self, view: View) -> Edit:
        return Edit(mask=view.mask)


@dataclass(frozen=True)
class BDWP(DenseWeightMethod):
    """n:m along inputs in the forward product, along outputs in the input's gradient; the weight's gradient is dense.

    Source: Fang et al., Efficient N:M Sparse DNN Training Using Algorithm, Architecture, and Dataflow Co-Design,
    https://arxiv.org/abs/2309.13015. UNVERIFIED: that both masks are taken independently from the dense weight.

    Example:
        >>> import torch, sten
        >>> model = torch.nn.Linear(8, 8)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> model = sten.sparsify(model, sten.NM(2, 4), sten.BDWP(), optimizer=optimizer)
        >>> model.weight.parts["backward_mask"].sum(0).tolist()
        [4, 4, 4, 4, 4, 4, 4, 4]
    """

    layouts: ClassVar[tuple[type[Layout], ...]] = (NM,)
    stateless: ClassVar[bool] = True

    def apply(self, w: Tensor, view: View) -> Tensor:
        score = self.score(view)
        return dual_masked(w, view.layout.mask(score), along_outputs(view.layout, score))


@dataclass(frozen=True)
class BiMask(DenseWeightMethod):
    """BDWP with the backward mask taken from the forward-masked weight, its rows in the best of several random orders.

    Every `refresh` steps `tries` orders are compared, and the one with most entries in both masks is taken; SR-STE's
    decay is added to the weight's gradient. The gradient of the input is biased: forward and backward weights differ.

    Source: Zhang et al., Bi-directional Masks for Efficient N:M Sparse Training, https://arxiv.org/abs/2302.06058,
    section 3.

    Example:
        >>> import sten
        >>> sten.BiMask(refresh=100).schedule.every
        100
    """

    refresh: int = 100
    tries: int = 10
    decay: float = 2e-4
    seed: int = 0
    schedule: Schedule | None = field(default=None, kw_only=True)

    layouts: ClassVar[tuple[type[Layout], ...]] = (NM,)

    def default_schedule(self) -> Schedule:
        return Constant(0.0, start=self.refresh, every=self.refresh)

    def init(self, view: View) -> State:
        return {"order": torch.arange(len(view.weight), device=view.weight.device)}

    def check_state(self, state: State) -> None:
        order = state["order"]
        if not torch.equal(order.sort().values, torch.arange(len(order), device=order.device)):
            raise ValueError("Expected each output once in the order of BiMask, got others.")

    def backward_mask(self, view: View, order: Tensor) -> Tensor:
        """n:m along the reordered outputs of the forward-masked weight."""
        score = self.score(view).masked_fill(~self.present_mask(view), 0)
        mask = along_outputs(view.layout, score[order])
        return torch.empty_like(mask).index_copy_(0, order, mask) & self.present_mask(view)

    def update(self, view: View) -> Edit:
        if view.mask is None:
            return super().update(view)
        rows, device = len(view.weight), view.weight.device
        orders = [torch.randperm(rows, generator=view.generator).to(device) for _ in range(self.tries)]
        best = max([view.state["order"], *orders], key=lambda order: int(self.backward_mask(view, order).sum()))
        return Edit(mask=self.present_mask(view), state={"order": best})

    def apply(self, w: Tensor, view: View) -> Tensor:
        return dual_masked(w, self.present_mask(view), self.backward_mask(view, view.state["order"]))

    def grad(self, view: View) -> Tensor:
        return pruned_decay(view, self.present_mask(view), self.decay)

    def finish(self, view: View) -> Edit:
        return Edit(mask=self.present_mask(view))
