"""VectorNM for a few tokens: split-K, every weight read once; the launchers are in ``vector_nm``.

Letters as there: T tokens, I inputs, O outputs, K slots a row; BM output rows, BT tokens, BK slots a tile; S splits.
"""

import triton
import triton.language as tl

from .epilogue import finish
from .pdl import begin
from .vector_nm_gemm import group_rows, load_columns


@triton.jit
def _step(
    acc, columns, x_ptr, w_ptr, k0, w_rows, t, I, K, stride_xi,
    BT: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, EVEN_I: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc plus BK slots of the stored rows times the gathered activations; one token stays a sum for each slot."""
    k = k0 + tl.arange(0, BK)
    w_at = w_ptr + w_rows[:, None] * K + k[None, :]
    w = tl.load(w_at) if EVEN_K else tl.load(w_at, mask=(k < K)[None, :], other=0.0)
    if BT == 1:
        if EVEN_K and EVEN_I:
            x = tl.load(x_ptr + columns * stride_xi)
        else:
            x = tl.load(x_ptr + columns * stride_xi, mask=columns < I, other=0.0)
        acc += w.to(tl.float32) * x.to(tl.float32)[None, :]
    else:
        x_at = x_ptr + columns[:, None] * stride_xi + t[None, :]
        if EVEN_K and EVEN_I:
            x = tl.load(x_at)
        else:
            x = tl.load(x_at, mask=(columns < I)[:, None], other=0.0)
        acc = tl.dot(w, x, acc, input_precision=PRECISION)
    return acc


@triton.jit
def few_tokens(
    x_ptr, w_ptr, index_ptr, bias_ptr, gate_ptr, up_ptr, up_index_ptr, up_bias_ptr, y_ptr, partial_ptr, count_ptr,
    T, I, O, K, stride_xi, stride_yo, stride_yt,
    V: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, S: tl.constexpr, PIPE: tl.constexpr,
    PDL: tl.constexpr, AFTER_TRANSPOSE: tl.constexpr, EVEN_K: tl.constexpr, EVEN_I: tl.constexpr, WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The weight is read once; with ``up``, a second one, both are, and their products are multiplied in fp32.

    AFTER_TRANSPOSE: x was written by the transpose just before, and everything else by earlier kernels.
    """
    HALVES: tl.constexpr = 1 if up_ptr is None else 2
    tile, split = tl.program_id(0), tl.program_id(1)
    group, row0, limit = group_rows(tile, O, V, BM)
    rows = row0 + tl.arange(0, BM)
    if WIDE:
        rows = rows.to(tl.int64)
    row_ok = rows < limit
    w_rows = tl.minimum(rows, limit - 1)
    t, k = tl.arange(0, BT), tl.arange(0, BK)
    pattern = group.to(tl.int64) * K
    steps = tl.cdiv(K, S * BK) * BK
    first, stop = split * steps, tl.minimum((split + 1) * steps, K)
    acc = tl.zeros((BM, BK) if BT == 1 else (BM, BT), tl.float32)
    up_acc = acc
    if not AFTER_TRANSPOSE:
        begin(PDL)
    ahead = load_columns(index_ptr + pattern, first, k, K, I, BK, EVEN_K)
    if HALVES == 2:
        up_ahead = load_columns(up_index_ptr + pattern, first, k, K, I, BK, EVEN_K)
    if AFTER_TRANSPOSE:
        begin(PDL)  # only x depends on the transpose, which itself waited for all kernels before it
    for k0 in tl.range(first, stop, BK, num_stages=PIPE):
        columns = ahead
        ahead = load_columns(index_ptr + pattern, k0 + BK, k, K, I, BK, EVEN_K)
        acc = _step(acc, columns, x_ptr, w_ptr, k0, w_rows, t, I, K, stride_xi, BT, BK, EVEN_K, EVEN_I, PRECISION)
        if HALVES == 2:
            up_columns = up_ahead
            up_ahead = load_columns(up_index_ptr + pattern, k0 + BK, k, K, I, BK, EVEN_K)
            up_acc = _step(
                up_acc, up_columns, x_ptr, up_ptr, k0, w_rows, t, I, K, stride_xi, BT, BK, EVEN_K, EVEN_I, PRECISION
            )
    if BT == 1:
        acc = tl.sum(acc, 1)[:, None]
        if HALVES == 2:
            up_acc = tl.sum(up_acc, 1)[:, None]
    mask = row_ok[:, None] & (t < T)[None, :]
    finish(
        acc, up_acc, tile, split, S, tile * S, rows, row_ok, rows[:, None] * stride_yo + t[None, :] * stride_yt, mask,
        T * O, bias_ptr, up_bias_ptr, gate_ptr, y_ptr, partial_ptr, count_ptr, HALVES, S > 1, BM, BT, ACTIVATION,
    )  # fmt: skip
