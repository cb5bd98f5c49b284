"""GroupedNM for a few tokens; the launchers are in ``grouped_nm``.

Letters as there, and: E entries of a program, BS strips of PP patterns of GP slots, PP, GP, NP and MP rounded up to
powers of two; BT tokens; S splits of the chunks.
"""

import triton
import triton.language as tl

from .epilogue import finish
from .tiles import begin


@triton.jit
def slot_rows(values_ptr, index_ptr, pattern_ptr, base, q, c, I, Q, G: tl.constexpr, N: tl.constexpr, MP: tl.constexpr):
    """The dense (BQ, MP) tile of slots q of one (chunk, strip), in fp32, and their columns (I or more: not there)."""
    ok = q < Q
    column = c * Q + tl.load(index_ptr + base + q, mask=ok, other=0).to(tl.int32)
    column = tl.where(ok, column, I)
    r = tl.arange(0, MP)
    dense = tl.zeros((q.shape[0], MP), tl.float32)
    for i in tl.static_range(N):
        row = tl.load(pattern_ptr + q // G * N + i, mask=ok, other=0)
        value = tl.load(values_ptr + (base + q) * N + i, mask=ok, other=0.0).to(tl.float32)
        dense += tl.where(row[:, None] == r[None, :], value[:, None], 0.0)
    return dense, column


@triton.jit
def slot_tiles(
    x_ptr, values_ptr, index_ptr, pattern_ptr, bias_ptr, gate_ptr, y_ptr, partial_ptr, count_ptr,
    T, I, O, Q, chunks, strips, stride_x,
    G: tl.constexpr, N: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, BT: tl.constexpr, BQ: tl.constexpr,
    S: tl.constexpr, UNROLL: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One strip, a share of its slots, one tile of tokens. x is feature-major (I, whole tiles), or one token."""
    begin(PDL)
    strip, split = tl.program_id(0), tl.program_id(1)
    t, tiles = tl.program_id(2) * BT + tl.arange(0, BT), tl.cdiv(Q, BQ)
    place = strip * tl.num_programs(2) + tl.program_id(2)
    share = tl.cdiv(chunks * tiles, S)
    acc = tl.zeros((BQ, MP) if BT == 1 else (MP, BT), tl.float32)
    for step in tl.range(split * share, tl.minimum((split + 1) * share, chunks * tiles), loop_unroll_factor=UNROLL):
        c = step // tiles
        q = step % tiles * BQ + tl.arange(0, BQ)
        base = (c * strips + strip).to(tl.int64) * Q
        dense, column = slot_rows(values_ptr, index_ptr, pattern_ptr, base, q, c, I, Q, G, N, MP)
        ok = column < I
        if BT == 1:
            x = tl.load(x_ptr + column * stride_x, mask=ok, other=0.0).to(tl.float32)
            acc += dense * x[:, None]
        else:
            x = tl.load(x_ptr + column.to(tl.int64)[:, None] * stride_x + t[None, :], mask=ok[:, None], other=0.0)
            acc = tl.dot(tl.trans(dense.to(x_ptr.dtype.element_ty)), x, acc, input_precision=PRECISION)
    if BT == 1:
        acc = tl.sum(acc, 0)[:, None]
    r = tl.arange(0, MP)
    rows = strip * M + r
    row_ok = (r < M) & (rows < O)
    finish(
        acc, acc, place, split, S, place * S, rows, row_ok, t.to(tl.int64)[None, :] * O + rows[:, None],
        row_ok[:, None] & (t < T)[None, :], bias_ptr, None, gate_ptr, y_ptr, partial_ptr, count_ptr,
        1, S > 1, MP, BT, ACTIVATION,
    )  # fmt: skip


@triton.jit
def gathered(
    x_ptr, values_ptr, index_ptr, pattern_ptr, bias_ptr, gate_ptr, y_ptr, partial_ptr, count_ptr,
    T, I, O, chunks, strips, stride_x,
    P: tl.constexpr, G: tl.constexpr, N: tl.constexpr, M: tl.constexpr, PP: tl.constexpr, GP: tl.constexpr,
    NP: tl.constexpr, MP: tl.constexpr, BS: tl.constexpr, BT: tl.constexpr, S: tl.constexpr, UNROLL: tl.constexpr,
    ACTIVATION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Every entry times its activations, which lie in the few columns of its chunk: no dense tile is made.

    A place of a strip belongs to the same row in all chunks, so that it has sums of its own, which meet at the end.
    x is feature-major (I, whole tiles), or one token.
    """
    begin(PDL)
    tile, split = tl.program_id(0), tl.program_id(1)
    t = tl.program_id(2) * BT + tl.arange(0, BT)
    e, i = tl.arange(0, BS * PP * GP), tl.arange(0, NP)
    p, j = e // GP % PP, e % GP
    here = (tile * BS + e // (PP * GP) < strips) & (p < P) & (j < G)
    inside = (e // (PP * GP) * P + p) * G + j
    share = tl.cdiv(chunks, S)
    acc = tl.zeros((BS * PP * GP, NP, BT), tl.float32)
    for c in tl.range(split * share, tl.minimum((split + 1) * share, chunks), loop_unroll_factor=UNROLL):
        slot = (c * strips + tile * BS).to(tl.int64) * (P * G) + inside
        column = c * (P * G) + tl.load(index_ptr + slot, mask=here, other=0).to(tl.int32)
        ok = here & (column < I)
        v = tl.load(values_ptr + slot[:, None] * N + i[None, :], mask=ok[:, None] & (i < N)[None, :], other=0.0).to(
            tl.float32
        )
        x = tl.load(x_ptr + column.to(tl.int64)[:, None] * stride_x + t[None, :], mask=ok[:, None], other=0.0).to(
            tl.float32
        )
        acc += v[:, :, None] * x[:, None, :]
    sums = tl.reshape(tl.sum(tl.reshape(acc, (BS, PP, GP, NP * BT)), 2), (BS, 1, PP * NP, BT))
    place, r = tl.arange(0, PP * NP), tl.arange(0, MP)
    given = (place // NP < P) & (place % NP < N)
    row = tl.load(pattern_ptr + place // NP * N + place % NP, mask=given, other=MP)
    mine = row[None, :] == r[:, None]
    acc = tl.reshape(tl.sum(tl.where(mine[None, :, :, None], sums, 0.0), 2), (BS * MP, BT))
    q = tl.arange(0, BS * MP)
    rows = (tile * BS + q // MP) * M + q % MP
    row_ok = (q % MP < M) & (rows < O)
    tiles = tile * tl.num_programs(2) + tl.program_id(2)
    finish(
        acc, acc, tiles, split, S, tiles * S, rows, row_ok, t.to(tl.int64)[None, :] * O + rows[:, None],
        row_ok[:, None] & (t < T)[None, :], bias_ptr, None, gate_ptr, y_ptr, partial_ptr, count_ptr,
        1, S > 1, BS * MP, BT, ACTIVATION,
    )  # fmt: skip
