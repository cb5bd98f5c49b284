"""The kernels that sten brings: C++ on the CPU, Triton on CUDA, and an honest expansion to dense everywhere else.

They come in through `sten.kernel`, the door that is open to everybody.
"""

from . import cpu, cuda, dual_mask, expand

__all__ = ["cpu", "cuda", "dual_mask", "expand"]
