"""The entries of the largest magnitudes of each row, where many are kept: a program holds a row in registers.

largest    as ``top_columns``, of rows up to ``MOST`` columns
"""

import torch
import triton
import triton.language as tl

from .backend import INTERPRET, backend
from .launch import triton_launch
from .pdl import begin, overlap
from .tiles import power_of_two

MOST = 1 << 14  # columns: 16 a thread


@triton.jit
def _largest(
    x_ptr, values_ptr, col_ptr, C, K,
    SIZE: tl.constexpr, BITS: tl.constexpr, INF: tl.constexpr, RELU: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A row per program. Keys are the bits of the magnitude plus one, 0 for NaN, -1 where there is no entry; the K-th
    largest one is found by halving the numbers that it may be, BITS times. Of equal keys the first are kept."""
    begin(PDL)
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    y = tl.load(x_ptr + row * C + i, mask=i < C, other=0.0)
    if RELU:
        y = tl.where(y < 0, 0.0, y).to(y.dtype)
    if BITS == 31:
        bits = y.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        bits = y.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
    key = tl.where(i < C, tl.where(bits > INF, 0, bits + 1), -1)
    low, high = tl.full((), 0, tl.int32), tl.full((), INF + 2, tl.int32)
    for _ in range(BITS):  # at least K keys are ``low`` or more, and fewer ``high`` or more
        middle = low + (high - low) // 2
        enough = tl.sum((key >= middle).to(tl.int32), 0) >= K
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
    more, tie = (key > low).to(tl.int32), (key == low).to(tl.int32)
    free = K - tl.sum(more, 0)  # slots for entries that are equal to the K-th largest
    kept = (more > 0) | ((tie > 0) & (tl.cumsum(tie, 0) <= free))
    slot = row * K + tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(values_ptr + slot, y, mask=kept)
    tl.store(col_ptr + slot, i, mask=kept)


def fits(x: torch.Tensor) -> bool:
    """Whether a program can hold a row: the scans exchange it in shared memory."""
    size = power_of_two(x.shape[1], 16, MOST)
    return x.shape[1] <= size and (INTERPRET or 8 * size <= backend.shared_memory(x.device))


def launch(x: torch.Tensor, infinity: int, relu: bool):
    """A function of (x, values, columns, number of columns, count), for matrices like x."""
    rows, columns = x.shape
    size, bits = power_of_two(columns, 16, MOST), 8 * x.element_size() - 1
    warps = 4 if INTERPRET else max(4, min(32, size // 512))
    constants = {"SIZE": size, "BITS": bits, "INF": infinity, "RELU": relu, "num_warps": warps, **overlap(x)}
    return triton_launch(_largest, (rows,), **constants)
