"""DenseWeight: a weight whose dense Parameter is trained, while the module computes with what a method makes of it.

The Parameter keeps its place, name and identity; reading the module's attribute gives the effective weight. So
optimizers, DDP, FSDP2, EMA and checkpoints see an ordinary dense weight under its ordinary key.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..layouts.base import Layout
from ..sparsifiers import DenseWeightMethod, Edit, View
from ..sparsifiers.allocation import Allocation
from ..tensor import SparseTensor, from_dense
from .distributed import shard_like, sharded, whole
from .trained_weight import TrainedWeight, optimizer_slots


class DenseWeight(TrainedWeight):
    """The method of a weight and its mask. Calling it with the Parameter gives the effective weight.

    Attributes:
        forward_cache: what the last forward pass worked out, for the step that follows it.
    """

    def __init__(
        self,
        layout: Layout,
        transposed: bool,
        method: DenseWeightMethod,
        view: View,
        allocation: Allocation | None,
    ) -> None:
        super().__init__(view.name, layout, tuple(view.weight.shape), transposed)
        self.register_buffer("mask", view.mask, persistent=not method.stateless)
        self.set_method(method, view, allocation)
        self.adds_to_gradient = type(method).grad is not DenseWeightMethod.grad
        self.forward_cache: tuple[weakref.ref, int, dict[str, Tensor]] | None = None
        self._sharded_mask: tuple[Tensor, Tensor] | None = None

    def _detach_from_run(self) -> None:
        super()._detach_from_run()
        self.forward_cache = self._sharded_mask = None

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k not in ("forward_cache", "_sharded_mask")}

    def run_names(self) -> tuple[str, ...]:
        names = super().run_names()
        return ("mask", *names) if names else ()

    def active(self) -> Tensor:
        return self.mask

    def dense(self, t: Tensor) -> Tensor:
        t = whole(t.detach())
        return t.t() if self.transposed else t

    def packed(self, dense: Tensor) -> Tensor:
        return shard_like((dense.t() if self.transposed else dense).contiguous(), self.param)

    def view(self, **more: Any) -> View:
        view = super().view(**more)
        view.memo.update(self._recall(self.param))
        return view

    def forward(self, param: Tensor) -> Tensor:
        if sharded(param):  # outside of a forward pass FSDP2 asks for the shard that it keeps
            return param
        w = param.t() if self.transposed else param
        view = self._view_of(w.detach())
        effective = self.method.apply(w, view)
        # A compiled graph would have to give the masks out; there the hook computes them once more.
        if self.adds_to_gradient and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.forward_cache = weakref.ref(param), param._version, view.memo
        return effective.t() if self.transposed else effective

    def _view_of(self, dense: Tensor) -> View:
        step = 0 if self.method.stateless else self.run_step
        given = {"mask": self.mask, "last": self.is_last, "step": step, "state": self.state}
        return View(self.name, dense, self.layout, self.sparsity, **given)

    def _recall(self, param: Tensor) -> dict[str, Tensor]:
        """What the last forward pass worked out, once, if it saw these very numbers."""
        seen, self.forward_cache = self.forward_cache, None
        return seen[2] if seen is not None and seen[0]() is param and seen[1] == param._version else {}

    @torch.no_grad()
    def tensor(self, param: Tensor | None = None) -> SparseTensor:
        """What training would end with now, stored in the layout."""
        param = self.param if param is None else param
        dense = self.dense(param)
        end = self.method.finish(self._view_of(dense))
        mask = end.mask if end.mask is not None else self.mask
        w = from_dense((dense if end.value is None else end.value).contiguous(), self.layout, mask)
        w = w.t() if self.transposed else w
        return w.requires_grad_(param.requires_grad)

    @torch.no_grad()
    def assign(self, param: Tensor, value: Tensor) -> None:
        param.copy_(value.detach().to_dense() if isinstance(value, SparseTensor) else value.detach())

    def zero_pruned(self) -> None:
        """Zero what the mask drops: momentum and weight decay revive it otherwise."""
        if self._sharded_mask is None or self._sharded_mask[0] is not self.mask:
            self._sharded_mask = (self.mask, self.packed(self.mask))
        self.param.mul_(self._sharded_mask[1])

    def momentum(self, optimizer: Optimizer) -> Tensor | None:
        """The direction of the optimizer: SGD's buffer, or Adam's m / (sqrt(v) + 1e-8)."""
        state = optimizer.state.get(self.param, {})
        if "exp_avg" in state:
            return self.dense(state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8))
        return self.dense(state["momentum_buffer"]) if state.get("momentum_buffer") is not None else None

    @torch.no_grad()
    def change(self, edit: Edit, optimizer: Optimizer) -> Callable[[], None]:
        zero_pruned = self.method.zero_pruned
        if not zero_pruned and edit.value is None and edit.fresh is None:
            return lambda: self._write_mask(edit)
        mask = self.mask if edit.mask is None else edit.mask
        lost, fresh = self._lost(mask, edit)

        def move(t: Tensor) -> Tensor:
            gone = lost if t is self.param else fresh
            dense = self.dense(t)
            return self.packed(dense.clone() if gone is None else dense.masked_fill(gone, 0))

        new = move(self.param)
        if edit.value is not None:
            value = edit.value.to(self.param.dtype)
            new = self.packed(value.masked_fill(~mask, 0) if zero_pruned else value)
        slots = {key: move(slot) for key, slot in optimizer_slots(self.param, optimizer).items()}

        @torch.no_grad()
        def write() -> None:
            self.param.copy_(new)
            for key, slot in slots.items():
                optimizer.state[self.param][key].copy_(slot)
            self._write_mask(edit)

        return write

    def _lost(self, mask: Tensor, edit: Edit) -> tuple[Tensor | None, Tensor | None]:
        """The entries that become zero in the weight, and those that become zero in every slot."""
        fresh = edit.fresh
        if not self.method.zero_pruned:
            return fresh, fresh
        if edit.mask is not None:
            grown = mask & ~self.mask
            fresh = grown if fresh is None else fresh | grown
        return ~mask if fresh is None else ~mask | fresh, fresh

    def _write_mask(self, edit: Edit) -> None:
        if edit.mask is not None:
            self.mask = edit.mask
        self.keep_state(edit.state)
