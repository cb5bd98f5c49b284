"""Where the input of a weight is read: the module to hook, and the input as rows of the weight's columns."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from copy import copy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..tensor import SparseTensor


class Located(Protocol):
    """A weight: its name, the (module, attribute) pairs that own it, and whether it is (in, out), as in Conv1D."""

    name: str
    owners: list[tuple[nn.Module, str]]
    transposed: bool


@dataclass(frozen=True)
class Site:
    """One module that computes with a weight.

    Attributes:
        module: its forward pre-hook sees the input.
        read: the input in (args, kwargs) of a call.
        rows: that input as (tokens, columns).
        kind: two weights of one kind that get one tensor have the same statistics.
    """

    module: nn.Module
    read: Callable[[tuple, dict], Tensor]
    rows: Callable[[Tensor], Tensor]
    kind: Hashable = "linear"


def sites_of(weight: Located, attentions: dict[int, nn.MultiheadAttention]) -> list[Site]:
    """The sites of a weight, one for each owner. `attentions`: by id of their output layers.

    Raises:
        ValueError: a module whose input is not known to be what the weight is multiplied with.
    """
    return [_site(weight, module, attribute, attentions) for module, attribute in weight.owners]


def output_layers(model: nn.Module) -> dict[int, nn.MultiheadAttention]:
    return {id(module.out_proj): module for module in model.modules() if isinstance(module, nn.MultiheadAttention)}


def _site(weight: Located, module: nn.Module, attribute: str, attentions: dict[int, nn.MultiheadAttention]) -> Site:
    if id(module) in attentions:
        attention = attentions[id(module)]
        return Site(attention, lambda args, kwargs: _before_output(attention, args, kwargs), _rows, id(module))
    if isinstance(module, nn.MultiheadAttention):
        names = {"q_proj_weight": ("query",), "k_proj_weight": ("key",), "v_proj_weight": ("value",)}
        inputs = names.get(attribute, ("query", "key", "value"))
        return Site(module, lambda args, kwargs: _attended(inputs, args, kwargs), _rows)
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and attribute == "weight" and module.groups == 1:
        geometry = (module.kernel_size, module.stride, module.padding, module.dilation, module.padding_mode)
        return Site(module, _first, lambda x: patches(x, module), geometry)
    if attribute == "weight" and (isinstance(module, nn.Linear) or weight.transposed):
        return Site(module, _first, _rows)
    raise ValueError(
        f"Expected {weight.name} in a linear layer, a convolution without groups, or MultiheadAttention, whose inputs "
        f"calibration can measure, got {type(module).__name__}; leave it out with weights=, or use sten.Magnitude()."
    )


def _first(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def _rows(x: Tensor) -> Tensor:
    x = x.to_dense() if isinstance(x, SparseTensor) else x  # which `sten.sparsify(site=...)` made of it
    return x.reshape(-1, x.shape[-1])


def patches(x: Tensor, conv: nn.Module) -> Tensor:
    """The input of a convolution, unfolded: (batch * positions, channels * kernel), as `weight.flatten(1)` has them."""
    size = len(conv.kernel_size)
    x = x if x.dim() == size + 2 else x[None]  # one image without a batch
    pads: list[int] = []
    for i in reversed(range(size)):
        total = conv.dilation[i] * (conv.kernel_size[i] - 1)
        pair = (total // 2, total - total // 2) if conv.padding == "same" else (0, 0)
        pads += pair if isinstance(conv.padding, str) else (conv.padding[i],) * 2
    if any(pads):
        x = F.pad(x, pads, "constant" if conv.padding_mode == "zeros" else conv.padding_mode)
    for i in range(size):
        d = conv.dilation[i]
        x = x.unfold(2 + i, d * (conv.kernel_size[i] - 1) + 1, conv.stride[i])[..., ::d]
    order = [0, *range(2, 2 + size), 1, *range(2 + size, 2 + 2 * size)]
    x = x.permute(order)
    return x.reshape(-1, x.shape[1 + size] * torch.Size(conv.kernel_size).numel())


def _attended(names: tuple[str, ...], args: tuple, kwargs: dict) -> Tensor:
    """What an attention's projection gets; of several tensors, for one weight, all rows."""
    given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
    inputs: list[Tensor] = []
    for name in names:
        if not any(given[name] is x for x in inputs):
            inputs.append(given[name])
    return inputs[0] if len(inputs) == 1 else torch.cat([_rows(x) for x in inputs])


def _before_output(attention: nn.MultiheadAttention, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """What the output layer gets, which attention does not call as a module: its output with the identity there."""
    layer = copy(attention.out_proj)
    width = layer.in_features
    like = args[0] if args else kwargs["query"]
    identity, zero = torch.eye(width, device=like.device, dtype=like.dtype), like.new_zeros(width)
    layer._parameters = {"weight": nn.Parameter(identity, False), "bias": nn.Parameter(zero, False)}
    twin = copy(attention)
    twin._modules = {**attention._modules, "out_proj": layer}
    return type(attention).forward(twin, *args, **kwargs)[0]
