"""Transposable masks, BDWP and Bi-Mask: n:m in the forward product and in that of the input's gradient."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dispatch import kernel
from ..layout import Layout, Parts, expect_dense, expect_parts, expect_score, kept, top
from ..layouts import NM
from ..ops.conv import GEOMETRY, INPUT, WEIGHT
from ..schedule import FOREVER, Constant, Schedule
from ..tensor import SparseTensor
from .masks import DenseMaster, masked
from .sparsifier import Edit, State, View


@dataclass(frozen=True)
class TwoFaced(Layout):
    """A dense weight that the forward product sees through one mask and the input's gradient through another.

    Parts, all of the weight's shape: `values`; `forward` and `backward`, bool. The gradient of the values is dense. A
    form for training alone; it saves no memory.

    Example:
        >>> import torch, sten
        >>> w = sten.from_dense(torch.ones(1, 2), sten.sparsifiers.TwoFaced(), torch.tensor([[True, False]]))
        >>> w.to_dense()
        tensor([[1., 0.]])
    """

    pattern: ClassVar[tuple[str, ...]] = ("forward", "backward")

    def mask(self, score: Tensor, sparsity: float | None = None) -> Tensor:
        expect_score(self, score, sparsity)
        return top(score, kept(score.numel(), sparsity, self))

    def pack(self, dense: Tensor, mask: Tensor) -> Parts:
        expect_dense(self, dense, mask)
        return {"values": dense.masked_fill(~mask, 0), "forward": mask.clone(), "backward": mask.clone()}

    def unpack(self, parts: Parts, shape: tuple[int, ...]) -> Tensor:
        return parts["values"].masked_fill(~parts["forward"], 0)

    def pack_like(self, dense: Tensor, parts: Parts) -> Tensor:
        return dense

    def support(self, parts: Parts, shape: tuple[int, ...]) -> Tensor:
        return parts["forward"].clone()

    def validate(self, parts: Parts, shape: tuple[int, ...]) -> None:
        self.check(shape)
        expect_parts(
            self, parts, {"values": (shape, None), "forward": (shape, torch.bool), "backward": (shape, torch.bool)}
        )


def back(weight: Parts) -> Tensor:
    """What the gradient of the input sees."""
    return weight["values"].masked_fill(~weight["backward"], 0)


def linear(x, weight, bias, *, layout, shape):
    """Dense product with the forward mask."""
    return F.linear(x, layout.unpack(weight, shape), bias)


def linear_grad_input(grad, weight, *, layout, shape):
    """Dense product with the backward mask."""
    return grad @ back(weight)


def linear_grad_weight(grad, x, weight, *, layout, shape):
    """The dense gradient."""
    return grad.flatten(0, -2).t() @ x.flatten(0, -2)


def conv2d_grad_input(grad, weight, *, layout, shape, size, **geometry):
    """Dense transposed convolution with the backward mask."""
    return INPUT[len(shape)](size, back(weight), grad, *(geometry[name] for name in GEOMETRY))


def conv2d_grad_weight(grad, x, weight, *, layout, shape, **geometry):
    """The dense gradient."""
    return WEIGHT[len(shape)](x, shape, grad, *(geometry[name] for name in GEOMETRY))


for _rule in (linear, linear_grad_input, linear_grad_weight, conv2d_grad_input, conv2d_grad_weight):
    for _device in ("cpu", "cuda"):
        kernel(_rule.__name__, weight=TwoFaced, device=_device)(_rule)


class Faces(torch.autograd.Function):
    """A dense weight as a TwoFaced SparseTensor; its gradient comes back dense."""

    @staticmethod
    def forward(ctx, w, forward, backward):
        return SparseTensor(TwoFaced(), {"values": w, "forward": forward, "backward": backward}, w.shape)

    @staticmethod
    def backward(ctx, grad):
        return grad.parts["values"] if isinstance(grad, SparseTensor) else grad, None, None


@torch._dynamo.allow_in_graph
def faces(w: Tensor, forward: Tensor, backward: Tensor) -> Tensor:
    """The weight as the two products see it."""
    return Faces.apply(w, forward, backward)


def along_outputs(layout: NM, score: Tensor) -> Tensor:
    """The n:m mask whose groups run along the outputs."""
    return layout.mask(score.transpose(0, 1).contiguous()).transpose(0, 1)


def expect_nm(method: object, layout: Layout) -> None:
    if not isinstance(layout, NM):
        raise ValueError(f"{type(method).__name__} is defined for sten.NM; got {layout}.")


@functools.cache
def square_patterns(n: int, m: int) -> Tensor:
    """All m x m masks with n in every row and column, (patterns, m, m); 90 of them for 2:4."""
    rows = [tuple(i in chosen for i in range(m)) for chosen in itertools.combinations(range(m), n)]
    found = [p for p in itertools.product(rows, repeat=m) if all(sum(column) == n for column in zip(*p, strict=True))]
    return torch.tensor(found)


def transposable(layout: NM, score: Tensor) -> Tensor:
    """A mask that is n:m along inputs and outputs: the best one for m <= 4, a greedy one (at most n) above."""
    n, m = layout.n, layout.m
    rows, columns = (-(-size // m) for size in score.shape)
    padded = F.pad(score.double(), (0, columns * m - score.shape[1], 0, rows * m - score.shape[0]))
    blocks = padded.view(rows, m, columns, m).transpose(1, 2).reshape(-1, m, m)
    if m <= 4:
        patterns = square_patterns(n, m).to(score.device)
        chosen = patterns[(blocks.flatten(1) @ patterns.flatten(1).double().t()).argmax(1)]
    else:
        chosen = _greedy(blocks, n)
    return (
        chosen.view(rows, columns, m, m)
        .transpose(1, 2)
        .reshape(rows * m, columns * m)[: score.shape[0], : score.shape[1]]
    )


def _greedy(blocks: Tensor, n: int) -> Tensor:
    """Entries in falling order, each taken if its row and its column have room."""
    count, m, _ = blocks.shape
    taken = torch.zeros(count, m, m, dtype=torch.bool, device=blocks.device)
    which = torch.arange(count, device=blocks.device)
    for place in blocks.flatten(1).sort(descending=True, stable=True).indices.unbind(1):
        row, column = place // m, place % m
        taken[which, row, column] = (taken[which, row].sum(1) < n) & (taken[which, :, column].sum(1) < n)
    return taken


@dataclass(frozen=True)
class Transposable(DenseMaster):
    """One mask that is n:m along rows and columns, so that forward and backward products are both sparse; STE gradient.

    The mask is chosen anew every `refresh` steps; `decay` as in SR-STE (FST adds it). Exact for m <= 4 (all 90 patterns
    of 2:4); above, greedy: some groups keep fewer than n.

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

    @property
    def ticks(self) -> Schedule:
        return Constant(0.0, start=self.refresh, stop=FOREVER, every=self.refresh)

    def check(self, layout: Layout) -> None:
        expect_nm(self, layout)

    def update(self, view: View, state: State) -> Edit:
        return Edit(mask=transposable(view.layout, self.score(view)))

    def apply(self, w: Tensor, view: View, state: State) -> Tensor:
        return masked(w, view.mask)

    def grad(self, view: View, state: State) -> Tensor:
        return self.shrinking(view, view.mask)

    def finish(self, view: View, state: State) -> Edit:
        return Edit(mask=view.mask)


@dataclass(frozen=True)
class BDWP(DenseMaster):
    """The forward product is n:m along inputs, that of the input's gradient n:m along outputs; the weight's gradient is
    dense.

    Source: Fang et al., Efficient N:M Sparse DNN Training Using Algorithm, Architecture, and Dataflow Co-Design,
    https://arxiv.org/abs/2309.13015. UNVERIFIED: that both masks are taken independently from the dense weight.

    Example:
        >>> import sten
        >>> sten.BDWP().master
        True
    """

    alone: ClassVar[bool] = True

    def check(self, layout: Layout) -> None:
        expect_nm(self, layout)

    def apply(self, w: Tensor, view: View, state: State) -> Tensor:
        score = self.score(view)
        return faces(w, view.layout.mask(score), along_outputs(view.layout, score))


@dataclass(frozen=True)
class BiMask(DenseMaster):
    """As BDWP, but the backward mask lies in the forward-masked weight, with the rows in the best of several random
    orders.

    The order that lets most entries survive is sought among `tries` every `refresh` steps; the weight's gradient gains
    SR-STE's decay. The gradient of the input is biased: forward and backward weights differ.

    Source: Zhang et al., Bi-directional Masks for Efficient N:M Sparse Training, https://arxiv.org/abs/2302.06058,
    section 3.

    Example:
        >>> import sten
        >>> sten.BiMask(refresh=100).ticks.every
        100
    """

    refresh: int = 100
    tries: int = 10
    decay: float = 2e-4
    seed: int = 0

    @property
    def ticks(self) -> Schedule:
        return Constant(0.0, start=self.refresh, stop=FOREVER, every=self.refresh)

    def check(self, layout: Layout) -> None:
        expect_nm(self, layout)

    def init(self, view: View) -> State:
        return {"order": torch.arange(len(view.weight), device=view.weight.device)}

    def backward_mask(self, view: View, order: Tensor) -> Tensor:
        """n:m along the reordered outputs of the forward-masked weight."""
        score = self.score(view).masked_fill(~self.chosen(view), 0)
        mask = along_outputs(view.layout, score[order])
        return torch.empty_like(mask).index_copy_(0, order, mask) & self.chosen(view)

    def update(self, view: View, state: State) -> Edit:
        generator = view.generator or torch.Generator().manual_seed(self.seed)
        orders = [
            torch.randperm(len(view.weight), generator=generator).to(view.weight.device) for _ in range(self.tries)
        ]
        best = max([state["order"], *orders], key=lambda order: int(self.backward_mask(view, order).sum()))
        return Edit(mask=self.chosen(view), state={"order": best})

    def apply(self, w: Tensor, view: View, state: State) -> Tensor:
        return faces(w, self.chosen(view), self.backward_mask(view, state["order"]))

    def grad(self, view: View, state: State) -> Tensor:
        return self.shrinking(view, self.chosen(view))

    def finish(self, view: View, state: State) -> Edit:
        return Edit(mask=self.chosen(view))
