"""Sparse activations ("codes") times a dense matrix, whose rows belong to their columns: only the rows in use are read.

    linear        y = S W + bias
    grad_values   grad W^T at the entries of S
    grad_weight   S^T grad: the rows of grad, added up by columns of S, in the order of the tokens

``weight`` is input-major, (columns, O). S has a token a row: lists (values and index (T, K)) or, with crow, compressed
rows (values and index (entries,)); of ``linear`` also blocks of H tokens that share their columns, with values
(entries, H, 1). Each row is added up by one program: results are the same in each run.

Letters: T tokens, K entries a token, O outputs; BK entries, BO outputs and BT tokens a tile.
"""

import torch
import triton
import triton.language as tl

from . import autotune
from .backend import INTERPRET, backend
from .epilogue import finish
from .launch import into_new, triton_launch
from .operators import operator
from .pdl import begin, overlap
from .precision import precision
from .split_k import workspace
from .tiles import power_of_two, wide


@triton.jit
def _load_entries(values_ptr, order_ptr, index_ptr, at, stop, K, BK: tl.constexpr, WIDE: tl.constexpr):
    """BK entries: their values, their rows, and which of them are there."""
    e = at + tl.arange(0, BK)
    used = e < stop
    slot = e if order_ptr is None else tl.load(order_ptr + e, mask=used, other=0).to(tl.int32)
    row = slot // K if index_ptr is None else tl.load(index_ptr + e, mask=used, other=0)
    if WIDE:
        row = row.to(tl.int64)
    return tl.load(values_ptr + slot, mask=used, other=0.0).to(tl.float32), row, used


@triton.jit
def _load_rows(w_ptr, row, used, o, O, EVEN: tl.constexpr):
    mask = used[:, None] if EVEN else used[:, None] & (o < O)[None, :]
    return tl.load(w_ptr + row[:, None] * O + o[None, :], mask=mask, other=0.0)


@triton.jit
def _sum_rows(
    values_ptr, crow_ptr, order_ptr, index_ptr, w_ptr, bias_ptr, sums_ptr, y_ptr, partial_ptr, count_ptr, K, O,
    BK: tl.constexpr, BO: tl.constexpr, S: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token, BO outputs and one of S shares of its entries per program. While rows are added, the next ones and the
    entries after those come.

    ``order``: where the values of the entries are; without ``index`` their row of w is that number divided by K.
    ``sums``: of the values of each token.
    """
    begin(PDL)
    token, o = tl.program_id(0), tl.program_id(1) * BO + tl.arange(0, BO)
    if crow_ptr is None:
        start, stop = token * K, token * K + K
    else:
        start, stop = tl.load(crow_ptr + token), tl.load(crow_ptr + token + 1)
    if S > 1:
        each = tl.cdiv(stop - start, S * BK) * BK
        start += tl.program_id(2) * each
        stop = tl.minimum(stop, start + each)
    value, row, used = _load_entries(values_ptr, order_ptr, index_ptr, start, stop, K, BK, WIDE)
    w = _load_rows(w_ptr, row, used, o, O, EVEN)
    next_value, row, used = _load_entries(values_ptr, order_ptr, index_ptr, start + BK, stop, K, BK, WIDE)
    acc, total = tl.zeros((BK, BO), tl.float32), tl.zeros((BK,), tl.float32)
    for at in range(start, stop, BK):
        next_w = _load_rows(w_ptr, row, used, o, O, EVEN)
        last_value, row, used = _load_entries(values_ptr, order_ptr, index_ptr, at + 2 * BK, stop, K, BK, WIDE)
        acc += value[:, None] * w.to(tl.float32)
        if sums_ptr is not None:
            total += value
        value, next_value, w = next_value, last_value, next_w
    if sums_ptr is not None:
        total_of_token = tl.sum(total, 0).to(sums_ptr.dtype.element_ty)
        tl.store(sums_ptr + token, total_of_token, mask=tl.program_id(1) == 0)
    y, place = tl.sum(acc, 0), token.to(tl.int64) * O + o
    if S > 1:
        y, tile = y[:, None], token * tl.num_programs(1) + tl.program_id(1)
        finish(
            y, y, tile, tl.program_id(2), S, tile * S, o, o < O, place[:, None], (o < O)[:, None], 0,
            bias_ptr, None, None, y_ptr, partial_ptr, count_ptr, 1, True, BO, 1, "none",
        )  # fmt: skip
    else:
        if bias_ptr is not None:
            y += tl.load(bias_ptr + o, mask=o < O, other=0.0).to(tl.float32)
        tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=o < O)


@triton.jit
def _sum_shared(
    values_ptr, crow_ptr, index_ptr, w_ptr, bias_ptr, y_ptr, T, H, O,
    BK: tl.constexpr, BO: tl.constexpr, BT: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BT tokens of a block and BO outputs per program: each row in use is read once for all of them."""
    begin(PDL)
    pieces = tl.cdiv(H, BT)
    block, first = tl.program_id(0) // pieces, tl.program_id(0) % pieces * BT
    t, o = first + tl.arange(0, BT), tl.program_id(1) * BO + tl.arange(0, BO)
    start, stop = tl.load(crow_ptr + block), tl.load(crow_ptr + block + 1)
    acc = tl.zeros((BT, BO), tl.float32)
    for at in range(start, stop, BK):
        e = at + tl.arange(0, BK)
        used = e < stop
        row = tl.load(index_ptr + e, mask=used, other=0)
        if WIDE:
            row = row.to(tl.int64)
        w = _load_rows(w_ptr, row, used, o, O, EVEN)
        x = tl.load(values_ptr + e[None, :] * H + t[:, None], mask=used[None, :] & (t < H)[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
    token = (block * H + t).to(tl.int64)
    mask = ((t < H) & (token < T))[:, None] & (o < O)[None, :]
    tl.store(y_ptr + token[:, None] * O + o[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dot_rows(
    grad_ptr, crow_ptr, index_ptr, w_ptr, out_ptr, K, O,
    BK: tl.constexpr, BO: tl.constexpr, SHARES: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BK entries of a token at a time, every SHARES-th of these groups per program."""
    begin(PDL)
    token = tl.program_id(0)
    if crow_ptr is None:
        start, stop = token * K, token * K + K
    else:
        start, stop = tl.load(crow_ptr + token), tl.load(crow_ptr + token + 1)
    for at in range(start + tl.program_id(1) * BK, stop, SHARES * BK):
        e = at + tl.arange(0, BK)
        used = e < stop
        row = tl.load(index_ptr + e, mask=used, other=0)
        if WIDE:
            row = row.to(tl.int64)
        acc = tl.zeros((BK, BO), tl.float32)
        for o0 in range(0, O, BO):
            o = o0 + tl.arange(0, BO)
            w = tl.load(w_ptr + row[:, None] * O + o[None, :], mask=used[:, None] & (o < O)[None, :], other=0.0)
            g = tl.load(grad_ptr + token.to(tl.int64) * O + o, mask=o < O, other=0.0)
            acc += w.to(tl.float32) * g.to(tl.float32)[None, :]
        tl.store(out_ptr + e, tl.sum(acc, 1).to(out_ptr.dtype.element_ty), mask=used)


def _rows_configs(tokens: int, each: int, alone: bool) -> list[dict]:
    if INTERPRET:
        return [{"BK": 8, "BO": 16, "S": 3 if alone else 1}]
    if alone:  # the entries are divided among programs, too
        tiles = [(128, 64, 8, 2), (64, 64, 4, 4), (128, 32, 4, 4), (128, 64, 8), (64, 128, 8, 2), (64, 64, 8)]
    elif tokens < 64:  # the outputs are all that can be divided among the multiprocessors
        tiles = [(128, 64, 8), (64, 32, 4), (64, 64, 8), (128, 32, 8), (256, 64, 8), (256, 32, 8), (128, 64, 4)]
    elif each <= 8:  # programs that end soon: many of them, and small
        tiles = [(4, 256, 1), (4, 128, 1), (2, 256, 1), (4, 256, 2), (8, 128, 1), (4, 512, 2)]
    else:
        tiles = [(4, 256, 2), (8, 256, 4), (8, 128, 2), (16, 256, 4), (4, 256, 1), (4, 1024, 8)]
    return [{"BK": bk, "BO": bo, "num_warps": warps, "S": sum(s) or 1} for bk, bo, warps, *s in tiles]


def _sums(values, crow, order, index, weight, bias, sums, tokens: int, count: int):
    """The prepared launch of linear, and of grad_weight as the product with S^T; `count`: entries of a row of S."""
    outputs = weight.shape[1]
    constants = {"WIDE": wide(weight), **overlap(weight)}

    def prepare(config):
        size, tiles = config["BO"], tokens * triton.cdiv(outputs, config["BO"])
        grid, shares = (tokens, tiles // max(1, tokens), config["S"]), tiles * config["S"]
        launch = triton_launch(_sum_rows, grid, EVEN=outputs % size == 0, **constants, **config)
        return lambda *tensors: launch(*tensors, *workspace.take(tensors[-1], tiles, shares, size), count, outputs)

    y = weight.new_empty(tokens, outputs)
    if y.numel() == 0:
        return lambda *tensors: None
    each = values.numel() // max(1, tokens)
    key = (weight.dtype, power_of_two(tokens, 1, 4096), power_of_two(each, 1, 1 << 16), outputs, crow is None)
    tensors = (values, crow, order, index, weight, bias, sums, y)
    configs = _rows_configs(tokens, each, alone=tokens == 1 and order is None)
    return autotune.pick("codes_linear", key, configs, prepare, tensors)


def _shared_sums(values, crow, index, weight, bias, tokens: int):
    """The prepared launch of linear for blocks of tokens."""
    height, outputs = values.shape[1], weight.shape[1]
    bt = power_of_two(height, 16, 64)
    rows = (len(crow) - 1) * triton.cdiv(height, bt)
    constants = {"BT": bt, "WIDE": wide(weight), "PRECISION": precision(weight.dtype), **overlap(weight)}
    configs = [{"BK": 16, "BO": 16}]
    if not INTERPRET:
        tiles = [(64, 64, 4), (64, 32, 4), (128, 32, 4), (64, 128, 8), (32, 64, 4)]
        configs = [{"BK": bk, "BO": bo, "num_warps": warps} for bk, bo, warps in tiles]

    def prepare(config):
        grid = (rows, triton.cdiv(outputs, config["BO"]))
        launch = triton_launch(_sum_shared, grid, EVEN=outputs % config["BO"] == 0, **constants, **config)
        return lambda *tensors: launch(*tensors, tokens, height, outputs)

    y = weight.new_empty(tokens, outputs)
    if y.numel() == 0:
        return lambda *tensors: None
    key = (weight.dtype, rows, bt, power_of_two(len(index) // max(1, len(crow) - 1), 1, 1 << 16), outputs)
    return autotune.pick("codes_shared", key, configs, prepare, (values, crow, index, weight, bias, y))


def _check(values, crow, index, weight, tokens: int):
    blocks = crow is not None and values.dim() == 3 and values.shape[2] == 1 and len(values) == len(index)
    if blocks and index.dim() == 1 and len(crow) - 1 == triton.cdiv(tokens, values.shape[1]):
        if values.numel() >= 2**31:
            raise ValueError(f"Expected fewer than 2**31 entries, got {values.numel()}.")
        return
    if values.shape != index.shape or index.dim() != (2 if crow is None else 1):
        got = f"got values {tuple(values.shape)} and index {tuple(index.shape)}"
        raise ValueError(f"Expected values and index of one shape, (tokens, K) or, with crow, (entries,), {got}.")
    rows = len(index) if crow is None else len(crow) - 1
    if rows != tokens or index.numel() >= 2**31:
        raise ValueError(f"Expected fewer than 2**31 entries of {tokens} tokens, got {index.numel()} of {rows}.")


@operator(
    "gpu_codes_linear(Tensor values, Tensor? crow, Tensor index, Tensor weight, Tensor? bias, int tokens) -> Tensor",
    lambda values, crow, index, weight, bias, tokens: (tokens, weight.shape[1]),
    strided=(),
)
def linear(values, crow, index, weight, bias, tokens):
    """values, crow or None, index, weight (columns, O), bias -> (tokens, O). A last block may have fewer tokens."""
    _check(values, crow, index, weight, tokens)
    if values.dim() == 3:
        launch = _shared_sums(values, crow, index, weight, bias, tokens)
        return into_new(launch, values, (tokens, weight.shape[1]))
    sums = _sums(values, crow, None, index, weight, bias, None, tokens, index.shape[-1] if crow is None else 0)
    launch = into_new(sums, values, (tokens, weight.shape[1]))
    return lambda values, crow, index, weight, bias: launch(values, crow, None, index, weight, bias, None)


@operator(
    "gpu_codes_grad_values(Tensor grad, Tensor? crow, Tensor index, Tensor weight) -> Tensor",
    lambda grad, crow, index, weight: index.shape,
    strided=(),
)
def grad_values(grad, crow, index, weight):
    """grad (tokens, O), crow or None, index, weight (columns, O) -> values; of slots that are free: zero."""
    tokens, outputs = grad.shape
    count = index.shape[-1] if crow is None else 0
    shares = 1 if tokens >= 256 else min(64, triton.cdiv(index.numel(), 32 * max(1, tokens)))
    constants = {"SHARES": max(1, shares), "WIDE": wide(weight), **overlap(weight)}
    configs = [{"BK": 8, "BO": 16}]
    if not INTERPRET:
        tiles = [(32, 64, 4), (8, 256, 4), (16, 128, 4), (4, 256, 2), (32, 128, 8), (8, 128, 2)]
        configs = [{"BK": bk, "BO": bo, "num_warps": warps} for bk, bo, warps in tiles]

    def prepare(config):
        launch = triton_launch(_dot_rows, (tokens, constants["SHARES"]), **constants, **config)
        return lambda *tensors: launch(*tensors, count, outputs)

    if index.numel() == 0 or tokens == 0:
        return lambda grad, crow, index, weight: grad.new_zeros(index.shape)
    out = grad.new_zeros(index.shape)
    key = (grad.dtype, power_of_two(tokens, 1, 4096), power_of_two(index.numel() // tokens, 1, 1 << 16), outputs)
    launch = autotune.pick("codes_grad_values", key, configs, prepare, (grad, crow, index, weight, out))

    def call(grad, crow, index, weight):
        # a program writes the stored entries only
        out = torch.empty_like(index, dtype=grad.dtype) if crow is None else grad.new_zeros(index.shape)
        launch(grad, crow, index, weight, out)
        return out

    return call


def by_columns(crow, index, columns: int):
    """(starts, order, token): the entries of S by columns, as ``grad_weight`` takes them.

    Those of column c are ``order[starts[c]:starts[c + 1]]``, places in the values, of tokens that ascend; ``token`` has
    their tokens, and is None of lists.
    """
    index, token = index.flatten(), None
    if crow is not None:
        slots = torch.arange(index.numel(), device=index.device, dtype=crow.dtype)
        token = torch.searchsorted(crow, slots, right=True, out_int32=True) - 1
        index = index.masked_fill(slots >= crow[-1], columns)  # free slots come last
    column, order = torch.sort(index, stable=True)
    edges = torch.arange(columns + 1, device=index.device, dtype=index.dtype)
    starts = torch.searchsorted(column, edges, out_int32=True)
    return starts, order, None if token is None else token[order]


@operator(
    "gpu_codes_grad_weight(Tensor values, Tensor starts, Tensor order, Tensor? token, Tensor grad) -> (Tensor, Tensor)",
    lambda values, starts, order, token, grad: [(starts.shape[0] - 1, grad.shape[1]), (starts.shape[0] - 1,)],
    strided=(),
)
def grad_weight(values, starts, order, token, grad):
    """values, what ``by_columns`` made of the pattern, grad (tokens, O >= 1) -> (columns, O), and the values' sums by
    columns: the gradient of a bias whose gradient S is."""
    columns = len(starts) - 1
    if values.numel() != len(order) or (token is None and (values.dim() != 2 or len(values) != len(grad))):
        got = f"got values {tuple(values.shape)} and order {tuple(order.shape)} of {len(grad)} tokens"
        raise ValueError(f"Expected values (tokens, K) or, with token, (entries,), and their order, {got}.")
    if grad.shape[1] == 0 or values.numel() >= 2**31:
        got = f"got a gradient of shape {tuple(grad.shape)} and {values.numel()} entries"
        raise ValueError(f"Expected at least one output and fewer than 2**31 entries, {got}.")
    new, new_sums = backend.empty(grad, columns, grad.shape[1]), backend.empty(values, columns)
    if values.numel() == 0 or columns == 0:
        return lambda *tensors: (new().zero_(), new_sums().zero_())
    count = values.shape[1] if token is None else 0
    launch = _sums(values, starts, order, token, grad, None, new_sums(), columns, count)

    def call(values, starts, order, token, grad):
        out, sums = new(), new_sums()
        launch(values, starts, order, token, grad, None, sums, out)
        return out, sums

    return call
