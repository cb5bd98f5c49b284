"""The entries of the largest magnitudes of each row of a dense matrix, in CUDA C++ (``cuda/top_columns.cu``), or where
many are kept, in Triton (``largest``)."""

import math

import torch

from . import largest, nvrtc
from .operators import operator

MOST, PIECE = 1024, 16  # candidates of a row, as in the source; bytes of a load
INFINITY = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}  # its bits


def takes(x: torch.Tensor) -> bool:
    """Whether the kernel selects columns of a matrix of this dtype."""
    return x.dtype in INFINITY and nvrtc.available()


def warps_for(count: int) -> int:
    """The warps of a CTA: with few, whose threads have few maxima to compare, more rows are under way."""
    return 4 if count <= 64 else 8


def shared_bytes(warps: int) -> int:
    """The shared memory of a CTA."""
    return 4 * (32 * warps + 3 * MOST + 2)


@operator(
    "gpu_top_columns(Tensor x, int count, bool relu) -> (Tensor, Tensor)",
    lambda x, count, relu: 2 * [(x.shape[0], count)],
    strided=(),
    dtype=[None, torch.int32],
)
def top_columns(x, count, relu):
    """x (rows, columns) -> (values, columns) of the ``count`` largest |x| of each row, the columns ascending, int32.

    NaN is lowest, and of equal magnitudes the first ones are taken. ``relu``: of relu(x).
    """
    rows, columns = x.shape
    if not 1 <= count <= columns:
        raise ValueError(f"Expected a count from 1 to the columns, got {count} of {columns}.")
    if count > MOST and largest.fits(x):
        launch = largest.launch(x, INFINITY[x.dtype], relu)
    else:
        size, warps = x.element_size(), warps_for(count)
        known = {"SIZE": size, "INF": INFINITY[x.dtype], "WARPS": warps, "RELU": int(relu)}
        known["VECTOR"] = math.gcd(columns * size, x.data_ptr() or PIECE, PIECE) // size
        launch = nvrtc.cuda_launch("top_columns", (rows,), 32 * warps, shared_bytes(warps), **known)
    dtype, device = x.dtype, x.device

    def call(x):
        values = torch.empty(rows, count, dtype=dtype, device=device)
        index = torch.empty(rows, count, dtype=torch.int32, device=device)
        if rows:
            launch(x, values, index, columns, count)
        return values, index

    return call
