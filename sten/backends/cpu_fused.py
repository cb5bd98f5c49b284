"""linear_activation on the CPU: the layout's linear kernel, whose tasks activate what they have computed."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..dispatch import Flags, Plan, kernel
from ..layouts.base import Layout, Parts
from ..ops import fused as fused  # declares the operators
from . import cpp
from .cpu_tables import LINEAR


def prepare_activation(layout: Layout, shape: tuple[int, ...], dtype: torch.dtype, flags: Flags) -> Plan:
    """linear, and the activation of each block of its output by the task that computes it."""
    product, activation = LINEAR[type(layout)](layout, shape, dtype, flags), flags.geometry["activation"]
    if product.run is None:
        return product

    def run(x: Tensor, weight: Parts, bias: Tensor | None, activation: str) -> Tensor:
        return product.run(x, weight, bias)

    how = "after it, in place" if product.variant == "expand" else "in the product"
    return dataclasses.replace(product, reason=f"{product.reason}; {activation} {how}", run=run)


if cpp.available():
    for _layout in LINEAR:
        kernel("linear_activation", weight=_layout, device="cpu", prepare=True)(prepare_activation)
