"""When layouts use the C++ operators that pack (csrc/register_pack.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from sten._torch_private import PLAIN_TENSORS, must_apply, tracing_state


def runs(name: str, *tensors: Tensor) -> bool:
    """Whether the C++ operator `sten::<name>` is there for these: plain numbers on the CPU, recorded by nothing."""
    if not hasattr(torch.ops.sten, name) or must_apply() or tracing_state() is not None:
        return False
    recorded = torch.is_grad_enabled()
    return all(
        type(t) in PLAIN_TENSORS and t.device.type == "cpu" and not (recorded and t.requires_grad) and not t.is_neg()
        for t in tensors
    )
