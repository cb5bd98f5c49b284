"""Triton kernels: plain tensors in, plain tensors out; nothing here knows of a SparseTensor.

One module a layout (``vector_nm``, ``bsr``, ``nm``, ``grouped_nm``, ``csr``) with the same surface: ``linear``,
``linear_grad_input``, ``linear_grad_values``, ``expand`` (parts -> dense): objects that can be called, that ``choose``
(which variant runs, and why) and that ``prepare`` (the launches for tensors like those that are given; see
``operators``). The parts are those of ``docs/formats.md``. ``transpose`` gives the feature-major order that some read;
``pattern_cache`` keeps what is computed from a pattern once. Importing this package needs neither triton nor a GPU; its
modules need triton.
"""

import importlib
import importlib.util

MODULES = ("vector_nm", "bsr", "nm", "grouped_nm", "csr", "transpose", "pattern_cache", "backend", "precision")


def available() -> bool:
    """Whether triton can be imported, without importing it."""
    return importlib.util.find_spec("triton") is not None


def __getattr__(name):
    if name in MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
