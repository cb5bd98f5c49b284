"""Which channels of a model can change places without changing what it computes: found by running it once.

Each channel that a layer makes (a row of its weight) gets a number. While the model runs on an example, a tensor has a
second one of its shape, the *labels*: the number of the channel that each element belongs to, -1 for none.

- view, transpose, expand, cat, ...: the same operator is applied to the labels.
- Element by element: numbers that meet become one channel, such as a gate and what it multiplies. A tensor without
  labels tells channels apart along the dimensions that it varies in.
- A product with a matrix without labels, or attention's values: the labels stay, if the sum runs within a channel;
  channels of different heads are told apart.
- Pooling, and norms: the labels stay.
- A layer: its columns have the labels of its input, since they must move with those channels.
- Anything else, and the model's outputs: the channels stay where they are, with the reason.

Two channels can change places if they have the same members (rows, columns and entries of biases, equally often) and
nothing has told them apart. What is not understood is left in place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .._torch_private import storage_of, tree_leaves, tree_map
from .defaults import is_conv1d

SAME = {"clone", "_to_copy", "contiguous", "alias", "detach", "lift_fresh"}
RESHAPING = {"view", "_unsafe_view", "reshape", "_reshape_alias"}
MOVING = {
    "t", "transpose", "permute", "expand", "slice", "select", "squeeze", "unsqueeze", "split", "split_with_sizes",
    "unbind", "repeat", "cat", "stack", "index", "index_select", "narrow", "flip",
}  # fmt: skip
POOLING = (
    "max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "_adaptive_avg_pool", "upsample_", "_upsample_",
)  # fmt: skip
UNTAGGED = {"hardswish"}
REDUCING = {"mean", "sum", "amax", "amin"}
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.RMSNorm)
CHANNELWISE = ("weight", "bias", "running_mean", "running_var")

MIXED = "it meets a tensor that is not permuted (the residual stream, or a rotary embedding)"
SCORES = "it is summed over, as queries and keys are in attention scores"


@dataclass(frozen=True)
class Member:
    """A tensor of a module, the dimension that channels lie in, and where: `at[c, k]`, the k-th place of channel c."""

    module: nn.Module
    attribute: str
    dim: int
    at: Tensor

    @property
    def tensor(self) -> Tensor:
        return getattr(self.module, self.attribute)


@dataclass(frozen=True)
class Space:
    """Channels that can change places, those of one `group` among each other, and all that has to move with them."""

    members: list[Member]
    group: Tensor


@dataclass
class _Use:
    """A dimension of a tensor, and the number of the channel at each of its places."""

    module: nn.Module
    attribute: str
    dim: int
    labels: Tensor
    reads: bool  # whether these are the columns of a layer


class Channels(TorchDispatchMode):
    """What is known of a model's channels. Call `run` once, then `spaces`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.reasons = model, [""]
        empty = torch.zeros(0, dtype=torch.int64)
        self.root, self.frozen, self.key = (
            empty,
            empty,
            empty,
        )  # by number: the first of its channel, reason, told apart
        self.uses: dict[tuple[int, int], _Use] = {}  # by id of the tensor, and dimension
        self.labelled: dict[int, tuple[Tensor, Tensor]] = {}  # the tensors are kept, so that an id stays theirs
        self.inside, self.salt = 0, 0
        self.stored = {storage_of(p) for p in self.model.parameters()}
        self.outside: set[int | None] = set()

    # ---- the run

    def run(self, call: Callable[[], Any]) -> Any:
        """Call the model; its outputs."""
        handles = []
        for module in self.model.modules():
            rule = self._rule(module)
            if rule is not None:
                handles += [
                    module.register_forward_pre_hook(self._enter),
                    module.register_forward_hook(lambda m, args, kwargs, y, r=rule: self._leave(m, args, kwargs, y, r),
                                                 with_kwargs=True),
                ]  # fmt: skip
        try:
            with torch.no_grad(), self:
                out = call()
        finally:
            for handle in handles:
                handle.remove()
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and id(t) in self.labelled:
                self._freeze(self._labels(t), "it is an output of the model")
        for use in self.uses.values():
            if storage_of(getattr(use.module, use.attribute)) in self.outside:
                self._freeze(use.labels, "its weight is used outside its layer, too")
        self.labelled.clear()
        return out

    def _rule(self, module: nn.Module) -> Callable | None:
        forward = type(module).forward
        if is_conv1d(module) or forward is nn.Linear.forward:
            return self._linear
        if any(forward is kind.forward for kind in CONVOLUTIONS):
            return self._conv
        norm = any(forward is kind.forward for kind in NORMS)
        return self._channelwise if norm and len(getattr(module, "normalized_shape", (1,))) == 1 else None

    def _enter(self, module: nn.Module, args: Any) -> None:
        self.inside += 1

    def _leave(self, module: nn.Module, args: tuple, kwargs: dict, out: Tensor, rule: Callable) -> None:
        self.inside -= 1
        (x,) = (*args, *kwargs.values())
        rule(module, x, self._labels(x), out)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self.inside:
            return out
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self.outside |= {s for t in tensors if (s := storage_of(t)) in self.stored}
        if any(id(t) in self.labelled for t in tensors):
            self._follow(func, args, tensors, out)
        return out

    def _labels(self, t: Tensor) -> Tensor | None:
        return self.labelled[id(t)][1] if id(t) in self.labelled else None

    def _set(self, t: Tensor, labels: Tensor | None) -> None:
        if labels is not None and labels.shape == t.shape:
            self.labelled[id(t)] = (t, labels)
        elif labels is not None:
            self._freeze(labels, "its shape is not understood")

    # ---- layers

    def _linear(self, layer: nn.Module, x: Tensor, labels: Tensor | None, out: Tensor) -> None:
        rows, columns = (1, 0) if is_conv1d(layer) else (0, 1)
        self._use(layer, "weight", columns, labels, -1, reads=True)
        self._set(out, self._made(layer, rows).expand(out.shape))

    def _conv(self, layer: nn.Module, x: Tensor, labels: Tensor | None, out: Tensor) -> None:
        channel = -layer.weight.dim() + 1  # counted from the end: with or without a batch
        if layer.groups == 1:
            self._use(layer, "weight", 1, labels, channel, reads=True)
            made = self._made(layer, 0)
            self._set(out, made.view(-1, *[1] * (-channel - 1)).expand(out.shape))
        elif layer.groups == layer.in_channels == layer.out_channels:
            self._channelwise(layer, x, labels, out, channel)
        elif labels is not None:
            self._freeze(labels, "it is read by a convolution in groups")

    def _channelwise(self, layer: nn.Module, x: Tensor, labels: Tensor | None, out: Tensor, channel=None) -> None:
        """A layer with one number (or filter) for each channel, which leaves the channels where they are."""
        if channel is None:
            channel = -1 if hasattr(layer, "normalized_shape") else 1
        for name in CHANNELWISE:
            if getattr(layer, name, None) is not None:
                self._use(layer, name, 0, labels, channel)
        if labels is not None:
            first = labels.movedim(channel, -1)[(0,) * (x.dim() - 1)]  # all are the same, or frozen by now
            shape = [1] * x.dim()
            shape[channel] = -1
            self._set(out, first.view(shape).expand(out.shape))

    def _made(self, layer: nn.Module, dim: int) -> Tensor:
        """The numbers of the channels that a layer makes."""
        known = self.uses.get((id(layer.weight), dim))
        if known is None:
            count, start = layer.weight.shape[dim], len(self.root)
            new = torch.arange(start, start + count)
            self.root = torch.cat([self.root, new])
            self.frozen, self.key = (torch.cat([old, torch.zeros_like(new)]) for old in (self.frozen, self.key))
            self._use(layer, "weight", dim, new, -1)
            known = self.uses[id(layer.weight), dim]
        if layer.bias is not None:
            self._use(layer, "bias", 0, known.labels, -1)
        return known.labels

    def _use(self, module, name: str, dim: int, labels: Tensor | None, channel: int, reads: bool = False) -> None:
        """Places of a module's tensor belong to the channels in dimension `channel` of `labels`."""
        tensor = module._parameters.get(name, module._buffers.get(name))
        if labels is None:
            labels, channel = torch.full((tensor.shape[dim] if tensor is not None else 1,), -1), -1
        flat = labels.movedim(channel, -1).reshape(-1, labels.shape[channel])
        if bool((flat != flat[0]).any()):
            return self._freeze(flat, "it comes to one place of a layer from several channels")
        if type(tensor) not in (nn.Parameter, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            kind = "no plain tensor" if tensor is None or not tensor.is_meta else "on the meta device"
            return self._freeze(flat, f"{name} of its layer is {kind}: permute before pruning or quantizing")
        known = self.uses.setdefault((id(tensor), dim), _Use(module, name, dim, flat[0], reads))
        self._meet([known.labels, flat[0]])
        return None

    # ---- operators

    def _follow(self, func, args: tuple, tensors: list[Tensor], out: Any) -> None:
        name = func.overloadpacket.__name__
        plain = name.rstrip("_")
        x = self._labels(args[0]) if isinstance(args[0], Tensor) else None
        if plain in SAME and x is not None:
            self._set(out, x)
        elif plain in RESHAPING and x is not None:
            self._set(out, x.reshape(args[1]))
        elif plain in MOVING and (x is not None or not isinstance(args[0], Tensor)):
            moved = func(*tree_map(self._relabelled, args))
            for t, labels in zip(tree_leaves(out), tree_leaves(moved), strict=True):
                self._set(t, labels)
        elif _is_pointwise(plain) and (x is not None or plain == name):
            self._pointwise(tensors, out)
        elif plain.startswith(POOLING) and x is not None:
            first = out[0] if isinstance(out, tuple) else out
            kept = x[(..., *[slice(0, 1)] * (x.dim() - 2))]
            self._summed(x, kept, kept.expand(first.shape), first)
        elif plain in REDUCING and x is not None and len(args) > 1:
            dims = [args[1]] if isinstance(args[1], int) else list(args[1] or range(x.dim()))
            kept = x.amax(dims, keepdim=True)
            self._summed(x, kept, kept.reshape(out.shape), out)
        elif plain in ("mm", "bmm") or plain.startswith("_scaled_dot_product"):
            self._product(args, out[0] if isinstance(out, tuple) else out)
        else:
            for t in tensors:
                self._freeze(self._labels(t), f"it goes through torch's {plain}")

    def _relabelled(self, value: Any) -> Any:
        """The labels of a tensor; of one without, where it is no index, -1."""
        if not isinstance(value, Tensor):
            return value
        labels = self._labels(value)
        if labels is not None or not value.is_floating_point():
            return value.cpu() if labels is None else labels
        return torch.full(value.shape, -1)

    def _pointwise(self, tensors: list[Tensor], out: Tensor) -> None:
        labels = [x.expand(out.shape) for t in tensors if (x := self._labels(t)) is not None]
        met = self._meet(labels)
        for t in tensors:
            if self._labels(t) is None and t.dim():
                shape = [1] * (out.dim() - t.dim()) + list(t.shape)
                self._tell_apart(met, [i for i, size in enumerate(shape) if size > 1])
        self._set(out, met)

    def _summed(self, labels: Tensor, kept: Tensor, after: Tensor, out: Tensor) -> None:
        """A reduction, whose result has the labels `after` if it runs within channels."""
        if bool((labels != kept).any()):
            self._freeze(labels, "it is summed over")
        else:
            self._set(out, after)

    def _product(self, args: tuple, out: Tensor) -> None:
        """out = a @ b, or attention of (query, key, value): the labels of one factor, if the other has none."""
        *others, values = args[:2] if len(args) < 3 or not isinstance(args[2], Tensor) else args[:3]
        left, right = self._labels(others[0]), self._labels(values)
        if len(others) == 1 and right is None:  # a's rows, summed along its last dimension
            right, left, dim = left, None, -1
        else:
            dim = -2
        for t in others if left is not None or len(others) == 2 else ():
            self._freeze(self._labels(t), SCORES)
        if right is None:
            return
        kept = right.narrow(dim, 0, 1)
        if bool((right != kept).any()) or (left is not None and len(others) == 1):
            return self._freeze(right, SCORES)
        if out.dim() == 4 and kept.shape[1] != out.shape[1]:  # grouped queries: several heads of them read one
            kept = kept.repeat_interleave(out.shape[1] // kept.shape[1], 1)
        after = kept.expand(out.shape)
        self._tell_apart(after, list(range(out.dim() - 2)))
        return self._set(out, after)

    # ---- channels

    def _freeze(self, labels: Tensor | None, reason: str) -> None:
        if labels is None:
            return
        if reason not in self.reasons:
            self.reasons.append(reason)
        numbers = labels[labels >= 0].unique()
        new = numbers[self.frozen[numbers] == 0]
        self.frozen[new] = self.reasons.index(reason)

    def _meet(self, labels: list[Tensor]) -> Tensor:
        """Numbers at the same places become one channel; -1 beside a number keeps that in place. The common labels."""
        met = labels[0]
        for other in labels[1:]:
            alone = (met < 0) != (other < 0)
            self._freeze(torch.maximum(met, other)[alone], MIXED)
            a, b = torch.stack([met, other])[:, (met >= 0) & (other >= 0) & (met != other)]
            while bool((self.root[a] != self.root[b]).any()):
                pair = torch.stack([self.root[a], self.root[b]])
                self.root.scatter_reduce_(0, pair.amax(0), pair.amin(0), "amin")
                while bool((self.root != self.root[self.root]).any()):
                    self.root = self.root[self.root]
            met = torch.maximum(met, other)
        return met

    def _tell_apart(self, labels: Tensor, dims: list[int]) -> None:
        """Channels at different places along these dimensions differ from now on."""
        place = torch.zeros([1] * labels.dim(), dtype=torch.int64)
        for dim in dims:
            shape = [1] * labels.dim()
            shape[dim] = -1
            place = place * labels.shape[dim] + torch.arange(labels.shape[dim]).view(shape)
        pairs = torch.stack([labels.flatten(), place.expand(labels.shape).flatten()])[:, labels.flatten() >= 0]
        number, place = pairs.unique(dim=1)
        self.salt += 1
        self.key.index_add_(0, number, _hash(place + (self.salt << 40)))
        numbers = number.unique()
        if len(self.key[numbers].unique()) == len(numbers) > 1:
            self._freeze(numbers, MIXED)

    def spaces(self) -> list[Space]:
        """The channels that can change places."""
        count, uses = len(self.root), list(self.uses.values())
        # The sums of random numbers: equal for channels that are equal in all that is summed.
        key = torch.zeros(count, dtype=torch.int64).index_add_(0, self.root, _hash(self.key))
        frozen = torch.zeros(count, dtype=torch.bool).index_add_(0, self.root, self.frozen > 0)
        kind, read = torch.zeros_like(key), torch.zeros_like(frozen)
        channels = []
        for number, use in enumerate(uses):
            where = (use.labels >= 0).nonzero()[:, 0]
            channel = self.root[use.labels[where]]
            channels.append((where, channel))
            kind.index_add_(0, channel, _hash(torch.full_like(channel, number)))
            read[channel] |= use.reads
        free = ((self.root == torch.arange(count)) & ~frozen & read).nonzero()[:, 0]
        signature, group = torch.stack([key[free], kind[free]]).unique(dim=1, return_inverse=True)
        group_of = torch.full((count,), -1).index_put((free,), group)
        several = group.bincount(minlength=1) > 1
        found = []
        for value in signature[1, several].unique() if len(free) else ():
            members, index = [], torch.full((count,), -1)
            mine = free[(kind[free] == value) & several[group]]
            index[mine] = torch.arange(len(mine))
            for use, (where, channel) in zip(uses, channels, strict=True):
                used = index[channel] >= 0
                if bool(used.any()):
                    order = torch.argsort(index[channel[used]], stable=True)
                    members.append(Member(use.module, use.attribute, use.dim, where[used][order].view(len(mine), -1)))
            found.append(Space(members, group_of[mine]))
        return sorted(found, key=lambda space: self._first(space))

    def _first(self, space: Space) -> int:
        return min(list(self.uses).index((id(m.tensor), m.dim)) for m in space.members)

    def why_not(self, tensor: Tensor, dim: int) -> str:
        """Why this dimension of a weight stays as it is: the reason of most of its channels; empty if there is none."""
        use = self.uses.get((id(tensor), dim))
        if use is None:
            return "the example did not reach it"
        numbers = self.root[use.labels[use.labels >= 0]]
        if not len(numbers):
            return "its input is not made by one layer alone (the residual stream, or the model's input)"
        first = torch.where(self.frozen > 0, self.frozen, len(self.reasons))
        first = torch.full_like(first, len(self.reasons)).scatter_reduce_(0, self.root, first, "amin")
        [(most, _)] = Counter(first[numbers].tolist()).most_common(1)
        return [*self.reasons, ""][most]


def _is_pointwise(name: str) -> bool:
    """Whether an operator works element by element: torch's tag, which not all overloads have."""
    packet = getattr(torch.ops.aten, name, None)
    overloads = [getattr(packet, overload) for overload in packet.overloads()] if packet is not None else []
    return name in UNTAGGED or any(torch.Tag.pointwise in overload.tags for overload in overloads)


def _hash(x: Tensor) -> Tensor:
    """Pseudo-random 64-bit numbers."""
    for multiplier in (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15):
        x = (x + 1) * multiplier
        x = x ^ (x >> 29)
    return x
