"""Running averages of a model in training: they move with its patterns."""

from __future__ import annotations

import weakref

import torch
from torch import nn

from .engine import dynamic_weights
from .pattern_weight import PatternWeight


def follow(average: nn.Module, model: nn.Module) -> nn.Module:
    """Keep a running average of a model's weights (`torch.optim.swa_utils.AveragedModel`, an EMA) in its patterns.

    Averages are taken slot by slot, so when a mask update moves the pattern of a compressed weight, the average must
    move with it: entries that stay keep their average, new ones start at zero. Dense weights need no call.

    Args:
        average: a deep copy of the model, or a wrapper with one as its `module`; returned.
        model: the model that an engine trains.

    Raises:
        ValueError: `average` is no copy of the model.

    Example:
        >>> import torch, sten
        >>> model = torch.nn.Linear(8, 8)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> model = sten.sparsify(model, sten.CSR(), sten.SET(100, every=10), sparsity=0.75, optimizer=optimizer)
        >>> average = sten.follow(torch.optim.swa_utils.AveragedModel(model), model)
    """
    copy = average.module if isinstance(average, torch.optim.swa_utils.AveragedModel) else average
    copies = {weight.name: weight for weight in dynamic_weights(copy)}
    ours = [weight for weight in dynamic_weights(model) if weight.engine is not None]
    if not ours or any(copies.get(weight.name, weight) is weight for weight in ours):
        raise ValueError("Expected a deep copy of the model that an engine trains, or an AveragedModel of it.")
    for weight in ours:
        if isinstance(weight, PatternWeight):
            weight.averages.append(weakref.ref(copies[weight.name]))
    return average
