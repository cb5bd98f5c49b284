"""NM for a few tokens: the weight is read compressed, and its dense tiles exist only in registers.

Letters as in ``nm``: T tokens, I inputs, O outputs, K slots a row, BYTES of positions; BM rows, BT tokens, BK columns;
S splits. A word is two groups of 2:4 in 16-bit types: 4 values in 64 bits, whose positions share one byte.
"""

import triton
import triton.language as tl

from .epilogue import finish_rows
from .pdl import begin


@triton.jit
def _rows(O, BM: tl.constexpr, WIDE: tl.constexpr):
    """The output rows of this program, and the same limited to existing rows, for loads of the weight."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    w_rows = tl.minimum(rows, O - 1)
    if WIDE:
        w_rows = w_rows.to(tl.int64)
    return rows, w_rows


@triton.jit
def as_words(ptr):
    """A pointer to 16-bit values, which begin at a multiple of 8 bytes, as one to 64-bit words."""
    return ptr.to(tl.pointer_type(tl.int64))


@triton.jit
def _half(word, shift, BF16: tl.constexpr):
    """The 16-bit float at bit ``shift`` of a 64-bit word, as fp32."""
    bits = (word >> shift.to(tl.int64)).to(tl.int32)
    if BF16:
        value = (bits << 16).to(tl.float32, bitcast=True)
    else:
        value = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return value


@triton.jit
def one_token_24(
    x_ptr, w_ptr, index_ptr, bias_ptr, gate_ptr, y_ptr, partial_ptr, count_ptr, T, O, words,
    BM: tl.constexpr, BW: tl.constexpr, S: tl.constexpr, WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x and values as 64-bit words: the four activations of a group are one word, and a position is a shift."""
    begin(PDL)
    rows, w_rows = _rows(O, BM, WIDE)
    BF16: tl.constexpr = x_ptr.dtype.element_ty == tl.bfloat16
    x_words, w_words = as_words(x_ptr), as_words(w_ptr)
    share = tl.cdiv(words, S * BW) * BW
    first = tl.program_id(1) * share
    acc = tl.zeros((BM, BW), tl.float32)
    for w0 in range(first, tl.minimum(first + share, words), BW):
        j = w0 + tl.arange(0, BW)
        ok = j < words
        w = tl.load(w_words + w_rows[:, None] * words + j[None, :], mask=ok[None, :], other=0)
        p = tl.load(index_ptr + w_rows[:, None] * words + j[None, :], mask=ok[None, :], other=0).to(tl.int32)
        even, odd = tl.load(x_words + 2 * j, mask=ok, other=0), tl.load(x_words + 2 * j + 1, mask=ok, other=0)
        for s in tl.static_range(4):
            x = even if s < 2 else odd
            shift = (p << 4 >> 2 * s) & 48  # 16 bits a position
            acc += _half(x[None, :], shift, BF16) * _half(w, tl.full((1, 1), 16 * s, tl.int32), BF16)
    finish_rows(
        tl.sum(acc, 1)[:, None], rows, rows < O, bias_ptr, gate_ptr, y_ptr, partial_ptr, count_ptr, T, O,
        BM, 1, S, ACTIVATION,
    )  # fmt: skip


@triton.jit
def _dense_group(values, nibble, dtype: tl.constexpr):
    """Four elements of a 2:4 group, from its two values in 32 bits and its two positions in 4.

    One byte permute builds two elements: its selector is "zero, zero" with the bytes of the first value put at the
    first position and those of the second at the second.
    """
    d0, d1, d2, d3 = tl.inline_asm_elementwise(
        """{
        .reg .b32 a, b, s, lo, hi;
        shl.b32 a, $5, 3; and.b32 a, a, 24; shl.b32 a, 0x54, a;
        shl.b32 b, $5, 1; and.b32 b, b, 24; shl.b32 b, 0x76, b;
        xor.b32 s, a, b; xor.b32 s, s, 0x44444444;
        prmt.b32 lo, $4, 0, s; shr.u32 s, s, 16; prmt.b32 hi, $4, 0, s;
        mov.b32 {$0, $1}, lo; mov.b32 {$2, $3}, hi;
        }""",
        "=h,=h,=h,=h,r,r", [values, nibble], dtype=(tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=1,
    )  # fmt: skip
    return (
        d0.to(dtype, bitcast=True),
        d1.to(dtype, bitcast=True),
        d2.to(dtype, bitcast=True),
        d3.to(dtype, bitcast=True),
    )


@triton.jit
def dense_words(w, p, dtype: tl.constexpr, BM: tl.constexpr, BW: tl.constexpr):
    """The (BM, 8 * BW) dense elements of words w and their position bytes p."""
    a0, a1, a2, a3 = _dense_group(w.to(tl.int32), p, dtype)
    b0, b1, b2, b3 = _dense_group((w >> 32).to(tl.int32), p >> 4, dtype)
    even, odd = tl.join(tl.join(a0, b0), tl.join(a2, b2)), tl.join(tl.join(a1, b1), tl.join(a3, b3))
    return tl.reshape(tl.join(even, odd), (BM, BW * 8))


@triton.jit
def few_tokens_24(
    x_ptr, w_ptr, index_ptr, bias_ptr, gate_ptr, y_ptr, partial_ptr, count_ptr, T, O, words, stride_x,
    BM: tl.constexpr, BT: tl.constexpr, BW: tl.constexpr, S: tl.constexpr, WIDE: tl.constexpr, ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Tensor cores over tiles that are expanded in registers, 64-bit word by word."""
    begin(PDL)
    rows, w_rows = _rows(O, BM, WIDE)
    t = tl.program_id(2) * BT + tl.arange(0, BT)
    if WIDE:
        t = t.to(tl.int64)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    w_words = as_words(w_ptr)
    share = tl.cdiv(words, S * BW) * BW
    first = tl.program_id(1) * share
    acc = tl.zeros((BM, BT), tl.float32)
    for w0 in range(first, tl.minimum(first + share, words), BW):
        j, c = w0 + tl.arange(0, BW), w0 * 8 + tl.arange(0, BW * 8)
        w = tl.load(w_words + w_rows[:, None] * words + j[None, :], mask=(j < words)[None, :], other=0)
        p = tl.load(index_ptr + w_rows[:, None] * words + j[None, :], mask=(j < words)[None, :], other=0).to(tl.int32)
        x = tl.load(
            x_ptr + t[:, None] * stride_x + c[None, :], mask=(t < T)[:, None] & (c < words * 8)[None, :], other=0.0
        )
        acc = tl.dot(dense_words(w, p, dtype, BM, BW), tl.trans(x), acc)
    finish_rows(acc, rows, rows < O, bias_ptr, gate_ptr, y_ptr, partial_ptr, count_ptr, T, O, BM, BT, S, ACTIVATION)


@triton.jit
def _count(v):
    """The number of bits of uint32 v, by the arithmetic that LLVM turns into one instruction."""
    v = v - ((v >> 1) & 0x55555555)
    v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F
    return (v * 0x01010101) >> 24


@triton.jit
def bitmap_slots(index_ptr, rows, c, K, N: tl.constexpr, M: tl.constexpr):
    """(the slot of each column c in its row, whether it has one). A group is one word of M bits."""
    if M == 32:
        words = index_ptr.to(tl.pointer_type(tl.uint32))
    elif M == 16:
        words = index_ptr.to(tl.pointer_type(tl.uint16))
    else:
        words = index_ptr
    group, place = c // M, c % M
    word = tl.load(words + rows[:, None] * (K // N) + group[None, :], mask=(group < K // N)[None, :], other=0)
    word, place = word.to(tl.uint32), place.to(tl.uint32)
    before = _count(word & ((1 << place) - 1)[None, :]).to(tl.int32)
    return (group * N)[None, :] + before, (((word >> place[None, :]) & 1) != 0) & (before < N)


@triton.jit
def dense_tile(
    w_ptr, index_ptr, w_rows, c, K, BYTES, N: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Columns c of the dense weight: each looks at the N slots of its own group, or at its bit (BITS of 1)."""
    if BITS == 1:
        slot, mine = bitmap_slots(index_ptr, w_rows, c, K, N, M)
        return tl.load(w_ptr + w_rows[:, None] * K + slot, mask=mine, other=0.0)
    dense = tl.zeros((BM, BK), w_ptr.dtype.element_ty)
    for s in tl.static_range(N):
        slot = c // M * N + s
        ok = (slot < K)[None, :]
        byte = tl.load(index_ptr + w_rows[:, None] * BYTES + (slot * BITS // 8)[None, :], mask=ok, other=0).to(tl.int32)
        position = (byte >> (slot * BITS % 8)[None, :]) & ((1 << BITS) - 1)
        mine = ok & (position == (c % M)[None, :])
        dense = tl.where(mine, tl.load(w_ptr + w_rows[:, None] * K + slot[None, :], mask=mine, other=0.0), dense)
    return dense


@triton.jit
def few_tokens(
    x_ptr, w_ptr, index_ptr, bias_ptr, gate_ptr, y_ptr, partial_ptr, count_ptr, T, I, O, K, BYTES, stride_x,
    N: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    S: tl.constexpr, WIDE: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Any n, m and dtype: dense tiles are made on the fly, so that the dense weight is never in memory."""
    begin(PDL)
    rows, w_rows = _rows(O, BM, WIDE)
    t = tl.program_id(2) * BT + tl.arange(0, BT)
    t_ok = (t < T)[:, None]
    if WIDE:
        t = t.to(tl.int64)
    share = tl.cdiv(I, S * BK) * BK
    first = tl.program_id(1) * share
    acc = tl.zeros((BM, BT), tl.float32)
    for c0 in range(first, tl.minimum(first + share, I), BK):
        c = c0 + tl.arange(0, BK)
        w = dense_tile(w_ptr, index_ptr, w_rows, c, K, BYTES, N, M, BITS, BM, BK)
        x = tl.load(x_ptr + t[:, None] * stride_x + c[None, :], mask=t_ok & (c < I)[None, :], other=0.0)
        acc = tl.dot(w, tl.trans(x), acc, input_precision=PRECISION)
    finish_rows(acc, rows, rows < O, bias_ptr, gate_ptr, y_ptr, partial_ptr, count_ptr, T, O, BM, BT, S, ACTIVATION)
