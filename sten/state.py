"""What sparse weights accept in `load_state_dict`: any form of the same weight, checked; never a silent dense one."""

from __future__ import annotations

from torch import Tensor, nn

from .layout import fields
from .ops.pattern import dense_to_values
from .tensor import SparseTensor, checked, from_dense
from .training.pattern import PREFIX, installed


def keep_loadable(module: nn.Module) -> None:
    """Let `load_state_dict` of a module with sparse weights take dense, sparse and part-wise entries."""
    if not any(getattr(hook, "hook", None) is _fit_state for hook in module._load_state_dict_pre_hooks.values()):
        module.register_load_state_dict_pre_hook(_fit_state)


def _fit_state(module: nn.Module, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
    """Rewrite the entries of sparse weights to the form that the module has now."""
    sparse = {name: p.detach() for name, p in module._parameters.items() if isinstance(p, SparseTensor)}
    trained = {name: module._modules[PREFIX + name].tensor() for name in installed(module)}
    for name, current in (sparse | trained).items():
        try:
            given = _given(state_dict, prefix + name, current)
        except (ValueError, TypeError) as error:
            errors.append(f"{prefix + name}: {error}")
            continue
        if given is None:
            continue
        if name in trained:
            state_dict.update({f"{prefix}{PREFIX}{name}.{part}": tensor for part, tensor in given.parts.items()})
        else:
            state_dict[prefix + name] = given


def _given(state_dict, key: str, current: SparseTensor) -> SparseTensor | None:
    """The weight that a state_dict holds under this name, in the layout of `current`; it leaves the dict."""
    parts = {k.removeprefix(key + "."): state_dict.pop(k) for k in list(state_dict) if k.startswith(key + ".")}
    entry = state_dict.pop(key, None)
    if parts:
        layout = type(current.spec).__name__, fields(current.spec)
        return SparseTensor(*checked(*layout, parts, current.stored_shape, current.transposed))
    if entry is None:
        return None
    if not isinstance(entry, Tensor) or entry.shape != current.shape:
        raise ValueError(
            f"the entry must be a tensor of shape {tuple(current.shape)}; got {tuple(getattr(entry, 'shape', ()))}."
        )
    entry = entry.detach()
    if not isinstance(entry, SparseTensor):
        return current.with_values(dense_to_values(current, entry.to(current.device), "load_state_dict"))
    if entry.spec == current.spec and entry.transposed == current.transposed:
        return entry
    dense, mask = (x.t() if current.transposed else x for x in (entry.to_dense(), entry.mask()))
    new = from_dense(dense, current.spec, mask)
    return new.t() if current.transposed else new
