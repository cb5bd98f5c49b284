"""Scores: the importance of each entry of a weight, a pure function of tensors; higher is better.

`sten.extend.top` decides ties by index, so a score needs no noise.
"""

from __future__ import annotations

import torch
from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """|w|.

    Example:
        >>> import torch, sten
        >>> sten.scores.magnitude(torch.tensor([-2.0, 1.0]))
        tensor([2., 1.])
    """
    return weight.detach().abs()


def random(weight: Tensor, generator: torch.Generator, portable: bool = True) -> Tensor:
    """Uniform numbers, drawn on the CPU so that every device and rank gets the same ones from the same seed.

    With `portable=False` they are drawn on the weight's device, from a seed of the generator: 100 times faster on GPUs,
    but different on each kind of GPU.

    Example:
        >>> import torch, sten
        >>> sten.scores.random(torch.ones(2, 3), torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3])
    """
    if portable or weight.device.type == "cpu":
        return torch.rand(weight.shape, generator=generator).to(weight.device)
    seed = int(torch.randint(2**62, (), generator=generator))
    there = torch.Generator(weight.device).manual_seed(seed)
    return torch.rand(weight.shape, generator=there, device=weight.device)
