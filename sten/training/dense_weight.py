"""DenseWeight: a weight whose dense Parameter is trained, while the module computes with what a method makes of it.

The Parameter's name and identity do not change; reading the module's attribute gives the effective weight. So
optimizers, DDP, FSDP2, EMA and checkpoints see an ordinary dense weight under its ordinary key.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._torch_private import refuse_tracing
from ..layouts.base import Layout
from ..layouts.checks import starting_mask
from ..sparsifiers import DenseWeightMethod, Edit, View
from ..sparsifiers.allocation import Allocation
from ..sparsifiers.edits import expect_edit
from ..tensor import SparseTensor, from_dense
from .distributed import shard_like, whole
from .effective import effective
from .trained_weight import TrainedWeight, optimizer_slots


class DenseWeight(TrainedWeight):
    """The method of a weight and its mask. Calling it with the Parameter gives the effective weight.

    Attributes:
        mask: bool, in the orientation of the layout; a buffer that is written in place, so that CUDA graphs read it.
        forward_cache: (Parameter, its version, View.memo) of the last forward pass, for the step that follows it.
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
        self.register_buffer("mask", view.mask.clone(), persistent=not method.stateless)
        self.set_method(method, view, allocation)
        self.adds_to_gradient = type(method).grad is not DenseWeightMethod.grad
        self.forward_cache: tuple[weakref.ref, int, dict[str, Tensor]] | None = None
        self._packed_mask: tuple[Tensor, int, Tensor] | None = None

    def _detach_from_run(self) -> None:
        super()._detach_from_run()
        self.forward_cache = self._packed_mask = None

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k not in ("forward_cache", "_packed_mask")}

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
        self.expect_numbers()
        refuse_tracing()
        w = param.t() if self.transposed else param
        view = self._view_of(w.detach())
        w = self.method.apply(w, view)
        # A compiled graph would have to return the masks; there the hook of the step computes them once more.
        if self.adds_to_gradient and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.forward_cache = weakref.ref(param), param._version, view.memo
        return effective(w.t() if self.transposed else w, self)

    def _view_of(self, dense: Tensor) -> View:
        step = 0 if self.method.stateless else self.run_step
        fields = {"mask": self.mask, "last": self.is_last, "step": step, "state": self.state}
        return View(self.name, dense, self.layout, self.sparsity, **fields)

    def _recall(self, param: Tensor) -> dict[str, Tensor]:
        """Take the memo out of `forward_cache`; empty if the Parameter has been written since."""
        cached, self.forward_cache = self.forward_cache, None
        return cached[2] if cached is not None and cached[0]() is param and cached[1] == param._version else {}

    @torch.no_grad()
    def tensor(self, param: Tensor | None = None) -> SparseTensor:
        """What `method.finish` stores now, in the layout."""
        param = self.param if param is None else param
        dense = self.dense(param)
        view = self._view_of(dense)
        edit = self.method.finish(view)
        expect_edit(edit, view, self.method, exact=not self.method.zero_pruned)
        mask = edit.mask if edit.mask is not None else self.mask
        w = from_dense((dense if edit.value is None else edit.value).contiguous(), self.layout, mask)
        w = w.t() if self.transposed else w
        return w.requires_grad_(param.requires_grad)

    def copy_from(self, param: Tensor, value: Tensor) -> None:
        dense = value.to_dense()
        if param.is_meta:  # load_state_dict(assign=True)
            self.replace_param(nn.Parameter(dense, param.requires_grad))
        else:
            param.copy_(dense)

    @property
    def grad(self) -> Tensor | None:
        return self.param.grad

    @grad.setter
    def grad(self, grad: Tensor | None) -> None:
        self.param.grad = None if grad is None else grad.to_dense()

    @torch.no_grad()
    def restart(self) -> None:
        """Begin the run again. What a pruned checkpoint has at zero stays pruned, if the method prunes for good."""
        dense, method = self.dense(self.param), self.method
        if method.zero_pruned:
            self.mask.copy_(starting_mask(self.layout, dense != 0))
        else:
            generator = torch.Generator().manual_seed(method.seed)
            view = View(self.name, dense, self.layout, self.sparsity, generator=generator, last=self.is_last)
            self.mask.copy_(method.update(view).mask)
        super().restart()

    def set_step(self, step: int) -> None:
        """Write the step that the method reads, also for averages that follow."""
        for weight in (self, *(average for ref in self.averages if (average := ref()) is not None)):
            weight.run_step.fill_(step)

    @torch.no_grad()
    def follow(self, other: DenseWeight, dense: Tensor) -> None:
        """Take the mask and the method's tensors of another weight, and the entries that `dense` has in the mask."""
        self.mask.copy_(other.mask)
        self.set_state({name: t for name, t in other.state.items() if not isinstance(t, nn.Parameter)})
        if self.method.zero_pruned:
            self.param.copy_(self.packed(dense.masked_fill(~self.mask, 0)))

    def zero_pruned(self) -> None:
        """Zero the entries off the mask, which momentum and weight decay change."""
        key = self.mask, self.mask._version
        if self._packed_mask is None or self._packed_mask[0] is not key[0] or self._packed_mask[1] != key[1]:
            self._packed_mask = (*key, self.packed(self.mask))
        self.param.mul_(self._packed_mask[2])

    def momentum(self, optimizer: Optimizer) -> Tensor | None:
        """The direction of the optimizer: SGD's buffer, or Adam's m / (sqrt(v) + 1e-8)."""
        state = optimizer.state.get(self.param, {})
        if "exp_avg" in state:
            return self.dense(state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8))
        return self.dense(state["momentum_buffer"]) if state.get("momentum_buffer") is not None else None

    @torch.no_grad()
    def change(self, edit: Edit, *optimizers: Optimizer) -> Callable[[], None]:
        zero_pruned = self.method.zero_pruned
        if not zero_pruned and edit.value is None and edit.fresh is None:
            return lambda: self._write_mask(edit)
        mask = self.mask if edit.mask is None else edit.mask
        zero, fresh = self._zeroed(mask, edit)

        def move(t: Tensor) -> Tensor:
            drop = zero if t is self.param else fresh
            dense = self.dense(t)
            return self.packed(dense.clone() if drop is None else dense.masked_fill(drop, 0))

        new = move(self.param)
        if edit.value is not None:
            value = edit.value.to(self.param.dtype)
            new = self.packed(value.masked_fill(~mask, 0) if zero_pruned else value)
        slots = [(o, key, move(slot)) for o in optimizers for key, slot in optimizer_slots(self.param, o).items()]

        @torch.no_grad()
        def write() -> None:
            self.param.copy_(new)
            for optimizer, key, slot in slots:
                optimizer.state[self.param][key].copy_(slot)
            self._write_mask(edit)

        return write

    def _zeroed(self, mask: Tensor, edit: Edit) -> tuple[Tensor | None, Tensor | None]:
        """The entries that become zero in the weight, and those that become zero in every optimizer slot."""
        fresh = edit.fresh
        if not self.method.zero_pruned:
            return fresh, fresh
        if edit.mask is not None:
            grown = mask & ~self.mask
            fresh = grown if fresh is None else fresh | grown
        return ~mask if fresh is None else ~mask | fresh, fresh

    def _write_mask(self, edit: Edit) -> None:
        if edit.mask is not None:
            self.mask.copy_(edit.mask)
        self.set_state(edit.state)
