"""The attribute of a layer whose weight is sparse: `layer.weight` reads as what the layer computes with.

In trainable form the trained tensor is `layer._parameters["weight"]`, its TrainedWeight
`layer._modules["weight_pattern"]`. The layer's class is replaced by a subclass with a property that calls the second
with the first; methods, name and hooks do not change. Assigning to the property acts as `copy_`.

Of a finalized weight, `layer._parameters["weight"]` is the SparseTensor, and the subclass has a `Finalized`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from torch import Tensor, nn

from ..caller import no_replicas, no_shards
from ..tensor import SparseTensor
from .distributed import sharded
from .finalized import Finalized

SITES = "_sten_sites"  # on a module with sites other than its weights: {site: conversion.sites.Site}
SUFFIX = "_pattern"  # a submodule must not bear the parameter's own name: torch.export fails on that


@functools.cache
def _reparametrized(cls: type[nn.Module], names: tuple[str, ...], finalized: tuple[str, ...] = ()) -> type[nn.Module]:
    """A subclass of a module class whose attributes `names` are read through their TrainedWeights, and `finalized` by
    a `Finalized` each."""

    def attribute(name: str) -> property:
        key = name + SUFFIX

        def read(self) -> Tensor:
            param = self._parameters.get(name)
            if param is None:
                raise _not_removed(name)
            # FSDP2 looks its shard up by name, outside of a forward pass
            if type(param) is not nn.Parameter and hasattr(param, "placements"):
                return param
            try:
                return self._modules[key].forward(param)
            except AttributeError as error:  # which Python would answer by nn.Module's lookup: the raw Parameter
                raise RuntimeError(f"Reading {name} failed: {error}") from error

        return property(read)

    def set_attribute(self, name: str, value) -> None:
        if name in names and (value is None or isinstance(value, Tensor)):
            _assign(self, name, value)
        elif name == "qconfig":  # torch.ao.quantization sets it on every module, and then skips subclasses of Linear
            raise RuntimeError(
                f"Expected a model of dense weights for torch.ao.quantization, got {cls.__name__} with a sparse "
                f"{(*names, *finalized)[0]}; call sten.densify first."
            )
        else:
            cls.__setattr__(self, name, value)

    def delete_attribute(self, name: str) -> None:
        if name in names:
            raise _not_removed(name)
        cls.__delattr__(self, name)

    def register_parameter(self, name: str, param) -> None:
        if name in names and sharded(param):  # tensor parallelism; FSDP2 assigns
            raise no_shards(f"a {name} in training")
        if name in names:
            _assign(self, name, param)
        elif name.endswith(("_orig", "_g")) and name.rpartition("_")[0] in names:
            raise _not_removed(name.rpartition("_")[0])  # torch.nn.utils.prune, and weight_norm
        else:
            cls.register_parameter(self, name, param)

    def replicate(self):
        raise no_replicas(f"a {names[0]} in training")

    def apply(self, fn, recurse: bool = True):
        try:
            return cls._apply(self, fn, recurse)
        except RuntimeError as error:
            if "Couldn't swap" not in str(error):
                raise
            raise RuntimeError(
                f"Expected no view of a sparse {finalized[0]}, nor a result for which autograd saved it, while "
                f"its {cls.__name__} is cast or moved, got one in use, such as w.t() or w.abs(); delete it, or make "
                "it of w.detach(), and call .to() again."
            ) from error

    def reduce(self, protocol):
        return _rebuild, (cls, names, finalized), self.__getstate__()

    def set_state(self, state) -> None:
        cls.__setstate__(self, state)
        for name in names:
            self._modules[name + SUFFIX].add_owner(self, name)

    body: dict = {name: Finalized(name) for name in finalized} | {name: attribute(name) for name in names}
    if names:
        body |= {"__delattr__": delete_attribute, "register_parameter": register_parameter, "__setstate__": set_state}
        body["_replicate_for_data_parallel"] = replicate
    if finalized:
        body["_apply"] = apply
    body |= {"__setattr__": set_attribute, "__reduce_ex__": reduce}
    body |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), {**body, "plain_class": cls, "sparse_names": names, "finalized_names": finalized})


def _assign(module: nn.Module, name: str, value: Tensor | None) -> None:
    """Carry out `module.weight = value`: a shard of FSDP2 is stored, any other tensor is copied into the weight."""
    current = module._parameters.get(name)
    if value is current or sharded(value) or sharded(current):
        module._parameters[name] = value
    elif value is None:
        raise TypeError(f"Expected a tensor for {name}, got None; call sten.densify before removing a weight.")
    else:
        module._modules[name + SUFFIX].assign(current, value)
        if isinstance(value, nn.Parameter):
            module._parameters[name].requires_grad_(value.requires_grad)


def _not_removed(name: str) -> RuntimeError:
    """For parametrizations, weight_norm, spectral_norm and torch.nn.utils.prune, which all replace the Parameter."""
    return RuntimeError(
        f"Expected {name}, which sten trains, to stay the module's Parameter, got a request to remove or reparametrize "
        "it; call sten.densify (or sten.finalize) on the module first."
    )


def _rebuild(cls: type[nn.Module], names: tuple[str, ...], finalized: tuple[str, ...] = ()) -> nn.Module:
    new = _reparametrized(cls, names, finalized)
    return new.__new__(new)


def install(module: nn.Module, name: str, param: nn.Parameter, weight: nn.Module) -> None:
    """Register the trained Parameter under the weight's name, and its TrainedWeight as a submodule."""
    module._parameters[name] = param
    module.add_module(name + SUFFIX, weight)
    weight.add_owner(module, name)
    _set_names(module, (*installed(module), name), _without(finalized(module), name))


def remove(module: nn.Module, name: str, param: nn.Parameter) -> None:
    """Undo `install`: an ordinary Parameter under the weight's name."""
    del module._modules[name + SUFFIX]
    _set_names(module, _without(installed(module), name), finalized(module))
    module._parameters[name] = param


def read_finalized(module: nn.Module, name: str, sparse: bool) -> None:
    """Let a weight's attribute be a `Finalized`, or an ordinary one."""
    names = _without(finalized(module), name)
    _set_names(module, installed(module), (*names, name) if sparse else names)


def read_every_finalized(model: nn.Module) -> None:
    """The same for all weights of a model whose SparseTensors have been put into place by others."""
    for module in model.modules():
        for name, param in module._parameters.items():
            if isinstance(param, SparseTensor):
                read_finalized(module, name, sparse=True)


def installed(module: nn.Module) -> tuple[str, ...]:
    """The names of the module's weights that are in trainable form."""
    return getattr(type(module), "sparse_names", ())


def finalized(module: nn.Module) -> tuple[str, ...]:
    """The names of the module's weights whose attribute is a `Finalized`."""
    return getattr(type(module), "finalized_names", ())


def _without(names: tuple[str, ...], name: str) -> tuple[str, ...]:
    return tuple(each for each in names if each != name)


def trained_of(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The (name, TrainedWeight) pairs of the module's weights in trainable form."""
    for name in installed(module):
        yield name, module._modules[name + SUFFIX]


def _set_names(module: nn.Module, names: tuple[str, ...], finalized: tuple[str, ...]) -> None:
    plain = getattr(type(module), "plain_class", type(module))
    module.__class__ = _reparametrized(plain, names, finalized) if names or finalized else plain
