"""Running averages of a model in training, whose patterns follow those of the model."""

from __future__ import annotations

import weakref

import torch
from torch import nn

from .engine import dynamic_weights


def follow(average: nn.Module, model: nn.Module) -> nn.Module:
    """Move the masks of a running average (`torch.optim.swa_utils.AveragedModel`, an EMA) with those of the model.

    Averages are taken slot by slot, so the average must have the pattern of the model; that of a dense weight must have
    its mask, to end as sparse. After each mask update entries that stay have their average, new ones zero.

    Args:
        average: a deep copy of the model, or an AveragedModel of it; returned.
        model: a model whose weights are attached to an optimizer.

    Raises:
        ValueError: `average` is no copy of the model, or none of the model's weights is attached.

    Example:
        >>> import torch, sten
        >>> model = torch.nn.Linear(8, 8)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> model = sten.sparsify(model, sten.CSR(), sten.SET(100, every=10), sparsity=0.75, optimizer=optimizer)
        >>> average = sten.follow(torch.optim.swa_utils.AveragedModel(model), model)
    """
    copy = average.module if isinstance(average, torch.optim.swa_utils.AveragedModel) else average
    copies = {weight.name: weight for weight in dynamic_weights(copy)}
    attached = [weight for weight in dynamic_weights(model) if weight.engine is not None]
    if not attached:
        raise ValueError("Expected a model that is attached to an optimizer, got another; call sten.attach first.")
    if any(copies.get(weight.name, weight) is weight for weight in attached):
        raise ValueError(
            "Expected a deep copy of the model or an AveragedModel of it, got the model itself or a model without its "
            "sparse weights; copy the model after sten.sparsify."
        )
    for weight in attached:
        copied = copies[weight.name]
        if not torch.equal(copied.active(), weight.active()):  # copied before the last mask update
            copied.follow(weight, copied.dense(copied.param))
        weight.averages.append(weakref.ref(copied))
    return average
