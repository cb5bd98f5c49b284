"""Channels of a model by number: which are one, which differ, which stay, and what has to move with each.

Two channels can change places if they have the same members (rows, columns and entries of biases, equally often) and
nothing has told them apart.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn

MIXED = "it meets a tensor that is not permuted (the residual stream, or a rotary embedding)"


@dataclass(frozen=True)
class Member:
    """A tensor of a module, the dimension that channels lie in, and where: `at[c, k]`, the k-th place of channel c."""

    module: nn.Module
    attribute: str
    dim: int
    at: Tensor
    reads: bool  # whether the channels are the columns of a layer

    @property
    def tensor(self) -> Tensor:
        return getattr(self.module, self.attribute)


@dataclass(frozen=True)
class Space:
    """Channels that can change places, those of one `group` among each other, and all that has to move with them."""

    members: list[Member]
    group: Tensor


@dataclass
class Use:
    """A dimension of a tensor, and the number of the channel at each of its places."""

    module: nn.Module
    attribute: str
    dim: int
    labels: Tensor
    reads: bool  # whether these are the columns of a layer


class Channels:
    """The numbers of a model's channels; `channel_trace.follow` finds them, and `spaces` is what can be permuted."""

    def __init__(self) -> None:
        self.reasons = [""]
        empty = torch.zeros(0, dtype=torch.int64)
        # by number: the first number of its channel, which reason keeps it in place, and a sum that tells it apart
        self.root, self.frozen, self.key = empty, empty, empty
        self.uses: dict[tuple[int, int], Use] = {}  # by id of the tensor, and dimension
        self.salt = 0

    def made(self, layer: nn.Module, dim: int) -> Tensor:
        """The numbers of the channels that a layer makes."""
        known = self.uses.get((id(layer.weight), dim))
        if known is None:
            count, start = layer.weight.shape[dim], len(self.root)
            new = torch.arange(start, start + count)
            self.root = torch.cat([self.root, new])
            self.frozen, self.key = (torch.cat([old, torch.zeros_like(new)]) for old in (self.frozen, self.key))
            self.use(layer, "weight", dim, new, -1)
            known = self.uses[id(layer.weight), dim]
        if layer.bias is not None:
            self.use(layer, "bias", 0, known.labels, -1)
        return known.labels

    def use(self, module, name: str, dim: int, labels: Tensor | None, channel: int, reads: bool = False) -> None:
        """Places of a module's tensor belong to the channels in dimension `channel` of `labels`."""
        tensor = module._parameters.get(name, module._buffers.get(name))
        if labels is None:
            labels, channel = torch.full((tensor.shape[dim] if tensor is not None else 1,), -1), -1
        flat = labels.movedim(channel, -1).reshape(-1, labels.shape[channel])
        if bool((flat != flat[0]).any()):
            return self.freeze(flat, "it comes to one place of a layer from several channels")
        if type(tensor) not in (nn.Parameter, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            kind = "no plain tensor" if tensor is None or not tensor.is_meta else "on the meta device"
            return self.freeze(flat, f"{name} of its layer is {kind}: permute before pruning or quantizing")
        known = self.uses.setdefault((id(tensor), dim), Use(module, name, dim, flat[0], reads))
        self.meet([known.labels, flat[0]])
        return None

    def freeze(self, labels: Tensor | None, reason: str) -> None:
        if labels is None:
            return
        if reason not in self.reasons:
            self.reasons.append(reason)
        numbers = labels[labels >= 0].unique()
        new = numbers[self.frozen[numbers] == 0]
        self.frozen[new] = self.reasons.index(reason)

    def meet(self, labels: list[Tensor]) -> Tensor:
        """Numbers at the same places become one channel; -1 beside a number keeps that in place. The common labels."""
        met = labels[0]
        for other in labels[1:]:
            alone = (met < 0) != (other < 0)
            self.freeze(torch.maximum(met, other)[alone], MIXED)
            a, b = torch.stack([met, other])[:, (met >= 0) & (other >= 0) & (met != other)]
            while bool((self.root[a] != self.root[b]).any()):
                pair = torch.stack([self.root[a], self.root[b]])
                self.root.scatter_reduce_(0, pair.amax(0), pair.amin(0), "amin")
                while bool((self.root != self.root[self.root]).any()):
                    self.root = self.root[self.root]
            met = torch.maximum(met, other)
        return met

    def tell_apart(self, labels: Tensor, dims: list[int]) -> None:
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
            self.freeze(numbers, MIXED)

    def mark(self, labels: Tensor) -> None:
        """Channels that an operator computes with differ from those that it leaves out."""
        self.salt += 1
        self.key[labels[labels >= 0].unique()] += _hash(torch.tensor(self.salt << 40))

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
                    at = where[used][order].view(len(mine), -1)
                    members.append(Member(use.module, use.attribute, use.dim, at, use.reads))
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


def _hash(x: Tensor) -> Tensor:
    """Pseudo-random 64-bit numbers."""
    for multiplier in (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15):
        x = (x + 1) * multiplier
        x = x ^ (x >> 29)
    return x
