"""Products in float32, whatever autocast and the switches for TF32 and bfloat16 say."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def in_float32(device: torch.device) -> Iterator[None]:
    """Matrix products of float32 are computed so, until the block ends; the switches are as they were then.

    They are those of each backend: torch refuses to read the common one where a program has set one of these.
    """
    switches = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value
