"""The gathered GEMM of VectorNM on tensor cores, for many tokens; the launchers are in ``vector_nm``.

Letters as there: T tokens, I inputs, O outputs, K slots a row; BM output rows, BN tokens, BK slots a tile.
y[o, t] = sum_k values[o, k] * x[index[o//v, k], t] with feature-major x: whole rows are gathered, asynchronously.
"""

import triton
import triton.language as tl

from .epilogue import activate
from .tiles import grouped


@triton.jit
def group_rows(tile, O, V: tl.constexpr, BM: tl.constexpr):
    """The pattern row of a row tile, its first row, and the row where its group or the matrix ends."""
    SUB: tl.constexpr = (V + BM - 1) // BM
    group = tile // SUB
    return group, group * V + (tile % SUB) * BM, tl.minimum(O, (group + 1) * V)


@triton.jit
def load_columns(index_row, k0, k, K, I, BK: tl.constexpr, EVEN_K: tl.constexpr):
    """The columns of slots k0 + k; beyond the end, column I, which does not exist (without tails: any, unused)."""
    if EVEN_K:
        columns = tl.load(index_row + tl.minimum(k0, K - BK) + k)
    else:
        columns = tl.load(index_row + k0 + k, mask=k0 + k < K, other=I)
    return columns


@triton.jit
def weight_of(half, w_ptr, index_ptr, up_ptr, up_index_ptr):
    """The weight that a half of a gated tile multiplies with: ``up`` first. Without ``up``: always the one weight."""
    if up_ptr is not None and half == 0:
        w_ptr, index_ptr = up_ptr, up_index_ptr
    return w_ptr, index_ptr


@triton.jit
def _step(
    acc, columns, x_ptr, w_desc, w_ptr, k0, row0, limit, token0, T, I, K, stride_x,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TOKENS_FIRST: tl.constexpr, EVEN_T: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_I: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc plus one tile's product: the gathered rows of x times BK columns of the stored weight."""
    t, k = token0 + tl.arange(0, BN), k0 + tl.arange(0, BK)
    rows = tl.minimum(row0 + tl.arange(0, BM), limit - 1)
    if WIDE:
        columns, t, rows = columns.to(tl.int64), t.to(tl.int64), rows.to(tl.int64)
    pointers = x_ptr + columns[:, None] * stride_x + t[None, :]
    if EVEN_K and EVEN_I and EVEN_T:
        x = tl.load(pointers)
    elif EVEN_T:
        x = tl.load(pointers, mask=(columns < I)[:, None], other=0.0)
    else:
        x = tl.load(pointers, mask=(columns < I)[:, None] & (t < T)[None, :], other=0.0)
    if w_desc is not None:
        w = w_desc.load([row0, k0])
    elif EVEN_K:
        w = tl.load(w_ptr + rows[:, None] * K + k[None, :])
    else:
        w = tl.load(w_ptr + rows[:, None] * K + k[None, :], mask=(k < K)[None, :], other=0.0)
    if TOKENS_FIRST:
        acc = tl.dot(tl.trans(x), tl.trans(w), acc, input_precision=PRECISION)
    else:
        acc = tl.dot(w, x, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _product(
    x_ptr, w_desc, w_ptr, index_row, row0, limit, token0, T, I, K, stride_x,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TOKENS_FIRST: tl.constexpr, EVEN_T: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_I: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The whole reduction of one tile."""
    k = tl.arange(0, BK)
    ahead = load_columns(index_row, 0, k, K, I, BK, EVEN_K)
    acc = tl.zeros((BN, BM) if TOKENS_FIRST else (BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        columns = ahead
        ahead = load_columns(index_row, k0 + BK, k, K, I, BK, EVEN_K)
        acc = _step(
            acc, columns, x_ptr, w_desc, w_ptr, k0, row0, limit, token0, T, I, K, stride_x,
            BM, BN, BK, TOKENS_FIRST, EVEN_T, EVEN_K, EVEN_I, WIDE, PRECISION,
        )  # fmt: skip
    return acc


@triton.jit
def _store(
    acc, bias_ptr, gate_ptr, y_ptr, row0, limit, token0, T, stride_yo, stride_yt,
    BM: tl.constexpr, BN: tl.constexpr, TOKENS_FIRST: tl.constexpr, ROW_MAJOR: tl.constexpr, WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    rows, t = row0 + tl.arange(0, BM), token0 + tl.arange(0, BN)
    if WIDE:
        rows, t = rows.to(tl.int64), t.to(tl.int64)
    if TOKENS_FIRST != ROW_MAJOR:
        acc = tl.trans(acc)
    o_axis: tl.constexpr = 0 if ROW_MAJOR else 1  # the axis along which an output index is broadcast
    offsets = tl.expand_dims(rows, o_axis) * stride_yo + tl.expand_dims(t, 1 - o_axis) * stride_yt
    mask = tl.expand_dims(rows < limit, o_axis) & tl.expand_dims(t < T, 1 - o_axis)
    if bias_ptr is not None:
        acc += tl.expand_dims(tl.load(bias_ptr + rows, mask=rows < limit, other=0.0).to(tl.float32), o_axis)
    acc = activate(acc, ACTIVATION)
    if gate_ptr is not None:
        acc *= tl.load(gate_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _finish(
    acc, half, bias_ptr, gate_ptr, up_ptr, up_bias_ptr, y_ptr, row0, limit, token0, T, stride_yo, stride_yt,
    BM: tl.constexpr, BN: tl.constexpr, TOKENS_FIRST: tl.constexpr, ROW_MAJOR: tl.constexpr, WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    if up_ptr is None:
        _store(
            acc, bias_ptr, gate_ptr, y_ptr, row0, limit, token0, T, stride_yo, stride_yt,
            BM, BN, TOKENS_FIRST, ROW_MAJOR, WIDE, ACTIVATION,
        )  # fmt: skip
    else:
        if half == 0:
            _store(
                acc, up_bias_ptr, None, y_ptr, row0, limit, token0, T, stride_yo, stride_yt,
                BM, BN, TOKENS_FIRST, ROW_MAJOR, WIDE, "none",
            )  # fmt: skip
        else:
            _store(
                acc, bias_ptr, y_ptr, y_ptr, row0, limit, token0, T, stride_yo, stride_yt,
                BM, BN, TOKENS_FIRST, ROW_MAJOR, WIDE, ACTIVATION,
            )  # fmt: skip


@triton.jit
def _tile_origin(tile, T, O, V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """(pattern row, first row, row limit, first token) of an output tile; beyond the last tile, of the last."""
    tiles_m, tiles_n = tl.cdiv(O, V) * ((V + BM - 1) // BM), tl.cdiv(T, BN)
    tile_m, tile_n = grouped(tl.minimum(tile, tiles_m * tiles_n - 1), tiles_m, tiles_n, GROUP)
    group, row0, limit = group_rows(tile_m, O, V, BM)
    return group.to(tl.int64), row0, limit, tile_n * BN


@triton.jit
def gather_gemm(
    x_ptr, w_desc, w_ptr, index_ptr, bias_ptr, gate_ptr, up_ptr, up_index_ptr, up_bias_ptr, y_ptr,
    T, I, O, K, stride_x, stride_yo, stride_yt, tiles, programs,
    V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    TOKENS_FIRST: tl.constexpr, ROW_MAJOR: tl.constexpr, PERSISTENT: tl.constexpr, EVEN_T: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_I: tl.constexpr, WIDE: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile per program; or, PERSISTENT, ``programs`` programs iterate over the tiles in one flat loop of k steps.

    The flat loop keeps loads in flight across a tile's end, which pays where K is short. Columns are loaded one step
    ahead, by hand: left to the compiler's pipeline, the chain index -> activations costs a buffer of both operands.

    It is not launched with PDL, which cost up to 5 % where k is long.

    With ``up``, a second weight, a tile has two halves: x @ up is stored in y, a few KB that stay in L2, and is the
    gate of the other. Both run the same code, as two copies of it spill the accumulators.
    """
    HALVES: tl.constexpr = 1 if up_ptr is None else 2
    pid = tl.program_id(0)
    group, row0, limit, token0 = _tile_origin(pid, T, O, V, BM, BN, GROUP)
    if PERSISTENT:
        k = tl.arange(0, BK)
        steps = tl.cdiv(K, BK)
        last = (steps - 1) * BK
        tile, half, k0 = pid, 0, 0
        w, index = weight_of(half, w_ptr, index_ptr, up_ptr, up_index_ptr)
        ahead = load_columns(index + group * K, 0, k, K, I, BK, EVEN_K)
        acc = tl.zeros((BN, BM) if TOKENS_FIRST else (BM, BN), tl.float32)
        for _ in range(tl.cdiv(tiles - pid, programs) * steps * HALVES):
            columns = ahead
            next_k0 = k0 + BK
            next_tile, next_group, next_row0, next_limit, next_token0 = tile, group, row0, limit, token0
            next_half, next_w = half, w
            if k0 == last:
                next_k0 = 0
                next_half = (half + 1) % HALVES
                next_w, index = weight_of(next_half, w_ptr, index_ptr, up_ptr, up_index_ptr)
                if next_half == 0:
                    next_tile = tile + programs
                    next_group, next_row0, next_limit, next_token0 = _tile_origin(next_tile, T, O, V, BM, BN, GROUP)
            ahead = load_columns(index + next_group * K, next_k0, k, K, I, BK, EVEN_K)
            acc = _step(
                acc, columns, x_ptr, w_desc, w, k0, row0, limit, token0, T, I, K, stride_x,
                BM, BN, BK, TOKENS_FIRST, EVEN_T, EVEN_K, EVEN_I, WIDE, PRECISION,
            )  # fmt: skip
            if k0 == last:  # no extra barrier between the halves, which would stop the pipeline: every k step has one
                _finish(
                    acc, half, bias_ptr, gate_ptr, up_ptr, up_bias_ptr, y_ptr, row0, limit, token0, T,
                    stride_yo, stride_yt, BM, BN, TOKENS_FIRST, ROW_MAJOR, WIDE, ACTIVATION,
                )  # fmt: skip
                acc = tl.zeros((BN, BM) if TOKENS_FIRST else (BM, BN), tl.float32)
            tile, k0, group, row0, limit, token0 = next_tile, next_k0, next_group, next_row0, next_limit, next_token0
            half, w = next_half, next_w
    else:
        for half in tl.range(HALVES, num_stages=1):
            w, index = weight_of(half, w_ptr, index_ptr, up_ptr, up_index_ptr)
            acc = _product(
                x_ptr, w_desc, w, index + group * K, row0, limit, token0, T, I, K, stride_x,
                BM, BN, BK, TOKENS_FIRST, EVEN_T, EVEN_K, EVEN_I, WIDE, PRECISION,
            )  # fmt: skip
            _finish(
                acc, half, bias_ptr, gate_ptr, up_ptr, up_bias_ptr, y_ptr, row0, limit, token0, T,
                stride_yo, stride_yt, BM, BN, TOKENS_FIRST, ROW_MAJOR, WIDE, ACTIVATION,
            )  # fmt: skip
            if HALVES == 2:
                tl.debug_barrier()  # another thread of the program may load what this one stored
