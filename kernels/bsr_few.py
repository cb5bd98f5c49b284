"""BSR for a few tokens: every block read once, by programs with equal shares; the launchers are in ``bsr``.

Letters as there: T tokens, I inputs, O outputs; BO outputs, BT tokens, BK reduction a tile.

The reduction of a block row is split over as many programs as its blocks need. What a program computes stands in one
row of a table, made once per pattern, so that a program loads it at once and starts loading blocks: block row, split,
splits; then for each weight the first block of the block row and the one after its last, the first step of the share
and the one after its last, and the block column of the share's first block.
"""

import triton
import triton.language as tl

from .epilogue import finish
from .pdl import begin

HEAD, SHARE = tl.constexpr(3), tl.constexpr(5)  # integers in a row of the table: of the program, of each share


@triton.jit
def _share(entry):
    """The integers of one share: start and stop of its blocks, of its steps, and the first block column."""
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4)


@triton.jit
def _share_of(start_ptr, other_ptr, split, S, BW: tl.constexpr, BK: tl.constexpr):
    """The same integers of one split of a block row, from the pattern."""
    start, stop = tl.load(start_ptr), tl.load(start_ptr + 1)
    steps = tl.cdiv((stop - start) * BW, BK)
    share = tl.cdiv(steps, S)
    low = tl.minimum(split * share, steps)
    first = start + low * BK // BW
    return start, stop, low, tl.minimum(low + share, steps), tl.load(other_ptr + first, mask=first < stop, other=0)


@triton.jit
def _product(
    x_ptr, w_ptr, other_ptr, share, inside, T, I, stride_xt, stride_xi,
    BH: tl.constexpr, BW: tl.constexpr, BO: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(BO, BT): one share of the blocks of a block row times their activations."""
    start, stop, low, high, ahead = share
    length = (stop - start) * BW
    t, k = tl.arange(0, BT), tl.arange(0, BK)
    base = w_ptr + start.to(tl.int64) * (BH * BW)
    acc = tl.zeros((BO, BK) if BT == 1 else (BO, BT), tl.float32)
    for step in tl.range(low * BK, high * BK, BK, num_stages=STAGES):
        if BW % BK == 0:  # a step stays inside one block: its columns are contiguous, which the compiler can see
            first, ok = tl.multiple_of(step % BW, BK), k < BK
            inner, column = first + k, tl.multiple_of(ahead * BW + first, BK) + k
            following = tl.minimum(step + BK, length - BK)  # one step ahead, or the copies would not be pipelined
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
    x_ptr, w_ptr, start_ptr, other_ptr, bias_ptr, gate_ptr, up_ptr, up_start_ptr, up_other_ptr, up_bias_ptr, table_ptr,
    y_ptr, partial_ptr, count_ptr, T, I, O, stride_xt, stride_xi,
    BH: tl.constexpr, BW: tl.constexpr, BO: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
    STAGES: tl.constexpr, READY: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
    S: tl.constexpr,
):  # fmt: skip
    """The weight is read once; where SPLIT, the programs of a block row share its blocks, and the last one adds up.

    With ``up``, a second weight, both are read, and their products are multiplied in fp32. READY: the table was
    finished before this launch, and may be read while the previous kernel still runs. Without a table, every block row
    has S programs, which find their shares in the pattern: two loads, one after the other, at their start.
    """
    HALVES: tl.constexpr = 1 if up_ptr is None else 2
    SUB: tl.constexpr = (BH + BO - 1) // BO
    program, sub, t = tl.program_id(0) // SUB, tl.program_id(0) % SUB, tl.arange(0, BT)
    inside = sub * BO + tl.arange(0, BO)
    if not READY:
        begin(PDL)
    if table_ptr is None:
        block_row, split, splits = program // S, program % S, S
        share = _share_of(start_ptr + block_row, other_ptr, split, S, BW, BK)
        up_share = share
        if HALVES == 2:
            up_share = _share_of(up_start_ptr + block_row, up_other_ptr, split, S, BW, BK)
    else:
        entry = table_ptr + program * (HEAD + HALVES * SHARE)
        block_row, split, splits = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
        share = _share(entry + HEAD)
        up_share = share
        if HALVES == 2:
            up_share = _share(entry + HEAD + SHARE)
    if READY:
        begin(PDL)  # the table is not written by an earlier kernel
    acc = _product(
        x_ptr, w_ptr, other_ptr, share, inside, T, I, stride_xt, stride_xi,
        BH, BW, BO, BT, BK, STAGES, PRECISION,
    )  # fmt: skip
    up_acc = acc
    if HALVES == 2:
        up_acc = _product(
            x_ptr, up_ptr, up_other_ptr, up_share, inside, T, I, stride_xt, stride_xi,
            BH, BW, BO, BT, BK, STAGES, PRECISION,
        )  # fmt: skip
    o = block_row * BH + inside
    o_ok = (inside < BH) & (o < O)
    finish(
        acc, up_acc, block_row * SUB + sub, split, splits, (program - split) * SUB + sub * splits, o, o_ok,
        t[None, :] * O + o[:, None], o_ok[:, None] & (t < T)[None, :], T * O,
        bias_ptr, up_bias_ptr, gate_ptr, y_ptr, partial_ptr, count_ptr, HALVES, SPLIT, BO, BT, ACTIVATION,
    )  # fmt: skip
