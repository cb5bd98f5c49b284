"""The start of training under a dynamic method: its trainable form, with what the method keeps beside it."""

from __future__ import annotations

from collections.abc import Iterable

from torch.optim import Optimizer

from ..decision import Change
from ..forms import move, take_off
from ..sparsifiers import PatternMethod
from ..state import keep_loadable
from ..tensor import SparseTensor
from .idle import wait
from .master import MasterWeight
from .pattern import PREFIX, install


def _roomy(w: SparseTensor, capacity: float) -> SparseTensor:
    """The weight with free slots, for a method that moves entries between weights."""
    slots = min(round(capacity * len(w.parts["values"])), w.numel())
    return SparseTensor(w.spec, w.spec.with_slots(w.parts, slots), w.stored_shape, w.transposed, w.requires_grad)


def begin(change: Change, optimizers: Iterable[Optimizer]) -> None:
    """Give a chosen weight the form that its method trains."""
    method, target = change.method.sparsifier, change.target
    if isinstance(method, PatternMethod):
        move(target, _roomy(change.tensor, method.capacity), optimizers, trainable=True)
        for module, name in target.owners:
            module._modules[PREFIX + name].adopt(change.method, method.init(change.view))
        wait(module._modules[PREFIX + name], module, name)
        return
    holder = MasterWeight(change.method, target.layout, target.transposed, change.view)
    take_off(target)
    for module, name in target.owners:
        install(module, name, holder)
        keep_loadable(module)
    wait(holder, *target.owners[0])
    # Into the weight's own group: a new one would upset learning-rate schedulers that exist.
    for group in (g for o in optimizers for g in o.param_groups if any(p is target.tensor for p in g["params"])):
        group["params"].extend(holder.parameters())
