"""BSR: dense blocks (bh, bw) at block columns ``col`` of each block row, and the same blocks column by column.

Letters: T tokens, I inputs, O outputs; BO output features, BT tokens, BK reduction a tile; S splits of the reduction.
BH and BW are the block's output and reduction sides: (bh, bw) for x @ W.T, (bw, bh) for grad @ W, which is the same
walk over ``t_crow``, ``t_row`` and ``t_block``. A line is a block row (or column); its blocks form a reduction of
length count * BW, walked BK at a time.
"""

import functools

import torch
import triton
import triton.language as tl

from . import autotune, epilogue
from .bsr_gradient import expand as expand_parts
from .bsr_gradient import grad_values
from .derived import derived
from .epilogue import activate, last_to_arrive
from .library import (
    INTERPRET,
    Launch,
    describable,
    multiprocessors,
    operator,
    plan,
    power_of_two,
    precision,
    rows_contiguous,
    wide,
)

FEW = 64


@triton.jit
def _many_tokens(
    x_desc, x_ptr, w_desc, w_ptr, other_ptr, block_ptr, schedule_ptr, bias_ptr, gate_ptr, y_ptr,
    T, I, O, lines, stride_x,
    BH: tl.constexpr, BW: tl.constexpr, BO: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    TRANSPOSED: tl.constexpr, TOKENS_FIRST: tl.constexpr, WIDE: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    SUB: tl.constexpr = (BH + BO - 1) // BO
    STEPS: tl.constexpr = (BW + BK - 1) // BK
    # all lines of one token tile come before the next one's, so that its activations stay in L2; the longest line first
    pid = tl.program_id(0)
    entry = schedule_ptr + pid % (lines * SUB) // SUB * 4
    line, start, stop, other = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    sub = pid % SUB
    token0 = pid // (lines * SUB) * BT
    inside, t, k = sub * BO + tl.arange(0, BO), token0 + tl.arange(0, BT), tl.arange(0, BK)
    t64 = t.to(tl.int64) if WIDE else t
    acc = tl.zeros((BT, BO) if TOKENS_FIRST else (BO, BT), tl.float32)
    block = start
    if TRANSPOSED:
        block = tl.load(block_ptr + start, mask=start < stop, other=0)
    for step in range((stop - start) * STEPS):
        k0 = step % STEPS * BK
        column, row = other * BW + k0, block
        following = start + (step + 1) // STEPS  # loaded one step ahead: the copies of a tile wait for its place
        other = tl.load(other_ptr + following, mask=following < stop, other=0)
        block = following
        if TRANSPOSED:
            block = tl.load(block_ptr + following, mask=following < stop, other=0)
        if x_desc is not None:
            x = x_desc.load([token0, column])
            if TRANSPOSED:
                w = w_desc.load([row * BW + k0, sub * BO])
            else:
                w = w_desc.load([row * BH + sub * BO, k0])
        else:
            in_block, in_x = k0 + k < BW, (k0 + k < BW) & (column + k < I)
            x = tl.load(
                x_ptr + t64[:, None] * stride_x + (column + k)[None, :],
                mask=(t < T)[:, None] & in_x[None, :],
                other=0.0,
            )
            base = w_ptr + row.to(tl.int64) * (BH * BW)
            if TRANSPOSED:
                w = tl.load(
                    base + (k0 + k)[:, None] * BH + inside[None, :],
                    mask=in_block[:, None] & (inside < BH)[None, :],
                    other=0.0,
                )
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

    if not TOKENS_FIRST:
        acc = tl.trans(acc)
    o = line * BH + inside
    mask = (t < T)[:, None] & ((inside < BH) & (o < O))[None, :]
    offsets = t64[:, None] * O + o[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + o, mask=(inside < BH) & (o < O), other=0.0).to(tl.float32)[None, :]
    acc = activate(acc, ACTIVATION)
    if gate_ptr is not None:
        acc *= tl.load(gate_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _few_tokens(
    x_ptr, w_ptr, start_ptr, other_ptr, bias_ptr, gate_ptr, y_ptr, partial_ptr, count_ptr,
    T, I, O, stride_xt, stride_xi,
    BH: tl.constexpr, BW: tl.constexpr, BO: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, S: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The weight is read once; the S programs of a line share its blocks, and the last to arrive adds up."""
    SUB: tl.constexpr = (BH + BO - 1) // BO
    tile, split = tl.program_id(0), tl.program_id(1)
    line, sub = tile // SUB, tile % SUB
    start, stop = tl.load(start_ptr + line), tl.load(start_ptr + line + 1)
    length = (stop - start) * BW
    share = tl.cdiv(length, S * BK) * BK
    inside, t, k = sub * BO + tl.arange(0, BO), tl.arange(0, BT), tl.arange(0, BK)
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

    finish = True
    if S > 1:
        at = tl.arange(0, BO)[:, None] * BT + t[None, :]
        own = partial_ptr + (tile * S).to(tl.int64) * (BO * BT)
        tl.store(own + split * (BO * BT) + at, acc)
        finish = last_to_arrive(count_ptr + tile, S)
        if finish:  # in a fixed order, so that the sum does not depend on who came last
            acc = tl.zeros((BO, BT), tl.float32)
            for s in range(S):
                acc += tl.load(own + s * (BO * BT) + at, cache_modifier=".cg")
    if finish:
        o = line * BH + inside
        o_ok = (inside < BH) & (o < O)
        offsets, mask = t[None, :] * O + o[:, None], o_ok[:, None] & (t < T)[None, :]
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + o, mask=o_ok, other=0.0).to(tl.float32)[:, None]
        acc = activate(acc, ACTIVATION)
        if gate_ptr is not None:
            acc *= tl.load(gate_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + offsets, acc.to(y_ptr.dtype.element_ty), mask=mask)


# ---- which variant, and with which tiles


@functools.lru_cache(maxsize=4096)
def choose(
    out_features: int, in_features: int, bh: int, bw: int, blocks: int, tokens: int, dtype: torch.dtype
) -> tuple[str, str]:
    """(variant, reason): ``empty``, ``few`` (split-K), ``blocks`` (tensor cores) or ``expand`` (dense, then cuBLAS)."""
    if tokens == 0 or out_features == 0:
        return "empty", "nothing to compute"
    density = blocks * bh * bw / max(1, out_features * in_features)
    if tokens <= FEW:
        return (
            "few",
            f"{tokens} tokens: time goes to reading the weight, and the split-K kernel reads {density:.2g} of it once",
        )
    side = min(bh, bw)
    limit = 0.4 if side >= 128 else 0.35 if side >= 64 else 0.15 if side >= 32 else 0.06
    if (dtype == torch.float32 and density > limit / 2) or density > limit:
        return "expand", f"density {density:.2g} is over {limit} for blocks of {bh}x{bw}; expanded, cuBLAS runs"
    return "blocks", f"tensor cores over {blocks} blocks of {bh}x{bw}, {density:.2g} of the dense work"


def _many_configs(side_out: int, side_in: int, itemsize: int) -> list[dict]:
    if INTERPRET:
        return [{"BO": 16, "BT": 16, "BK": 16, "TOKENS_FIRST": side_out < 16, "num_stages": 1}]
    out = power_of_two(side_out, 16, 128)
    depth = power_of_two(side_in, 16, 64 if itemsize == 2 else 32)
    first = out < 64
    if out >= 128:
        tiles = [(128, 3, 4, True), (256, 4, 8, True), (128, 3, 8, True)]
    else:
        tiles = [(128, 4, 4, True), (256, 4, 8, True), (256, 3, 4, True), (128, 3, 4, first)]
    return [
        {"BO": out, "BT": t, "BK": depth, "TOKENS_FIRST": f, "num_stages": s, "num_warps": w} for t, s, w, f in tiles
    ]


def _few_configs(bh: int, bw: int, lines: int, blocks: int, tokens: int, programs: int) -> list[dict]:
    if INTERPRET:
        return [{"BO": 16, "BK": 16, "S": 2, "num_stages": 1}]
    depth = power_of_two(bw, 16, 128)
    tiles = [(64, min(depth, 64), 4, 4), (64, depth, 4, 3), (32, depth, 4, 3), (32, min(depth, 64), 4, 5)]
    if tokens == 1:
        tiles = [(8, 512, 4, 2), (16, 256, 4, 2), (8, 256, 2, 2)]
    found = []
    for rows, depth, warps, stages in tiles:
        rows = min(rows, power_of_two(bh, 1 if tokens == 1 else 16, 128))
        tiles_o, length, split = lines * -(-bh // rows), blocks * bw // max(lines, 1), 1
        while tiles_o * split < programs and split < 16 and length // (2 * split) >= depth:
            split *= 2
        found.append({"BO": rows, "BK": depth, "S": split, "num_stages": stages, "num_warps": warps})
    return [config for place, config in enumerate(found) if config not in found[:place]]


# ---- launchers


def _described(x, values, bt, bk, w_block):
    """How the copy engine sees the activations and the blocks as one matrix; nothing where rows are not aligned."""
    matrix = values.view(-1, values.shape[2])
    if not (describable(x) and describable(matrix)):
        return {}
    return {0: ([bt, bk], x.shape, x.stride()), 2: (w_block, matrix.shape, matrix.stride())}


def _schedule(start, other):
    """(line, its start, its stop, the first of ``other``) for each line, the longest first: none is left for last."""

    def make():
        line = start.diff().argsort(descending=True, stable=True)
        first = other[start[line].long().clamp(max=len(other) - 1)] if len(other) else torch.zeros_like(start[1:])
        return torch.stack([line.int(), start[line], start[line + 1], first], 1).contiguous()

    return derived("bsr schedule", start, make)


def _plan_many(x, values, start, other, block, bias, gate, y, transposed, activation):
    """y[:, line] = the sum over the line's blocks of x[:, other] @ block; ``transposed`` for grad @ W."""
    (tokens, inputs), outputs, lines, stride = x.shape, y.shape[1], start.numel() - 1, x.stride(0)
    bh, bw = values.shape[1:] if not transposed else values.shape[:0:-1]

    def prepare(config):
        bo, bt, bk = config["BO"], config["BT"], config["BK"]
        w_block = [bk, bo] if transposed else [bo, bk]
        described = _described(x, values, bt, bk, w_block) if bw % bk == 0 else {}
        launch = Launch(
            _many_tokens, (lines * triton.cdiv(bh, bo) * triton.cdiv(tokens, bt),), described, BH=bh, BW=bw,
            TRANSPOSED=transposed, WIDE=wide(x, y), ACTIVATION=activation, PRECISION=precision(x), **config,
        )  # fmt: skip

        def call(x, values, start, other, block, bias, gate, y):
            x_desc, w_desc = (x, values) if described else (None, None)
            launch(
                x_desc, x, w_desc, values, other, block, _schedule(start, other), bias, gate, y,
                tokens, inputs, outputs, lines, stride,
            )  # fmt: skip

        return call

    key = (x.dtype, outputs, inputs, bh, bw, values.shape[0].bit_length(), tokens.bit_length(), transposed)
    configs = _many_configs(bh, bw, x.element_size())
    given = (x, values, start, other, block, bias, gate, y)
    return autotune.pick("bsr_many", key, configs, prepare, given)


def _plan_few(x, values, crow, col, bias, gate, y, activation):
    (tokens, inputs), outputs, lines, strides = x.shape, y.shape[1], crow.numel() - 1, x.stride()
    blocks, bh, bw = values.shape
    width = 1 if tokens == 1 else power_of_two(tokens, 16, FEW)

    def prepare(config):
        tiles, split = lines * triton.cdiv(bh, config["BO"]), config["S"]
        launch = Launch(
            _few_tokens, (tiles, split), BH=bh, BW=bw, BT=width, ACTIVATION=activation, PRECISION=precision(x), **config
        )

        def call(x, values, crow, col, bias, gate, y):
            partial = count = x
            if split > 1:
                partial = torch.empty(tiles * split * config["BO"] * width, dtype=torch.float32, device=x.device)
                count = epilogue.counters.take(x, tiles)
            launch(x, values, crow, col, bias, gate, y, partial, count, tokens, inputs, outputs, *strides)

        return call

    key = (x.dtype, outputs, inputs, bh, bw, blocks.bit_length(), width)
    configs = _few_configs(bh, bw, lines, blocks, tokens, multiprocessors(x))
    given = (x, values, crow, col, bias, gate, y)
    return autotune.pick("bsr_few", key, configs, prepare, given)


def _check(x, values, features, lines, side):
    if x.dtype != values.dtype:
        raise TypeError(f"x is {x.dtype} and values {values.dtype}; expected one dtype")
    if lines != -(-features // side):
        raise ValueError(f"{lines} lines of blocks of side {side} do not hold {features} features")


def _linear_fake(x, values, crow, col, bias, gate, out_features, activation):
    return x.new_empty(*x.shape[:-1], out_features)


@operator(
    "gpu_bsr_linear(Tensor x, Tensor values, Tensor crow, Tensor col, Tensor? bias, Tensor? gate, int out_features,"
    " str activation) -> Tensor",
    _linear_fake,
)
def _linear(x, values, crow, col, bias, gate, out_features, activation):
    gate = None if gate is None else gate.contiguous()
    tensors, statics = (x, values, crow, col, bias, gate), ("bsr", out_features, activation, precision(x))
    return plan(statics, tensors, lambda: _plan_linear(*tensors, out_features, activation))(*tensors)


def _plan_linear(x, values, crow, col, bias, gate, outputs, activation):
    """The callable for one layout of arguments; it is made on the first call's tensors."""
    (blocks, bh, bw), inputs, shape = values.shape, x.shape[-1], (*x.shape[:-1], outputs)
    _check(x, values, outputs, crow.numel() - 1, bh)
    tokens = x.numel() // inputs
    variant, _ = choose(outputs, inputs, bh, bw, blocks, tokens, x.dtype)
    if variant == "empty":
        return lambda x, *parts: x.new_empty(shape)
    if variant == "expand":

        def call(x, values, crow, col, bias, gate):
            dense = expand(values, crow, col, out_features=outputs, in_features=inputs)
            return epilogue.apply(torch.nn.functional.linear(x, dense, bias), activation, gate)

        return call
    flat, y = rows_contiguous(x.reshape(tokens, inputs)), x.new_empty(tokens, outputs)
    if variant == "few":
        few = _plan_few(flat, values, crow, col, bias, gate, y, activation)
    else:
        many = _plan_many(flat, values, crow, col, None, bias, gate, y, False, activation)

    def call(x, values, crow, col, bias, gate):
        y = x.new_empty(shape)
        flat = rows_contiguous(x.reshape(tokens, inputs))
        if variant == "few":
            few(flat, values, crow, col, bias, gate, y)
        else:
            many(flat, values, crow, col, None, bias, gate, y)
        return y

    return call


def _grad_input_fake(grad, values, crow, col, t_crow, t_row, t_block, in_features):
    return grad.new_empty(*grad.shape[:-1], in_features)


@operator(
    "gpu_bsr_grad_input(Tensor grad, Tensor values, Tensor crow, Tensor col, Tensor t_crow, Tensor t_row,"
    " Tensor t_block, int in_features) -> Tensor",
    _grad_input_fake,
)
def _grad_input(grad, values, crow, col, t_crow, t_row, t_block, in_features):
    (blocks, bh, bw), outputs = values.shape, grad.shape[-1]
    _check(grad, values, in_features, t_crow.numel() - 1, bw)
    y = grad.new_empty(*grad.shape[:-1], in_features)
    flat = grad.reshape(-1, outputs)
    variant, _ = choose(in_features, outputs, bw, bh, blocks, flat.shape[0], grad.dtype)
    if variant == "expand":
        return torch.matmul(grad, expand(values, crow, col, out_features=outputs, in_features=in_features))
    if variant != "empty":
        flat = rows_contiguous(flat)
        given = (flat, values, t_crow, t_row, t_block, None, None, y.view(-1, in_features))
        plan(("bsr grad", precision(flat)), given, lambda: _plan_many(*given, True, "none"))(*given)
    return y


# ---- what the framework calls


def linear(x, values, crow, col, bias=None, *, out_features, activation=None, gate=None):
    """x (*, I) -> activation(x @ W.T + bias) * gate, (*, O). ``gate`` has the output's shape."""
    return _linear(x, values, crow, col, bias, gate, out_features, epilogue.activation_name(activation))


def gated_linear(x, up, gate, *, out_features, activation="silu"):
    """activation(x @ W_gate.T) * (x @ W_up.T), where ``up`` and ``gate`` are each (values, crow, col)."""
    other = linear(x, *up, out_features=out_features)
    return linear(x, *gate, out_features=out_features, activation=activation, gate=other)


def linear_grad_input(grad, values, crow, col, t_crow, t_row, t_block, *, in_features):
    """grad (*, O) -> grad @ W, (*, I), by walking the blocks of a column."""
    return _grad_input(grad, values, crow, col, t_crow, t_row, t_block, in_features)


def linear_grad_values(grad, x, col, t_row, t_block, *, bh, bw):
    """grad (*, O), x (*, I) -> the gradient of ``values`` (blocks, bh, bw): a product sampled at the blocks."""
    return grad_values(grad, x, col, t_row, t_block, bh, bw)


def expand(values, crow, col, *, out_features, in_features):
    """The dense weight (O, I)."""
    return expand_parts(values, crow, col, out_features, in_features)
