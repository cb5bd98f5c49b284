"""2:4 products on sparse tensor cores by cuSPARSELt, with the plan and the searched algorithm kept.

torch's own wrapper plans anew at each call, about a millisecond of host time. Here the library that torch ships is
bound with ctypes; one plan is kept per (device, sizes, dtype), searched when it is used again, and a weight's
compressed form is kept while the weight lives. Where the library cannot be bound, torch's ``_cslt_*`` serve.

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

from .derived import derived
from .epilogue import hand_over
from .library import as_rows, blank, capturing

OPAQUE_BYTES = 1 << 14  # the opaque structs took 11 kB in old versions and take 512 bytes in new ones
ROW, COLUMN = 2, 1
AS_IT_IS, HALF_SPARSE, COMPUTE_F32, ALIGNMENT = 0, 0, 2, 16  # the library's enumerations, from its header
SEARCH_AT = 2  # the use at which all algorithms are timed: a size that comes once is not worth it
BIAS, POINTER_BYTES = 8, ctypes.c_size_t(8)  # the attribute of a product that holds the address of a bias (O,)
CUDA_TYPES = {torch.float16: 2, torch.bfloat16: 14}


class Opaque:
    """Zeroed, 64-byte aligned memory for a struct that only the library looks into."""

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
            found = ctypes.CDLL(name)
        except OSError:
            continue
        if hasattr(found, "cusparseLtSpMMACompress2"):
            return found
    return None


@functools.cache
def available() -> bool:
    """Whether sparse tensor cores can be used, through the library or through torch."""
    return (
        torch.cuda.is_available()
        and torch.cuda.get_device_capability()[0] >= 8
        and torch.backends.cusparselt.is_available()
    )


def _call(function: str, *arguments) -> None:
    """Calls one function of the library; structs are given as ``Opaque``."""
    told = (a.pointer if isinstance(a, Opaque) else a for a in arguments)
    status = getattr(_library(), function)(*told)
    if status != 0:
        raise RuntimeError(f"{function} answered {status}")


@functools.cache
def _handle(device: int) -> Opaque:
    handle = Opaque()
    with torch.cuda.device(device):
        torch.cuda.current_blas_handle()  # the library wants an initialized context
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
        self.parts, self.device = (a, b, d, product, algorithm), device  # the plan points into them
        self.turn = threading.Lock()  # a plan holds one bias and one algorithm at a time
        if biased:
            self._set_bias(torch.empty(outputs, dtype=dtype, device=device))  # any: it asks for kernels that add one
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
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in (dense, packed, buffer))
        _call("cusparseLtSpMMACompress", self.handle, self.plan, *pointers, stream)
        return packed

    def run(self, packed, x, bias, y) -> None:
        """y = x @ W.T + bias, on tensors of this plan's sizes; at the second use all algorithms are timed first."""
        with self.turn:
            if bias is not None:
                self._set_bias(bias)
            if self.uses < SEARCH_AT and not capturing(x):
                self.uses += 1
                if self.uses == SEARCH_AT:
                    self._multiply("cusparseLtMatmulSearch", packed, x, y)
                    self._read_workspace()
            self._multiply("cusparseLtMatmul", packed, x, y)

    def _multiply(self, function, packed, x, y):
        scratch = hand_over.room(x, -(-self.workspace // 4)) if self.workspace else None
        stream = ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(self.device))
        status = _matmul(function)(
            self.handle.pointer, self.plan.pointer, self.one, packed.data_ptr(), x.data_ptr(), self.zero,
            y.data_ptr(), y.data_ptr(), scratch if scratch is None else scratch.data_ptr(), ctypes.byref(stream), 1,
        )  # fmt: skip
        if status != 0:
            raise RuntimeError(f"{function} answered {status}")


@functools.cache
def _matmul(name: str):
    """The library's product, told its argument types once, so that addresses are given as plain integers."""
    function = getattr(_library(), name)
    function.argtypes = (*[ctypes.c_void_p] * 10, ctypes.c_int)
    return function


_plans: dict[tuple, Plan] = {}


def _planned(key: tuple, x: torch.Tensor) -> Plan | None:
    found = _plans.get(key)
    if found is None and not capturing(x):
        if len(_plans) > 256:
            _plans.clear()
        found = _plans[key] = Plan(*key)
    return found


def _as_read(t: torch.Tensor) -> torch.Tensor:
    """A copy where the library could not read the tensor as it lies."""
    return t if t.is_contiguous() and t.data_ptr() % 16 == 0 else t.clone(memory_format=torch.contiguous_format)


def plan_linear(x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None):
    """(x, values, bias, make_dense) -> x (*, I) @ W.T + bias (*, O), for tensors like these.

    It answers None where it cannot be done now: a capture before any warm-up. ``make_dense()`` gives the dense weight.
    """
    inputs, outputs, rows = x.shape[-1], values.shape[0], as_rows(x)
    tokens = x.numel() // inputs
    if _library() is None:
        return _by_torch
    extra, shape = -tokens % 8, (*x.shape[:-1], outputs)  # the library wants multiples of 8
    key = (x.get_device(), outputs, inputs, tokens + extra, x.dtype, bias is not None)
    new = blank(x, *((tokens + extra, outputs) if extra else shape))

    def call(x, values, bias, make_dense):
        found = _planned(key, x)
        if found is None:
            return None
        packed, _ = derived("cusparselt 2:4", lambda _: found.compress(make_dense()), values, renewed=False)
        y = new()
        x, bias = _as_read(rows(x)), bias if bias is None else _as_read(bias.to(x.dtype))
        if extra:
            x = torch.nn.functional.pad(x, (0, 0, 0, extra))
        found.run(packed, x, bias, y)
        return y[:tokens].view(shape) if extra else y

    return call


def _by_torch(x, values, bias, make_dense):
    """The same through torch's own wrapper, which plans anew at each call."""
    inputs, outputs = x.shape[-1], values.shape[0]
    flat = x.reshape(-1, inputs)
    flat = torch.nn.functional.pad(flat, (0, 0, 0, -len(flat) % 8)).contiguous()
    packed, _ = derived("torch 2:4", lambda _: torch._cslt_compress(make_dense()), values, renewed=False)
    bias = bias if bias is None else bias.to(x.dtype)
    y = torch._cslt_sparse_mm(packed, flat.T, bias=bias, transpose_result=True)
    return y[: x.numel() // inputs].reshape(*x.shape[:-1], outputs)
