"""The small model of the tests of sparsify, and its training loop. A helper of the tests, not a test."""

from __future__ import annotations

import pytest
import torch
from cases import SMALL
from torch import nn
from torch.nn.utils import clip_grad_norm_

every_layout = pytest.mark.parametrize("layout", SMALL, ids=str)


def rate(layout) -> float | None:
    return 0.7 if layout.rate is None else None


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8))


def batch(step: int) -> torch.Tensor:
    return torch.randn(6, 12, generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    return (model(batch(step)) - 1).square().mean()


def train(model: nn.Module, opt, steps: range, clip: float | None = 0.05) -> None:
    for step in steps:
        opt.zero_grad()
        loss_of(model, step).backward()
        if clip is not None:
            clip_grad_norm_(model.parameters(), clip)
        opt.step()
