"""What the inputs of a model's weights are like on some batches: mean squares, and a sample of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .defaults import is_conv1d
from .select import Target

SAMPLED = 256  # tokens of each layer that its output error is measured on


@dataclass
class Inputs:
    """Of one weight: the mean of x_j^2 over tokens (in,), and some tokens (n, in); of a convolution only the former."""

    square: Tensor
    sample: Tensor | None = None
    tokens: int = 0

    def reordered(self, index: Tensor) -> None:
        """The inputs have changed places."""
        self.square = self.square[index]
        self.sample = None if self.sample is None else self.sample[:, index]


def call(model: nn.Module, batch: Any) -> Any:
    """The model's outputs: a mapping is passed by keyword, a tuple or list by position."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def input_statistics(model: nn.Module, targets: list[Target], batches: Iterable[Any]) -> dict[str, Inputs]:
    """Statistics of the targets' inputs, by name, without the tokens that an `attention_mask` leaves out.

    Raises:
        ValueError: no batch, or activations that are not finite.
    """
    found: dict[str, Inputs] = {}
    valid: list[Tensor | None] = [None]

    def hook(target: Target):
        def forward(module: nn.Module, args: tuple) -> None:
            _observe(found, target.name, module, args[0].detach(), valid[0])

        return forward

    handles = [m.register_forward_pre_hook(hook(t)) for t in targets for m, _ in t.owners[:1] if _is_layer(m)]
    count = 0
    try:
        for count, batch in enumerate(batches, 1):  # noqa: B007 - the number of batches
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            valid[0] = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
            with torch.no_grad():
                call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if not count:
        raise ValueError("Expected batches in calibration=, got none; an iterator can be read only once.")
    for name, inputs in found.items():
        if not bool(inputs.square.isfinite().all()):
            raise ValueError(f"Expected finite activations, got NaN or inf in the input of {name}.")
    return found


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) or is_conv1d(module)


def _observe(found: dict[str, Inputs], name: str, module: nn.Module, x: Tensor, valid: Tensor | None) -> None:
    convolution = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    if valid is not None and x.shape[:2] == valid.shape:
        x = x[valid.to(x.device)]
    if convolution:
        x = x.movedim(-module.weight.dim() + 1, -1)
    x = x.reshape(-1, x.shape[-1]).float()
    if not len(x):
        return
    square, old = x.square().sum(0), found.get(name)
    if old is None:
        old = found[name] = Inputs(torch.zeros_like(square))
    old.square = (old.square * old.tokens + square) / (old.tokens + len(x))
    old.tokens += len(x)
    if not convolution:
        have = 0 if old.sample is None else len(old.sample)
        if have < SAMPLED:
            new = x[:: max(1, len(x) // (SAMPLED // 4))][: SAMPLED - have]
            old.sample = new.clone() if old.sample is None else torch.cat([old.sample, new])
