"""Programmatic dependent launch (PDL): a kernel may start while the kernel before it still runs (Hopper and newer)."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .backend import backend


@triton.jit
def begin(PDL: tl.constexpr):
    """With PDL (programmatic dependent launch), this program was started while the kernel before it still ran.

    It waits until that one has ended and its writes are seen; every program must, so that the next kernel, which may
    start as soon as all have passed here, waits for all before it. What a kernel may have written is read after it.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


def overlap(x: torch.Tensor) -> dict[str, bool]:
    """The constants of a launch that may start while the kernel before it ends, if the GPU of ``x`` can."""
    if backend.capability(x.device)[0] < 9:
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}
