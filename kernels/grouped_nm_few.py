"""GroupedNM for a few tokens, and its dense tiles; the launchers are in ``grouped_nm``.

Letters as exists, and: BS strips, BK columns, BT tokens a tile; S splits of the columns; WIDTH columns of the table of
slots. Slots are stored by pattern; the table says for each strip which slot of its chunk a column has, so that columns
are visited in order: activations are read contiguously, and a tile of several strips goes to the tensor cores.
"""

import triton
import triton.language as tl

from .epilogue import finish_rows
from .pdl import begin


@triton.jit
def strip_tile(
    values_ptr, pattern_ptr, slot, strip, k, ok, strips,
    Q: tl.constexpr, G: tl.constexpr, N: tl.constexpr, MP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The dense (BS * MP, BK) tile of ``strip`` (BS,) and columns ``k`` (BK,), whose slots are ``slot`` (BS, BK)."""
    if WIDE:
        strip = strip.to(tl.int64)
    at = ((k // Q * strips)[None, :] + strip[:, None]) * Q + slot
    r = tl.arange(0, MP)
    dense = tl.zeros((strip.shape[0], MP, k.shape[0]), values_ptr.dtype.element_ty)
    for i in tl.static_range(N):
        row = tl.load(pattern_ptr + slot // G * N + i)
        value = tl.load(values_ptr + at * N + i, mask=ok, other=0.0)
        dense = tl.where(row[:, None, :] == r[None, :, None], value[:, None, :], dense)
    return tl.reshape(dense, (strip.shape[0] * MP, k.shape[0]))


@triton.jit
def few_tokens(
    x_ptr, values_ptr, slot_ptr, pattern_ptr, bias_ptr, gate_ptr, y_ptr, partial_ptr, count_ptr,
    T, I, O, strips, width, stride_x,
    Q: tl.constexpr, G: tl.constexpr, N: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, BS: tl.constexpr,
    BK: tl.constexpr, BT: tl.constexpr, S: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    READY: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BS strips, a share of their columns, one tile of tokens. READY: the slots were finished before this launch."""
    if not READY:
        begin(PDL)
    tile, split = tl.program_id(0), tl.program_id(1)
    t, j = tl.program_id(2) * BT + tl.arange(0, BT), tl.arange(0, BK)
    strip = tile * BS + tl.arange(0, BS)
    steps = tl.cdiv(I, BK)
    share = tl.cdiv(steps, S)
    low, high = split * share, tl.minimum((split + 1) * share, steps)
    slots = slot_ptr + strip.to(tl.int64)[:, None] * width
    exists = (strip < strips)[:, None]
    ahead = tl.load(slots + (low * BK + j)[None, :], mask=exists & (low * BK + j < I)[None, :], other=0)
    if READY:
        begin(PDL)
    acc = tl.zeros((BS * MP, BK) if BT == 1 else (BS * MP, BT), tl.float32)
    for step in range(low, high):
        k = step * BK + j
        slot = ahead.to(tl.int32)
        following = k + BK  # one step ahead: the loads of values depend on their slots
        ahead = tl.load(slots + following[None, :], mask=exists & (following < I)[None, :], other=0)
        w = strip_tile(values_ptr, pattern_ptr, slot, strip, k, exists & (k < I)[None, :], strips, Q, G, N, MP, WIDE)
        if BT == 1:
            acc += w.to(tl.float32) * tl.load(x_ptr + k, mask=k < I, other=0.0).to(tl.float32)[None, :]
        else:
            x_at = x_ptr + t.to(tl.int64)[:, None] * stride_x + k[None, :]
            x = tl.load(x_at, mask=(t < T)[:, None] & (k < I)[None, :], other=0.0)
            acc = tl.dot(w, tl.trans(x), acc, input_precision=PRECISION)
    if BT == 1:
        acc = tl.sum(acc, 1)[:, None]
    q = tl.arange(0, BS * MP)
    rows = (tile * BS + q // MP) * M + q % MP
    row_ok = (q % MP < M) & (rows < O)
    finish_rows(acc, rows, row_ok, bias_ptr, gate_ptr, y_ptr, partial_ptr, count_ptr, T, O, BS * MP, BT, S, ACTIVATION)


@triton.jit
def expand_columns(
    values_ptr, slot_ptr, pattern_ptr, out_ptr, I, O, strips, width,
    Q: tl.constexpr, G: tl.constexpr, N: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, BS: tl.constexpr,
    BK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The dense (O, I) matrix, a tile of strips and columns per program."""
    strip, k = tl.program_id(0) * BS + tl.arange(0, BS), tl.program_id(1) * BK + tl.arange(0, BK)
    ok = (strip < strips)[:, None] & (k < I)[None, :]
    slot = tl.load(slot_ptr + strip.to(tl.int64)[:, None] * width + k[None, :], mask=ok, other=0).to(tl.int32)
    w = strip_tile(values_ptr, pattern_ptr, slot, strip, k, ok, strips, Q, G, N, MP, WIDE)
    q = tl.arange(0, BS * MP)
    rows = (tl.program_id(0) * BS + q // MP).to(tl.int64) * M + q % MP
    at = out_ptr + rows[:, None] * I + k[None, :]
    tl.store(at, w, mask=((q % MP < M) & (rows < O))[:, None] & (k < I)[None, :])
