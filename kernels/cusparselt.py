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

import torch

from .derived import derived
from .library import capturing

OPAQUE_BYTES = 1 << 14  # the opaque structs took 11 kB in old versions and take 512 bytes in new ones
ROW, COLUMN = 2, 1
AS_IT_IS, HALF_SPARSE, COMPUTE_F32, ALIGNMENT = 0, 0, 2, 16  # the library's enumerations, from its header
SEARCH_AT = 2  # the use at which all algorithms are timed: a size that comes once is not worth it
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
    """One product: sizes, dtype, device. ``run`` with ``search`` times all algorithms and keeps the fastest."""

    def __init__(self, device: int, outputs: int, inputs: int, tokens: int, dtype: torch.dtype):
        self.handle = h = _handle(device)
        a, b, d, product, algorithm, self.plan = (Opaque() for _ in range(6))
        kind, o, i, t = CUDA_TYPES[dtype], *(ctypes.c_int64(size) for size in (outputs, inputs, tokens))
        _call("cusparseLtStructuredDescriptorInit", h, a, o, i, i, ALIGNMENT, kind, ROW, HALF_SPARSE)
        _call("cusparseLtDenseDescriptorInit", h, b, i, t, i, ALIGNMENT, kind, COLUMN)
        _call("cusparseLtDenseDescriptorInit", h, d, o, t, o, ALIGNMENT, kind, COLUMN)
        _call("cusparseLtMatmulDescriptorInit", h, product, AS_IT_IS, AS_IT_IS, a, b, d, d, COMPUTE_F32)
        _call("cusparseLtMatmulAlgSelectionInit", h, algorithm, product, 0)
        _call("cusparseLtMatmulPlanInit", h, self.plan, product, algorithm)
        self.parts = (a, b, d, product, algorithm)  # the plan points into them
        self.one, self.zero, self.workspace, self.uses = ctypes.c_float(1), ctypes.c_float(0), 0, 0
        self._read_workspace()

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

    def run(self, packed: torch.Tensor, x: torch.Tensor, y: torch.Tensor, search: bool = False) -> None:
        workspace = torch.empty(max(self.workspace, 16), dtype=torch.uint8, device=x.device)
        stream = ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(x.device.index))
        a, b, d, scratch = (ctypes.c_void_p(t.data_ptr()) for t in (packed, x, y, workspace))
        one, zero = ctypes.byref(self.one), ctypes.byref(self.zero)
        function = "cusparseLtMatmulSearch" if search else "cusparseLtMatmul"
        _call(function, self.handle, self.plan, one, a, b, zero, d, d, scratch, ctypes.byref(stream), 1)
        if search:
            self._read_workspace()


_plans: dict[tuple, Plan] = {}


def _pad_tokens(x: torch.Tensor) -> torch.Tensor:
    """The library wants sizes in multiples of 8; extra tokens are zeros whose results are dropped."""
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[0] % 8)) if x.shape[0] % 8 else x


def linear(x: torch.Tensor, values: torch.Tensor, make_dense) -> torch.Tensor | None:
    """x (*, I) @ W.T (*, O), or None where it cannot be done now (a capture before any warm-up)."""
    inputs, outputs = x.shape[-1], values.shape[0]
    flat = _pad_tokens(x.reshape(-1, inputs).contiguous())
    if _library() is None:
        packed = derived("torch 2:4", values, lambda: torch._cslt_compress(make_dense()))
        y = torch._cslt_sparse_mm(packed, flat.T, transpose_result=True)
        return y[: x.numel() // inputs].reshape(*x.shape[:-1], outputs)
    key = (x.device.index, outputs, inputs, flat.shape[0], x.dtype)
    found = _plans.get(key)
    if found is None:
        if capturing(x):
            return None
        if len(_plans) > 256:
            _plans.clear()
        found = _plans[key] = Plan(*key)
    packed = derived("cusparselt 2:4", values, lambda: found.compress(make_dense()))
    y = x.new_empty(flat.shape[0], outputs)
    if not capturing(x):
        found.uses += 1
        if found.uses == SEARCH_AT:
            found.run(packed, flat, y, search=True)
    found.run(packed, flat, y)
    return y[: x.numel() // inputs].view(*x.shape[:-1], outputs)
