"""Triton kernels: plain tensors in, plain tensors out; nothing here knows of a SparseTensor.

Each layout has one module (``vector_nm``, ``bsr``, ``nm``, ``grouped_nm``, ``csr``) with the same interface:
``linear``, ``linear_grad_input``, ``linear_grad_values`` and ``expand`` (parts -> dense) are callables with the methods
``choose`` (which variant runs, and why) and ``prepare`` (its launches for such tensors, see ``operators``). Parts are
documented in ``docs/formats.md``. Importing this package needs neither triton nor a GPU; its modules need triton.
"""

import importlib
import importlib.util

MODULES = (
    "vector_nm", "vector_nm_mlp", "bsr", "nm", "grouped_nm", "csr", "codes", "top_columns", "above", "finish",
    "several", "transpose", "pattern_cache", "backend", "precision",
)  # fmt: skip


def available() -> bool:
    """Whether triton can be imported, without importing it."""
    return importlib.util.find_spec("triton") is not None


def __getattr__(name):
    if name in MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
