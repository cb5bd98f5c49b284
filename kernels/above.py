"""The entries of one row above a threshold, in compressed rows with room for the whole row.

How many there are stays on the GPU, in ``crow``: all shapes are known before, so that CUDA graphs can be recorded, and
nothing waits for the device.
"""

import torch
import triton
import triton.language as tl

from .backend import INTERPRET
from .epilogue import bits_of, edge_of
from .launch import triton_launch
from .operators import operator
from .pdl import begin, overlap
from .tiles import power_of_two

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OWN, MOST = 1024, 1 << 14  # entries that a program stores; that it counts at a time


@triton.jit
def _entries(x_ptr, i, stop, edge, RELU: tl.constexpr, SIGNED: tl.constexpr):
    """The entries i, in float32, and which of those before ``stop`` are above the threshold."""
    y = tl.load(x_ptr + i, mask=i < stop, other=0.0).to(tl.float32)
    if RELU:
        y = tl.where(y < 0, 0.0, y)  # NaN stays, and is above nothing
    return y, (i < stop) & ((y if SIGNED else tl.abs(y)) > edge)


@triton.jit
def _above(
    x_ptr, edge_ptr, values_ptr, crow_ptr, col_ptr, number, C,
    OWN: tl.constexpr, SIZE: tl.constexpr, RELU: tl.constexpr, SIGNED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """OWN entries per program, which counts all kept ones before them, so that programs need not wait for each other.

    Kept entries go to the slots from the first one on, the others, as zeros, to those from the last one back.
    """
    begin(PDL)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    edge = edge_of(edge_ptr, number, dtype)
    first = tl.program_id(0) * OWN
    count = 0
    for at in range(0, first, SIZE):
        _, kept = _entries(x_ptr, at + tl.arange(0, SIZE), first, edge, RELU, SIGNED)
        count += tl.sum(kept.to(tl.int32), 0)
    i = first + tl.arange(0, OWN)
    y, kept = _entries(x_ptr, i, C, edge, RELU, SIGNED)
    one = kept.to(tl.int32)
    before = count + tl.cumsum(one, 0) - one
    slot = tl.where(kept, before, C - 1 - (i - before))
    tl.store(values_ptr + slot, tl.where(kept, y, 0.0).to(dtype), mask=i < C)
    tl.store(col_ptr + slot, tl.where(kept, i, 0), mask=i < C)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(crow_ptr, 0)
        tl.store(crow_ptr + 1, count + tl.sum(one, 0))


def takes(x: torch.Tensor) -> bool:
    """Whether the kernel selects from a matrix like this: of one row."""
    return x.dtype in DTYPES and len(x) == 1 and 0 < x.shape[1] < 2**30


@operator(
    "gpu_above(Tensor x, Tensor? edge, float number, bool signed, bool relu) -> (Tensor, Tensor, Tensor)",
    lambda x, edge, number, signed, relu: [(x.shape[1],), (2,), (x.shape[1],)],
    strided=(),
    dtype=[None, torch.int32, torch.int32],
)
def above(x, edge, number, signed, relu):
    """x (1, columns) -> values (columns,), crow (2,), col (columns,) of |x| > edge, the columns ascending, int32.

    The slots behind crow[1] hold zeros. ``edge``: a tensor of one element, or None: ``number``. ``signed``: of x >
    edge; ``relu``: of relu(x). The threshold is rounded to the dtype of x.
    """
    if not takes(x):
        raise ValueError(f"Expected one row of float32, bfloat16 or float16, got {tuple(x.shape)} of {x.dtype}.")
    if edge is not None and (edge.numel() != 1 or not edge.is_floating_point()):
        raise ValueError(f"Expected one floating-point threshold, got {tuple(edge.shape)} of {edge.dtype}.")
    columns, dtype, device = x.shape[1], x.dtype, x.device
    bits = bits_of(number)
    own, size = (16, 32) if INTERPRET else (OWN, power_of_two(columns, OWN, MOST))
    launch = triton_launch(
        _above, (triton.cdiv(columns, own),), OWN=own, SIZE=size, RELU=relu, SIGNED=signed, num_warps=8, **overlap(x)
    )

    def call(x, edge):
        values = torch.empty(columns, dtype=dtype, device=device)
        crow, col = (torch.empty(size, dtype=torch.int32, device=device) for size in (2, columns))
        launch(x, edge, values, crow, col, bits, columns)
        return values, crow, col

    return call
