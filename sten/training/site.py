"""Site: one weight under an engine, in either form; what a tick reads of it and writes to it.

A rewrite computes everything that an Edit changes (Parameter, gradient, every optimizer slot, pattern) before anything
is
written: pattern parts are shared, so reading after writing would mix two patterns.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..layout import Parts
from ..sparsifiers import Edit, View
from .distributed import shard_like, whole
from .master import MasterWeight
from .pattern import Method, SparseWeight, fill

Commit = Callable[[], None]
Carry = Callable[[Tensor], Tensor]


@dataclass(eq=False)
class Site:
    """A weight whose Parameter is dense (MasterWeight) or the values of its layout (SparseWeight)."""

    module: nn.Module
    attribute: str
    holder: SparseWeight | MasterWeight
    warned: bool = False
    copies: list[weakref.ref] = field(default_factory=list)
    _shard: tuple[Tensor, Tensor] | None = None

    @property
    def about(self) -> Method:
        return self.holder.method

    @property
    def name(self) -> str:
        return self.holder.method.name

    @property
    def master(self) -> bool:
        return isinstance(self.holder, MasterWeight)

    @property
    def zero_pruned(self) -> bool:
        return self.master and self.about.sparsifier.zero_pruned

    @property
    def param(self) -> nn.Parameter:
        """The trained tensor."""
        return self.module._parameters[self.attribute] if self.master else self.holder.values

    @property
    def mask(self) -> Tensor | None:
        """The entries that live, in the orientation of the layout."""
        return self.holder.mask if self.master else self.holder.spec.support(self.holder.parts, self.holder.shape)

    def dense(self, t: Tensor) -> Tensor:
        """The parameter, or a tensor of its shape (a slot, a gradient), dense and in the orientation of the layout."""
        if not self.master:
            return self.holder.spec.unpack({**self.holder.pattern, "values": t.detach()}, self.holder.shape)
        t = whole(t.detach())
        return t.t() if self.holder.transposed else t

    def stored(self, dense: Tensor, parts: Parts) -> Tensor:
        """The inverse of `dense`, at the pattern of `parts`."""
        if not self.master:
            return self.holder.spec.pack_like(dense, parts)
        return shard_like((dense.t() if self.holder.transposed else dense).contiguous(), self.param)

    def twins(self) -> list[SparseWeight]:
        """The averages of this weight that follow its pattern (`sten.follow`)."""
        return [twin for ref in self.copies if (twin := ref()) is not None]

    @property
    def size(self) -> int:
        return math.prod(self.holder.shape)

    def view(self, **more) -> View:
        """What a method may read; the weight and mask are made for it."""
        about, given = self.about, {"sparsity": self.about.sparsity, "state": self.holder.state, **more}
        view = View(about.name, self.dense(self.param), self.holder.spec, mask=self.mask, last=about.last, **given)
        view.memo.update(self.holder.recall(self.param) if self.master else {})
        return view

    def enforce(self) -> None:
        """Zero what the mask of a hard master drops: momentum and weight decay revive it otherwise."""
        if self._shard is None or self._shard[0] is not self.holder.mask:
            self._shard = (self.holder.mask, self.stored(self.holder.mask, {}))
        self.param.mul_(self._shard[1])

    def momentum(self, optimizer: Optimizer) -> Tensor | None:
        """The direction of a dense master's optimizer: SGD's buffer, or Adam's m / (sqrt(v) + 1e-8)."""
        state = optimizer.state.get(self.param, {})
        if "exp_avg" in state:
            return self.dense(state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8))
        return self.dense(state["momentum_buffer"]) if state.get("momentum_buffer") is not None else None

    # edits

    @torch.no_grad()
    def rewrite(self, edit: Edit, optimizer: Optimizer) -> Commit:
        """All that the edit changes, computed; calling the result writes it."""
        if self.master and not self.zero_pruned and edit.value is None and edit.fresh is None:
            return lambda: self._write_pattern(edit.mask, {}) or self._keep(edit.state)
        mask = self.mask if edit.mask is None else edit.mask
        parts, carry = self._in_master(mask, edit) if self.master else self._in_pattern(mask, edit)
        new, grad = carry(self.param), self.param.grad
        if edit.value is not None:
            off = ~mask if self.zero_pruned or not self.master else torch.zeros_like(mask)
            new = self.stored(edit.value.to(self.param.dtype).masked_fill(off, 0), parts)
        slots = {key: carry(slot) for key, slot in self.slots(optimizer)}
        grad = grad if grad is None or self.master else carry(grad)

        @torch.no_grad()
        def commit() -> None:
            if self.param.shape == new.shape:
                self.param.copy_(new)
            else:
                self._replace(nn.Parameter(new, requires_grad=self.param.requires_grad), optimizer)
            for key, slot in slots.items():
                optimizer.state[self.param][key] = fill(optimizer.state[self.param][key], slot)
            self.param.grad = grad
            self._write_pattern(mask, parts)
            self._keep(edit.state)

        return commit

    def _in_master(self, mask: Tensor, edit: Edit) -> tuple[Parts, Carry]:
        """No parts, and what turns the master, or a slot, into what the edit leaves of it."""
        fresh, old = edit.fresh, self.mask
        if self.zero_pruned and edit.mask is not None and old is not None:
            fresh = mask & ~old if fresh is None else fresh | (mask & ~old)
        lost = fresh if not self.zero_pruned else ~mask if fresh is None else ~mask | fresh

        def carry(t: Tensor) -> Tensor:
            gone = lost if t is self.param else fresh
            dense = self.dense(t)
            return self.stored(dense.clone() if gone is None else dense.masked_fill(gone, 0), {})

        return {}, carry

    def _in_pattern(self, mask: Tensor, edit: Edit) -> tuple[Parts, Carry]:
        """The parts of the new pattern, and what moves values, a slot or the gradient into it.

        Only the numbers of the slots become dense, once: `source` says for each new slot which old one it takes.
        """
        spec, shape, slots = self.holder.spec, self.holder.shape, self.param.numel()
        number = torch.int32 if slots < 2**31 else torch.int64
        numbers = torch.arange(1, slots + 1, dtype=number, device=self.param.device).view(self.param.shape)
        numbers = spec.unpack({**self.holder.pattern, "values": numbers}, shape)
        if edit.fresh is not None:
            numbers = numbers.masked_fill(edit.fresh, 0)
        parts = spec.with_slots(spec.pack(self.param.detach().new_zeros(()).expand(shape), mask), len(self.param))
        source = spec.pack_like(numbers, parts)

        def carry(t: Tensor) -> Tensor:
            moved = torch.cat([t.new_zeros(1), t.detach().flatten()])
            return moved.index_select(0, source.flatten()).view(source.shape)

        return parts, carry

    def slots(self, optimizer: Optimizer) -> list[tuple[str, Tensor]]:
        """The optimizer's tensors that go with each entry of the parameter."""
        state = optimizer.state.get(self.param, {})
        return [
            (k, t) for k, t in state.items() if isinstance(t, Tensor) and t.dim() > 0 and t.shape == self.param.shape
        ]

    def _replace(self, param: nn.Parameter, optimizer: Optimizer) -> None:
        """Another Parameter, of another shape: a graph that is still alive holds the old one to its shape."""
        old, self.holder._parameters["values"] = self.param, param
        for group in optimizer.param_groups:
            group["params"] = [param if p is old else p for p in group["params"]]
        if old in optimizer.state:
            optimizer.state[param] = optimizer.state.pop(old)
        if old._post_accumulate_grad_hooks:
            for hook in old._post_accumulate_grad_hooks.values():
                param.register_post_accumulate_grad_hook(hook)

    def _write_pattern(self, mask: Tensor, parts: Parts) -> None:
        if self.master and mask is not None:
            self.holder.mask = mask
        if parts:
            self.holder.rewrite(parts)

    def _keep(self, state: dict[str, Tensor] | None) -> None:
        for name, value in (state or {}).items():
            self.holder.state[name].copy_(value)

