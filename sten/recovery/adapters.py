"""Adapters that keep a pattern: a few factors for each sparse weight, which is frozen (SPP)."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from ..conversion.arguments import Weights, requested_weights
from ..conversion.select import Target, matches, sparse_weights
from ..tensor import SparseTensor
from ..training.inference_mode import ordinary_tensors

Model = TypeVar("Model", bound=nn.Module)


class SPP(nn.Module):
    """w * (1 + scale * lora_B[row] * lora_A[group of the row]), a parametrization of a sparse weight.

    Attributes:
        lora_A: (rank, columns) as the layout stores them, one row for each group of neighboring rows of the weight.
        lora_B: (rows, 1), zero at the start.
    """

    def __init__(self, w: SparseTensor, rank: int, scale: float) -> None:
        super().__init__()
        rows, *rest = w.stored_shape
        self.scale, self.shape, self.transposed = scale, (rows, *rest), w.transposed
        rank = min(rank, rows)
        dtype = torch.float64 if w.dtype == torch.float64 else torch.float32
        self.lora_A = nn.Parameter(torch.empty(rank, math.prod(rest), device=w.device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(rows, 1, device=w.device, dtype=dtype))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, w: SparseTensor) -> SparseTensor:
        rank, columns = self.lora_A.shape
        rows = len(self.lora_B)
        each = -(-rows // rank)  # rows to a group; the last groups may have fewer, or none
        change = F.pad(self.lora_B, (0, 0, 0, rank * each - rows)).view(rank, each, 1) * self.lora_A.unsqueeze(1)
        factor = (1 + self.scale * change.view(-1, columns)[:rows]).view(self.shape)
        factor = factor.t() if self.transposed else factor
        return w * factor.to(w.dtype)

    def extra_repr(self) -> str:
        return f"rank={len(self.lora_A)}, scale={self.scale}, shape={self.shape}"


@ordinary_tensors
def add_adapters(model: Model, rank: int = 16, scale: float = 2.0, weights: Weights = None) -> Model:
    """Freeze a sparse model, and give its weights small factors that train in their place (SPP), in place.

    A weight computes as `w * (1 + scale * lora_B[i] * lora_A[g(i)])`, where g(i) is one of `rank` groups of neighboring
    rows: `rank * columns + rows` numbers, float32 or more, in any layout. At the start nothing changes, since lora_B is
    zero. The pattern cannot change, and a stored zero stays zero.

    All parameters are frozen but the adapters; unfreeze others by `requires_grad_`, as norms or a classifier. Then
    train with any optimizer made from those that require a gradient, or by `sten.distill`; the usual learning rate is
    some 4e-3, larger than for weights. `sten.adapter_state_dict` has the small state, `model.load_state_dict(state,
    strict=False)` takes it, and `sten.merge_adapters` ends it. The adapters are a parametrization of
    `torch.nn.utils.parametrize`, so `parametrize.cached()` works; `save_pretrained` and `sten.finalize` come after the
    merge.

    Args:
        model: with finalized weights, as `sten.sparsify`, `sten.finalize` and `sten.load` make them.
        rank: groups of a weight, at most its rows.
        scale: fixed factor, alpha / r of LoRA.
        weights: which of the sparse weights get adapters, as in `sten.sparsify`; None: all.

    Raises:
        ValueError, TypeError: no sparse weights, or some that are in training or parametrized; nothing was changed.

    Source: https://arxiv.org/abs/2405.16057 (SPP), and its code; without the dropout on the adapter's input, which has
    no place in a weight.

    Example:
        >>> import torch, sten
        >>> model = sten.sparsify(torch.nn.Linear(64, 32), sten.NM(2, 4))
        >>> model = sten.add_adapters(model, rank=4)
        >>> [(name.rpartition(".")[2], tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
        [('lora_A', (4, 64)), ('lora_B', (32, 1))]
        >>> sten.merge_adapters(model).weight.sparse_layout
        NM(n=2, m=4)
    """
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1 or not scale > 0:
        raise ValueError(f"Expected a positive rank and scale, got rank={rank!r} and scale={scale!r}.")
    adapters = [(target, SPP(target.tensor, rank, scale)) for target in _chosen(model, weights)]
    for p in model.parameters():
        p.requires_grad_(False)
    for target, adapter in adapters:
        w = nn.Parameter(target.tensor.detach(), requires_grad=False)  # parametrize swaps it, and no graph must hold it
        for module, name in target.owners:
            module._parameters[name] = w
        for module, name in target.owners:
            parametrize.register_parametrization(module, name, adapter)
    return model


@ordinary_tensors
def merge_adapters(model: Model) -> Model:
    """Write what `sten.add_adapters` has trained into the weights, once, and remove it; in place.

    The weights are finalized again, and frozen, until `requires_grad_`.

    Raises:
        ValueError: no adapters; nothing was changed.

    Example:
        >>> import torch, sten
        >>> model = sten.add_adapters(sten.sparsify(torch.nn.Linear(64, 32), sten.NM(2, 4)))
        >>> type(sten.merge_adapters(model)).__name__
        'Linear'
    """
    adapted = _adapted(model)
    with torch.no_grad():
        merged = {id(module.parametrizations[name].original): getattr(module, name) for module, name in adapted}
        for module, name in adapted:
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
            w = module._parameters[name]
            if id(w) in merged:
                w.copy_(merged.pop(id(w)))
    return model


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' part of `model.state_dict()`, for `load_state_dict(state, strict=False)` of a model with adapters.

    Example:
        >>> import torch, sten
        >>> model = sten.add_adapters(sten.sparsify(torch.nn.Linear(64, 32), sten.NM(2, 4)))
        >>> [name.rpartition(".")[2] for name in sten.adapter_state_dict(model)]
        ['lora_A', 'lora_B']
    """
    _adapted(model)
    paths = [path for path, module in model.named_modules(remove_duplicate=False) if isinstance(module, SPP)]
    state = model.state_dict()
    return {key: t for key, t in state.items() if key.rpartition(".")[0] in paths}


def _chosen(model: nn.Module, weights: Weights) -> list[Target]:
    """The weights that get adapters; one sentence for what cannot have them."""
    sparse, requested = sparse_weights(model), requested_weights(weights)
    if not sparse:
        raise ValueError("Expected a model with sparse weights for adapters, got none; call sten.sparsify first.")
    targets = []
    for target in sparse:
        if requested is None:
            wanted = True
        elif isinstance(requested, list):
            wanted = any(matches(pattern, target) for pattern in requested)
        else:
            wanted = any(requested(target.name, module, name) for module, name in target.owners)
        if wanted:
            targets.append(target)
    if not targets:
        raise ValueError(f"Expected weights= to match a sparse weight, got none; there is {sparse[0].name}, say.")
    for target in targets:
        if target.weight is not None:
            raise ValueError(
                f"Expected finalized weights for adapters, got {target.name} in training; call sten.finalize first."
            )
        if target.why:
            raise ValueError(f"Expected plain sparse weights for adapters, got {target.name}: {target.why}.")
        if any(isinstance(module, nn.RNNBase) for module, _ in target.owners):
            raise TypeError(
                f"Expected weights that are read at each use for adapters, got {target.name} of a fused recurrent "
                "layer; leave it out with weights=."
            )
    return targets


def _adapted(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """(module, attribute) of every weight with an adapter."""
    found = []
    for module in model.modules():
        for name, steps in getattr(module, "parametrizations", {}).items():
            if any(isinstance(step, SPP) for step in steps):
                if len(steps) > 1:
                    kinds = ", ".join(type(step).__name__ for step in steps)
                    raise ValueError(f"Expected adapters alone on {name}, got {kinds}; remove the others first.")
                found.append((module, name))
    if not found:
        raise ValueError("Expected a model with adapters, got none; call sten.add_adapters first.")
    return found
