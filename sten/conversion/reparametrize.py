"""The forms of a weight, and the one move between them.

    form            module._parameters["weight"]    module.weight reads as      made by
    dense           the Parameter                   itself                      (torch), sten.densify
    finalized       a SparseTensor Parameter        itself                      sten.sparsify, sten.finalize, sten.load
    pattern         the layout's values, 2-D        a SparseTensor              sten.sparsify(optimizer=), sten.attach
    dense weight    the Parameter                   what the method makes       sten.sparsify with such a method

The last two are the trainable forms: a TrainedWeight lies beside the Parameter. A move keeps the Parameter's identity,
so that optimizers, schedulers, ties and anybody's references survive, and turns its gradient and every optimizer slot
into the new form. Everything new is made before the first thing is changed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..sparsifiers import DenseWeightMethod, Sparsifier, View
from ..tensor import SparseTensor
from ..training.attribute import install, read_finalized, remove
from ..training.dense_weight import DenseWeight
from ..training.distributed import whole
from ..training.optimizer_checks import expect_slots
from ..training.pattern_weight import PatternWeight, as_matrix
from ..training.trained_weight import TrainedWeight, optimizer_slots, replace_in_optimizer
from .record import known_optimizers
from .select import Target


def move(target: Target, after: Tensor, optimizers: list[Optimizer], trainable: bool = False) -> TrainedWeight | None:
    """Give a weight the form of `after`: dense, a SparseTensor, or that one's trainable form, which is returned."""
    old, optimizers = target.tensor, _all(target, optimizers)
    weight = PatternWeight(target.name, after.detach().requires_grad_(old.requires_grad)) if trainable else None
    new = nn.Parameter(as_matrix(after.parts["values"].detach()) if trainable else after, old.requires_grad)
    with torch.no_grad():
        slots = []
        for optimizer in optimizers:
            for key, slot in optimizer_slots(old, optimizer).items():
                slots.append((optimizer, key, _in_form(slot, target, after, trainable)))
        grad = None if old.grad is None else _in_form(old.grad, target, after, trainable)
    take_off(target)
    param = _become(old, new, optimizers)
    for module, name in target.owners:
        if trainable:
            install(module, name, param, weight)
        else:
            setattr(module, name, param)  # a recurrent layer notes it in its list of weights
            read_finalized(module, name, isinstance(after, SparseTensor))
    if grad is not None:
        param.grad = grad
    for optimizer, key, slot in slots:
        optimizer.state[param][key] = slot
    target.tensor, target.weight = param, weight
    return weight


def begin(target: Target, sparsifier: Sparsifier, view: View, allocation, optimizers: list[Optimizer]) -> TrainedWeight:
    """Give a chosen weight the form that its dynamic method trains."""
    if not isinstance(sparsifier, DenseWeightMethod):
        weight = move(target, with_capacity(target.result, sparsifier.capacity), optimizers, trainable=True)
        weight.set_method(sparsifier, view, allocation)
        return weight
    if (stored := target.stored) is not None:  # sparse already: train its numbers as a dense weight
        move(target, stored.to_dense().contiguous(), optimizers)
    weight = DenseWeight(target.layout, target.transposed, sparsifier, view, allocation)
    take_off(target)
    for module, name in target.owners:
        install(module, name, target.tensor, weight)
    if target.mask is not None:  # torch's pruning keeps numbers there, which would come back
        with torch.no_grad():
            target.tensor.mul_(target.mask)
    # Into the weight's own group: a new one would upset learning-rate schedulers that exist.
    for group in (g for o in optimizers for g in o.param_groups if any(p is target.tensor for p in g["params"])):
        group["params"].extend(weight.parameters())
    return weight


def with_capacity(w: SparseTensor, capacity: float) -> SparseTensor:
    """The weight with free slots, for a method that moves entries between weights."""
    if capacity <= 1 or not w.sparse_layout.free_slots:
        return w
    slots = min(round(capacity * len(w.parts["values"])), w.numel())
    return SparseTensor(
        w.sparse_layout, w.sparse_layout.with_slots(w.parts, slots), w.stored_shape, w.transposed, w.requires_grad
    )


def _all(target: Target, optimizers: list[Optimizer]) -> list[Optimizer]:
    """These optimizers and those that the weight was given before."""
    everyone = list(optimizers)
    for module, name in target.owners:
        for optimizer in known_optimizers(module, name):
            if not any(optimizer is other for other in everyone):
                everyone.append(optimizer)
    return everyone


def expect_slots_to_follow(target: Target, optimizers: list[Optimizer]) -> None:
    """Raise ValueError if state of these optimizers, or of those that the weight was given before, cannot follow it."""
    for optimizer in _all(target, optimizers):
        expect_slots(target.name, target.tensor, optimizer)


def _in_form(t: Tensor, target: Target, after: Tensor, trainable: bool) -> Tensor:
    """A gradient or slot of the weight's present form in the form that the weight takes."""
    t = whole(t)
    if isinstance(t, SparseTensor):
        dense = t.to_dense()
    elif isinstance(target.weight, PatternWeight):
        dense = target.weight.dense(t)
        dense = dense.t() if target.weight.transposed else dense
    else:
        dense = t
    if not isinstance(after, SparseTensor):
        return dense.contiguous()
    values = after.values_like(dense)
    return as_matrix(values) if trainable else after.with_values(values)


def _become(old: Tensor, new: nn.Parameter, optimizers: list[Optimizer]) -> Tensor:
    """Make the object `old` hold what `new` holds, so that every reference survives; return what to use.

    A graph that is still alive (a loss that never saw backward) must keep the old tensor: then the new Parameter takes
    its place in the optimizers.
    """
    for key in vars(old).keys() - vars(old.detach()).keys() - {"_is_param"}:  # what the user noted on the Parameter
        setattr(new, key, vars(old)[key])
    torch.clear_autocast_cache()  # it has weak references to weights, with which swap_tensors would break the object
    try:
        torch.utils.swap_tensors(old, new)
        return old
    except RuntimeError:
        for optimizer in optimizers:
            replace_in_optimizer(old, new, optimizer)
        return new


def take_off(target: Target) -> None:
    """Remove the TrainedWeight, or torch's pruning reparametrization; the Parameter goes back under its own name."""
    for module, name in target.owners:
        if target.weight is not None:
            remove(module, name, target.tensor)
        elif target.mask is not None and name + "_orig" in module._parameters:
            param = module._parameters.pop(name + "_orig")
            module._buffers.pop(name + "_mask")
            for key, hook in list(module._forward_pre_hooks.items()):
                if getattr(hook, "_tensor_name", None) == name:
                    del module._forward_pre_hooks[key]
            module.__dict__.pop(name, None)
            module.register_parameter(name, param)
        elif target.mask is not None:
            param = module.parametrizations[name].original
            nn.utils.parametrize.remove_parametrizations(module, name, leave_parametrized=False)
            module._parameters[name] = param
