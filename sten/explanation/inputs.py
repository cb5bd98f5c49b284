"""The inputs of `sten.explain` and `sten.compare`: what the model's forward takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..conversion.select import expect_model


def call_of(model: nn.Module, inputs: tuple, kwargs: dict[str, Any], who: str) -> Callable[[], Any]:
    """A function that calls the model on these inputs; one dictionary, as tokenizers make it, is its keywords."""
    expect_model(model)
    if not inputs and not kwargs:
        raise TypeError(f"Expected inputs for {who}, got none; pass what {type(model).__name__}.forward takes.")
    if len(inputs) == 1 and not kwargs and isinstance(inputs[0], Mapping):
        inputs, kwargs = (), dict(inputs[0])

    def call() -> Any:
        try:
            return model(*inputs, **kwargs)
        except Exception as error:
            error.add_note(f"sten: in {who}, which calls the model on the inputs that it is given.")
            raise

    return call


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter; ValueError for one that has none, or is on the meta device."""
    first = next(model.parameters(), None)
    if first is None:
        raise ValueError(f"Expected a model with parameters, got {type(model).__name__} without any.")
    if first.is_meta:
        raise ValueError("Expected a model with numbers, got one on the meta device; load it first.")
    return first.device


def place_of(device: torch.device) -> str:
    """The device by its name, and the threads of a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' if threads > 1 else ''} of the CPU" if device.type == "cpu" else str(device)
