"""Other tensors in the place of weights, for a time: what was there is never written, and comes back whatever happens.

A module's class and `__dict__` are put aside, so that every form of a weight (a Parameter, a SparseTensor, in training,
under torch's pruning or a parametrization) gives way to a plain Parameter, and returns as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from ..training.attribute import finalized, installed
from ..training.uninterrupted import uninterrupted

Owners = Iterable[tuple[nn.Module, str]]


@contextlib.contextmanager
def substituted(values: Iterable[tuple[Owners, Tensor]]) -> Iterator[None]:
    """Each value, a dense tensor as the module has it, in place of the weight of these (module, attribute) pairs."""
    by_module: dict[int, tuple[nn.Module, dict[str, Tensor]]] = {}
    for owners, value in values:
        param = nn.Parameter(value, requires_grad=False)
        for module, name in owners:
            by_module.setdefault(id(module), (module, {}))[1][name] = param
    saved: list[tuple[nn.Module, type, dict]] = []
    try:
        for module, params in by_module.values():
            saved.append((module, type(module), dict(module.__dict__)))
            _replace(module, params)
        yield
    finally:
        with uninterrupted():
            for module, cls, state in saved:
                module.__class__ = cls
                module.__dict__.clear()
                module.__dict__.update(state)


def _replace(module: nn.Module, params: dict[str, nn.Parameter]) -> None:
    parametrized = list(module.parametrizations) if is_parametrized(module) else []
    for name in {*installed(module), *finalized(module), *parametrized} - params.keys():
        params[name] = nn.Parameter(getattr(module, name).detach(), requires_grad=False)
    hooks = {key: hook for key, hook in module._forward_pre_hooks.items() if not _prunes(hook, params)}
    module.__class__ = getattr(type(module), "plain_class", None) or type_before_parametrizations(module)
    for name in params:
        module.__dict__.pop(name, None)
    module.__dict__["_parameters"] = {**module._parameters, **params}
    module.__dict__["_forward_pre_hooks"] = type(module._forward_pre_hooks)(hooks)


def _prunes(hook, params: dict[str, nn.Parameter]) -> bool:
    """Whether a hook is torch.nn.utils.prune's, which writes the attribute before each forward pass."""
    return getattr(hook, "_tensor_name", None) in params


@contextlib.contextmanager
def copied_to(block: nn.Module, device: torch.device | None) -> Iterator[None]:
    """The block with copies of its parameters and buffers on a device, which are dropped at the end; None: as it is."""
    if device is None:
        yield
        return
    copies: dict[int, Tensor] = {}

    def copied(t: Tensor | None) -> Tensor | None:
        if t is None or t.device == device:
            return t
        if id(t) not in copies:
            moved = t.detach().to(device)
            copies[id(t)] = nn.Parameter(moved, t.requires_grad) if isinstance(t, nn.Parameter) else moved
        return copies[id(t)]

    saved = [(module, dict(module._parameters), dict(module._buffers)) for module in block.modules()]
    try:
        for module, params, buffers in saved:
            module._parameters.update({name: copied(p) for name, p in params.items()})
            module._buffers.update({name: copied(b) for name, b in buffers.items()})
        yield
    finally:
        with uninterrupted():
            for module, params, buffers in saved:
                module._parameters.update(params)
                module._buffers.update(buffers)
