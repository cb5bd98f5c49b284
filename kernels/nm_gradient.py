"""NM as a dense matrix and back: the expansion of a weight, and a dense gradient collected at the pattern.

Letters as in ``nm``: I inputs, O outputs, K slots a row, BYTES of positions; BM rows, BC columns or BW words a tile.
"""

import torch
import triton
import triton.language as tl

from .backend import INTERPRET
from .launch import into_new, triton_launch
from .nm_few import as_words, bitmap_slots, dense_tile, dense_words
from .operators import operator


@triton.jit
def _expand_tile(
    w_ptr, index_ptr, out_ptr, I, O, K, BYTES,
    N: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    rows, c = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM), tl.program_id(1) * BC + tl.arange(0, BC)
    dense = dense_tile(w_ptr, index_ptr, tl.minimum(rows, O - 1), c, K, BYTES, N, M, BITS, BM, BC)
    tl.store(out_ptr + rows[:, None] * I + c[None, :], dense, mask=(rows < O)[:, None] & (c < I)[None, :])


@triton.jit
def _expand_words(w_ptr, index_ptr, out_ptr, O, words, BM: tl.constexpr, BW: tl.constexpr):
    """2:4 in 16-bit types, 64-bit word by word: eight elements of the dense weight each."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    rows, j = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM), tl.program_id(1) * BW + tl.arange(0, BW)
    c = tl.program_id(1) * BW * 8 + tl.arange(0, BW * 8)
    ok = (rows < O)[:, None] & (j < words)[None, :]
    w = tl.load(as_words(w_ptr) + rows[:, None] * words + j[None, :], mask=ok, other=0)
    p = tl.load(index_ptr + rows[:, None] * words + j[None, :], mask=ok, other=0).to(tl.int32)
    dense = dense_words(w, p, dtype, BM, BW)
    tl.store(
        out_ptr + rows[:, None] * words * 8 + c[None, :], dense, mask=(rows < O)[:, None] & (c < words * 8)[None, :]
    )


@triton.jit
def _collect_slots(
    dense_ptr, index_ptr, out_ptr, I, O, K, BYTES,
    N: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The dense matrix at the pattern: values, and zero in the slots of columns that the matrix does not have."""
    rows, slot = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM), tl.program_id(1) * BC + tl.arange(0, BC)
    ok = (rows < O)[:, None] & (slot < K)[None, :]
    byte = tl.load(index_ptr + rows[:, None] * BYTES + (slot * BITS // 8)[None, :], mask=ok, other=0).to(tl.int32)
    column = (slot // N * M)[None, :] + ((byte >> (slot * BITS % 8)[None, :]) & ((1 << BITS) - 1))
    values = tl.load(dense_ptr + rows[:, None] * I + column, mask=ok & (column < I), other=0.0)
    tl.store(out_ptr + rows[:, None] * K + slot[None, :], values, mask=ok)


@triton.jit
def _collect_bits(
    dense_ptr, index_ptr, out_ptr, I, O, K, BYTES,
    N: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The same by columns, of a bitmap: each column knows its slot."""
    rows, c = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM), tl.program_id(1) * BC + tl.arange(0, BC)
    slot, mine = bitmap_slots(index_ptr, tl.minimum(rows, O - 1), c, K, N, M)
    values = tl.load(dense_ptr + rows[:, None] * I + c[None, :], mask=(rows < O)[:, None] & (c < I)[None, :], other=0.0)
    tl.store(out_ptr + rows[:, None] * K + slot, values, mask=(rows < O)[:, None] & mine)


def bits(n: int, m: int) -> int:
    """Bits of a stored position; 1 if the index is a bitmap, of a word of m bits a group."""
    width = 2 if m <= 4 else 4 if m <= 16 else 8
    return 1 if m in (8, 16, 32) and n * width >= m else width


def index_shape(outputs: int, groups: int, n: int, m: int) -> tuple[int, ...]:
    """The shape of the index, uint8."""
    width = bits(n, m)
    return (outputs, groups, m // 8) if width == 1 else (outputs, -(-groups * n * width // 8))


def has_words(n: int, m: int, dtype: torch.dtype, in_features: int) -> bool:
    """Whether two groups fill a 64-bit word (values that are not aligned to words are copied)."""
    return (n, m) == (2, 4) and dtype in (torch.float16, torch.bfloat16) and in_features % 8 == 0


def begin_at_words(t: torch.Tensor, size: int = 8):
    """A function that copies tensors like t, as their words of so many bytes are not aligned; None if they are."""
    return torch.Tensor.clone if t.data_ptr() % size else None


def _reads_words(call, index: torch.Tensor, n: int, m: int):
    """``call``, a function of a tensor and an index like this one, with words of its bitmap that are aligned."""
    copied = begin_at_words(index, m // 8) if bits(n, m) == 1 else None
    return call if copied is None else lambda first, index: call(first, copied(index))


@operator(
    "gpu_nm_expand(Tensor values, Tensor index, int n, int m, int in_features) -> Tensor",
    lambda values, index, n, m, in_features: (values.shape[0], in_features),
    strided=(),
)
def expand(values, index, n, m, in_features):
    """values, index -> the dense weight (O, I)."""
    outputs, words = len(values), in_features // 8
    if has_words(n, m, values.dtype, in_features) and not INTERPRET:
        launch = triton_launch(_expand_words, (triton.cdiv(outputs, 8), triton.cdiv(words, 128)), BM=8, BW=128)
        return into_new(launch, values, (outputs, in_features), outputs, words, arrange=begin_at_words(values))
    height, width = (16, 32) if INTERPRET else (8, 512)
    grid = (triton.cdiv(outputs, height), triton.cdiv(in_features, width))
    launch = triton_launch(_expand_tile, grid, N=n, M=m, BITS=bits(n, m), BM=height, BC=width)
    sizes = in_features, outputs, values.shape[1], index.shape[1]
    return _reads_words(into_new(launch, values, (outputs, in_features), *sizes), index, n, m)


@operator(
    "gpu_nm_collect(Tensor dense, Tensor index, int n, int m) -> Tensor",
    lambda dense, index, n, m: (dense.shape[0], -(-dense.shape[1] // m) * n),
)
def collect(dense, index, n, m):
    """A dense matrix (O, I) at the pattern: values (O, K)."""
    (outputs, inputs), height, width = dense.shape, *((16, 32) if INTERPRET else (8, 512))
    slots = -(-inputs // m) * n
    kernel, across = (_collect_bits, slots // n * m) if bits(n, m) == 1 else (_collect_slots, slots)
    grid = (triton.cdiv(outputs, height), triton.cdiv(across, width))
    launch = triton_launch(kernel, grid, N=n, M=m, BITS=bits(n, m), BM=height, BC=width)
    call = into_new(launch, dense, (outputs, slots), inputs, outputs, slots, index.shape[1])
    return _reads_words(call, index, n, m)
