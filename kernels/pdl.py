"""Programmatic dependent launch (PDL): a kernel may start while the kernel before it still runs (Hopper and newer)."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .backend import backend


@triton.jit
def begin(PDL: tl.constexpr):
    """Wait for the previous kernel, and let the next one start; with PDL, this program was started before it ended.

    Every program must call it, so that the next kernel, which may start as soon as all have, waits for all kernels
    before it. Read after this call whatever an earlier kernel may have written.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


def overlap(x: torch.Tensor) -> dict[str, bool]:
    """The constants of a launch that uses PDL if the GPU of ``x`` can."""
    if backend.capability(x.device)[0] < 9:
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}
