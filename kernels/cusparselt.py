"""2:4 products on sparse tensor cores by cuSPARSELt, with cached plans and searched algorithms.

torch's own wrapper makes a plan at each call, about a millisecond of host time. Here the library that torch ships is
called through ctypes; one plan per (device, sizes, dtype) is in the launch cache, searched at its second use, and the
compressed form of a weight in the pattern cache. If the library is missing, or of a version that was not tested, it is
not used, and weights are expanded: torch's wrapper is slower than a dense product.

Letters: T tokens, I inputs, O outputs. The library computes D (O, T) = A (O, I, 2:4) @ B (I, T), all column-wise views
of row-major tensors: B is x (T, I) read as its transpose, D is y (T, O) likewise.
"""

import ctypes
import functools
import glob
import os
import sys
import threading

import torch

from . import launch_cache
from .backend import backend
from .pattern_cache import Derived
from .split_k import workspace
from .tiles import matrix_of

OPAQUE_BYTES = 1 << 14  # the opaque structs took 11 kB in old versions and take 512 bytes in new ones
ROW, COLUMN = 2, 1
AS_IT_IS, HALF_SPARSE, COMPUTE_F32, ALIGNMENT = 0, 0, 2, 16  # the library's enumerations, from its header
SEARCH_AT = 2  # the use at which all algorithms are timed: a size that is used once is not worth it
BIAS, POINTER_BYTES = 8, ctypes.c_size_t(8)  # the attribute of a product that holds the address of a bias (O,)
CUDA_TYPES = {torch.float16: 2, torch.bfloat16: 14}
MAJOR, MINOR = 0, 1  # the properties of the library's version
KNOWN_MAJOR, OLDEST_MINOR = 0, 6  # older ones were not tried
STATUS = (
    "SUCCESS", "NOT_INITIALIZED", "ALLOC_FAILED", "INVALID_VALUE", "ARCH_MISMATCH", "MAPPING_ERROR", "EXECUTION_FAILED",
    "INTERNAL_ERROR", "MATRIX_TYPE_NOT_SUPPORTED", "ZERO_PIVOT", "NOT_SUPPORTED", "INSUFFICIENT_RESOURCES",
)  # fmt: skip


class Opaque:
    """Zeroed, 64-byte aligned memory for an opaque struct of the library."""

    def __init__(self):
        self.memory = ctypes.create_string_buffer(OPAQUE_BYTES + 64)
        self.pointer = ctypes.c_void_p((ctypes.addressof(self.memory) + 63) & ~63)


@functools.cache
def _library():
    """The shared library, or None."""
    names = ["libcusparseLt.so.0", "libcusparseLt.so"]
    for root in sys.path:
        names += glob.glob(os.path.join(root, "nvidia", "*", "lib", "libcusparseLt.so*"))
    for name in names:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        if known(library):
            return library
    return None


def known(library) -> bool:
    """Whether this is a version of the library that these bindings were written for."""
    if not hasattr(library, "cusparseLtSpMMACompress2") or not hasattr(library, "cusparseLtGetProperty"):
        return False
    major, minor = ctypes.c_int(-1), ctypes.c_int(-1)
    for which, number in ((MAJOR, major), (MINOR, minor)):
        if library.cusparseLtGetProperty(which, ctypes.byref(number)) != 0:
            return False
    return major.value == KNOWN_MAJOR and minor.value >= OLDEST_MINOR


@functools.cache
def available() -> bool:
    """Whether sparse tensor cores can be used."""
    return backend.has_cusparselt() and _library() is not None


def _call(function: str, *arguments) -> None:
    """Calls one function of the library; structs are passed as ``Opaque``."""
    pointers = (a.pointer if isinstance(a, Opaque) else a for a in arguments)
    _raise(function, getattr(_library(), function)(*pointers))


def _raise(function: str, status: int) -> None:
    if status != 0:
        name = STATUS[status] if 0 < status < len(STATUS) else "unknown"
        raise RuntimeError(f"{function} failed with status {status} (CUSPARSE_STATUS_{name})")


@functools.cache
def _handle(device: int) -> Opaque:
    """The library's handle of a device, which is the current one."""
    handle = Opaque()
    backend.initialize()  # the library needs a context
    _call("cusparseLtInit", handle)
    return handle


class Plan:
    """One product: sizes, dtype, device, with a bias or without."""

    def __init__(self, device: int, outputs: int, inputs: int, tokens: int, dtype: torch.dtype, biased: bool):
        self.handle = h = _handle(device)
        a, b, d, product, algorithm, self.plan = (Opaque() for _ in range(6))
        kind, o, i, t = CUDA_TYPES[dtype], *(ctypes.c_int64(size) for size in (outputs, inputs, tokens))
        _call("cusparseLtStructuredDescriptorInit", h, a, o, i, i, ALIGNMENT, kind, ROW, HALF_SPARSE)
        _call("cusparseLtDenseDescriptorInit", h, b, i, t, i, ALIGNMENT, kind, COLUMN)
        _call("cusparseLtDenseDescriptorInit", h, d, o, t, o, ALIGNMENT, kind, COLUMN)
        _call("cusparseLtMatmulDescriptorInit", h, product, AS_IT_IS, AS_IT_IS, a, b, d, d, COMPUTE_F32)
        self.parts, self.device = (a, b, d, product, algorithm), device  # the plan points to them
        self.lock = threading.Lock()  # a plan holds one bias and one algorithm at a time
        if biased:
            # any address: it selects algorithms that add a bias
            self._set_bias(torch.empty(outputs, dtype=dtype, device=device))
        _call("cusparseLtMatmulAlgSelectionInit", h, algorithm, product, 0)
        _call("cusparseLtMatmulPlanInit", h, self.plan, product, algorithm)
        self.one, self.zero, self.uses = ctypes.byref(ctypes.c_float(1)), ctypes.byref(ctypes.c_float(0)), 0
        self._read_workspace()

    def _set_bias(self, bias: torch.Tensor):
        pointer = ctypes.c_void_p(bias.data_ptr())
        _call(
            "cusparseLtMatmulDescSetAttribute", self.handle, self.parts[3], BIAS, ctypes.byref(pointer), POINTER_BYTES
        )

    def _read_workspace(self):
        size = ctypes.c_size_t()
        _call("cusparseLtMatmulGetWorkspace", self.handle, self.plan, ctypes.byref(size))
        self.workspace = size.value

    def compress(self, dense: torch.Tensor) -> torch.Tensor:
        """The library's own form of a row-major 2:4 weight."""
        size, scratch = ctypes.c_size_t(), ctypes.c_size_t()
        sizes = (ctypes.byref(size), ctypes.byref(scratch))
        _call("cusparseLtSpMMACompressedSize", self.handle, self.plan, *sizes)
        packed = torch.empty(size.value, dtype=torch.uint8, device=dense.device)
        buffer = torch.empty(max(scratch.value, 16), dtype=torch.uint8, device=dense.device)
        stream = ctypes.c_void_p(backend.stream(self.device))
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in (dense, packed, buffer))
        _call("cusparseLtSpMMACompress", self.handle, self.plan, *pointers, stream)
        return packed

    def run(self, packed, x, bias, y) -> None:
        """y = x @ W.T + bias, on tensors of this plan's sizes; at the second use all algorithms are timed first."""
        with self.lock:
            if bias is not None:
                self._set_bias(bias)
            if self.uses < SEARCH_AT and not backend.capturing(x):
                self.uses += 1
                if self.uses == SEARCH_AT:
                    self._multiply("cusparseLtMatmulSearch", packed, x, y)
                    self._read_workspace()
            self._multiply("cusparseLtMatmul", packed, x, y)

    def _multiply(self, function, packed, x, y):
        scratch = workspace.partial_sums(x, -(-self.workspace // 4)) if self.workspace else None
        stream = ctypes.c_void_p(backend.stream(self.device))
        status = _matmul(function)(
            self.handle.pointer, self.plan.pointer, self.one, packed.data_ptr(), x.data_ptr(), self.zero,
            y.data_ptr(), y.data_ptr(), scratch if scratch is None else scratch.data_ptr(), ctypes.byref(stream), 1,
        )  # fmt: skip
        _raise(function, status)


@functools.cache
def _matmul(name: str):
    """The library's product, with its argument types set once, so that addresses are given as plain integers."""
    function = getattr(_library(), name)
    function.argtypes = (*[ctypes.c_void_p] * 10, ctypes.c_int)
    return function


def prepare(x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None):
    """(x, values, bias, make_dense) -> x (*, I) @ W.T + bias (*, O), for tensors like these; ``make_dense()`` gives the
    dense weight. None where it cannot be made now: in a capture, of a size that was not used before."""
    inputs, outputs, tokens = x.shape[-1], values.shape[0], x.shape[:-1].numel()
    extra, shape = -tokens % 8, (*x.shape[:-1], outputs)  # the library wants multiples of 8
    size = (x.get_device(), outputs, inputs, tokens + extra, x.dtype, bias is not None)
    plan = launch_cache.cached(
        ("cusparselt", *size), x, lambda: None if backend.capturing(x) else Plan(*size)
    )  # shared: all weights of one size use the algorithm that was searched once
    if plan is None:
        return None
    new = backend.empty(x, *((tokens + extra, outputs) if extra else shape))
    compressed = Derived("cusparselt 2:4", values=True)
    arrange = matrix_of(x, aligned=True, packed=True)

    def call(x, values, bias, make_dense):
        packed, _ = compressed(values, make=lambda _: plan.compress(make_dense()))
        y = new()
        x, bias = x if arrange is None else arrange(x), bias if bias is None else _aligned(bias.to(x.dtype))
        if extra:
            x = torch.nn.functional.pad(x, (0, 0, 0, extra))
        plan.run(packed, x, bias, y)
        return y[:tokens].view(shape) if extra else y

    return call


def _aligned(bias):
    """A copy if the library could not read it in place."""
    return bias if bias.is_contiguous() and bias.data_ptr() % 16 == 0 else bias.clone()
