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

from ..layout import Layout, Parts
from ..layouts import CSR
from ..sparsifiers import Edit, View
from .distributed import shard_like, whole
from .master import MasterWeight
from .pattern import Method, SparseWeight

Commit = Callable[[], None]


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
        about, given = self.about, {"sparsity": self.about.sparsity, **more}
        return View(about.name, self.dense(self.param), self.holder.spec, mask=self.mask, last=about.last, **given)

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
        if self.master and not self.about.sparsifier.hard and edit.value is None and edit.fresh is None:
            return lambda: self._write_pattern(edit.mask, {}) or self._keep(edit.state)
        old = self.mask
        mask = old if edit.mask is None else edit.mask
        value = self.dense(self.param) if edit.value is None else edit.value.to(self.param.dtype)
        fresh = torch.zeros_like(mask) if edit.fresh is None else edit.fresh
        if edit.mask is not None and old is not None and (self.about.sparsifier.hard or not self.master):
            fresh = fresh | (mask & ~old)
        off = ~mask if self.about.sparsifier.hard or not self.master else torch.zeros_like(mask)
        value = value.masked_fill(off | fresh if edit.value is None else off, 0)
        parts = {} if self.master else fitted(self.holder.spec, self.holder.spec.pack(value, mask), len(self.param))
        new = parts["values"] if parts else self.stored(value, parts)
        slots = {}
        for key, slot in self.slots(optimizer):
            slots[key] = self.stored(self.dense(slot).masked_fill(fresh, 0), parts)
        grad = self.param.grad
        grad = None if grad is None else grad if self.master else self.stored(self.dense(grad), parts)

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
        for name in self.holder.pattern if parts else ():
            self.holder._buffers[name] = fill(self.holder._buffers[name], parts[name])

    def _keep(self, state: dict[str, Tensor] | None) -> None:
        for name, value in (state or {}).items():
            self.holder.state[name].copy_(value)


def fitted(layout: Layout, parts: Parts, slots: int) -> Parts:
    """The parts with as many slots as before, where the layout allows empty ones (CSR): shapes stay, nothing
    recompiles."""
    more = slots - len(parts["values"])
    if not isinstance(layout, CSR) or more <= 0:
        return parts
    return {name: part if name == "crow" else torch.nn.functional.pad(part, (0, more)) for name, part in parts.items()}


def fill(old: Tensor | None, new: Tensor) -> Tensor:
    """The old tensor with the new numbers, so that references survive; the new one where shapes differ."""
    if old is None or old.shape != new.shape:
        return new
    return old.copy_(new)
