"""The trainable form of a weight whose dense Parameter stays ("dense master").

The Parameter keeps its place, name and identity; reading the module's attribute gives what the method makes of it. So
optimizers, DDP, FSDP2, EMA and checkpoints see an ordinary dense weight under its ordinary key.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from ..layout import Layout
from ..sparsifiers import DenseWeightMethod, State, View
from ..tensor import SparseTensor, from_dense
from .distributed import sharded, whole
from .pattern import Method


class MasterWeight(nn.Module):
    """What belongs to a dense master: the method, the mask, and the method's own tensors.

    Mask and state are not in the model's state_dict (`sten.state_dict` has them), so dense checkpoints fit; what the
    method trains beside the weight is a Parameter here. Calling it with the master gives the effective weight.
    """

    def __init__(self, method: Method, spec: Layout, transposed: bool, view: View) -> None:
        super().__init__()
        self.method, self.spec, self.shape, self.transposed = method, spec, tuple(view.weight.shape), transposed
        self.register_buffer("mask", view.mask, persistent=False)
        self.register_buffer("clock", torch.zeros((), dtype=torch.int64, device=view.weight.device), persistent=False)
        state = method.sparsifier.init(view)
        self.names = tuple(state)
        for name, value in state.items():
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            elif name not in self._parameters:
                self.register_buffer(name, value, persistent=False)

        self.remembers = type(method.sparsifier).grad is not DenseWeightMethod.grad
        self.memo: tuple[weakref.ref, int, dict[str, Tensor]] | None = None

    @property
    def state(self) -> State:
        return {name: getattr(self, name) for name in self.names}

    def view(self, dense: Tensor, **more) -> View:
        """The View of the master, given dense and in the orientation of the layout."""
        about = self.method
        return View(about.name, dense, self.spec, about.sparsity, self.mask, last=about.last, state=self.state, **more)

    def forward(self, param: Tensor) -> Tensor:
        if sharded(param):  # outside of a forward pass FSDP2 asks for the shard that it keeps
            return param
        w = param.t() if self.transposed else param
        view = self.view(w.detach(), step=self.clock)
        effective = self.method.sparsifier.apply(w, view)
        # A compiled graph would have to give the masks out; there the hook computes them once more.
        if self.remembers and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.memo = weakref.ref(param), param._version, view.memo
        return effective.t() if self.transposed else effective

    def recall(self, param: Tensor) -> dict[str, Tensor]:
        """What the last forward pass worked out, once, if it saw these very numbers."""
        seen, self.memo = self.memo, None
        return seen[2] if seen is not None and seen[0]() is param and seen[1] == param._version else {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "memo": None}

    @torch.no_grad()
    def tensor(self, param: Tensor) -> SparseTensor:
        """What training would end with now, stored in the layout."""
        dense = whole(param.detach())
        dense = dense.t() if self.transposed else dense
        end = self.method.sparsifier.finish(self.view(dense, step=int(self.clock)))
        mask = end.mask if end.mask is not None else self.mask
        w = from_dense((dense if end.value is None else end.value).contiguous(), self.spec, mask)
        w = w.t() if self.transposed else w
        return w.requires_grad_(param.requires_grad)

    def extra_repr(self) -> str:
        return f"{self.method.sparsifier}, {self.spec}, shape={self.shape}{', transposed' if self.transposed else ''}"
