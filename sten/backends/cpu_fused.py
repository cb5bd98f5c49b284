"""linear_activation on the CPU: the layout's linear kernel, and then one C++ pass over its output, in place."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..dispatch import Flags, Plan, kernel
from ..kernel_table import prepare
from ..layouts import BSR, CSR, NM, FanIn, GroupedNM, VectorNM
from ..layouts.base import Layout, Parts
from ..ops import fused as fused  # declares the operators
from ..ops.epilogue import DTYPES, NUMBERS, activate
from . import cpp


def prepare_activation(layout: Layout, shape: tuple[int, ...], dtype: torch.dtype, flags: Flags) -> Plan:
    """linear, and the activation in place."""
    product, activation = prepare("linear", layout, shape, dtype, flags), flags.geometry["activation"]
    in_place = flags.tokens is not None and dtype in DTYPES  # compilers fuse operators themselves
    epilogue, number = torch.ops.sten.epilogue_.default, NUMBERS[activation]

    def run(x: Tensor, weight: Parts, bias: Tensor | None, activation: str) -> Tensor:
        y = product.run(x, weight, bias)
        if not in_place:
            return activate(y, activation)
        epilogue(y, number, 0, 0.0, 0, 0)
        return y

    how = "in the epilogue, in place" if in_place else "as an operator"
    return dataclasses.replace(product, reason=f"{product.reason}; {activation} {how}", run=run)


if cpp.available():
    for _layout in (CSR, GroupedNM, VectorNM, BSR, FanIn, NM):
        kernel("linear_activation", weight=_layout, device="cpu", prepare=True)(prepare_activation)
