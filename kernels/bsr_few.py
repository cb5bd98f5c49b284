"""BSR for a few tokens: split-K, every block read once; the launchers are in ``bsr``.

Letters as there: T tokens, I inputs, O outputs; BO outputs, BT tokens, BK reduction a tile; S splits of the reduction.
"""

import triton
import triton.language as tl

from .epilogue import finish
from .tiles import begin


@triton.jit
def _product(
    x_ptr, w_ptr, start_ptr, other_ptr, line, inside, split, T, I, stride_xt, stride_xi,
    BH: tl.constexpr, BW: tl.constexpr, BO: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, S: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(BO, BT): this split's share of the line's blocks times their activations."""
    start, stop = tl.load(start_ptr + line), tl.load(start_ptr + line + 1)
    length = (stop - start) * BW
    share = tl.cdiv(length, S * BK) * BK
    t, k = tl.arange(0, BT), tl.arange(0, BK)
    base = w_ptr + start.to(tl.int64) * (BH * BW)
    acc = tl.zeros((BO, BK) if BT == 1 else (BO, BT), tl.float32)
    ahead = tl.load(other_ptr + start + split * share // BW, mask=split * share < length, other=0)
    for step in range(split * share, tl.minimum((split + 1) * share, length), BK):
        if BW % BK == 0:  # a step stays inside one block: its columns are contiguous, which the compiler can see
            first, ok = tl.multiple_of(step % BW, BK), k < BK
            inner, column = first + k, tl.multiple_of(ahead * BW + first, BK) + k
            following = tl.minimum(
                step + BK, length - BK
            )  # loaded one step ahead, or the copies would not be pipelined
            ahead = tl.load(other_ptr + start + following // BW)
            w_at = base + step // BW * (BH * BW) + inside[:, None] * BW + inner[None, :]
        else:
            slot = step + k
            ok = slot < length
            column = tl.load(other_ptr + start + slot // BW, mask=ok, other=0) * BW + slot % BW
            w_at = base + (slot // BW)[None, :] * (BH * BW) + inside[:, None] * BW + (slot % BW)[None, :]
        w = tl.load(w_at, mask=ok[None, :] & (inside < BH)[:, None], other=0.0)
        ok = ok & (column < I)
        if BT == 1:
            x = tl.load(x_ptr + column * stride_xi, mask=ok, other=0.0)
            acc += w.to(tl.float32) * x.to(tl.float32)[None, :]
        else:
            x = tl.load(
                x_ptr + column[None, :] * stride_xi + t[:, None] * stride_xt,
                mask=ok[None, :] & (t < T)[:, None],
                other=0.0,
            )
            acc = tl.dot(w, tl.trans(x), acc, input_precision=PRECISION)
    if BT == 1:
        acc = tl.sum(acc, 1)[:, None]
    return acc


@triton.jit
def few_tokens(
    x_ptr, w_ptr, start_ptr, other_ptr, bias_ptr, gate_ptr, up_ptr, up_start_ptr, up_other_ptr, up_bias_ptr, y_ptr,
    partial_ptr, count_ptr, T, I, O, stride_xt, stride_xi,
    BH: tl.constexpr, BW: tl.constexpr, BO: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, S: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The weight is read once; the S programs of a line share its blocks, and the last to arrive adds up.

    With ``up``, a second weight, both are read, and their products meet in fp32.
    """
    HALVES: tl.constexpr = 1 if up_ptr is None else 2
    SUB: tl.constexpr = (BH + BO - 1) // BO
    begin(PDL)
    tile, split = tl.program_id(0), tl.program_id(1)
    line, t = tile // SUB, tl.arange(0, BT)
    inside = tile % SUB * BO + tl.arange(0, BO)
    acc = _product(
        x_ptr, w_ptr, start_ptr, other_ptr, line, inside, split, T, I, stride_xt, stride_xi,
        BH, BW, BO, BT, BK, S, PRECISION,
    )  # fmt: skip
    up_acc = acc
    if HALVES == 2:
        up_acc = _product(
            x_ptr, up_ptr, up_start_ptr, up_other_ptr, line, inside, split, T, I, stride_xt, stride_xi,
            BH, BW, BO, BT, BK, S, PRECISION,
        )  # fmt: skip
    o = line * BH + inside
    o_ok = (inside < BH) & (o < O)
    finish(
        acc, up_acc, tile, split, o, o_ok, t[None, :] * O + o[:, None], o_ok[:, None] & (t < T)[None, :],
        bias_ptr, up_bias_ptr, gate_ptr, y_ptr, partial_ptr, count_ptr, HALVES, S, BO, BT, ACTIVATION,
    )  # fmt: skip
