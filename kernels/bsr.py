"""BSR: dense blocks (bh, bw) at block columns ``col`` of each block row, and the same blocks column by column.

Letters: T tokens, I inputs, O outputs; BO output features, BT tokens, BK reduction a tile.
BH and BW are the block's output and reduction sides: (bh, bw) for x @ W.T, (bw, bh) for grad @ W, which is the same
walk over ``t_crow``, ``t_row`` and ``t_block``. A line is a block row (or column); its blocks form a reduction of
length count * BW, walked BK at a time.
"""

import functools

import torch
import triton

from . import autotune, epilogue, transpose
from .bsr_few import few_tokens
from .bsr_gemm import block_gemm
from .bsr_gradient import expand as expand_parts
from .bsr_gradient import grad_values
from .derived import derived
from .gated import TWO_LAUNCHES, in_two_launches, with_bias
from .library import (
    INTERPRET,
    as_rows,
    contiguous,
    describable,
    exact,
    filled,
    for_tables,
    multiprocessors,
    operator,
    overlap,
    plan,
    power_of_two,
    precision,
    rows_contiguous,
    wide,
)

FEW = 64


# ---- which variant, and with which tiles


def choose(
    out_features: int, in_features: int, bh: int, bw: int, blocks: int, tokens: int, dtype: torch.dtype
) -> tuple[str, str]:
    """(variant, reason): ``empty``, ``few`` (split-K), ``blocks`` (block by block) or ``expand`` (then cuBLAS)."""
    return _choose(out_features, in_features, bh, bw, blocks, tokens, exact(dtype))


@functools.lru_cache(maxsize=4096)
def _choose(out_features, in_features, bh, bw, blocks, tokens, exactly):
    if tokens == 0 or out_features == 0:
        return "empty", "nothing to compute"
    density = blocks * bh * bw / max(1, out_features * in_features)
    if tokens <= FEW:
        return (
            "few",
            f"{tokens} tokens: time goes to reading the weight, and the split-K kernel reads {density:.2g} of it once",
        )
    side = min(bh, bw)
    if exactly:
        limit = 0.5 if side >= 64 else 0.35 if side >= 16 else 0.12
    else:
        limit = 0.4 if side >= 128 else 0.35 if side >= 64 else 0.15 if side >= 32 else 0.06
    if density > limit:
        return "expand", f"density {density:.2g} is over {limit} for blocks of {bh}x{bw}; expanded, cuBLAS runs"
    means = "fp32 without tf32" if exactly else "tensor cores"
    return "blocks", f"{means} over {blocks} blocks of {bh}x{bw}, {density:.2g} of the dense work"


def _many_configs(side_out: int, side_in: int, itemsize: int, exactly: bool) -> list[dict]:
    if INTERPRET:
        return [{"BO": 16, "BT": 16, "BK": 16, "TOKENS_FIRST": side_out < 16, "num_stages": 1}]
    out = power_of_two(side_out, 16, 128)
    if exactly:  # each thread multiplies for itself: larger tiles spill, smaller ones read more than they multiply
        if out >= 64:
            tiles = [(64, 64, 4), (out, 128, 8), (64, 128, 4)]
        else:
            tiles = [(out, 128, 4), (out, 256, 4), (out, 256, 8)]
        return [
            {"BO": o, "BT": t, "BK": 16, "TOKENS_FIRST": False, "num_stages": 3, "num_warps": w} for o, t, w in tiles
        ]
    depth = power_of_two(side_in, 16, 64 if itemsize == 2 else 32)
    first = out < 64
    if out >= 128:
        tiles = [(128, 3, 4, True), (256, 4, 8, True), (128, 3, 8, True)]
    else:
        tiles = [(128, 4, 4, True), (256, 4, 8, True), (256, 3, 4, True), (128, 3, 4, first)]
    return [
        {"BO": out, "BT": t, "BK": depth, "TOKENS_FIRST": f, "num_stages": s, "num_warps": w} for t, s, w, f in tiles
    ]


def _few_configs(bh: int, bw: int, lines: int, blocks: int, width: int, programs: int) -> list[dict]:
    """C: how many steps of BK one program takes at most; None: a line is not split."""
    if INTERPRET:
        return [{"BO": 16, "BK": 16, "C": 2, "num_stages": 1}]
    depth = power_of_two(bw, 16, 128)
    short = min(depth, 64)
    if width == 1 and depth >= 64 and bw % depth == 0:
        tiles = [(8, depth, depth // 64, 4, 0), (4, depth, 1, 4, 0), (8, 512, 4, 1, 0), (8, 512, 4, 1, 4)]
    elif width == 1:
        tiles = [(8, 512, 4, 1, 0), (16, 256, 4, 1, 0), (8, 256, 2, 1, 0), (8, 512, 4, 1, 4)]
    elif width == 16:
        tiles = [(64, short, 4, 4, 0), (64, depth, 4, 3, 0), (64, depth, 4, 3, 1), (16, depth, 2, 4, 0)]
        tiles += [(16, short, 2, 4, 4), (32, short, 4, 5, 0), (32, depth, 2, 3, 3)]
    else:
        tiles = [(64, short, 4, 4, 0), (64, short, 4, 4, 2), (64, depth, 4, 3, 0), (64, depth, 4, 3, 2)]
        tiles += [(32, depth, 4, 3, 2), (32, short, 4, 5, 0)]
    if 2 * lines * triton.cdiv(bh, tiles[0][0]) < programs:  # whole lines leave most of the machine idle
        tiles.sort(key=lambda tile: tile[-1] == 0)
    found = []
    for rows, depth, warps, stages, waves in tiles:  # as many programs as fill the machine so often
        rows = min(rows, power_of_two(bh, 1 if width == 1 else 16, 128))
        work = triton.cdiv(blocks * bw, depth) * triton.cdiv(bh, rows)
        most = max(1, triton.cdiv(work, waves * programs)) if waves else None
        found.append({"BO": rows, "BK": depth, "C": most, "num_stages": stages, "num_warps": warps})
    return found


# ---- launchers


def _described(x, values, bt, bk, w_block):
    """How the copy engine sees the activations and the blocks as one matrix; nothing where rows are not aligned."""
    matrix = values.view(-1, values.shape[2])
    if not (describable(x) and describable(matrix)):
        return {}
    return {0: ([bt, bk], x.shape, x.stride()), 2: (w_block, matrix.shape, matrix.stride())}


def _schedule(start, other, beside=None):
    """(line, its start, its stop, the first of ``other``) for each line, the longest first: none is left for last.

    ``beside`` is the ``start`` of a second weight whose lines the same programs walk. It only decides the order.
    """
    return derived("bsr schedule", _scheduled, *((start, other) if beside is None else (start, other, beside)))


def _scheduled(start, other, beside=None):
    length = start.diff() if beside is None else start.diff() + beside.diff()
    line = length.argsort(descending=True, stable=True)
    first = other[start[line].long().clamp(max=len(other) - 1)] if len(other) else torch.zeros_like(start[1:])
    return torch.stack([line.int(), start[line], start[line + 1], first], 1).contiguous()


def _most_programs(lines, blocks, bw, depth, most, halves):
    """How many programs of up to ``most`` steps any pattern of so many blocks can need."""
    steps = min(blocks * triton.cdiv(bw, depth), halves * lines + blocks * bw // depth)
    return lines + (steps // most if most else 0)


def _shares(programs, most, depth, bw, *starts_and_others):
    """The table of ``few_tokens`` for one weight or two, each its start and its other. A program takes up to ``most``
    steps of ``depth``; of two weights one more, since each is rounded up.

    How many programs a pattern needs is known to the device alone: there is a row for as many as there may be, and
    those left over do nothing, in a line that is not there.
    """
    weights = list(zip(starts_and_others[::2], starts_and_others[1::2], strict=True))
    starts = [start.long() for start, _ in weights]
    steps = [-(-(start.diff() * bw) // depth) for start in starts]
    splits = torch.ones_like(steps[0]) if most is None else (-(-sum(steps) // most)).clamp(min=1)
    stops, lines = splits.cumsum(0), splits.numel()
    program = torch.arange(programs, device=splits.device)
    line = torch.searchsorted(stops, program, right=True)
    here, at = line < lines, line.clamp(max=lines - 1)
    split, count = program - (stops - splits)[at], torch.where(here, splits[at], 1)
    columns = [line, torch.where(here, split, 0), count]
    for start, length, (_, other) in zip(starts, steps, weights, strict=True):
        share = -(-length[at] // count)
        low = torch.minimum(split * share, length[at])
        high = torch.where(here, torch.minimum(low + share, length[at]), low)
        first = (start[at] + low * depth // bw).clamp(max=max(len(other) - 1, 0))
        columns += [start[at], start[at + 1], low, high, other[first] if len(other) else torch.zeros_like(low)]
    return torch.stack(columns, 1).int()


def _plan_many(*given, transposed, activation):
    """y[:, line] = the sum over the line's blocks of x[:, other] @ block; ``transposed`` for grad @ W.

    ``given``: x, values, start, other, block, bias, gate, the same five of an up weight, y.
    """
    x, values, up, y = given[0], given[1], given[7], given[-1]
    bh, bw = values.shape[1:] if not transposed else values.shape[:0:-1]
    blocks, halves = len(values) + (0 if up is None else len(up)), 1 if up is None else 2

    def prepare(config):
        if config == TWO_LAUNCHES:
            return in_two_launches(functools.partial(_plan_many, transposed=False), given, activation)
        return _launch_many(config, *given[:3], up, y, bh, bw, transposed, activation)

    key = (x.dtype, y.shape[1], x.shape[1], bh, bw, blocks.bit_length(), len(x).bit_length(), transposed)
    configs = _many_configs(bh, bw, x.element_size(), exact(x.dtype)) + [TWO_LAUNCHES] * (halves - 1)
    return autotune.pick("bsr_many" if halves == 1 else "bsr_gated_many", key, configs, prepare, given)


def _launch_many(config, x, values, start, up, y, bh, bw, transposed, activation):
    (tokens, inputs), outputs, lines, strides = x.shape, y.shape[1], start.numel() - 1, x.stride()
    bo, bt, bk = config["BO"], config["BT"], config["BK"]
    described = _described(x, values, bt, bk, [bk, bo] if transposed else [bo, bk]) if bw % bk == 0 else {}
    if up is not None:  # a load in a branch is not pipelined, so that the weight of a half is a chosen pointer
        described.pop(2, None)
    launches = for_tables(
        block_gemm, (lines * triton.cdiv(bh, bo) * triton.cdiv(tokens, bt),), described, BH=bh, BW=bw,
        TRANSPOSED=transposed, WIDE=wide(x, y), ACTIVATION=activation, PRECISION=precision(x), **overlap(x), **config,
    )  # fmt: skip

    def call(x, values, start, other, block, bias, gate, up, up_start, up_other, up_block, up_bias, y):
        schedule, settled = _schedule(start, other, up_start)
        launches[settled](
            x if 0 in described else None, x, values if 2 in described else None, values, other, block,
            schedule, bias, gate, up, up_start, up_other, up_bias, y,
            tokens, inputs, outputs, lines, *strides,
        )  # fmt: skip

    return call


def _plan_few(*given, activation):
    """``given``: x, values, crow, col, bias, gate, the same four of an up weight, y."""
    x, values, crow, up, y = *given[:3], given[6], given[-1]
    (blocks, bh, bw), lines, halves = values.shape, crow.numel() - 1, 1 if up is None else 2
    blocks += 0 if up is None else len(up)
    width = 1 if len(x) == 1 else power_of_two(len(x), 16, FEW)

    def prepare(config):
        if config == TWO_LAUNCHES:
            return in_two_launches(_plan_few, given, activation)
        return _launch_few(config, width, blocks, x, values, lines, y.shape[1], activation, halves)

    key = (x.dtype, y.shape[1], x.shape[1], bh, bw, blocks.bit_length(), width)
    configs = _few_configs(bh, bw, lines, blocks, width, multiprocessors(x))
    configs += [TWO_LAUNCHES] * (halves - 1)
    return autotune.pick("bsr_few" if halves == 1 else "bsr_gated_few", key, configs, prepare, given)


def _launch_few(config, width, blocks, x, values, lines, outputs, activation, halves):
    (tokens, inputs), strides, (_, bh, bw) = x.shape, x.stride(), values.shape
    constants, rows = dict(config), config["BO"]
    most, depth = constants.pop("C"), constants["BK"]
    sub, programs = triton.cdiv(bh, rows), _most_programs(lines, blocks, bw, depth, most, halves)
    tiles, shares, tag = lines * sub, programs * sub, f"bsr shares {programs} {most} {depth} {bw}"
    make = functools.partial(_shares, programs, most, depth, bw)
    launches = for_tables(
        few_tokens, (shares,), BH=bh, BW=bw, BT=width, SPLIT=shares > tiles, STAGES=config["num_stages"],
        ACTIVATION=activation, PRECISION=precision(x), **overlap(x), **constants,
    )  # fmt: skip

    def call(x, values, crow, col, bias, gate, up, up_crow, up_col, up_bias, y):
        weights = (crow, col) if up is None else (crow, col, up_crow, up_col)
        table, settled = derived(tag, make, *weights)
        met = epilogue.hand_over.take(x, tiles, shares, halves * rows * width)
        launch = launches[settled]
        launch(x, values, col, bias, gate, up, up_col, up_bias, table, y, *met, tokens, inputs, outputs, *strides)

    return call


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
    bias, gate = contiguous(bias, gate)
    return _planned(out_features, activation, x, values, crow, col, bias, gate, None, None, None, None)


def _gated_fake(x, values, crow, col, bias, up, up_crow, up_col, up_bias, out_features, activation):
    return x.new_empty(*x.shape[:-1], out_features)


@operator(
    "gpu_bsr_gated_linear(Tensor x, Tensor values, Tensor crow, Tensor col, Tensor? bias, Tensor up, Tensor up_crow,"
    " Tensor up_col, Tensor? up_bias, int out_features, str activation) -> Tensor",
    _gated_fake,
)
def _gated_linear(x, values, crow, col, bias, up, up_crow, up_col, up_bias, out_features, activation):
    if up.shape[1:] != values.shape[1:]:
        raise ValueError(f"blocks of {tuple(values.shape[1:])} and of {tuple(up.shape[1:])} in one gated product")
    bias, up_bias = contiguous(bias, up_bias)
    return _planned(out_features, activation, x, values, crow, col, bias, None, up, up_crow, up_col, up_bias)


def _planned(outputs, activation, *tensors):
    statics = ("bsr", outputs, activation, precision(tensors[0]))
    return plan(statics, tensors, lambda: _plan_linear(outputs, activation, *tensors))(*tensors)


def _plan_linear(outputs, activation, x, values, crow, col, bias, gate, up, up_crow, up_col, up_bias):
    """The callable for one layout of arguments; it is made on the first call's tensors."""
    (blocks, bh, bw), inputs, shape = values.shape, x.shape[-1], (*x.shape[:-1], outputs)
    _check(x, values, outputs, crow.numel() - 1, bh)
    if up is not None:
        _check(x, up, outputs, up_crow.numel() - 1, bh)
        blocks = (blocks + len(up) + 1) // 2
    epilogue.check(outputs, shape, (bias, up_bias), gate)
    tokens = x.numel() // inputs
    variant, _ = choose(outputs, inputs, bh, bw, blocks, tokens, x.dtype)
    if variant == "empty":
        return lambda x, *parts: x.new_empty(shape)
    if variant == "expand":
        return functools.partial(_expanded, outputs, activation)
    parts = (values, crow, col, bias, gate, up, up_crow, up_col, up_bias)
    rows = as_rows(x)
    given = (_arranged(rows(x)), *parts, x.new_empty(tokens, outputs))
    if variant == "few":
        run = _plan_few(*given, activation=activation)
    else:
        many = _plan_many(*_with_order(*given), transposed=False, activation=activation)
        run = lambda *given: many(*_with_order(*given))  # noqa: E731

    return filled(run, x, shape, arrange=lambda x: _arranged(rows(x)))


def _arranged(x):
    """The matrix (tokens, I) as the kernels read it: its rows are contiguous; or its columns, where each thread
    multiplies for itself and reads along the tokens."""
    if exact(x.dtype) and len(x) > 1:
        return transpose.transpose(x, transpose.padded(len(x))).T[: len(x)]
    return rows_contiguous(x)


def _with_order(x, values, crow, col, bias, gate, up, up_crow, up_col, up_bias, y):
    """As the walk over many tokens has it, where an order of the blocks may follow ``col``: here they lie in order."""
    return x, values, crow, col, None, bias, gate, up, up_crow, up_col, None, up_bias, y


def _expanded(outputs, activation, x, values, crow, col, bias, gate, up, up_crow, up_col, up_bias):
    """Dense weights, cuBLAS, and the epilogue in torch."""

    def product(values, crow, col, bias):
        dense = expand(values, crow, col, out_features=outputs, in_features=x.shape[-1])
        return torch.nn.functional.linear(x, dense, bias)

    gate = gate if up is None else product(up, up_crow, up_col, up_bias)
    return epilogue.apply(product(values, crow, col, bias), activation, gate)


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
        flat = _arranged(flat)
        given = (flat, values, t_crow, t_row, t_block, *(None,) * 7, y.view(-1, in_features))
        make = functools.partial(_plan_many, *given, transposed=True, activation="none")
        plan(("bsr grad", precision(flat)), given, make)(*given)
    return y


# ---- what the framework calls


def linear(x, values, crow, col, bias=None, *, out_features, activation=None, gate=None):
    """x (*, I) -> activation(x @ W.T + bias) * gate, (*, O). ``gate`` has the output's shape."""
    return _linear(x, values, crow, col, bias, gate, out_features, epilogue.activation_name(activation))


def gated_linear(x, up, gate, *, out_features, activation="silu"):
    """activation(x @ W_gate.T) * (x @ W_up.T), (*, O), where ``up`` and ``gate`` are each (values, crow, col[, bias]).

    One launch, or two where they are faster. Over 64 tokens the up half is rounded to the output's dtype once, on its
    way through the output; below, both halves meet in fp32. Both weights have blocks of one shape. A recorded graph
    goes on with the patterns that it met: after a change of one, call ``derived.renew`` with the parts of both.
    """
    parts, name = (*with_bias(gate, 3), *with_bias(up, 3)), epilogue.activation_name(activation)
    return _gated_linear(x, *parts, out_features, name)


def linear_grad_input(grad, values, crow, col, t_crow, t_row, t_block, *, in_features):
    """grad (*, O) -> grad @ W, (*, I), by walking the blocks of a column."""
    return _grad_input(grad, values, crow, col, t_crow, t_row, t_block, in_features)


def linear_grad_values(grad, x, col, t_row, t_block, *, bh, bw):
    """grad (*, O), x (*, I) -> the gradient of ``values`` (blocks, bh, bw): a product sampled at the blocks."""
    return grad_values(grad, x, col, t_row, t_block, bh, bw)


def expand(values, crow, col, *, out_features, in_features):
    """The dense weight (O, I)."""
    return expand_parts(values, crow, col, out_features, in_features)
