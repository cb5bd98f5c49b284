"""Weights whose method waits for an engine: the first step of an optimizer that holds one of them says so.

A method that is given to `sten.sparsify` without `optimizer=` does nothing until `sten.attach`. A backward pass is no
sign that attach was forgotten (a learning-rate finder may come first), a step is; and a step of another model's
optimizer is none. The hook exists only while weights wait, and looks at each optimizer once.
"""

from __future__ import annotations

import warnings
import weakref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .emptiness import listed
from .pattern import SparseWeight

WAITING: weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref, str]] = weakref.WeakKeyDictionary()
SEEN: weakref.WeakSet[Optimizer] = weakref.WeakSet()
HOOK: list[torch.utils.hooks.RemovableHandle] = []


def wait(holder: nn.Module, owner: nn.Module, attribute: str) -> None:
    """This weight has no engine yet."""
    if holder.method.sparsifier.stateless:
        return
    WAITING[holder] = weakref.ref(owner), attribute
    SEEN.clear()
    if not HOOK:
        HOOK.append(register_optimizer_step_pre_hook(_look))


def served(holder: nn.Module) -> None:
    """It has one now, or needs none any more."""
    WAITING.pop(holder, None)
    if not WAITING:
        while HOOK:
            HOOK.pop().remove()


def _param(holder: nn.Module) -> Tensor | None:
    owner, attribute = WAITING[holder]
    if isinstance(holder, SparseWeight):
        return holder.values
    return None if owner() is None else owner()._parameters.get(attribute)  # FSDP puts another Parameter there


def _look(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    if optimizer in SEEN:
        return
    SEEN.add(optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    found = [holder for holder in list(WAITING) if id(_param(holder)) in held]
    for holder in found:
        served(holder)
    if found:
        method, names = found[0].method.sparsifier, listed([holder.method.name for holder in found])
        warnings.warn(
            f"sten: {type(method).__name__} does not act on {names}: call sten.attach(model, optimizer) before the "
            "first step, or give sten.sparsify optimizer=.",
            stacklevel=3,
        )
