"""Tiles: their order, their sizes, and how matrices are loaded by tiles.

GROUP row tiles iterate over the columns together, so that concurrent programs share both operands in L2.
"""

import torch
import triton
import triton.language as tl

from .backend import backend


@triton.jit
def grouped(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """(row tile, column tile) of program ``pid``."""
    first = pid // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    inside = pid % (GROUP * tiles_n)
    return first + inside % height, inside // height


def power_of_two(size: int, low: int, high: int) -> int:
    """The next power of two of ``size``, clamped to ``low`` and ``high``."""
    return min(high, max(low, triton.next_power_of_2(max(size, 1))))


def splits(tiles: int, wanted: int, length: int, least: int, most: int = 16) -> int:
    """The number of parts that each of ``tiles`` reductions of ``length`` is split into, a power of two up to ``most``:
    at least ``wanted`` parts in all, as long as each has at least ``least`` elements."""
    split = 1
    while tiles * split < wanted and split < most and length // (2 * split) >= least:
        split *= 2
    return split


def wide(*tensors: torch.Tensor | None) -> bool:
    """Whether any offset into ``tensors`` needs 64 bits."""
    return any(
        t is not None and sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) >= 2**31
        for t in tensors
    )


def tma_can_load(matrix: torch.Tensor) -> bool:
    """Whether TMA can load tiles of ``matrix``: Hopper, and rows that start at multiples of 16 bytes."""
    if matrix.numel() == 0 or matrix.data_ptr() % 16 or matrix.stride(0) * matrix.element_size() % 16:
        return False
    return matrix.stride(1) == 1 and backend.capability(matrix.device)[0] >= 9


def matrix_of(x: torch.Tensor, aligned: bool = False, packed: bool = False):
    """A function from tensors like ``x`` (*, features) to a matrix with contiguous rows; None if ``x`` is one already.
    ``aligned``: which starts at a multiple of 16 bytes; ``packed``: without gaps between rows."""
    size = (x.shape[:-1].numel(), x.shape[-1])
    flat = x.reshape(size)
    if flat.stride(1) != 1 or (aligned and flat.data_ptr() % 16) or (packed and not flat.is_contiguous()):
        # `contiguous` would leave a matrix of one column as it is, whatever its stride
        return lambda x: x.reshape(size).clone(memory_format=torch.contiguous_format)
    return None if x.dim() == 2 else lambda x: x.reshape(size)
