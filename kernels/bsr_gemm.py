"""BSR's product for many tokens on tensor cores, x @ W.T and grad @ W; the launchers are in ``bsr``.

Letters as there: T tokens, I inputs, O outputs; blocks (BH, BW); BO outputs, BT tokens, BK reduction a tile.
"""

import triton
import triton.language as tl

from .epilogue import activate
from .pdl import begin


@triton.jit
def _product(
    x_desc, x_ptr, w_desc, w_ptr, other_ptr, block_ptr, start, stop, other, sub, token0, T, I, stride_xt, stride_xi,
    BH: tl.constexpr, BW: tl.constexpr, BO: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    TRANSPOSED: tl.constexpr, TOKENS_FIRST: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The whole reduction of one tile; ``other`` is the block column of the first block."""
    STEPS: tl.constexpr = (BW + BK - 1) // BK
    inside, t, k = sub * BO + tl.arange(0, BO), token0 + tl.arange(0, BT), tl.arange(0, BK)
    t64, k64 = (t.to(tl.int64), k.to(tl.int64)) if WIDE else (t, k)
    acc = tl.zeros((BT, BO) if TOKENS_FIRST else (BO, BT), tl.float32)
    block = start
    if TRANSPOSED:
        block = tl.load(block_ptr + start, mask=start < stop, other=0)
    for step in range((stop - start) * STEPS):
        k0 = step % STEPS * BK
        column, row = other * BW + k0, block
        following = start + (step + 1) // STEPS  # loaded one step ahead: the copies of a tile need its column
        other = tl.load(other_ptr + following, mask=following < stop, other=0)
        block = following
        if TRANSPOSED:
            block = tl.load(block_ptr + following, mask=following < stop, other=0)
        in_block = k0 + k < BW
        if x_desc is not None:
            x = x_desc.load([token0, column])
        else:
            in_x = in_block & (column + k < I)
            x = tl.load(
                x_ptr + t64[:, None] * stride_xt + (column + k64)[None, :] * stride_xi,
                mask=(t < T)[:, None] & in_x[None, :],
                other=0.0,
            )
        base = w_ptr + row.to(tl.int64) * (BH * BW)
        if TRANSPOSED:
            if w_desc is not None:
                w = w_desc.load([row * BW + k0, sub * BO])
            else:
                w = tl.load(
                    base + (k0 + k)[:, None] * BH + inside[None, :],
                    mask=in_block[:, None] & (inside < BH)[None, :],
                    other=0.0,
                )
        elif w_desc is not None:
            w = w_desc.load([row * BH + sub * BO, k0])
        else:
            w = tl.load(
                base + inside[:, None] * BW + (k0 + k)[None, :],
                mask=(inside < BH)[:, None] & in_block[None, :],
                other=0.0,
            )
        if TOKENS_FIRST:
            acc = tl.dot(x, w if TRANSPOSED else tl.trans(w), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(tl.trans(w) if TRANSPOSED else w, tl.trans(x), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _store(
    acc, bias_ptr, gate_ptr, y_ptr, block_row, sub, token0, T, O,
    BH: tl.constexpr, BO: tl.constexpr, BT: tl.constexpr, TOKENS_FIRST: tl.constexpr, WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    inside, t = sub * BO + tl.arange(0, BO), token0 + tl.arange(0, BT)
    o, t64 = block_row * BH + inside, t.to(tl.int64) if WIDE else t
    o_ok = (inside < BH) & (o < O)
    if not TOKENS_FIRST:
        acc = tl.trans(acc)
    mask = (t < T)[:, None] & o_ok[None, :]
    offsets = t64[:, None] * O + o[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + o, mask=o_ok, other=0.0).to(tl.float32)[None, :]
    acc = activate(acc, ACTIVATION)
    if gate_ptr is not None:
        acc *= tl.load(gate_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def block_gemm(
    x_desc, x_ptr, w_desc, w_ptr, other_ptr, block_ptr, schedule_ptr, bias_ptr, gate_ptr,
    up_ptr, up_start_ptr, up_other_ptr, up_bias_ptr, y_ptr, T, I, O, block_rows, stride_xt, stride_xi,
    BH: tl.constexpr, BW: tl.constexpr, BO: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    TRANSPOSED: tl.constexpr, TOKENS_FIRST: tl.constexpr, WIDE: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, READY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One tile per program. With ``up``, a second weight, a tile has two halves, as in ``vector_nm_gemm``: x @ up is
    stored in y, where it stays in L2, and is the gate of the other. READY: as in ``bsr_few``."""
    HALVES: tl.constexpr = 1 if up_ptr is None else 2
    SUB: tl.constexpr = (BH + BO - 1) // BO
    if not READY:
        begin(PDL)
    # all block rows of one token tile come before the next tile's, so that its activations stay in L2; longest first
    pid = tl.program_id(0)
    entry = schedule_ptr + pid % (block_rows * SUB) // SUB * 4
    block_row, start, stop, other = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    sub, token0 = pid % SUB, pid // (block_rows * SUB) * BT
    if READY:
        begin(PDL)
    if HALVES == 2:
        up_start, up_stop = tl.load(up_start_ptr + block_row), tl.load(up_start_ptr + block_row + 1)
        up_other = tl.load(up_other_ptr + up_start, mask=up_start < up_stop, other=0)
    for half in tl.range(HALVES, num_stages=1):
        w, others, first, end, column = w_ptr, other_ptr, start, stop, other
        if HALVES == 2 and half == 0:
            w, others, first, end, column = up_ptr, up_other_ptr, up_start, up_stop, up_other
        acc = _product(
            x_desc, x_ptr, w_desc, w, others, block_ptr, first, end, column, sub, token0, T, I, stride_xt, stride_xi,
            BH, BW, BO, BT, BK, TRANSPOSED, TOKENS_FIRST, WIDE, PRECISION,
        )  # fmt: skip
        if HALVES == 1:
            _store(
                acc, bias_ptr, gate_ptr, y_ptr, block_row, sub, token0, T, O,
                BH, BO, BT, TOKENS_FIRST, WIDE, ACTIVATION,
            )  # fmt: skip
        elif half == 0:
            _store(acc, up_bias_ptr, None, y_ptr, block_row, sub, token0, T, O, BH, BO, BT, TOKENS_FIRST, WIDE, "none")
            tl.debug_barrier()  # another thread of the program may load what this one stored
        else:
            _store(
                acc, bias_ptr, y_ptr, y_ptr, block_row, sub, token0, T, O,
                BH, BO, BT, TOKENS_FIRST, WIDE, ACTIVATION,
            )  # fmt: skip
