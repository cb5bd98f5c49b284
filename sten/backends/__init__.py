"""The kernels that sten brings: C++ on the CPU, Triton on CUDA, and an honest expansion to dense everywhere else.

They are registered by `sten.kernel`, as anybody's are.
"""

from . import cpu, cuda, dual_mask, expand

__all__ = ["cpu", "cuda", "dual_mask", "expand"]
