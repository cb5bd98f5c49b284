"""The weights of a model that are in trainable form."""

from __future__ import annotations

from torch import nn

from .attribute import trained_of
from .trained_weight import TrainedWeight


def trained_weights(model: nn.Module) -> list[TrainedWeight]:
    """The weights of a model that are in trainable form, each once."""
    weights: dict[TrainedWeight, None] = {}  # in order
    for module in model.modules():
        for name, weight in trained_of(module):
            weight.add_owner(module, name)
            weights[weight] = None
    return list(weights)


def dynamic_weights(model: nn.Module) -> list[TrainedWeight]:
    """Those of them that have a dynamic method."""
    return [weight for weight in trained_weights(model) if weight.method is not None]


def is_frozen(weight: TrainedWeight) -> bool:
    """Whether a weight does not train: its Parameter requires no gradient, or its module exists no more."""
    return weight.param is None or not weight.param.requires_grad
