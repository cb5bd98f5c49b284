"""Checks for layouts, kernels and methods of your own; each raises an AssertionError that names the broken law."""

from .kernels import check_kernel
from .layouts import check_layout
from .sparsifiers import check_sparsifier

__all__ = ["check_kernel", "check_layout", "check_sparsifier"]
