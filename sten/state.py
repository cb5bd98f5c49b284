"""What sparse weights accept in `load_state_dict`: any form of the same weight, checked; never a silent dense one."""

from __future__ import annotations

from torch import Tensor, nn

from .layouts.registry import fields
from .ops.attributes import entries_of
from .ops.pattern import dense_to_values
from .tensor import SparseTensor, checked
from .training.pattern import PREFIX, SparseWeight, installed


def keep_loadable(module: nn.Module) -> None:
    """Let `load_state_dict` of a module with sparse weights take dense, sparse and part-wise entries."""
    if not any(getattr(hook, "hook", None) is _fit_state for hook in module._load_state_dict_pre_hooks.values()):
        module.register_load_state_dict_pre_hook(_fit_state)


def _fit_state(module: nn.Module, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
    """Rewrite the entries of sparse weights to the form that the module has now; a dense master takes dense ones."""
    weights = {name: p.detach() for name, p in module._parameters.items() if isinstance(p, SparseTensor)}
    holders = {name: module._modules[PREFIX + name] for name in installed(module)}
    weights |= {name: holder.tensor() for name, holder in holders.items() if isinstance(holder, SparseWeight)}
    for name, current in weights.items():
        try:
            given = _given(state_dict, prefix + name, current)
        except (ValueError, TypeError) as error:
            errors.append(f"{prefix + name}: {error}")
            given = current  # so that the weight is not reported as missing, too
        if given is None:
            continue
        if name in holders:
            state_dict.update({f"{prefix}{PREFIX}{name}.{part}": tensor for part, tensor in given.parts.items()})
        else:
            state_dict[prefix + name] = given


def _given(state_dict, key: str, current: SparseTensor) -> SparseTensor | None:
    """The weight that a state_dict holds under this name, in the layout of `current`; it leaves the dict.

    A sparse entry brings its own pattern; a dense one must be zero off the present pattern.
    """
    parts = {k.removeprefix(key + "."): state_dict.pop(k) for k in list(state_dict) if k.startswith(key + ".")}
    entry = state_dict.pop(key, None)
    if parts:
        layout = type(current.spec).__name__, fields(current.spec)
        return SparseTensor(*checked(*layout, parts, current.stored_shape, current.transposed))
    if entry is None:
        return None
    if not isinstance(entry, Tensor) or entry.shape != current.shape:
        given = tuple(entry.shape) if isinstance(entry, Tensor) else type(entry).__name__
        raise ValueError(f"the entry must be a tensor of shape {tuple(current.shape)}; got {given}.")
    entry = entry.detach()
    if not isinstance(entry, SparseTensor):
        return current.with_values(dense_to_values(current, entry.to(current.device), "load_state_dict"))
    if entry.spec == current.spec and entry.transposed == current.transposed:
        entry.spec.validate(entry.parts, entry.stored_shape)
        return entry
    return entries_of(entry, current)
