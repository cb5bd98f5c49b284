"""Checks for what you bring: each raises AssertionError, with a sentence that names the law that does not hold."""

from .kernels import check_kernel
from .layouts import check_layout
from .sparsifiers import check_sparsifier

__all__ = ["check_kernel", "check_layout", "check_sparsifier"]
