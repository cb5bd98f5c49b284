"""The attribute of a layer whose weight is in trainable form: `layer.weight` reads as what the layer computes with.

The trained tensor stands in `layer._parameters["weight"]`, the object that knows how to read it in
`layer._modules["weight_pattern"]`. The layer's class gains a subclass whose property puts the two together; its
methods, name and hooks stay what they were. A user's assignment acts as `copy_`, so it is never lost.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from torch import Tensor, nn

from .distributed import sharded

SUFFIX = "_pattern"  # a submodule must not bear the parameter's own name: torch.export fails on that


@functools.cache
def _reparametrized(cls: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of a module class whose attributes `names` are read through their TrainedWeights."""

    def attribute(name: str) -> property:
        key = name + SUFFIX

        def read(self) -> Tensor:
            param = self._parameters[name]
            # FSDP2 looks the shard that it keeps up by name, outside of a forward pass
            return param if hasattr(param, "placements") else self._modules[key](param)

        return property(read)

    def set_attribute(self, name: str, value) -> None:
        if name in names and (value is None or isinstance(value, Tensor)):
            _assign(self, name, value)
        else:
            cls.__setattr__(self, name, value)

    def register_parameter(self, name: str, param) -> None:
        _assign(self, name, param) if name in names else cls.register_parameter(self, name, param)

    def reduce(self, protocol):
        return _rebuild, (cls, names), self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__

    def set_state(self, state) -> None:
        cls.__setstate__(self, state)
        for name in names:
            self._modules[name + SUFFIX].add_owner(self, name)

    body = {name: attribute(name) for name in names}
    body |= {"__setattr__": set_attribute, "register_parameter": register_parameter}
    body |= {"__reduce_ex__": reduce, "__setstate__": set_state, "__module__": cls.__module__}
    return type(cls.__name__, (cls,), {**body, "plain_class": cls, "sparse_names": names})


def _assign(module: nn.Module, name: str, value: Tensor | None) -> None:
    """`module.weight = value`: what a sharding wrapper sets is stored; what a user sets is copied into the weight."""
    current = module._parameters.get(name)
    if value is current or sharded(value) or sharded(current):
        module._parameters[name] = value
    elif value is None:
        raise TypeError(f"Expected a tensor for {name}, got None; sten.densify the model before removing its weight.")
    else:
        module._modules[name + SUFFIX].assign(current, value)


def _rebuild(cls: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    new = _reparametrized(cls, names)
    return new.__new__(new)


def install(module: nn.Module, name: str, param: nn.Parameter, weight: nn.Module) -> None:
    """Put the trained Parameter in the weight's place, and the object that reads it beside it."""
    module._parameters[name] = param
    module.add_module(name + SUFFIX, weight)
    weight.add_owner(module, name)
    _set_names(module, (*installed(module), name))


def remove(module: nn.Module, name: str, param: nn.Parameter) -> None:
    """The Parameter alone again."""
    names = tuple(n for n in installed(module) if n != name)
    del module._modules[name + SUFFIX]
    _set_names(module, names)
    module._parameters[name] = param


def installed(module: nn.Module) -> tuple[str, ...]:
    """The names of the module's weights that are in trainable form."""
    return getattr(type(module), "sparse_names", ())


def trained_of(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, TrainedWeight) of each of the module's weights in trainable form."""
    for name in installed(module):
        yield name, module._modules[name + SUFFIX]


def _set_names(module: nn.Module, names: tuple[str, ...]) -> None:
    plain = getattr(type(module), "plain_class", type(module))
    module.__class__ = _reparametrized(plain, names) if names else plain
