"""The forms of a weight, and the one move between them.

A weight is a dense Parameter, a SparseTensor Parameter (for inference), or trainable: plain Parameters and a holder
beside them. A move keeps the Parameter's identity, so that optimizers, schedulers, ties and anybody's references
survive, and turns its gradient and every optimizer slot into the new form.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .state import keep_loadable
from .targets import Target, trained
from .tensor import SparseTensor
from .training.distributed import whole
from .training.pattern import PREFIX, SparseWeight, holders, install, remove

attached: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # the optimizers whose slots follow a weight from form to form


def sparse_weights(model: nn.Module) -> list[Target]:
    """Every sparse weight of a model, in either form, once, with all its owners."""
    found: dict[int, Target] = {}

    def add(key: int, full: str, owner: tuple[nn.Module, str], make: Callable[[], Target]) -> None:
        target = found[key] if key in found else found.setdefault(key, make())
        target.owners.append(owner)
        target.names.append(full)

    for prefix, module in model.named_modules():
        for name, p in module._parameters.items():
            if isinstance(p, SparseTensor):
                full = f"{prefix}.{name}" if prefix else name
                add(id(p), full, (module, name), lambda p=p, full=full: Target(full, [], p, stored=p.detach()))
    for full, module, name, holder in holders(model):
        add(id(holder), full, (module, name), functools.partial(_held, full, module, name, holder))
    return list(found.values())


def _held(full: str, module: nn.Module, name: str, holder: nn.Module) -> Target:
    stored = holder.tensor(module._parameters[name]).detach()
    return Target(full, [], trained(module, name, holder), holder=holder, stored=stored)


def move(target: Target, after: Tensor, optimizers: Iterable[Optimizer], trainable: bool = False) -> None:
    """Give a weight the form of `after`: dense, a SparseTensor, or that one's trainable form.

    Everything new is made before the first thing is changed.
    """
    old, optimizers = target.tensor, list(optimizers)
    holder = SparseWeight(after.detach().requires_grad_(old.requires_grad)) if trainable else None
    new = holder.values if trainable else nn.Parameter(after, requires_grad=old.requires_grad)
    with torch.no_grad():
        slots = [(o, key, _in_form(slot, target, after, trainable)) for o, key, slot in _slots(optimizers, old)]
        grad = None if old.grad is None else _in_form(old.grad, target, after, trainable)
    take_off(target)
    kept = _become(old, new, optimizers)
    for module, name in target.owners:
        if trainable:
            holder._parameters["values"] = kept
            install(module, name, holder)
        else:
            setattr(module, name, kept)  # a recurrent layer notes it in its list of weights
        keep_loadable(module)
    kept.grad = grad
    for optimizer, key, slot in slots:
        optimizer.state[kept][key] = slot


def _slots(optimizers: list[Optimizer], param: Tensor) -> list[tuple[Optimizer, str, Tensor]]:
    """The optimizer slots that have the parameter's shape: (optimizer, name, tensor)."""
    items = [(o, key, slot) for o in optimizers for key, slot in o.state.get(param, {}).items()]
    return [
        (o, key, slot)
        for o, key, slot in items
        if isinstance(slot, Tensor) and slot.dim() and slot.shape == param.shape
    ]


def _in_form(t: Tensor, target: Target, after: Tensor, trainable: bool) -> Tensor:
    """A gradient or slot of the weight's present form in the form that the weight takes."""
    t = whole(t)
    if isinstance(t, SparseTensor):
        dense = t.to_dense()
    elif isinstance(target.holder, SparseWeight):
        dense = target.stored.with_values(t).to_dense()
    else:
        dense = t
    if not isinstance(after, SparseTensor):
        return dense.contiguous()
    values = after.values_like(dense)
    return values if trainable else after.with_values(values)


def _become(old: Tensor, new: nn.Parameter, optimizers: list[Optimizer]) -> Tensor:
    """Make the object `old` hold what `new` holds, so that every reference survives; return what to use.

    A graph that is still alive (a loss that never saw backward) must keep the old tensor: then the new Parameter takes
    its place in the optimizers.
    """
    for key in vars(old).keys() - vars(old.detach()).keys() - {"_is_param"}:  # what the user noted on the Parameter
        setattr(new, key, vars(old)[key])
    try:
        torch.utils.swap_tensors(old, new)
        return old
    except RuntimeError:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["params"] = [new if p is old else p for p in group["params"]]
            if old in optimizer.state:
                optimizer.state[new] = optimizer.state.pop(old)
        return new


def take_off(target: Target) -> None:
    """Remove the holder, or torch's pruning reparametrization; the Parameter goes back under its own name."""
    for module, name in target.owners:
        if target.holder is not None:
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


def settled_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state under the names it has when finalized: sparse weights of either form as SparseTensors.

    A tied weight is the same object under each of its names.
    """
    state = dict(model.state_dict(keep_vars=True))
    made: dict[int, SparseTensor] = {}
    for full, module, name, holder in holders(model):
        inside = full.removesuffix(name) + PREFIX + name + "."
        state = {key: value for key, value in state.items() if not key.startswith((full + ".", inside))}
        if id(holder) not in made:
            made[id(holder)] = holder.tensor(module._parameters[name])
        state[full] = made[id(holder)]
    return state
