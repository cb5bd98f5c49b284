"""The entries of a state dict that are no sparse weights, checked before `load_state_dict` writes the first one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..checked import expect_parts_of
from ..errors import FormatError
from ..tensor import SparseTensor
from ..training.attribute import trained_of
from ..training.pattern_weight import PatternWeight
from ..training.trained_weight import TrainedWeight


def expect_fit(root: nn.Module, state_dict, prefix: str, assign: bool, own_hook: Callable) -> None:
    """Raise FormatError unless each dense entry has the shape of its tensor, as PyTorch requires after writing others.

    Modules that rewrite entries, by a hook or a `_load_from_state_dict` of their own, check them themselves.
    """
    for path, module in root.named_modules(remove_duplicate=False):
        hooks = [getattr(hook, "hook", None) for hook in module._load_state_dict_pre_hooks.values()]
        reads = next(cls for cls in type(module).__mro__ if "_load_from_state_dict" in vars(cls))
        own = not reads.__module__.startswith("torch.nn.modules")
        if own or isinstance(module, TrainedWeight) or any(hook is not own_hook for hook in hooks):
            continue
        below = prefix + path + "." if path else prefix
        trained = dict(trained_of(module))
        skip = module._non_persistent_buffers_set | {n for n, w in trained.items() if isinstance(w, PatternWeight)}
        for name, have in (*module._parameters.items(), *module._buffers.items()):
            if have is not None and name not in skip and not isinstance(have, SparseTensor) and not is_lazy(have):
                entry = state_dict.get(below + name, have)
                if assign and name in trained and isinstance(entry, Tensor) and entry.dtype != have.dtype:
                    raise FormatError(f"{below + name}: Expected {have.dtype}, got {entry.dtype}; convert it first.")
                copied = not assign or (name in trained and not have.is_meta)  # its Parameter stays
                _expect_entry(below + name, entry, have, not copied)


def _expect_entry(key: str, entry: object, have: Tensor, assign: bool) -> None:
    if not isinstance(entry, Tensor):
        raise FormatError(f"{key}: Expected a tensor, got a {type(entry).__name__}.")
    if isinstance(entry, SparseTensor):
        expect_parts_of(entry.sparse_layout, entry.parts, entry.stored_shape)
    scalar = have.dim() == 0 and tuple(entry.shape) == (1,)  # of PyTorch 0.3
    if entry.shape != have.shape and not scalar:
        raise FormatError(
            f"size mismatch for {key}: Expected shape {tuple(have.shape)}, got {tuple(entry.shape)}; load into the "
            "architecture that was saved."
        )
    if entry.is_meta and not have.is_meta and not assign:
        raise FormatError(f"{key}: Expected a tensor with numbers, got one on the meta device; pass assign=True.")
    trained = assign and isinstance(have, nn.Parameter) and have.requires_grad
    if trained and not entry.is_floating_point() and not entry.is_complex():
        raise FormatError(f"{key}: Expected a dtype that can be trained, got {entry.dtype}; convert it with .float().")
    if entry.layout is not have.layout and entry.layout is not torch.strided:
        raise FormatError(f"{key}: Expected a {have.layout} tensor, got {entry.layout}; call .to_dense() on it.")
