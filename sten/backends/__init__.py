"""The built-in kernels: C++ on the CPU, Triton on CUDA, and expansion to dense on any device.

They are registered by `sten.kernel`, as every kernel is.
"""

from . import cpu, cpu_conv, cpu_fused, cpu_tables, cuda, cuda_fused, dual_mask, expand, sparse_input

__all__ = ["cpu", "cpu_conv", "cpu_fused", "cpu_tables", "cuda", "cuda_fused", "dual_mask", "expand", "sparse_input"]
