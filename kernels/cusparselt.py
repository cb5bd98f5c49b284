"""2:4 products on sparse tensor cores by cuSPARSELt, with the plan and the searched algorithm kept.

torch's own wrapper plans anew at each call, about a millisecond of host time. Here the library that torch ships is bound
with ctypes; one plan is kept per (device, sizes, dtype), searched on the first call's tensors, and a weight's compressed
form is kept while the weight lives. Where the library cannot be bound, torch's ``_cslt_*`` serve.

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
NO_TRANSPOSE, TRANSPOSE = 0, 1
COMPUTE_F32 = 2
CUDA_TYPES = {torch.float16: 2, torch.bfloat16: 14}
SEARCH_ITERATIONS = 2  # attribute number in cusparseLtMatmulAlgAttribute_t
ALGORITHM = 0


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
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8 and torch.backends.cusparselt.is_available()


def _check(status: int, what: str) -> None:
    if status != 0:
        raise RuntimeError(f"cuSPARSELt: {what} answered {status}")


@functools.cache
def _handle(device: int) -> Opaque:
    handle = Opaque()
    with torch.cuda.device(device):
        torch.cuda.current_blas_handle()  # the library wants an initialized context
        _check(_library().cusparseLtInit(handle.pointer), "init")
    return handle


class Plan:
    """One product: sizes, dtype, device; ``search`` picks the algorithm by timing them all."""

    def __init__(self, device: int, outputs: int, inputs: int, tokens: int, dtype: torch.dtype):
        lib, self.handle = _library(), _handle(device)
        a, b, d, self.descriptor, algorithm, self.plan = (Opaque() for _ in range(6))
        h, kind, long = self.handle.pointer, CUDA_TYPES[dtype], ctypes.c_int64
        _check(lib.cusparseLtStructuredDescriptorInit(h, a.pointer, long(outputs), long(inputs), long(inputs), 16, kind, ROW, 0), "sparse descriptor")  # fmt: skip
        _check(lib.cusparseLtDenseDescriptorInit(h, b.pointer, long(inputs), long(tokens), long(inputs), 16, kind, COLUMN), "input descriptor")  # fmt: skip
        _check(lib.cusparseLtDenseDescriptorInit(h, d.pointer, long(outputs), long(tokens), long(outputs), 16, kind, COLUMN), "output descriptor")  # fmt: skip
        _check(lib.cusparseLtMatmulDescriptorInit(h, self.descriptor.pointer, NO_TRANSPOSE, NO_TRANSPOSE, a.pointer, b.pointer, d.pointer, d.pointer, COMPUTE_F32), "product")  # fmt: skip
        _check(lib.cusparseLtMatmulAlgSelectionInit(h, algorithm.pointer, self.descriptor.pointer, 0), "algorithm")
        _check(lib.cusparseLtMatmulPlanInit(h, self.plan.pointer, self.descriptor.pointer, algorithm.pointer), "plan")
        self.parts = (a, b, d, algorithm)  # the plan points into them
        self.one, self.zero, self.workspace, self.searched = ctypes.c_float(1), ctypes.c_float(0), 0, False
        self._read_workspace()

    def _read_workspace(self):
        size = ctypes.c_size_t()
        _check(_library().cusparseLtMatmulGetWorkspace(self.handle.pointer, self.plan.pointer, ctypes.byref(size)), "workspace")
        self.workspace = size.value

    def compress(self, dense: torch.Tensor) -> torch.Tensor:
        """The library's own form of a row-major 2:4 weight."""
        lib, size, scratch = _library(), ctypes.c_size_t(), ctypes.c_size_t()
        _check(lib.cusparseLtSpMMACompressedSize(self.handle.pointer, self.plan.pointer, ctypes.byref(size), ctypes.byref(scratch)), "compressed size")  # fmt: skip
        packed = torch.empty(size.value, dtype=torch.uint8, device=dense.device)
        buffer = torch.empty(max(scratch.value, 16), dtype=torch.uint8, device=dense.device)
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in (dense, packed, buffer))
        _check(lib.cusparseLtSpMMACompress(self.handle.pointer, self.plan.pointer, *pointers, stream), "compress")
        return packed

    def run(self, packed: torch.Tensor, x: torch.Tensor, y: torch.Tensor, search: bool = False) -> None:
        lib = _library()
        workspace = torch.empty(max(self.workspace, 16), dtype=torch.uint8, device=x.device)
        stream = ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(x.device.index))
        call = lib.cusparseLtMatmulSearch if search else lib.cusparseLtMatmul
        out = ctypes.c_void_p(y.data_ptr())
        status = call(
            self.handle.pointer, self.plan.pointer, ctypes.byref(self.one), ctypes.c_void_p(packed.data_ptr()),
            ctypes.c_void_p(x.data_ptr()), ctypes.byref(self.zero), out, out, ctypes.c_void_p(workspace.data_ptr()),
            ctypes.byref(stream), 1,
        )  # fmt: skip
        _check(status, "search" if search else "product")
        if search:
            self.searched = True
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
        return torch._cslt_sparse_mm(packed, flat.T, transpose_result=True)[: x.numel() // inputs].reshape(*x.shape[:-1], outputs)  # fmt: skip
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
    if not found.searched and not capturing(x):
        found.run(packed, flat, y, search=True)
    found.run(packed, flat, y)
    return y[: x.numel() // inputs].view(*x.shape[:-1], outputs)
