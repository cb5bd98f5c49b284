"""BSR: dense blocks (bh, bw) at block columns ``col`` of each block row, and the same blocks column by column.

Letters: T tokens, I inputs, O outputs; BO output features, BT tokens, BK reduction a tile.
BH and BW are the block's output and reduction sides: (bh, bw) for x @ W.T, (bw, bh) for grad @ W, which goes through
``t_crow``, ``t_row`` and ``t_block`` in the same way. The blocks of a block row (or column) form a reduction of length
count * BW, BK at a time.
"""

import functools

import torch
import triton

from . import autotune, transpose
from .backend import INTERPRET, backend
from .bsr_few import few_tokens
from .bsr_gemm import block_gemm
from .bsr_gradient import expand as expand
from .bsr_gradient import grad_values as linear_grad_values
from .gated import TWO_LAUNCHES, in_two_launches
from .launch import into_new, table_launches
from .linear import Layout, Linear
from .operators import operator
from .pattern_cache import Derived
from .pdl import overlap
from .precision import exact, precision
from .split_k import workspace
from .tiles import describable, matrix_of, power_of_two, wide

FEW = 64


# ---- which variant, and with which tiles


def choose(tokens, outputs, inputs, dtype, *, bh, bw, blocks) -> tuple[str, str]:
    """(variant, reason): ``empty``, ``few`` (split-K), ``blocks`` (block by block) or ``expand`` (then cuBLAS)."""
    if tokens == 0 or outputs == 0:
        return "empty", "nothing to compute"
    density = blocks * bh * bw / max(1, outputs * inputs)
    if tokens <= FEW:
        return (
            "few",
            f"{tokens} tokens: time goes to reading the weight, and the split-K kernel reads {density:.2g} of it once",
        )
    exactly, side = exact(dtype), min(bh, bw)
    if exactly:
        limit = 0.5 if side >= 64 else 0.35 if side >= 16 else 0.12
    else:
        limit = 0.4 if side >= 128 else 0.35 if side >= 64 else 0.15 if side >= 32 else 0.06
    if density > limit:
        return "expand", f"density {density:.2g} is over {limit} for blocks of {bh}x{bw}; expanded, cuBLAS runs"
    means = "fp32 without tf32" if exactly else "tensor cores"
    return "blocks", f"{means} over {blocks} blocks of {bh}x{bw}, {density:.2g} of the dense work"


def choose_grad_input(tokens, outputs, inputs, dtype, *, bh, bw, blocks) -> tuple[str, str]:
    """(variant, reason) of grad @ W: ``empty``, ``blocks`` or ``expand``."""
    variant, reason = choose(tokens, inputs, outputs, dtype, bh=bw, bw=bh, blocks=blocks)
    if variant == "few":
        return "blocks", f"{tokens} tokens: all blocks of each block column, by the transposed index"
    return variant, reason


def reference(*, bh, bw, **facts) -> str | None:
    """Why a gradient with such blocks is better made dense, or None."""
    if min(bh, bw) >= 16:
        return None
    # the kernels take them too, but more slowly
    return f"blocks of {bh}x{bw} are below the 16 of tensor cores and each reads x again: dense is faster"


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


def _few_configs(bh: int, bw: int, block_rows: int, blocks: int, width: int, programs: int) -> list[dict]:
    """C: how many steps of BK one program takes at most; None: a block row is not split."""
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
    if 2 * block_rows * triton.cdiv(bh, tiles[0][0]) < programs:  # whole block rows leave most of the machine idle
        tiles.sort(key=lambda tile: tile[-1] == 0)
    configs = []
    for rows, depth, warps, stages, waves in tiles:  # as many programs as fill the machine so often
        rows = min(rows, power_of_two(bh, 1 if width == 1 else 16, 128))
        work = triton.cdiv(blocks * bw, depth) * triton.cdiv(bh, rows)
        most = max(1, triton.cdiv(work, waves * programs)) if waves else None
        configs.append({"BO": rows, "BK": depth, "C": most, "num_stages": stages, "num_warps": warps})
    return configs


# ---- launchers


def _described(x, values, bt, bk, w_block):
    """How the copy engine sees the activations and the blocks as one matrix; nothing where rows are not aligned."""
    matrix = values.view(-1, values.shape[2])
    if not (describable(x) and describable(matrix)):
        return {}
    return {0: ([bt, bk], x.shape, x.stride()), 2: (w_block, matrix.shape, matrix.stride())}


def _schedule(start, other, second_start=None):
    """(block row, its start, its stop, the first of ``other``) for each, the longest first: none is left for last.

    ``second_start`` is the ``start`` of a second weight that the same programs go through; it only decides the order.
    """
    length = start.diff() if second_start is None else start.diff() + second_start.diff()
    row = length.argsort(descending=True, stable=True)
    first = other[start[row].long().clamp(max=len(other) - 1)] if len(other) else torch.zeros_like(start[1:])
    return torch.stack([row.int(), start[row], start[row + 1], first], 1).contiguous()


def _most_programs(block_rows, blocks, bw, depth, most, halves):
    """How many programs of up to ``most`` steps any pattern of so many blocks can need."""
    steps = min(blocks * triton.cdiv(bw, depth), halves * block_rows + blocks * bw // depth)
    return block_rows + (steps // most if most else 0)


def _shares(programs, most, depth, bw, *starts_and_others):
    """The table of ``few_tokens`` for one weight or two, each its start and its other. A program takes up to ``most``
    steps of ``depth``; of two weights one more, since each is rounded up.

    How many programs a pattern needs is known to the device alone: there is a row for as many as there may be, and
    those left over do nothing, in a block row that is not there.
    """
    weights = list(zip(starts_and_others[::2], starts_and_others[1::2], strict=True))
    starts = [start.long() for start, _ in weights]
    steps = [-(-(start.diff() * bw) // depth) for start in starts]
    splits = torch.ones_like(steps[0]) if most is None else (-(-sum(steps) // most)).clamp(min=1)
    stops, count = splits.cumsum(0), splits.numel()
    program = torch.arange(programs, device=splits.device)
    row = torch.searchsorted(stops, program, right=True)
    here, at = row < count, row.clamp(max=count - 1)
    split, shares = program - (stops - splits)[at], torch.where(here, splits[at], 1)
    columns = [row, torch.where(here, split, 0), shares]
    for start, length, (_, other) in zip(starts, steps, weights, strict=True):
        share = -(-length[at] // shares)
        low = torch.minimum(split * share, length[at])
        high = torch.where(here, torch.minimum(low + share, length[at]), low)
        first = (start[at] + low * depth // bw).clamp(max=max(len(other) - 1, 0))
        columns += [start[at], start[at + 1], low, high, other[first] if len(other) else torch.zeros_like(low)]
    return torch.stack(columns, 1).int()


def _prepare_many(*given, activation):
    """y[:, block row] = the sum over its blocks of x[:, other] @ block.

    ``given``: x, values, crow, col, bias, gate, the same four of an up weight, y.
    """
    x, values, crow, up, y = *given[:3], given[6], given[-1]
    blocks, halves = len(values) + (0 if up is None else len(up)), 1 if up is None else 2

    def prepare(config):
        if config == TWO_LAUNCHES:
            return in_two_launches(_prepare_many, given, activation)
        launches, x_at, w_at, rest = _launches_many(config, x, values, crow, up, y, False, activation)
        table = Derived("bsr schedule", _schedule)

        def call(x, values, crow, col, bias, gate, up, up_crow, up_col, up_bias, y):
            schedule, ready = table(crow, col) if up is None else table(crow, col, up_crow)
            launches[ready](
                x if x_at else None, x, values if w_at else None, values, col, None, schedule, bias, gate, up, up_crow,
                up_col, up_bias, y, *rest,
            )  # fmt: skip

        return call

    return _pick_many(prepare, given, values.shape[1:], blocks, halves, False)


def _prepare_transposed(*given):
    """y = grad @ W in the same way; ``given``: grad, values, crow, col, t_crow, t_row, t_block, y."""
    grad, values, t_crow, y = given[0], given[1], given[4], given[-1]

    def prepare(config):
        launches, x_at, w_at, rest = _launches_many(config, grad, values, t_crow, None, y, True, "none")
        table, absent = Derived("bsr schedule", _schedule), (None,) * 6

        def call(grad, values, crow, col, t_crow, t_row, t_block, y):
            schedule, ready = table(t_crow, t_row)
            launches[ready](
                grad if x_at else None, grad, values if w_at else None, values, t_row, t_block, schedule, *absent, y,
                *rest,
            )  # fmt: skip

        return call

    return _pick_many(prepare, given, values.shape[:0:-1], len(values), 1, True)


def _pick_many(prepare, given, block, blocks, halves, transposed):
    x, y = given[0], given[-1]
    key = (x.dtype, y.shape[1], x.shape[1], *block, blocks.bit_length(), len(x).bit_length(), transposed)
    configs = _many_configs(*block, x.element_size(), exact(x.dtype)) + [TWO_LAUNCHES] * (halves - 1)
    return autotune.pick("bsr_many" if halves == 1 else "bsr_gated_many", key, configs, prepare, given)


def _launches_many(config, x, values, start, up, y, transposed, activation):
    """(launches, whether the copy engine fetches x, and the blocks, the integers that end the arguments)."""
    (tokens, inputs), outputs, block_rows = x.shape, y.shape[1], start.numel() - 1
    bh, bw = values.shape[:0:-1] if transposed else values.shape[1:]
    bo, bt, bk = config["BO"], config["BT"], config["BK"]
    described = _described(x, values, bt, bk, [bk, bo] if transposed else [bo, bk]) if bw % bk == 0 else {}
    if up is not None:  # a load in a branch is not pipelined, so that the weight of a half is a chosen pointer
        described.pop(2, None)
    launches = table_launches(
        block_gemm, (block_rows * triton.cdiv(bh, bo) * triton.cdiv(tokens, bt),), described, BH=bh, BW=bw,
        TRANSPOSED=transposed, WIDE=wide(x, y), ACTIVATION=activation, PRECISION=precision(x.dtype), **overlap(x),
        **config,
    )  # fmt: skip
    return launches, 0 in described, 2 in described, (tokens, inputs, outputs, block_rows, *x.stride())


def _prepare_few(*given, activation):
    """``given``: x, values, crow, col, bias, gate, the same four of an up weight, y."""
    x, values, crow, up, y = *given[:3], given[6], given[-1]
    (blocks, bh, bw), block_rows, halves = values.shape, crow.numel() - 1, 1 if up is None else 2
    blocks += 0 if up is None else len(up)
    width = 1 if len(x) == 1 else power_of_two(len(x), 16, FEW)

    def prepare(config):
        if config == TWO_LAUNCHES:
            return in_two_launches(_prepare_few, given, activation)
        return _launch_few(config, width, blocks, x, values, block_rows, y.shape[1], activation, halves)

    key = (x.dtype, y.shape[1], x.shape[1], bh, bw, blocks.bit_length(), width)
    configs = _few_configs(bh, bw, block_rows, blocks, width, backend.multiprocessors(x))
    configs += [TWO_LAUNCHES] * (halves - 1)
    return autotune.pick("bsr_few" if halves == 1 else "bsr_gated_few", key, configs, prepare, given)


def _launch_few(config, width, blocks, x, values, block_rows, outputs, activation, halves):
    (tokens, inputs), strides, (_, bh, bw) = x.shape, x.stride(), values.shape
    constants, rows = dict(config), config["BO"]
    most, depth = constants.pop("C"), constants["BK"]
    sub, programs = triton.cdiv(bh, rows), _most_programs(block_rows, blocks, bw, depth, most, halves)
    tiles, shares, size = block_rows * sub, programs * sub, halves * rows * width
    table = Derived(f"bsr shares {programs} {most} {depth} {bw}", functools.partial(_shares, programs, most, depth, bw))
    launches = table_launches(
        few_tokens, (shares,), BH=bh, BW=bw, BT=width, SPLIT=shares > tiles, STAGES=config["num_stages"],
        ACTIVATION=activation, PRECISION=precision(x.dtype), **overlap(x), **constants,
    )  # fmt: skip

    def call(x, values, crow, col, bias, gate, up, up_crow, up_col, up_bias, y):
        shared, ready = table(crow, col) if up is None else table(crow, col, up_crow, up_col)
        partial = workspace.take(x, tiles, shares, size)
        launches[ready](
            x, values, col, bias, gate, up, up_col, up_bias, shared, y, *partial, tokens, inputs, outputs, *strides
        )

    return call


def _check(x, weight, outputs, inputs):
    values, crow, _ = weight
    _check_blocks(x, values, outputs, crow, values.shape[1])


def _check_blocks(x, values, features, start, side):
    if x.dtype != values.dtype:
        raise TypeError(f"Expected x and values of one dtype, got {x.dtype} and {values.dtype}.")
    expected, got = -(-features // side), start.numel() - 1
    if got != expected:
        raise ValueError(f"Expected {expected} block rows of side {side} for {features} features, got {got}.")


def _facts(stored, up, numbers):
    blocks, bh, bw = stored[0].shape
    if up is not None:
        if up[0].shape[1:] != stored[0].shape[1:]:
            shapes = f"{bh}x{bw} and {up[0].shape[1]}x{up[0].shape[2]}"
            raise ValueError(f"Expected blocks of one shape in one gated product, got {shapes}.")
        blocks = (blocks + len(up[0]) + 1) // 2
    return {"bh": bh, "bw": bw, "blocks": blocks}


def _arrange(x, variant=None):
    """x (*, I) as the kernels read it: rows without gaps; or columns, where each thread multiplies for itself and reads
    along the tokens."""
    tokens = x.shape[:-1].numel()
    if not exact(x.dtype) or tokens <= 1:
        return matrix_of(x)
    turn = transpose.prepared(x, transpose.padded(tokens))
    return lambda x: turn(x).T[:tokens]


def _launch(variant, x, *parts, activation):
    return (_prepare_few if variant == "few" else _prepare_many)(x, *parts, activation=activation)


@operator(
    "gpu_bsr_grad_input(Tensor grad, Tensor values, Tensor crow, Tensor col, Tensor t_crow, Tensor t_row,"
    " Tensor t_block, int in_features) -> Tensor",
    lambda grad, *rest: (*grad.shape[:-1], rest[-1]),
    strided=("grad",),
    choose=choose_grad_input,
)
def linear_grad_input(grad, values, crow, col, t_crow, t_row, t_block, in_features, variant=None):
    """grad (*, O) -> grad @ W, (*, I), by the blocks of each block column."""
    (blocks, bh, bw), outputs, shape = values.shape, grad.shape[-1], (*grad.shape[:-1], in_features)
    _check_blocks(grad, values, in_features, t_crow, bw)
    tokens = grad.shape[:-1].numel()
    if variant is None:
        variant, _ = choose_grad_input(tokens, outputs, in_features, grad.dtype, bh=bh, bw=bw, blocks=blocks)
    if variant == "empty":
        return lambda grad, *parts: grad.new_empty(shape)
    if variant == "expand":
        dense = expand.prepare(values, crow, col, out_features=outputs, in_features=in_features)
        return lambda grad, values, crow, col, *rest: torch.matmul(grad, dense(values, crow, col))
    arrange, y = _arrange(grad), grad.new_empty(tokens, in_features)
    flat = grad if arrange is None else arrange(grad)
    launch = _prepare_transposed(flat, values, crow, col, t_crow, t_row, t_block, y)
    return into_new(launch, grad, shape, arrange=arrange)


linear = Linear(
    Layout(
        "bsr",
        stored="Tensor values, Tensor crow, Tensor col",
        numbers="",
        check=_check,
        choose=choose,
        facts=_facts,
        expand=expand,
        arrange=_arrange,
        launch=_launch,
        dual=True,
    )
)
gated_linear = linear.gated
